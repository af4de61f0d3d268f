"""The docs build without a warning; their commands run; their links exist."""

import ast
import functools
import importlib.util
import json
import pathlib
import re
import shlex
import subprocess
import urllib.parse

import children
import jax
import pytest
import syntax

import mla_moe
from configs import tiny
from mla_moe import sharding
from mla_moe.config import ConfigError, freeze

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / 'docs'
PAGES = [*sorted(DOCS.glob('*.md')), ROOT / 'CONTRIBUTING.md']
READER = ROOT / 'README.md'
# Options that a smoke run lacks: devices, texts, sizes of a large run.
DROPPED = (
  '--config.mesh.',
  '--config.data.micro_batch',
  '--config.data.source=gs',
)
# Steps of `tiny`, and the few steps of a smoke run in their place.
STEPS = {'400': '4', '--replay=201': '--replay=3'}
# The least with which a smoke run does each kind of its work; runs/tiny draws
# samples, with drafts.
WORK = {'steps': 4, 'save_every': 2, 'eval_every': 4, 'eval_batches': 1}
LEAST = {f'run.{name}': number for name, number in WORK.items()}
LEAST |= {'run.sample_every': 0, 'data.batch_size': 2, 'model.layers': 2}

# Files that a person has, and those of this repository in their place.
STANDINS = (
  ('data.tokenizer=Moonlight-16B-A3B', 'data.tokenizer=byte'),
  ('Moonlight-16B-A3B', 'runs/release'),  # as docs/checkpoints.md makes it
  ('my/texts', 'docs'),
  ('my/answers.jsonl', 'tests/golden/answers.jsonl'),
)


def _put_in(word, standin):
  return word.replace(*standin)


def commands():
  """Returns {command: page} of the documented commands, in their order."""
  pages = {}
  for page in [READER, *PAGES]:
    for block in re.findall(r'```sh\n(.*?)```', page.read_text(), re.S):
      for line in block.replace('\\\n', ' ').splitlines():
        if line.strip() and not line.startswith('#'):
          pages.setdefault(line, page.name)
  return pages


def _variant(config, words):
  """`micro`, of quick steps, but for runs with drafts or with an indexer."""
  is_tiny = config.endswith('tiny.py')
  whole = '/tiny', '/dense', '/warm', '/sparse'
  is_whole = any(word.endswith(whole) for word in words)
  return 'micro' if is_tiny and not is_whole else 'smoke'


def _least(config, words):
  """Options that make a smoke run small, but for those that `words` has."""
  least = dict(LEAST)
  if 'tiny' not in config:
    least['data.micro_batch'] = 1
  if words[-1].endswith('/tiny'):
    least['run.sample_every'] = 4
  if not any(word.endswith('/tiny') for word in words):
    least['model.mtp.depth'] = 0
  if any('/v3-4k' in word or '/v3-32k' in word for word in words):
    least['model.precision'] = 'bf16'  # the other commands of V3 are in FP8
  options = [f'--config.{name}={number}' for name, number in least.items()]
  fields = [word.partition('=')[0] for word in words]
  return [o for o in options if o.partition('=')[0] not in fields]


def smoke(line, folder):
  """Returns the command's words in a smoke variant, folders below `folder`."""
  words = shlex.split(line)
  assert words[:2] == ['python', '-m'], line
  words = [functools.reduce(_put_in, STANDINS, word) for word in words]
  words = [word.replace('runs/', f'{folder}/') for word in words]
  words = [STEPS.get(word, word) for word in words]
  trains = words[2] in (
    'experiments.train',
    'experiments.sft',
    'experiments.sweep',
    'experiments.convert',
  )
  if trains:
    words = [w for w in words if not w.startswith(DROPPED)]
    join = lambda w: w + (',' if ':' in w else ':') + _variant(w, words)
    words = [join(w) if w.startswith('--config=c') else w for w in words]
    config = next((w for w in words if w.startswith('--config=c')), '')
    if config.endswith('smoke'):
      words += _least(config, words)
  if words[2] == 'experiments.launch':
    assert '--dry-run' in words, line
    words.insert(words.index('--'), '--force')  # the clone may be at work
  return words[1:]


def chains():
  """Returns {name: commands}: those of shared folders in one, in their order.

  A command without a folder is with the others of its program.
  """
  chains = []
  for line in commands():
    words = smoke(line, 'runs')
    names = set(re.findall(r'runs/([\w-]+)', ' '.join(words)))
    names = names or {words[1].removeprefix('experiments.')}
    chain = [line]
    for others in [pair for pair in chains if pair[0] & names]:
      chains.remove(others)
      names, chain = others[0] | names, others[1] + chain
    chains.append((names, chain))
  return {min(names): chain for names, chain in chains}


def test_commands_of_a_folder_are_one_chain():
  both, order = chains(), [*commands()]
  assert sorted(sum(both.values(), [])) == sorted(order)
  assert len(order) >= 30 and len(both) >= 10
  for chain in both.values():
    assert chain == sorted(chain, key=order.index)
  (release,) = [x for x in both.values() if x[0].endswith('=runs/v3')]
  assert ' --fp8' in release[1] and 'moon/config.py' in release[-1]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings('default')
@pytest.mark.usefixtures('no_pictures')
@pytest.mark.parametrize('name', chains())
def test_every_documented_command_runs(name, tmp_path, call, monkeypatch):
  """In this process; so are the runs that a sweep starts."""

  started = subprocess.run

  def run_here(command, **options):
    if command[1] != '-m':
      return started(command, **options)
    code, *_ = call(command[2].removeprefix('experiments.'), *command[3:])
    return subprocess.CompletedProcess(command, code)

  monkeypatch.setattr(subprocess, 'run', run_here)
  for line in chains()[name]:
    _, program, *words = smoke(line, tmp_path)
    code, _, errors = call(program.removeprefix('experiments.'), *words)
    assert code == 0, f'{line}\n{errors[-2000:]}'
    if '.launch' in line:
      faults = errors.splitlines()
      assert all('commit' in fault for fault in faults), errors


@pytest.mark.slow
def test_launched_configs_fit_their_slices(call):
  """The plan's last line has the flags of the documented command."""
  launched = [c for c in commands() if '.launch' in c and '--topology' in c]
  assert len(launched) >= 4
  for line in launched:
    words = shlex.split(line)
    planned = ('--config', '--topology')
    words = [w for w in words if w.startswith(planned) and 'source' not in w]
    code, shown, errors = call('plan', *words)
    assert code == 0, f'{line}\n{errors}'
    last = shown.splitlines()[-1]
    assert last.startswith('To train it so: '), last
    flags = set(last.removeprefix('To train it so: ').split())
    assert flags <= set(words), f'{line}\n{last}'


@pytest.mark.skipif(
  any(
    importlib.util.find_spec(n) is None
    for n in ('sphinx', 'myst_parser', 'furo')
  ),
  reason='extra [docs]',
)
@pytest.mark.slow
def test_the_docs_build_with_warnings_as_errors(tmp_path):
  command = ['-m', 'sphinx', '-q', '-W', '--keep-going', '-b', 'html']
  done = children.run(*command, DOCS, tmp_path, timeout=200)
  assert done.returncode == 0, done.stderr[-4000:]
  assert 'train_step' in (tmp_path / 'api.html').read_text()


def test_the_sidebar_lists_each_page_once():
  trees = re.findall(
    r'```{toctree}\n(.*?)```', (DOCS / 'index.md').read_text(), re.S
  )
  listed = [page for tree in trees for page in tree.split('\n\n')[1].split()]
  pages = {page.stem for page in DOCS.glob('*.md')} - {'index'}
  assert sorted(listed) == sorted(pages)


@pytest.mark.parametrize('page', [*PAGES, READER], ids=lambda p: p.name)
def test_links_exist(page):
  """Offline: files of the repository and their anchors; hosts have a dot."""
  text = page.read_text()
  targets = re.findall(r'\]\(([^)\s]+)\)', text)
  assert len(targets) == text.count(']('), 'a link with a blank or no end'
  for target in targets:
    url = urllib.parse.urlsplit(target)
    if url.scheme:
      assert url.scheme == 'https' and '.' in url.netloc, target
      continue
    path, _, anchor = target.partition('#')
    other = page if not path else (page.parent / path)
    assert other.exists(), f'{page.name}: {target}'
    if anchor:
      titles = re.findall(r'^#+ (.*)$', other.read_text(), re.M)
      slugs = {
        re.sub(r'[^\w -]', '', t).lower().replace(' ', '-') for t in titles
      }
      assert anchor in slugs, f'{page.name}: {target}'


def test_named_files_exist():
  """Paths from the root, or from mla_moe as on the pages of the model."""
  names = set()
  for page in [*PAGES, READER]:
    for name in re.findall(r'`(\w+/[\w/.]+\.\w+)`', page.read_text()):
      names.add(name)
      paths = ROOT / name, ROOT / 'mla_moe' / name
      outside = name.startswith(('runs/', 'texts/', 'roles/'))
      assert outside or any(p.exists() for p in paths), f'{page.name}: {name}'
  assert len(names) >= 60


def printed(message):
  """Whether a string of the source says this, up to its values."""
  return any(message in text or p.search(message) for text, p in templates())


@functools.cache
def templates():
  """(text, pattern) of every long string of the package and programs.

  The text has no values of an f-string; the pattern lets each be anything.
  """
  pairs = []
  for folder in ('mla_moe', 'experiments'):
    for path in (ROOT / folder).glob('**/*.py'):
      for node in ast.walk(syntax.tree(path)):
        if not isinstance(node, ast.JoinedStr | ast.Constant):
          continue
        parts = getattr(node, 'values', [node])
        texts = [
          part.value if isinstance(part, ast.Constant) else None
          for part in parts
        ]
        if all(isinstance(t, str | None) for t in texts):
          text = '\0'.join(t for t in texts if t)
          pattern = ''.join('.*' if t is None else re.escape(t) for t in texts)
          if len(text) >= 16:
            pairs.append((text, re.compile(pattern)))
  return pairs


def test_quoted_messages_are_printed_by_the_source():
  text = (DOCS / 'troubleshooting.md').read_text()
  quoted = re.findall(r'^`(?:error: )?([^`]+)`(.*)\n: ', text, re.M)
  # Others' messages say from whom.
  quoted = [m for m, rest in quoted if not rest.startswith(' from')]
  assert len(quoted) >= 10
  for message in quoted:
    for piece in message.split('...'):
      assert printed(piece), piece
  assert not printed('the text was changed since step')
  assert not printed('config.model.topk: there is no such field; did you mean')


@pytest.mark.parametrize(
  'keys', [{'model.moe.top_k': 30}, {'mesh.data': 3}, {'mesh.fsdp': 2}], ids=str
)
def test_errors_of_a_config_are_quoted_to_the_letter(keys):
  values = tiny.get_config('')
  values.update_from_flattened_dict(keys)
  with pytest.raises(ConfigError) as refused:
    sharding.make_mesh(freeze(values).mesh, jax.devices()[:1])
  text = (DOCS / 'troubleshooting.md').read_text()
  assert f'`error: {refused.value}`' in text


def load(name):
  """A module of docs/, which is no package."""
  spec = importlib.util.spec_from_file_location(name, DOCS / f'{name}.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_the_architecture_picture_is_the_one_that_is_drawn():
  drawn = load('architecture').draw()
  assert drawn == (DOCS / '_static' / 'architecture.svg').read_text()


def test_the_run_picture_is_drawn_from_a_folder(tmp_path):
  pytest.importorskip('matplotlib')
  step = {'loss': 1.0, 'main_loss': 1.0, 'mtp_loss': 1.0, 'tokens': 8}
  step |= {'max_vio_layers': [1.0, 2.0], 'max_vio_running_layers': [1.0, 2.0]}
  evaluated = {'step': 6, 'bits_per_byte': 2.0, 'gzip_bits_per_byte': 2.1}
  metrics = [{'step': i} | step for i in (3, 6)] + [evaluated]
  loads = [{'step': i, 'load': [[1, 3], [2, 2]]} for i in (3, 6)]
  for name, rows in (('metrics', metrics), ('load', loads)):
    text = '\n'.join(json.dumps(row) for row in rows)
    (tmp_path / f'{name}.jsonl').write_text(text)
  config = {'model': {'layers': 2, 'dense_layers': 1}}
  (tmp_path / 'config.json').write_text(json.dumps(config))
  figure = load('run_picture').draw(tmp_path)
  titles = [plot.get_title(loc='center') for plot in figure.axes]
  assert titles[2:4] == ['MoE layer 1', 'MTP module']
  assert (DOCS / '_static' / 'run.png').stat().st_size <= 250_000


def test_the_api_page_has_every_public_module():
  """A page of Sphinx's own hooks: every file and folder of mla_moe is named."""
  package = ROOT / 'mla_moe'
  paths = [p for p in package.rglob('*.py') if not p.stem.startswith('_')]
  paths += [p.parent for p in package.glob('*/__init__.py')]
  expected = {
    '.'.join(p.relative_to(ROOT).with_suffix('').parts) for p in paths
  }
  source = [(DOCS / 'api.md').read_text()]
  load('conf').list_modules(None, 'api', source)
  rows = re.findall(r'^\| `(\w+)` \| [A-Z].*[^ ] \|$', source[0], re.M)
  assert rows == mla_moe.__all__ == sorted(rows)
  listed = re.findall(r'^\.\. automodule:: (\S+)$', source[0], re.M)
  assert len(listed) == len(set(listed))
  assert set(listed) == expected
