"""Converting refuses first, by one line, whatever it could not undo."""

import ast
import dataclasses
import errno
import json
import os

import chex
import pytest
from releases import GOLDEN

from configs import tiny
from experiments import cli, commands, convert, workdir
from experiments import tokenizer as tokenizer_program
from experiments.training import program
from mla_moe import load_huggingface, save_huggingface, vocabulary
from mla_moe.config import Config, ConfigError, RLConfig, freeze
from mla_moe.hf import settings


def run(folder):
  """Makes a run's folder with a step."""
  (folder / 'checkpoints' / '500').mkdir(parents=True)
  (folder / 'checkpoints' / '500' / 'x').write_text('state')
  (folder / 'config.json').write_text('{}')
  return folder


def refuse(source, target, words):
  with pytest.raises(ConfigError, match=words) as error:
    convert.to_run(source, target, Config(), force=True)
  assert '\n' not in str(error.value)
  assert (target / 'checkpoints' / '500' / 'x').read_text() == 'state'


def test_a_run_that_trains_is_not_replaced(tmp_path):
  target = run(tmp_path / 'run')
  with workdir.lock(target):
    refuse(GOLDEN / 'v2_lite', target, 'is writing to it')


def test_checkpoints_of_another_program_are_not_replaced(tmp_path):
  target = run(tmp_path / 'other')
  (target / 'config.json').unlink()
  refuse(GOLDEN / 'v2_lite', target, 'config.json: cannot be read')
  (target / 'config.json').write_text('{"hidden_size": 3}')
  refuse(GOLDEN / 'v2_lite', target, 'hidden_size')


def test_a_source_within_the_target_is_not_deleted(tmp_path):
  target = run(tmp_path / 'run')
  (target / 'release').mkdir()
  refuse(target / 'release', target, 'lies in the target')


@pytest.mark.slow
def test_a_run_to_reinforce_begins_with_its_reference(tmp_path, monkeypatch):
  """The state is what `experiments.rl` restores."""
  states = []
  keep = lambda _, config, state, __: states.append((config, state))
  monkeypatch.setattr(convert, '_write_run', keep)
  recipe = freeze(tiny.get_config('micro'))
  rl = RLConfig(task='sort8', beta=0.1, max_new=64)
  recipe = dataclasses.replace(recipe, rl=rl)
  convert.to_run(GOLDEN / 'v2_lite', tmp_path / 'run', recipe)
  ((config, state),) = states
  chex.assert_trees_all_equal_shapes_and_dtypes(
    state, program.state_shapes(config, None)
  )
  chex.assert_trees_all_equal(state.reference['params'], state.params)


def extras_of(folder, name, **ids):
  config = freeze({'data': {'tokenizer': name}, 'model': ids})
  return convert._extras(folder, config)


def test_the_tokenizer_of_an_export_is_the_one_of_the_run(tmp_path):
  words, mine = tmp_path / 'words', tmp_path / 'words' / 'bpe32k.json'
  words.mkdir()
  mine.write_text('mine')
  (words / 'tokenizer.json').write_text('another')
  ids = {'bos_id': 3, 'eos_id': 4}
  (words / 'chat_template.jinja').write_text("the other's")
  folder = tmp_path / 'run'
  both = {name: words / name for name in ('tokenizer.json',)}
  both['chat_template.jinja'] = words / 'chat_template.jinja'
  assert extras_of(folder, str(mine), **ids) == {'tokenizer.json': mine}
  assert extras_of(folder, str(words), **ids) == both
  assert extras_of(folder, str(words / 'tokenizer.json'), **ids) == both
  byte = extras_of(folder, 'byte')
  assert byte == {'tokenizer.json': tokenizer_program.byte_tokenizer()}
  assert extras_of(folder, 'byte', bos_id=0, eos_id=1) == {}
  (folder / 'huggingface').mkdir(parents=True)
  said = folder / 'huggingface' / 'generation_config.json'
  said.write_text('{}')
  extras = extras_of(folder, str(mine), **ids)
  assert extras == {'tokenizer.json': mine, said.name: said}


def test_a_tokenizer_beside_an_adapter_is_the_run_s(tmp_path, capsys):
  source, base = tmp_path / 'adapter', tmp_path / 'base'
  for folder, names in (
    (source, ('tokenizer_config.json',)),
    (
      base,
      ('tiktoken.model', 'tokenizer_config.json', 'special_tokens_map.json'),
    ),
  ):
    folder.mkdir()
    for name in names:
      (folder / name).write_text('{}')
  extras = convert._extras_of_adapter(source, base)
  assert {path.parent for path in extras.values()} == {base}
  assert not capsys.readouterr().out
  (source / 'tokenizer.json').write_text('{}')
  extras = convert._extras_of_adapter(source, base)
  assert 'tiktoken.model' not in extras
  for name in ('tokenizer.json', 'tokenizer_config.json'):
    assert extras[name] == source / name
  assert "tokenizer is the adapter's" in capsys.readouterr().out


def test_a_tokenizer_that_is_gone_is_told(tmp_path, capsys):
  assert extras_of(tmp_path, str(tmp_path / 'gone.json')) == {}
  assert 'gone.json' in capsys.readouterr().out


def test_config_py_is_a_module_without_a_path():
  """So no name of a folder can stand in its text, and it can be moved."""
  text = commands.typed(convert._CONFIG)
  assert '--config=DIR/config.py --workdir=DIR' in text
  assert [type(node) for node in ast.parse(text).body] == [
    *(ast.Expr, ast.Import, ast.Import),
    *([ast.ImportFrom] * 3),
    ast.FunctionDef,
  ]


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
  def full():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / 'x'))

  monkeypatch.setattr(convert, '_convert', full)
  with pytest.raises(cli.Stopped, match='ENOSPC; .*MiB are free') as error:
    convert.main()
  assert '\n' not in str(error.value)


def test_missing_settings_are_written_and_own_ones_are_carried(tmp_path):
  """What AutoTokenizer and vLLM begin, end and fill a text with."""
  words = tmp_path / 'words.json'
  content = json.loads(tokenizer_program.byte_tokenizer())
  names = (settings.PAD, settings.USER, settings.ASSISTANT)
  for index, name in enumerate(names, start=261):
    token = dict(content['added_tokens'][0], id=index, content=name)
    content['added_tokens'].append(token)
  words.write_text(json.dumps(content))
  config, variables = load_huggingface(GOLDEN / 'v2_lite')
  config = dataclasses.replace(config, bos_id=256, eos_id=257)
  save_huggingface(
    tmp_path / 'a', config, variables, extras={'tokenizer.json': words}
  )
  said = lambda folder, name: json.loads((tmp_path / folder / name).read_text())
  ids = {'bos_token_id': 256, 'eos_token_id': 257, 'pad_token_id': 261}
  assert said('a', 'generation_config.json') == ids
  values = said('a', 'tokenizer_config.json')
  assert values['bos_token'] == vocabulary.BOS
  assert values['eos_token'] == vocabulary.EOS
  assert values['pad_token'] == settings.PAD
  assert values['model_max_length'] == config.max_positions
  assert values['chat_template'] == settings.TEMPLATE
  own = tmp_path / 'a' / 'tokenizer_config.json'
  own.write_text('{"bos_token": "mine"}')
  save_huggingface(tmp_path / 'b', config, variables, extras=tmp_path / 'a')
  assert said('b', own.name) == {'bos_token': 'mine'}
  assert said('b', 'generation_config.json') == ids
  words.write_text('{}')
  with pytest.raises(ConfigError, match='words.json.*not a tokenizer.json'):
    save_huggingface(
      tmp_path / 'z', config, variables, extras={'tokenizer.json': words}
    )
  assert not (tmp_path / 'z').exists()
  # Without a pad token it is eos, and without a chat's tokens no template.
  byte = {'tokenizer.json': tokenizer_program.byte_tokenizer()}
  save_huggingface(tmp_path / 'c', config, variables, extras=byte)
  values = said('c', own.name)
  assert values['pad_token'] == vocabulary.EOS
  assert 'chat_template' not in values
  assert said('c', 'generation_config.json')['pad_token_id'] == 257
  # Without a tokenizer the ids alone are known, or nothing.
  save_huggingface(tmp_path / 'd', config, variables)
  assert 'pad_token_id' not in said('d', 'generation_config.json')
  assert not (tmp_path / 'd' / own.name).exists()
  config = dataclasses.replace(config, bos_id=-1, eos_id=-1)
  save_huggingface(tmp_path / 'e', config, variables)
  assert not (tmp_path / 'e' / 'generation_config.json').exists()
  assert said('e', 'config.json')['eos_token_id'] is None
