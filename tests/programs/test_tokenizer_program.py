"""The program that trains a tokenizer: its merges, its file, its refusals."""

import json

import pytest

from experiments import tokenizer as program
from experiments.data import tokenizer
from mla_moe import ConfigError, ModelConfig, vocabulary
from mla_moe.hf import settings


@pytest.fixture(scope='module', autouse=True)
def library():
  pytest.importorskip('tokenizers', reason='the extra [hf] is not installed')


def test_the_most_frequent_neighbours_are_merged_first(tmp_path):
  texts = ['ba ba ba 1234567', 'ba ca']
  path = tmp_path / 'deep' / 'words.json'
  program.write(path, texts, program.LEAST + 2)
  values = json.loads(path.read_text(encoding='utf-8'))
  # A word is spelled with the space before it, and Ġ is a space.
  merges = [''.join(pair) for pair in values['model']['merges']]
  assert merges[0] == 'ba' and len(merges) == 2
  words = tokenizer.load(str(path))
  assert (words.bos_id, words.eos_id, words.vocab) == (0, 1, program.LEAST + 2)
  assert words.fim_ids == (3, 4, 5)
  assert words.decode(words.encode('ba')) == 'ba'
  assert len(words.encode('ba')) == 1 and len(words.encode('ca')) == 2
  special = [words.core.id_to_token(i) for i in range(8)]
  assert special[2] == settings.PAD
  assert special[6:] == [settings.USER, settings.ASSISTANT]
  # Other programs begin a text with bos.
  assert words.core.encode('ba').ids == [0, *words.encode('ba')]
  again = tmp_path / 'again'
  program.write(again, texts, program.LEAST + 2)
  assert (again / 'tokenizer.json').read_bytes() == path.read_bytes()


def test_mistakes_are_one_line(tmp_path):
  with pytest.raises(ConfigError, match='TEXTS: name folders'):
    program.main()
  with pytest.raises(
    ConfigError, match=f'--vocab=9: must be at least {8 + 256}'
  ):
    program.write(tmp_path / 'a', ['text'], 9)
  (tmp_path / 'tokenizer.json').write_text('{}')
  with pytest.raises(ConfigError, match='exists'):
    program.write(tmp_path, ['text'], 300)
  (tmp_path / 'rows.jsonl').write_text('{"text": "a"}\n{"text": 5}\n')
  row = '{"content": "words of another field"}\n'
  (tmp_path / 'other.jsonl').write_text(row)
  other = program.texts_of([str(tmp_path / 'other.jsonl')], 'content')
  assert [*other] == ['words of another field']
  texts = program.texts_of([str(tmp_path / 'rows.jsonl')])
  with pytest.raises(ConfigError, match='rows.jsonl:2'):
    program.write(tmp_path / 'b', texts, 300)
  assert not (tmp_path / 'b').exists()


def test_a_model_of_bytes_is_exported_with_its_bytes(tmp_path):
  """The written BPE has the ids of the byte tokenizer, and begins with bos."""
  path = tmp_path / 'tokenizer.json'
  model = ModelConfig(bos_id=256, eos_id=257)
  extras = {'tokenizer.json': program.byte_tokenizer()}
  path.write_bytes(settings.completed(model, extras)['tokenizer.json'])
  words, byte = tokenizer.load(str(path)), tokenizer.load('byte')
  assert vocabulary.read(str(path)) == vocabulary.BYTE
  assert words.fim_ids == byte.fim_ids
  text = 'naïve 東京 🙂\x00\r\n' + ''.join(map(chr, range(256)))
  assert words.encode(text).tolist() == byte.encode(text).tolist()
  assert words.decode(byte.encode(text)) == text
  assert words.byte_lengths().tolist() == byte.byte_lengths().tolist()
  assert words.core.encode('a').ids == [byte.bos_id, 97]


def test_an_exported_tokenizer_begins_texts_with_bos_once(tmp_path):
  """Whatever it does after its tokens; settings of its own are not changed."""
  values = json.loads(program.byte_tokenizer())
  level = dict(values['decoder'])
  one = {'type': 'TemplateProcessing', 'pair': [], 'special_tokens': {}}
  one['single'] = [{'Sequence': {'id': 'A', 'type_id': 0}}]
  model = ModelConfig(bos_id=256, eos_id=257)
  path = tmp_path / 'tokenizer.json'
  for processor, ids in ((None, [256, 97]), (level, [256, 97]), (one, [97])):
    content = json.dumps(values | {'post_processor': processor}).encode()
    extras = {path.name: content}
    path.write_bytes(settings.completed(model, extras)[path.name])
    assert tokenizer.load(str(path)).core.encode('a').ids == ids
    again = settings.completed(model, {path.name: path})
    assert again[path.name] == path.read_bytes()
    extras['tokenizer_config.json'] = b'{}'
    assert settings.completed(model, extras)[path.name] == content
