"""A tiktoken.model has the ids of its releases' own code."""

import base64
import json

import numpy as np
import pytest

from experiments import opened, prompt, run_tokenizer
from experiments.data import ranks, tokenizer
from experiments.tokenizer import byte_tokenizer
from mla_moe import vocabulary
from mla_moe.config import ConfigError, ModelConfig

# The releases' pattern as their code spells it.
WORDS = (
  r'[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*'
  r'[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+'
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
  r'[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+'
  r'[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*'
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
)
REST = r'\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
MERGED = "th he the  the  a 漢字 文字 漢字文字 ab abc .\n \n   12 123 's we WE"
TEXTS = (
  'the the 漢字文字abc文字 12345 x.\n\n  y',
  "We've SAID they'd 'S it's naïve Ünïcödé ﬁ 🙂👩‍👧 한국어 カタカナ",
  'def f(x):\n\treturn x ** 2  # \x00\r\n\r\n   ',
  '',
  '[BOS]<|im_end|><|reserved_token_400|>[EOS]',
)


def written(folder, *, names=None, rows=None, **settings):
  """Writes a release's files; returns the number of its ranks."""
  merged = dict.fromkeys(x.encode() for x in MERGED.split(' ') if len(x) > 1)
  tokens = [bytes([i]) for i in range(256)]
  tokens += [x for x in (*merged, b' the') if x not in tokens]
  rows = tokens if rows is None else rows
  lines = (f'{base64.b64encode(x).decode()} {i}\n' for i, x in enumerate(rows))
  (folder / 'tiktoken.model').write_text(''.join(lines))
  size = len(rows)
  names = names or ['[BOS]', '[EOS]', '<|im_end|>', '<|im_user|>', '<think>']
  added = {
    str(size + i): {'content': name, 'special': name[0] == '['}
    for i, name in enumerate(names)
  }
  code = {'AutoTokenizer': ['tokenization_moonshot.TikTokenTokenizer', None]}
  values = {'added_tokens_decoder': added, 'auto_map': code} | settings
  (folder / 'tokenizer_config.json').write_text(json.dumps(values))
  return size


@pytest.fixture(scope='module')
def release(tmp_path_factory):
  reason = 'the extra [hf] is not installed'
  pytest.importorskip('tiktoken', reason=reason)
  folder = tmp_path_factory.mktemp('release')
  size = written(folder)
  return folder, size, tokenizer.load(str(folder))


def theirs(folder, size):
  """Returns the Encoding as the releases' code makes it."""
  import tiktoken

  lines = (folder / 'tiktoken.model').read_text().split('\n')
  pairs = [line.split() for line in lines if line]
  values = json.loads((folder / 'tokenizer_config.json').read_text())
  named = values['added_tokens_decoder']
  special = {}
  for i in range(size, size + 256):
    reserved = {'content': f'<|reserved_token_{i}|>'}
    special[named.get(str(i), reserved)['content']] = i
  return tiktoken.Encoding(
    name='theirs',
    pat_str='|'.join((r'[\p{Han}]+', *WORDS, REST)),
    mergeable_ranks={base64.b64decode(x): int(i) for x, i in pairs},
    special_tokens=special,
  )


def test_ids_are_those_of_the_releases_code(release):
  folder, size, words = release
  oracle = theirs(folder, size)
  for text, ids in zip(TEXTS, words.encode_batch(list(TEXTS)), strict=True):
    assert ids.dtype == np.int32
    assert ids.tolist() == oracle.encode(text, disallowed_special=())
    np.testing.assert_array_equal(words.encode(text), ids)
    assert words.decode(ids) == text
    lengths = words.byte_lengths()
    assert lengths.shape == (words.vocab,)
    assert lengths[ids].sum() == len(text.encode())
  assert words.encode('a\ud800').tolist() == words.encode('a?').tolist()


def test_long_runs_are_cut_as_their_code_does(release):
  """After 25,000 characters of one kind, and after 400,000 of all."""
  folder, size, words = release
  oracle = theirs(folder, size)
  run = 'abc' * 8334  # 25,002 characters
  text = run + ' ' * 25_001 + 'x' + '漢字 ' * 50_000 + 'ab' * 100_000
  parts, start, count = [], 0, 0
  for i, c in enumerate(text):
    is_same = i % 400_000 and c.isspace() == text[i - 1].isspace()
    count = count + 1 if is_same else 1
    if count > 25_000 or (i and i % 400_000 == 0):
      parts.append(text[start:i])
      start, count = i, 1
  parts.append(text[start:])
  ids = [i for part in parts for i in oracle.encode_ordinary(part)]
  assert ranks._parts(text) == parts and len(parts) > 6
  assert words.encode(text[:60_000]).tolist() != []
  assert words.encode(text).tolist() == ids


def test_reserved_ids_are_special_and_words_are_words(release):
  folder, size, words = release
  assert words.vocab == vocabulary.read(str(folder)).size == size + 256
  assert (words.bos_id, words.eos_id, words.fim_ids) == (size, size + 1, None)
  special = prompt.special_tokens(words)
  assert special['<|im_end|>'] == size + 2 and '<think>' not in special
  assert special[f'<|reserved_token_{size + 255}|>'] == size + 255
  assert words.encode('a<think>b').tolist() == [97, size + 4, 98]
  assert words.decode([97, size, size + 4, size + 2, size + 300, 98]) == (
    'a<think>b'
  )
  lengths = words.byte_lengths()
  assert lengths[size + 4] == len('<think>')
  assert not np.delete(lengths[size:], 4).any()
  path = str(folder / 'tiktoken.model')
  assert tokenizer.load(path).fingerprint == words.fingerprint
  other = tokenizer.load(path, size + 3, size + 2)  # as a config.json says
  assert (other.bos_id, other.eos_id) == (size + 3, size + 2)


def test_a_run_copies_the_file_and_its_settings(release, tmp_path):
  folder, size, words = release
  run_tokenizer.adopt(tmp_path, str(folder), begun=False)
  copy = run_tokenizer.path_of(tmp_path, str(folder))
  assert copy == str(tmp_path / run_tokenizer.FOLDER / 'tiktoken.model')
  assert tokenizer.load(copy).fingerprint == words.fingerprint
  run_tokenizer.adopt(tmp_path, str(folder), begun=True)  # the same


def test_without_settings_the_model_says_the_ends(release, tmp_path):
  folder, size, words = release
  path = tmp_path / 'tiktoken.model'
  path.write_bytes((folder / path.name).read_bytes())
  bare = tokenizer.load(str(tmp_path), 0, size)
  assert (bare.bos_id, bare.eos_id, bare.vocab) == (0, size, words.vocab)
  assert bare.encode(TEXTS[0]).tolist() == words.encode(TEXTS[0]).tolist()
  assert bare.fingerprint != words.fingerprint
  with pytest.raises(ConfigError, match='model.bos_id: .* do not say'):
    tokenizer.load(str(tmp_path))


def test_a_tokenizer_json_comes_before_ranks(tmp_path):
  written(tmp_path)
  assert vocabulary.file_of(str(tmp_path)).name == 'tiktoken.model'
  (tmp_path / 'tokenizer.json').write_text('{}')
  assert vocabulary.file_of(str(tmp_path)).name == 'tokenizer.json'


def test_bad_ranks_are_one_line(tmp_path, monkeypatch):
  """None of them needs the library."""
  code = lambda name: {'AutoTokenizer': [f'{name}.QWenTokenizer', None]}
  few = [bytes([i]) for i in range(255)]
  for more, says in (
    ({'rows': few}, 'a byte has no rank'),
    ({'rows': [*few, b'\xfe', b'\xff']}, '0, 1, 2'),
    ({'auto_map': code('tokenization_qwen')}, "'tokenization_qwen.QWen"),
    ({'added_tokens_decoder': [3]}, 'not a tokenizer'),
    ({'names': ['a', 'b']}, 'model.bos_id: .* do not say'),
  ):
    written(tmp_path, **more)
    with pytest.raises(ConfigError, match=says) as error:
      tokenizer.load(str(tmp_path))
    assert '\n' not in str(error.value)
  size = written(tmp_path)
  with pytest.raises(ConfigError, match='model.eos_id=5: .* special token'):
    tokenizer.load(str(tmp_path), size, 5)
  (tmp_path / 'tiktoken.model').write_bytes(b'\x00\xff 3\n')
  with pytest.raises(ConfigError, match='not a tiktoken.model|do not say'):
    tokenizer.load(str(tmp_path))
  written(tmp_path)
  monkeypatch.setitem(__import__('sys').modules, 'tiktoken', None)
  with pytest.raises(ConfigError, match=r'pip install "mla_moe\[hf\]"'):
    tokenizer.load(str(tmp_path))


def test_tekken_is_refused_with_the_way_out(tmp_path):
  """As a file, in a folder, and beside a model without another tokenizer."""
  tekken = tmp_path / 'tekken.json'
  tekken.write_text('{"vocab": [], "config": {"pattern": "x"}}')
  for name in (tekken, tmp_path):
    with pytest.raises(ConfigError, match='tekken.json: is not read; use the'):
      tokenizer.load(str(name))
  own = str(tmp_path / 'tokenizer.json')
  with pytest.raises(ConfigError, match='tekken.json: is not read; use the'):
    opened._tokenizer('', own, ModelConfig())
  (tmp_path / 'tokenizer.json').write_bytes(byte_tokenizer())
  assert tokenizer.load(str(tmp_path)).vocab == 261
