"""The reading path is as short as the README says, and functions stay short.

A file that the training step imports is either on the path or left out for a
named reason: no line hides. `python tests/test_reading.py` writes the counts
into README.md and docs/reading.md.
"""

import ast
import functools
import pathlib
import re

import pytest
import syntax

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / 'mla_moe'
# In the order of reading, as docs/reading.md has it.
PATH = (
  *('types', 'config'),
  *('model/rope', 'model/attention', 'model/products', 'model/weights'),
  *('model/mla', 'model/layers', 'model/router', 'model/dispatch'),
  *('model/experts', 'model/moe', 'model/block', 'model/mtp'),
  *('model/transformer', 'train/losses', 'train/optim', 'train/state'),
  'train/step',
)
# Imported by the path, and not read by a person with one device in bf16.
LEFT_OUT = {
  'a mesh': {
    *('sharding', 'model/collectives', 'model/embedding', 'model/exchange'),
    *('model/pipeline', 'model/sequence'),
  },
  'FP8': {
    *('fp8/__init__', 'fp8/gemm', 'fp8/grouped', 'fp8/linear', 'fp8/quantize'),
    *('fp8/recipe', 'kernels/block_gpu', 'kernels/block_tpu'),
  },
  'loops of CPU and GPU': {'model/expert_loop', 'model/flash'},
  'refusals of a config': {'checked'},
  'routing replay': {'model/replay'},
  "a tokenizer's ids": {'files', 'vocabulary'},
  'numbers of the loop, of reinforcement and of use': {
    *('run_config', 'rl_config', 'use_config', 'data_config'),
  },
  'sparse attention, which V3 does not have': {
    *('dsa_config', 'model/indexer', 'model/sparse', 'train/stage'),
  },
  'baselines that papers compare with': {'model/gqa'},
}
MOE = ('model/router', 'model/moe', 'model/experts', 'model/dispatch')
MLA = ('model/mla', 'model/rope', 'model/attention', 'model/products')
LIMITS = {'path': (PATH, 3100), 'moe': (MOE, 600), 'mla': (MLA, 550)}
# Words that say nothing of a thing (CONTRIBUTING.md).
NOT_NAMES = set(
  'how every held eight found written told asked fallen dog aside passed saved '
  'kept given made also'.split()
)
PAGES = (ROOT / 'README.md', ROOT / 'docs' / 'reading.md')
# A row of their tables: the files, and the number of their lines.
ROW = re.compile(
  r'^\| (.*?`\w.*?\.py`|.*?reading path.*?) \| ([\d,]+) \|', re.M
)
# The same in a sentence or a cell: "`model/flash.py` (248 lines)".
GROUPS = {
  'reading path': PATH,
  'layer on one device': MOE,
  'loop of CPU and GPU': ('model/expert_loop',),
  'exchange': ('model/exchange', 'model/collectives'),
}
PROSE = re.compile(
  rf'(`[\w/]+\.py`|{"|".join(GROUPS)})(\S*\s)\(([\d,]+) lines\)'
)


def lines(name):
  """The number of lines of a module, by its path below mla_moe."""
  return len((PACKAGE / f'{name}.py').read_text().splitlines())


def imports(name):
  """Modules of mla_moe that a module imports, at any depth, as paths."""
  for node in ast.walk(syntax.tree(PACKAGE / f'{name}.py')):
    if isinstance(node, ast.ImportFrom):
      module = (node.module or '').split('.')
      if module[0] == 'mla_moe':
        for alias in node.names:
          yield from _existing('/'.join([*module[1:], alias.name]))
          yield from _existing('/'.join(module[1:]))


def _existing(name):
  for file in (name, f'{name}/__init__'):
    if (PACKAGE / f'{file}.py').exists() and file != '/__init__':
      yield file


def closure(name):
  """The module and everything that it imports."""
  modules, ahead = set(), [name]
  while ahead:
    module = ahead.pop()
    if module not in modules:
      modules.add(module)
      ahead += imports(module)
  return modules


@functools.cache
def nodes():
  """(file, node) of every node of the package's and the programs' syntax."""
  return [
    (name, node)
    for folder in ('mla_moe', 'experiments')
    for path in (ROOT / folder).rglob('*.py')
    for name in [str(path.relative_to(ROOT))]
    for node in ast.walk(syntax.tree(path))
  ]


def functions():
  """(length, file, name) of every function."""
  for path, node in nodes():
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
      yield node.end_lineno - node.lineno + 1, path, node.name


def bindings(node):
  """Names that a node gives to a variable, parameter, attribute or import."""
  if isinstance(node, ast.Name | ast.Attribute):
    if isinstance(node.ctx, ast.Store):
      yield getattr(node, 'id', None) or node.attr
  elif isinstance(node, ast.arg):
    yield node.arg
  elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
    yield node.name
  elif isinstance(node, ast.alias):
    yield node.asname or ''


def is_no_name(name):
  return name.strip('_') in NOT_NAMES or name.endswith('_lib')


def test_names_are_nouns_of_the_field():
  source = 'import a_lib as b_lib\nhow = 1\ndef f(every): self.dog = 2'
  wrong = [n for node in ast.walk(ast.parse(source)) for n in bindings(node)]
  assert sorted(filter(is_no_name, wrong)) == ['b_lib', 'dog', 'every', 'how']
  bad = [
    f'{path}:{node.lineno}: {name}'
    for path, node in nodes()
    for name in bindings(node)
    if is_no_name(name)
  ]
  assert not bad, bad


def test_docstrings_begin_with_a_noun_or_a_verb():
  bad, count = [], 0
  for path, node in nodes():
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
      text = ast.get_docstring(node) or ''
      count += bool(text)
      if re.match(r'(what|who)(so)?(ever)?\b', text, re.I):
        bad.append(f'{path}: {text.splitlines()[0]}')
  assert count >= 500
  assert not bad, bad


def test_a_file_is_on_the_path_or_left_out_for_a_reason():
  packages = {f'{p.name}/__init__' for p in PACKAGE.iterdir() if p.is_dir()}
  imported = closure('train/step') - (packages - {'fp8/__init__'})
  left_out = set().union(*LEFT_OUT.values())
  assert imported == set(PATH) | left_out


@pytest.mark.parametrize('name', LIMITS)
def test_a_path_is_short(name):
  modules, limit = LIMITS[name]
  assert sum(map(lines, modules)) <= limit


def test_the_package_is_small():
  assert sum(
    len(p.read_text().splitlines()) for p in PACKAGE.rglob('*.py')
  ) <= (14_000)


def test_functions_are_short():
  long = [f for f in functions() if f[0] > 60]
  assert max(long, default=(0,))[0] <= 80
  assert len(long) <= 8, sorted(long)


@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.name)
def test_quoted_counts_are_true(page):
  """Within two in a hundred, so that a line more changes no page."""
  text = page.read_text()
  rows = ROW.findall(text) + [(p[0], p[2]) for p in PROSE.findall(text)]
  assert len([cell for cell, _ in rows if 'reading path' in cell]) >= 2
  assert text.count(' lines)') == len(PROSE.findall(text))
  for cell, quoted in rows:
    count = sum(map(lines, modules(cell)))
    assert abs(int(quoted.replace(',', '')) - count) <= 0.02 * count + 3, cell


def test_the_page_has_the_path_in_its_order():
  table = (ROOT / 'docs' / 'reading.md').read_text().split('\n## ')[1]
  cells = [cell for cell, _ in ROW.findall(table) if 'reading path' not in cell]
  assert tuple(name for cell in cells for name in modules(cell)) == PATH


def modules(cell):
  """Modules that a table's cell names, by their paths below mla_moe."""
  for group, names in GROUPS.items():
    if group in re.sub('`.*?`', '', cell):
      return names
  return re.findall(r'`([\w/]+)\.py`', cell)


def recount(row):
  """The row with the number of lines of its modules."""
  return f'| {row[1]} | {sum(map(lines, modules(row[1]))):,} |'


def recount_prose(words):
  """The words of a sentence, likewise."""
  count = sum(map(lines, modules(words[1])))
  return f'{words[1]}{words[2]}({count:,} lines)'


if __name__ == '__main__':
  for page in PAGES:
    text = ROW.sub(recount, page.read_text())
    page.write_text(PROSE.sub(recount_prose, text))
