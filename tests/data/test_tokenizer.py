"""Every text comes back, tokens have their bytes, no text forges a special."""

import json
import pathlib

import numpy as np
import pytest

from configs import tiny
from experiments import tokenizer as trained
from experiments.data import tokenizer
from experiments.data.tokenizer import BOS, EOS
from mla_moe.config import ConfigError, freeze

TEXTS = (
  '',
  'def f(x):\n  return x ** 2  # plain\r\n\t',
  'naïve café — 東京タワー, 12345 Ünïcödé 🙂👩‍👩‍👧',
  '\x00\x7f\ufeff\ufffd',
  'quoted: ' + ''.join((tokenizer.BOS, tokenizer.EOS, *tokenizer.FIM)),
)


@pytest.fixture(scope='module')
def bpe(tmp_path_factory):
  pytest.importorskip('tokenizers', reason='the extra [hf] is not installed')
  path = tmp_path_factory.mktemp('bpe') / 'tokenizer.json'
  trained.write(path, [' '.join(TEXTS) * 20], 320)
  return tokenizer.load(str(path), 0, 1), str(path)


@pytest.fixture(params=['byte', 'bpe'])
def any_tokenizer(request, bpe):
  return tokenizer.load('byte', 256, 257) if request.param == 'byte' else bpe[0]


@pytest.mark.parametrize('text', TEXTS)
def test_text_comes_back_and_bytes_are_counted(any_tokenizer, text):
  ids = any_tokenizer.encode(text)
  assert ids.dtype == np.int32
  assert any_tokenizer.decode(ids) == text
  lengths = any_tokenizer.byte_lengths()
  assert lengths.shape == (any_tokenizer.vocab,)
  assert lengths[ids].sum() == len(text.encode())


def test_no_text_makes_a_special_token(any_tokenizer):
  special = {any_tokenizer.bos_id, any_tokenizer.eos_id, *any_tokenizer.fim_ids}
  assert len(special) == 5
  assert not special & set(any_tokenizer.encode(TEXTS[-1]).tolist())


def test_specials_have_no_bytes_and_no_text(any_tokenizer):
  ids = [any_tokenizer.bos_id, any_tokenizer.eos_id, *any_tokenizer.fim_ids]
  assert not any_tokenizer.byte_lengths()[ids].any()
  assert any_tokenizer.decode(ids) == ''


def test_a_batch_is_its_texts(any_tokenizer):
  together = any_tokenizer.encode_batch(list(TEXTS))
  for ids, text in zip(together, TEXTS, strict=True):
    np.testing.assert_array_equal(ids, any_tokenizer.encode(text))


def test_half_a_character_and_ids_of_padding_decode(any_tokenizer):
  half = any_tokenizer.encode('é🙂')[:1].tolist()
  unknown = any_tokenizer.vocab + 2  # a model's vocabulary is padded
  assert isinstance(any_tokenizer.decode([*half, unknown]), str)
  byte = tokenizer.load('byte', 256, 257)
  assert byte.decode([0xC3, 0x28, 263]) == '\ufffd('
  assert byte.decode(byte.encode('a\ud800b')) == 'a?b'


def test_the_byte_tokenizer_is_the_bytes():
  byte = tokenizer.load('byte', 256, 257)
  np.testing.assert_array_equal(byte.encode('é\n'), [0xC3, 0xA9, 10])
  assert (byte.vocab, byte.fim_ids) == (261, (258, 259, 260))
  small = tokenizer.load('byte', 256, 257, 259)  # fills in no middle
  assert (small.vocab, small.fim_ids) == (258, None)


def test_bpe_merges_and_is_the_same_from_its_file(bpe):
  words, path = bpe
  again = tokenizer.load(path, 0, 1)
  assert again.fingerprint == words.fingerprint
  assert words.encode(TEXTS[1]).size < len(TEXTS[1].encode())
  np.testing.assert_array_equal(again.encode(TEXTS[2]), words.encode(TEXTS[2]))
  folder = path.rsplit('/', 1)[0]
  assert tokenizer.load(folder, 0, 1).fingerprint == words.fingerprint


def test_bpe_splits_as_deepseek_does(bpe):
  """No token holds four digits, or a word and the punctuation after it."""
  words, _ = bpe
  pieces = [words.decode([i]) for i in words.encode('12345 ab, cd')]
  assert max(sum(c.isdigit() for c in piece) for piece in pieces) <= 3
  assert not any('b,' in piece for piece in pieces)


def test_an_ordinary_word_is_no_bos_or_eos(bpe):
  """Text would become it, and decoding would drop it."""
  words, path = bpe
  bang = words.core.token_to_id('!')
  for bos, eos in ((bang, 1), (0, bang)):
    with pytest.raises(ConfigError, match=f"={bang}: .*'!'.* special"):
      tokenizer.load(path, bos, eos)


def test_bos_eos_and_the_size_are_the_tokenizer_s(bpe, tmp_path):
  """A config may name others; the settings beside the file say which."""
  words, path = bpe
  values = tiny.get_config()
  values.data.tokenizer = path
  model = freeze(values).model
  assert (model.bos_id, model.eos_id) == (0, 1)
  assert 0 <= model.vocab - words.vocab < 8 and model.vocab % 8 == 0
  pad = words.core.token_to_id('<｜▁pad▁｜>')
  (tmp_path / 'tokenizer.json').write_bytes(pathlib.Path(path).read_bytes())
  settings = tmp_path / 'tokenizer_config.json'
  values.data.tokenizer = str(tmp_path)
  for said, ids in (
    ({'bos_token': '<｜▁pad▁｜>', 'eos_token': {'content': EOS}}, (pad, 1)),
    ({'eos_token': '<｜▁pad▁｜>'}, (0, pad)),
  ):
    settings.write_text(json.dumps(said))
    model = freeze(values).model
    assert (model.bos_id, model.eos_id) == ids
    loaded = tokenizer.load(str(tmp_path))
    assert (loaded.bos_id, loaded.eos_id) == ids
  settings.write_text(json.dumps({'bos_token': None}))
  with pytest.raises(ConfigError, match=f'model.bos_id: .*one of 0 {BOS!r}'):
    freeze(values)
  values.model.bos_id, values.model.vocab = 1, 400
  model = freeze(values).model
  assert (model.bos_id, model.eos_id, model.vocab) == (1, 1, 400)
  with pytest.raises(ConfigError, match=f'vocab=9: .* {words.vocab} tokens'):
    tokenizer.load(path, vocab=9)
  # A plan of a machine with other files needs no ids.
  values.data.tokenizer, values.model.bos_id = '/not/here.json', -1
  assert freeze(values).model.bos_id == -1
  values.model.vocab = 0
  with pytest.raises(ConfigError, match='/not/here.json'):
    freeze(values)


def test_a_fim_token_that_is_a_word_is_refused(bpe, tmp_path):
  content = json.loads(pathlib.Path(bpe[1]).read_text(encoding='utf-8'))
  content['added_tokens'] = [
    x for x in content['added_tokens'] if x['content'] != tokenizer.FIM[1]
  ]
  path = tmp_path / 'word.json'
  path.write_text(json.dumps(content), encoding='utf-8')
  with pytest.raises(ConfigError, match=f'{tokenizer.FIM[1]}.* is a word'):
    tokenizer.load(str(path))


def test_control_tokens_without_the_flag_are_special(bpe, tmp_path):
  """V3's release has none for its roles and for FIM."""
  content = json.loads(pathlib.Path(bpe[1]).read_text(encoding='utf-8'))
  for token in content['added_tokens']:
    token['special'] = token['content'] in (BOS, EOS)
  content['added_tokens'].append(token | {'id': 320, 'content': '<think>'})
  path = tmp_path / 'flagless.json'
  path.write_text(json.dumps(content), encoding='utf-8')
  words = tokenizer.load(str(path), 0, 1)
  spelled = ''.join(trained.SPECIAL)
  ids = words.encode(f'{spelled}<think>').tolist()
  assert min(ids) >= len(trained.SPECIAL) and ids[-1] == 320
  assert words.decode(ids) == f'{spelled}<think>'
  ids = words.encode(TEXTS[-1])
  assert words.decode(ids) == TEXTS[-1]
  assert words.decode(words.fim_ids) == ''


def test_without_fim_tokens_there_are_no_fim_ids(bpe, tmp_path):
  content = json.loads(pathlib.Path(bpe[1]).read_text(encoding='utf-8'))
  for token in content['added_tokens']:
    token['content'] = token['content'].replace('fim', 'fun')
  vocab = content['model']['vocab']
  for name in tokenizer.FIM:
    vocab[name.replace('fim', 'fun')] = vocab.pop(name)
  path = tmp_path / 'plain.json'
  path.write_text(json.dumps(content), encoding='utf-8')
  assert tokenizer.load(str(path), 0, 1).fim_ids is None


def test_bad_input_is_one_line(bpe, tmp_path):
  broken = tmp_path / 'broken.json'
  broken.write_text('{"model": 3}')
  content = json.loads(pathlib.Path(bpe[1]).read_text(encoding='utf-8'))
  words = tmp_path / 'words.json'
  words.write_text(json.dumps(content | {'decoder': {'type': 'Fuse'}}))
  huge = tmp_path / 'huge.json'
  many = {'model': {'vocab': {'a': 10**12}}, 'decoder': {}}
  huge.write_text(json.dumps(many))
  for name, bos, eos, says in (
    ('byte', 0, 257, 'model.bos_id=256'),
    ('byte', 256, 1, 'model.eos_id=257'),
    (str(tmp_path / 'none.json'), 0, 1, 'none.json'),
    (str(broken), 0, 1, 'not a tokenizer.json'),
    (str(words), 0, 1, 'byte-level'),
    (str(huge), 0, 1, 'its largest id is 1000000000000'),
    (bpe[1], 0, 9999, 'model.eos_id=9999'),
  ):
    with pytest.raises(ConfigError) as caught:
      tokenizer.load(name, bos, eos)
    assert says in str(caught.value) and '\n' not in str(caught.value)
