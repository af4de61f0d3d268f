"""Text to token ids and back: raw bytes, or a byte-level BPE.

Both kinds start from the bytes of UTF-8, so every text has tokens, decoding
gives the same text back, and each token stands for a known number of bytes.
That last fact makes losses comparable between vocabularies: nats per token
divided by bytes per token is bits per byte (`data.bits_per_byte`).

A document's text never becomes a special token, whatever it spells: a web page
that quotes `<｜end▁of▁sentence｜>` must not end the document. Special ids are
put in by id (`corpus`), by whoever means them.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from typing import Any

import numpy as np

from mla_moe.config import ConfigError
from mla_moe.types import Int

BOS, EOS = '<｜begin▁of▁sentence｜>', '<｜end▁of▁sentence｜>'
PAD = '<｜▁pad▁｜>'
FIM = ('<｜fim▁begin｜>', '<｜fim▁hole｜>', '<｜fim▁end｜>')

# The splits that DeepSeek-V3's tokenizer.json makes before merging: digits by
# threes, runs of Chinese and Japanese, then words, punctuation and spaces.
_SPLITS = (
  r'\p{N}{1,3}',
  r'[一-龥぀-ゟ゠-ヿ]+',
  r'[!"#$%&\'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+'
  r'|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*'
  r'|\s*[\r\n]+|\s+(?!\S)|\s+',
)


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
  """A token is a byte of UTF-8; five specials follow the 256 bytes."""

  vocab: int = 261
  bos_id: int = 256
  eos_id: int = 257
  fim_ids: tuple[int, int, int] | None = (258, 259, 260)
  fingerprint: str = 'byte'

  def encode(self, text: str) -> Int[np.ndarray, ' M']:
    """The text's tokens, int32, without bos or eos."""
    return np.frombuffer(_bytes(text), np.uint8).astype(np.int32)

  def encode_batch(self, texts: list[str]) -> list[Int[np.ndarray, ' _']]:
    """`encode` of every text."""
    return [self.encode(text) for text in texts]

  def decode(self, ids: Any) -> str:
    """The text of the ids; specials vanish, broken UTF-8 becomes U+FFFD."""
    ids = np.asarray(ids).reshape(-1)
    return ids[ids < 256].astype(np.uint8).tobytes().decode('utf-8', 'replace')

  def byte_lengths(self) -> Int[np.ndarray, ' V']:
    """The bytes that each id stands for, int32; specials stand for none."""
    return (np.arange(self.vocab) < 256).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class BPETokenizer:
  """A byte-level BPE from a tokenizer.json, run by the library `tokenizers`."""

  vocab: int
  bos_id: int
  eos_id: int
  fim_ids: tuple[int, int, int] | None
  fingerprint: str
  core: Any = dataclasses.field(repr=False)

  def encode(self, text: str) -> Int[np.ndarray, ' M']:
    """The text's tokens, int32, without bos or eos."""
    return self.encode_batch([text])[0]

  def encode_batch(self, texts: list[str]) -> list[Int[np.ndarray, ' _']]:
    """`encode` of every text, on all cores."""
    clean = [_bytes(text).decode() for text in texts]
    found = self.core.encode_batch_fast(clean, add_special_tokens=False)
    return [np.array(one.ids, np.int32) for one in found]

  def decode(self, ids: Any) -> str:
    """The text of the ids; specials vanish, broken UTF-8 becomes U+FFFD."""
    special = {self.bos_id, self.eos_id, *(self.fim_ids or ())}
    ids = [i for i in np.asarray(ids).reshape(-1).tolist() if i not in special]
    return self.core.decode(ids, skip_special_tokens=True)

  def byte_lengths(self) -> Int[np.ndarray, ' V']:
    """The bytes that each id stands for, int32; specials stand for none."""
    lengths = np.zeros(self.vocab, np.int32)
    for token, index in self.core.get_vocab().items():
      lengths[index] = len(token)  # one letter of the byte alphabet a byte
    for index, token in self.core.get_added_tokens_decoder().items():
      lengths[index] = 0 if token.special else len(token.content.encode())
    lengths[[self.bos_id, self.eos_id, *(self.fim_ids or ())]] = 0
    return lengths


Tokenizer = ByteTokenizer | BPETokenizer


def load(name: str, bos_id: int, eos_id: int) -> Tokenizer:
  """The tokenizer 'byte', or that of a tokenizer.json (or a folder with one).

  `bos_id` and `eos_id` are the model's: a tokenizer.json does not say which of
  its tokens they are. The FIM ids are those of DeepSeek's names for them.

  Raises:
    ConfigError: no such file, not a byte-level tokenizer.json, or ids that the
      tokenizer does not have.
  """
  if name == 'byte':
    tokenizer = ByteTokenizer()
    for key, ours in (('bos_id', bos_id), ('eos_id', eos_id)):
      theirs = getattr(tokenizer, key)
      if ours != theirs:
        raise ConfigError(
          f'model.{key}={ours}: the byte tokenizer has {theirs}; set '
          f'model.{key}={theirs}'
        )
    return tokenizer
  path = os.path.expanduser(name)
  if os.path.isdir(path):
    path = os.path.join(path, 'tokenizer.json')
  try:
    with open(path, 'rb') as file:
      content = file.read()
  except OSError as error:
    raise ConfigError(
      f"data.tokenizer={name!r}: must be 'byte' or a tokenizer.json that can "
      f'be read ({error.strerror})'
    ) from None
  core = _parse(path, content)
  for key, index in (('bos_id', bos_id), ('eos_id', eos_id)):
    if core.id_to_token(index) is None:
      raise ConfigError(
        f'model.{key}={index}: {path} has no such token; set model.{key} to '
        'the id that it uses'
      )
  fim = tuple(core.token_to_id(token) for token in FIM)
  return BPETokenizer(
    vocab=max(core.get_vocab().values()) + 1,
    bos_id=bos_id,
    eos_id=eos_id,
    fim_ids=None if None in fim else fim,
    fingerprint=f'{hashlib.sha256(content).hexdigest()}:{bos_id}:{eos_id}',
    core=core,
  )


def train_bpe(texts: Iterable[str], vocab: int, path: str) -> Tokenizer:
  """Learns a byte-level BPE of at most `vocab` tokens and writes it to `path`.

  It splits as DeepSeek-V3's does and has its special tokens: bos 0, eos 1,
  padding 2, then FIM. Fewer tokens come out of a text too short for them.

  Raises:
    ConfigError: a vocabulary with no room for the 256 bytes and the specials.
  """
  library = _library()
  special = [BOS, EOS, PAD, *FIM]
  least = 256 + len(special)
  if vocab < least:
    raise ConfigError(
      f'vocab={vocab}: a byte-level BPE needs at least {least} tokens'
    )
  pre = library.pre_tokenizers
  core = library.Tokenizer(library.models.BPE())
  core.pre_tokenizer = pre.Sequence(
    [pre.Split(library.Regex(split), 'isolated') for split in _SPLITS]
    + [pre.ByteLevel(add_prefix_space=False, use_regex=False)]
  )
  core.decoder = library.decoders.ByteLevel()
  trainer = library.trainers.BpeTrainer(
    vocab_size=vocab,
    special_tokens=special,
    initial_alphabet=pre.ByteLevel.alphabet(),
    show_progress=False,
  )
  core.train_from_iterator(texts, trainer)
  folder = os.path.dirname(os.path.abspath(path))
  os.makedirs(folder, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=folder) as temp:
    fresh = os.path.join(temp, 'tokenizer.json')
    core.save(fresh)
    os.replace(fresh, path)
  return load(path, 0, 1)


def _parse(path: str, content: bytes) -> Any:
  """The `tokenizers` object of a tokenizer.json, if its tokens are bytes."""
  library = _library()
  try:
    core = library.Tokenizer.from_str(content.decode('utf-8'))
    decoder = json.loads(content)['decoder']
  except Exception as error:  # the library raises bare Exceptions
    raise ConfigError(
      f'data.tokenizer={path!r}: not a tokenizer.json ({error})'
    ) from None
  if 'ByteLevel' not in json.dumps(decoder):
    raise ConfigError(
      f'data.tokenizer={path!r}: its tokens are not bytes (no ByteLevel '
      'decoder), so bits per byte have no meaning; use a byte-level BPE'
    )
  core.no_padding()
  core.no_truncation()
  core.encode_special_tokens = True  # what a text spells stays text
  return core


@functools.cache
def _library() -> Any:
  try:
    import tokenizers
  except ImportError:
    raise ConfigError(
      'a tokenizer.json needs tokenizers: pip install "mla_moe[hf]"'
    ) from None
  return tokenizers


def _bytes(text: str) -> bytes:
  """UTF-8; half a surrogate pair (from JSON, a terminal) becomes '?'."""
  return text.encode('utf-8', 'replace')
