"""Paths of programs: ~ is a home, a URL is refused, a moved one is the same."""

import ast
import dataclasses
import functools
import pathlib
import shutil
import sys

import pytest
import syntax
from absl import flags

from experiments import cli, run_tokenizer, tokenizer, train, workdir
from experiments.data import remote
from experiments.training import warm_start
from mla_moe.config import ConfigError, freeze

# Of ml_collections.
pytestmark = pytest.mark.filterwarnings('ignore:the load_module')

FOLDER = pathlib.Path(cli.__file__).parent
# Flags of text that are no paths, of all programs.
WORDS = {'topology', 'mesh', 'system', 'task', 'prompt', 'host', 'name'}
WORDS |= {
  'field',
  'shard',
  'profile',
  'vary',
  'only',
  'config',
  'suffix',
  'prefix',
}
PATHS = {'workdir', 'init', 'data', 'out', 'checkpoint', 'tokenizer', 'include'}
PATHS |= {'chat_template', 'source', 'target'}
URLS = ('gs://b/x', 's3://b/x', 'hf://datasets/x', 'https://x.org/y')


@functools.cache
def calls():
  """Returns (function, first argument, call) of the programs' calls."""
  return [*_calls()]


def _calls():
  for path in FOLDER.rglob('*.py'):
    for node in ast.walk(syntax.tree(path)):
      if isinstance(node, ast.Call) and node.args:
        name = getattr(node.func, 'attr', getattr(node.func, 'id', ''))
        yield name, getattr(node.args[0], 'value', None), node


def test_each_flag_of_text_is_a_path_or_known_to_be_none():
  paths = {first for name, first, _ in calls() if name == 'define_path'}
  assert paths == PATHS
  words = {first for name, first, _ in calls() if name == 'DEFINE_string'}
  assert words <= WORDS, words - WORDS
  for name, first, call in calls():
    if name in ('add_argument', 'add'):
      kinds = {k.arg: ast.unparse(k.value) for k in call.keywords}
      assert 'Path' not in kinds.get('type', ''), first  # it loses a URL's //
    assert name != 'expanduser' or first is None


@pytest.mark.parametrize('flag', ['workdir', 'init'])
def test_a_path_of_a_flag_begins_at_home(flag, monkeypatch):
  monkeypatch.setenv('HOME', '/home/somebody')
  values = flags.FlagValues()
  words = ['', f'--{flag}=~/runs/x']
  train.define(values, words)
  values(words)
  assert values[flag].value == '/home/somebody/runs/x'
  for url in URLS[1:]:  # a run lies in gs://
    with pytest.raises(ConfigError, match='://.* is not supported') as error:
      cli.config_of([f'--{flag}={url}'], train.define)
    assert f'--{flag}={url!r}' in str(error.value)
    assert '\n' not in str(error.value)


def test_a_path_anywhere_else_is_checked_the_same_way(call, tmp_path):
  with pytest.raises(ConfigError, match='no such user'):
    cli.path('--out', '~nobody-of-this-name/x')
  for program, *words in (
    ('report', 's3://b/x'),
    ('generate', '--checkpoint=s3://b/x'),
    ('convert', '--source=tiny', '--target=gs://b/x'),
    ('profile', 'gs://b/x'),
    ('checkpoint', 'ls', 's3://b/x'),
    ('sweep', '--vary=data.seed=1', '--workdir=s3://b/x'),
    ('tokenizer', 'https://b/x', f'--out={tmp_path}/x'),
  ):
    code, _, error = call(program, *words)
    assert code == 2 and error.count('\n') == 1
    url = next(w for w in words if '://' in w).rpartition('=')[2]
    assert f'={url!r}: {url[:-3]} is not supported' in error


@pytest.mark.parametrize('url', URLS)
def test_a_path_of_a_config_is_none_of_another_machine(url, tmp_path):
  """On the command line, and for a run in code before its folder is made."""
  rows = {
    'data.sources': f'(("{url}",1.0,"a"),)',
    'data.validation': f'(("{url}","a"),)',
    'rl.teachers': f'(("{url}",1.0),)',
  }
  keys = ('data.source', 'data.sources', 'data.validation')
  keys += ('data.tokenizer', 'rl.task', 'rl.teachers')
  for key in keys[3 * remote.is_remote(url) :]:
    value = rows.get(key, url)
    flag = f'--config.{key}={value}'
    with pytest.raises(ConfigError, match=f'{key}={url!r}: .* not supported'):
      cli.config_of(['--config=r1_tiny:distil', flag], cli.define)
  config = freeze({'data': {'tokenizer': url}})
  with pytest.raises(ConfigError, match='data.tokenizer=.* not supported'):
    train.run(config, tmp_path / 'run')
  if not url.startswith('gs:'):
    with pytest.raises(ConfigError, match='workdir=.* not supported'):
      train.run(freeze({}), url)
    with pytest.raises(ConfigError, match='init=.* not supported'):
      train.run(freeze({}), tmp_path / 'run', train.Options(init=url))
  assert not (tmp_path / 'run').exists()


def test_a_run_in_a_bucket_needs_the_extra(call, monkeypatch):
  monkeypatch.setitem(sys.modules, 'gcsfs', None)  # it is not installed
  for program, *words in (
    ('train', '--config=tiny', '--workdir=gs://b/x'),
    ('train', '--config=tiny', '--workdir=gs://b/x', '--replay=1'),
    *(('checkpoint', word, 'gs://b/x') for word in ('ls', 'verify', 'rm')),
    ('report', 'gs://b/x'),
    ('generate', '--checkpoint=gs://b/x', '--prompt=a'),
    ('convert', '--source=gs://b/x', '--target=x'),
  ):
    code, _, error = call(program, *words)
    assert code == 2 and error.count('\n') == 1, error
    assert 'pip install "mla_moe[gcs]"' in error


def test_each_path_of_a_config_is_known():
  """A field of text or of pairs is checked by `cli`, or is no path."""
  config = freeze({})
  fields = {
    f'{group}.{field.name}'
    for group in ('data', 'rl', 'run')
    for field in dataclasses.fields(getattr(config, group))
    if str(field.type) in ('str', 'tuple')
  }
  no_paths = {'rl.rewards', 'data.phases', 'data.field'}
  paths = {'data.source', 'data.tokenizer', 'rl.task', 'rl.teachers'}
  paths |= {'data.sources', 'data.validation', 'run.base'}
  assert fields == paths | no_paths


@pytest.fixture(scope='module')
def words(tmp_path_factory):
  """Folders of two tokenizers, the first with a template."""
  pytest.importorskip('tokenizers')
  root = tmp_path_factory.mktemp('words')
  for name in ('one', 'two'):
    tokenizer.write(root / name, [name * 9], tokenizer.LEAST + 2)
  (root / 'one' / 'chat_template.jinja').write_text('{{ messages }}')
  return root


def config_of(path):
  return freeze({'data': {'tokenizer': str(path), 'source': 'text'}})


def test_a_run_reads_its_own_tokenizer_wherever_it_lies(words, tmp_path):
  run, moved = tmp_path / 'run', tmp_path / 'moved'
  shutil.copytree(words / 'one', tmp_path / 'one')
  config = config_of(tmp_path / 'one')
  with workdir.claim(run, config):
    (run / 'metrics.jsonl').write_text('{"step": 1}\n')
  own = {p.name: p.read_bytes() for p in (run / 'huggingface').iterdir()}
  assert own == {p.name: p.read_bytes() for p in (words / 'one').iterdir()}
  run.rename(moved)
  shutil.rmtree(tmp_path / 'one')
  copy = str(moved / 'huggingface' / 'tokenizer.json')
  assert workdir.read_config(moved).data.tokenizer == copy
  for path in (
    tmp_path / 'one',
    words / 'one',
    copy,
  ):  # gone, equal, its own
    named = dataclasses.replace(
      config, data=dataclasses.replace(config.data, tokenizer=str(path))
    )
    with workdir.claim(moved, named):
      assert run_tokenizer.resolved(moved, named).data.tokenizer == copy
  with pytest.raises(ConfigError, match='is not the one of this run'):
    with workdir.claim(moved, config_of(words / 'two')):
      pass
  assert run_tokenizer.path_of(moved, 'byte') == 'byte'


def test_a_run_that_has_not_begun_may_change_its_tokenizer(words, tmp_path):
  for name in ('one', 'two'):
    with workdir.claim(tmp_path, config_of(words / name)):
      pass
    own = tmp_path / 'huggingface'
    assert sorted(p.name for p in own.iterdir()) == sorted(
      p.name for p in (words / name).iterdir()
    )


def test_two_configs_that_differ_in_a_path_alone_are_one_run(tmp_path):
  base = freeze({})
  paths = {'source': '/elsewhere/text', 'tokenizer': '/elsewhere/words'}
  moved = dataclasses.replace(
    base, data=dataclasses.replace(base.data, **paths)
  )
  assert workdir.digest(moved) == workdir.digest(base)
  place = lambda path, weight: dataclasses.replace(
    base,
    data=dataclasses.replace(base.data, sources=((path, weight, 'a'),)),
  )
  assert workdir.digest(place('x', 1.0)) == workdir.digest(place('y', 1.0))
  assert workdir.digest(place('x', 1.0)) != workdir.digest(place('x', 2.0))
  # Numbers in tuples are equal as 3 and 3.0; older digests had their words.
  whole, real = place('x', 3), place('x', 3.0)
  assert whole == real and workdir.digest(whole) == workdir.digest(real)
  words = workdir._digest(whole, repr)
  assert words not in map(workdir.digest, (whole, real))
  assert not workdir.of_another(whole, words)
  # That of an older version has the paths, and is known while they stay.
  older = workdir._older_digest(moved)
  assert older != workdir.digest(moved)
  assert not workdir.of_another(moved, older)
  assert workdir.of_another(base, older)
  configs = [
    dataclasses.replace(base, rl=dataclasses.replace(base.rl, task=task))
    for task in ('a/q.jsonl', 'b/q.jsonl', 'sort8', '')
  ]
  assert len({workdir.digest(config) for config in configs}) == 3
  taught = [
    dataclasses.replace(base, rl=dataclasses.replace(base.rl, teachers=pairs))
    for pairs in ((('a', 0.5),), (('b', 0.5),), (('a', 1.0),))
  ]
  digests = [workdir.digest(config) for config in (*taught, base)]
  assert digests[0] == digests[1] and len(set(digests)) == 3
  with workdir.claim(tmp_path, configs[0]):
    (tmp_path / 'metrics.jsonl').write_text('{"step": 1}\n')
  with workdir.claim(tmp_path, configs[1]):
    pass
  for other in configs[2:]:
    with pytest.raises(ConfigError, match='another config'):
      with workdir.claim(tmp_path, other):
        pass


def test_an_origin_that_moved_is_the_same(tmp_path):
  run, theirs = tmp_path / 'run', tmp_path / 'theirs'
  for folder, content in ((theirs, '1'), (tmp_path / 'other', '2')):
    (folder / 'checkpoints' / '3').mkdir(parents=True)
    (folder / 'checkpoints' / '3' / 'seal.json').write_text(content)
  run.mkdir()
  text = f'{{"source": "{theirs}", "step": 3, "moments": true}}'
  (run / 'init.json').write_text(text)
  chosen = lambda x: warm_start.chosen(run, str(tmp_path / x), begun=True)
  shutil.copytree(theirs, tmp_path / 'copy')
  assert chosen('copy') == chosen('theirs') == warm_start.recorded(run)
  with pytest.raises(ConfigError, match='has begun, from'):
    chosen('other')
  theirs.rename(tmp_path / 'moved')
  assert chosen('moved') == warm_start.recorded(run)
