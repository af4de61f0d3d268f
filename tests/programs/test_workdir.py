"""A run's files: rows are strict JSON, errors one line, keys are redacted."""

import json
import math

import pytest

from experiments import workdir
from mla_moe.config import ConfigError, DataConfig, freeze


def test_rows_are_strict_json_and_nan_comes_back(tmp_path):
  path = tmp_path / 'rows.jsonl'
  file = workdir.Rows(path)
  file.append({'step': 1, 'loss': math.nan, 'layers': [1.5, -math.inf]})
  file.append({'step': 2, 'loss': 0.5})
  file.close()
  first = '{"step": 1, "loss": null, "layers": [1.5, null]}\n'
  text = first + '{"step": 2, "loss": 0.5}\n'
  assert path.read_text() == text
  one, two = workdir.rows(path)
  assert math.isnan(one['loss']) and math.isnan(one['layers'][1])
  assert one['layers'][0] == 1.5 and two == {'step': 2, 'loss': 0.5}
  workdir.rewind(path, 1)
  assert path.read_text() == first
  path.write_text('{"step": 1, "loss": NaN}\n[3]\n')  # of an older version
  (old,) = workdir.rows(path)
  assert math.isnan(old['loss'])


@pytest.mark.parametrize(
  'content', [b'\xff', b'[' * 100_000, b'[]', b'{"model": 3}', None]
)
def test_a_config_that_is_none_is_one_line(content, tmp_path):
  path = tmp_path / 'config.json'
  if content is None:
    path.symlink_to('/dev/zero')
  else:
    path.write_bytes(content)
  with pytest.raises(ConfigError, match='config') as error:
    workdir.read_config(tmp_path)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  'name, value, is_key',
  [
    ('TOKENIZER', '/data/tok/tokenizer.json', False),
    ('TOKENIZERS_PARALLELISM', 'disabled', False),
    ('SSH_KEY_DIR', '/home/me/keys', False),
    ('SIGNING_KEY', __file__, False),
    ('MONKEYS', 'chimpanzee', False),
    ('MY_TOKEN', 'abcdefgh12', True),
    ('TOKEN', 'abcdefgh12', True),
    ('AWS_SECRET_ACCESS_KEY', '/ab+cdefgh12', True),
    ('DB_PASSWORD', 'a"b\\c"long', True),
  ],
)
def test_keys_are_known_by_whole_words(name, value, is_key, monkeypatch):
  monkeypatch.setenv(name, value)
  for text in (f'the {value} loss', json.dumps({'source': value})):
    assert ('[redacted]' in workdir.redacted(text)) == is_key


def test_a_key_with_a_quote_is_not_written(tmp_path, monkeypatch):
  monkeypatch.setenv('MY_SECRET', 'a"b\\c"long')
  source = DataConfig(source='x a"b\\c"long').source
  config = freeze({'data': {'source': source}})
  with pytest.raises(ConfigError, match='looks like a key'):
    with workdir.claim(tmp_path / 'run', config):
      pass
  assert not (tmp_path / 'run').exists()
