"""The source calls nothing dangerous; the fault matrix names real tests."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
FOLDERS = ('mla_moe', 'experiments', 'configs', 'notebooks')
FILES = [
  *(p for name in FOLDERS for p in sorted((ROOT / name).glob('**/*.py'))),
  ROOT / 'setup.py',
]
MODULES = {
  *('pickle', 'cPickle', 'cloudpickle', 'dill', 'shelve', 'marshal', 'joblib'),
  *('jsonpickle', 'telnetlib', 'xmlrpc'),
}
CALLS = {
  *('eval', 'exec', 'compile', '__import__', 'breakpoint'),
  *('os.system', 'os.popen', 'torch.load', 'numpy.load', 'np.load'),
  *('yaml.load', 'yaml.unsafe_load', 'pty.spawn'),
  *('tempfile.mktemp', 'jax.profiler.start_server', 'runpy.run_path'),
}


def dotted(node):
  """'a.b.c' of the expression, or ''."""
  if isinstance(node, ast.Attribute):
    before = dotted(node.value)
    return f'{before}.{node.attr}' if before else ''
  return node.id if isinstance(node, ast.Name) else ''


def dangers(text):
  """Yields (line, construct) of each dangerous construct in the source."""
  for node in ast.walk(ast.parse(text)):
    names = []
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      names = [f'{node.module}.{alias.name}' for alias in node.names]
    for name in names:
      if MODULES & set(name.split('.')) or 'serialize_executable' in name:
        yield node.lineno, f'import {name}'
    if not isinstance(node, ast.Call):
      continue
    name = dotted(node.func)
    keywords = {k.arg: k.value for k in node.keywords}
    loads = name in ('np.load', 'numpy.load') and _is(
      keywords.get('allow_pickle'), False
    )
    if name in CALLS and not loads:
      yield node.lineno, name
    for word, good in (
      ('shell', False),
      ('allow_pickle', False),
      ('trust_remote_code', False),
      ('weights_only', True),
    ):
      if word in keywords and not _is(keywords[word], good):
        yield node.lineno, f'{name}({word}=...)'
    if _is(keywords.get('host'), '0.0.0.0'):
      yield node.lineno, f'{name} listens to everyone'


def _is(node, value):
  return isinstance(node, ast.Constant) and node.value == value


@pytest.mark.parametrize('path', FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_dangerous_is_called(path):
  assert list(dangers(path.read_text())) == []


@pytest.mark.parametrize(
  'text',
  [
    'import pickle',
    'from numpy.lib import pickle',
    'from jax.experimental import serialize_executable',
    'eval("1")',
    'torch.load("x")',
    'np.load("x")',
    'np.load("x", allow_pickle=True)',
    'subprocess.run("ls", shell=True)',
    'subprocess.run("ls", shell=anything)',
    'f(trust_remote_code=flag)',
    'serve(host="0.0.0.0")',
    'jax.profiler.start_server(9999)',
  ],
)
def test_each_danger_is_seen(text):
  assert len({line for line, _ in dangers(text)}) == 1
  assert not list(dangers('np.load("x", allow_pickle=False); re.compile("x")'))


def test_the_fault_matrix_names_tests_that_exist():
  text = (ROOT / 'docs/reliability.md').read_text()
  rows = re.findall(r'^\| (\d+) \| .* \| (.*) \|$', text, re.M)
  numbers = [int(number) for number, _ in rows]
  assert numbers == list(range(1, 51))
  for number, tests in rows:
    named = re.findall(r'`(test_\w+\.py)::(test_\w+)`', tests)
    words = {f'{number:0>2}', f'row{number:0>2}'}
    assert any(words & set(name.split('_')) for _, name in named), number
    for file, name in named:
      (path,) = (ROOT / 'tests').glob(f'**/{file}')
      source = path.read_text()
      assert f'\ndef {name}(' in source, f'row {number}: {name}'
