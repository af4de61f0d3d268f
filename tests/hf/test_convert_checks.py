"""Converting refuses first, by one line, whatever it could not undo."""

import ast
import errno
import os
import pathlib

import pytest
from releases import GOLDEN

from experiments import cli, convert, workdir
from mla_moe.config import Config, ConfigError


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


def test_the_tokenizer_of_an_export_is_the_one_of_the_run(tmp_path):
  words, mine = tmp_path / 'words', tmp_path / 'words' / 'bpe32k.json'
  words.mkdir()
  mine.write_text('mine')
  (words / 'tokenizer.json').write_text('another')
  (words / 'chat_template.jinja').write_text("the other's")
  folder = tmp_path / 'run'
  both = {name: words / name for name in ('tokenizer.json',)}
  both['chat_template.jinja'] = words / 'chat_template.jinja'
  assert convert._extras(folder, str(mine)) == {'tokenizer.json': mine}
  assert convert._extras(folder, str(words)) == both
  assert convert._extras(folder, str(words / 'tokenizer.json')) == both
  assert convert._extras(folder, 'byte') == {}
  (folder / 'huggingface').mkdir(parents=True)
  settings = folder / 'huggingface' / 'generation_config.json'
  settings.write_text('{}')
  extras = convert._extras(folder, str(mine))
  assert extras == {'tokenizer.json': mine, settings.name: settings}


def test_a_tokenizer_that_is_gone_is_told(tmp_path, capsys):
  assert convert._extras(tmp_path, str(tmp_path / 'gone.json')) == {}
  assert 'gone.json' in capsys.readouterr().out


@pytest.mark.parametrize(
  'name', ['plain', r'a\Users', '"""', 'it\'s """+exec(\'1\')+"""', 'a\nb']
)
def test_config_py_of_any_path_is_a_module(name):
  """The path stands in a docstring, and in a command for the shell."""
  tree = ast.parse(convert._config_py(pathlib.Path('/runs') / name))
  assert [type(node) for node in tree.body] == [
    *(ast.Expr, ast.Import, ast.Import, ast.ImportFrom, ast.FunctionDef)
  ]


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
  def full():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / 'x'))

  monkeypatch.setattr(convert, '_convert', full)
  with pytest.raises(cli.Stopped, match='ENOSPC; .*MiB are free') as error:
    convert.main()
  assert '\n' not in str(error.value)
