"""Releases that are broken, through the commands: one line, nothing left."""

import contextlib
import functools
import io
import json
import pathlib
import runpy
import shutil

import pytest

from experiments import convert, tokenizer

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'
SHARD = 'model-0000{}-of-00003.safetensors'
INDEX = 'model.safetensors.index.json'


def header(path, change):
  """Writes a file's header again after `change(entries)`."""
  content = path.read_bytes()
  size = int.from_bytes(content[:8], 'little')
  entries = json.loads(content[8 : 8 + size])
  change(entries)
  text = json.dumps(entries).encode()
  path.write_bytes(len(text).to_bytes(8, 'little') + text + content[8 + size :])


def turned(ending):
  """Swaps rows and columns of the first such matrix that is not square."""

  def change(entries):
    for name, entry in entries.items():
      shape = entry.get('shape', [])
      if name.endswith(ending) and len(shape) == 2 and shape[0] != shape[1]:
        entry['shape'] = shape[::-1]
        return

  return lambda folder: [
    header(folder / SHARD.format(n), change) for n in (1, 2, 3)
  ]


def places(change):
  """Changes the index's map from tensors to files."""

  def apply(folder):
    values = json.loads((folder / INDEX).read_text())
    change(folder, values['weight_map'])
    (folder / INDEX).write_text(json.dumps(values))

  return apply


def twice(folder, shard_of):
  """Places a tensor in a second shard that is a copy of the first."""
  shutil.copy(folder / SHARD.format(1), folder / 'model-4.safetensors')
  shard_of[next(iter(shard_of))] = 'model-4.safetensors'


def shorten(folder):
  path = folder / SHARD.format(2)
  path.write_bytes(path.read_bytes()[:-1])


def long_header(folder):
  path = folder / SHARD.format(2)
  path.write_bytes((2**40).to_bytes(8, 'little') + path.read_bytes()[8:])


FAULTS = {
  'a shard is missing': (
    lambda folder: (folder / SHARD.format(2)).unlink(),
    'shards are missing: model-00002-of',
  ),
  'an index names other files': (
    places(lambda _, m: m.update({next(iter(m)): 'other.safetensors'})),
    'shards are missing: other.safetensors',
  ),
  'a tensor is in two shards': (places(twice), 'more than one shard holds'),
  'a weight is turned': (turned('_proj.weight'), 'by config.json it must'),
  'scales are turned': (turned('weight_scale_inv'), 'by config.json it must'),
  'a file is truncated': (shorten, 'truncated or incomplete'),
  'a header is longer than its file': (
    long_header,
    'a header of 1099511627776',
  ),
  'tensors of another family': (
    lambda folder: shutil.copy(GOLDEN / 'v2_lite/config.json', folder),
    'must have [259, 96]',
  ),
}
COMMANDS = {
  'convert': ('--source={}', '--target={}/../out', '--config=tiny:smoke'),
  'generate': ('--checkpoint={}', '--prompt=hi', '--tokenizer=byte'),
  'serve': ('--checkpoint={}', '--tokenizer=byte', '--port=0'),
  'inspect': ('{}',),
}


@pytest.mark.parametrize('command', COMMANDS)
@pytest.mark.parametrize('fault', FAULTS)
def test_a_broken_release_is_one_line(fault, command, tmp_path, call):
  folder = tmp_path / 'release'
  shutil.copytree(GOLDEN / 'v3_release', folder)
  change, line = FAULTS[fault]
  change(folder)
  words = (word.format(folder) for word in COMMANDS[command])
  code, out, error = call(command, *words)
  assert code == 2, out + error
  assert error.startswith('error: ') and error.count('\n') == 1
  assert line in error, error
  assert [path.name for path in tmp_path.iterdir()] == ['release']


@pytest.mark.parametrize(
  ('command', 'fault'),
  [
    *(('train', fault) for fault in FAULTS),
    ('sft', 'a weight is turned'),
    *(
      pytest.param('sft', fault, marks=pytest.mark.slow)
      for fault in FAULTS
      if fault != 'a weight is turned'
    ),
  ],
)
def test_a_broken_release_begins_no_run(fault, command, tmp_path, call):
  """The folder stays free: the same words begin a run once it is whole."""
  folder, run = tmp_path / 'release', tmp_path / 'run'
  shutil.copytree(GOLDEN / 'v3_release', folder)
  change, line = FAULTS[fault]
  change(folder)
  (tmp_path / 'text.txt').write_text('a line of text\n' * 99)
  rows = [{'prompt': f'{i}', 'completion': 'b' * 9} for i in range(99)]
  (tmp_path / 'rows.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  words = ('--config=tiny:micro', f'--init={folder}', f'--workdir={run}')
  own = [f'--config.data.source={tmp_path}/text.txt']
  if command == 'sft':
    own = [f'--data={tmp_path}/rows.jsonl', '--config.data.fim_rate=0']
    own += ['--config.data.packing=separate', '--config.data.tokenizer=byte']
  code, out, error = call(command, *words, *own)
  assert code == 2, out + error
  assert error.startswith('error: ') and error.count('\n') == 1
  assert line in error, error
  assert 'Begins from' not in out
  files = {str(p.relative_to(run)) for p in run.rglob('*') if p.is_file()}
  assert not [x for x in files if 'init.json' in x or 'checkpoints/' in x], (
    files
  )


def test_another_tokenizer_than_the_release_s_is_no_secret(tmp_path, call):
  """tekken.json is refused, but for a recipe that names a file in its place."""
  folder, out = tmp_path / 'release', io.StringIO()
  shutil.copytree(GOLDEN / 'families' / 'large3', folder)
  take = functools.partial(convert._tokenizer, folder, tmp_path / 'run', [])
  with contextlib.redirect_stdout(out):
    assert take('byte') == 'byte'
    (folder / 'tekken.json').write_text('{}')
    assert take('/own.json') == '/own.json'
  first, second = out.getvalue().splitlines()
  line = f'WARNING: {folder}: has no tokenizer.json or tiktoken.model; the '
  line += "tokenizer is the recipe's, --config.data.tokenizer="
  assert first == f'{line}byte.' and second == f'{line}/own.json.'
  words = (
    f'--source={folder}',
    f'--target={tmp_path}/run',
    '--config=tiny:smoke',
  )
  code, _, error = call('convert', *words)
  assert code == 2 and error.count('\n') == 1
  assert 'tekken.json: is not read; use the tokenizer.json' in error
  assert [path.name for path in tmp_path.iterdir()] == ['release']


def test_a_run_that_moves_takes_a_tiktoken_model_with_it(tmp_path, call):
  """With --force, no file of the tokenizer before it stays beside it."""
  folder, run = tmp_path / 'release', tmp_path / 'run'
  shutil.copytree(GOLDEN / 'families' / 'youtu', folder)
  words = f'--source={folder}', f'--target={run}', '--config=tiny:smoke'
  for name in ('tokenizer.json', 'tiktoken.model'):
    (folder / name).write_bytes(tokenizer.byte_tokenizer())
    code, out, error = call('convert', *words, '--force')
    assert code == 0 and 'WARNING' not in out, out + error
    assert [path.name for path in (run / 'huggingface').iterdir()] == [name]
    (folder / name).unlink()
  moved = run.rename(tmp_path / 'moved')
  config = runpy.run_path(str(moved / 'config.py'))['get_config']()
  own = moved / 'huggingface' / 'tiktoken.model'
  assert config.data.tokenizer == str(own)
