"""Tokenizers: text to token ids and back, by raw bytes or a byte-level BPE.

Both kinds start from the bytes of UTF-8. So every text has tokens, decoding
returns the same text, and each token stands for a known number of bytes. The
last fact makes losses comparable between vocabularies: nats per token over
bytes per token gives bits per byte (`batches.bits_per_byte`).

A document's text never becomes a special token, even if it spells one: a web
page that quotes `<｜end▁of▁sentence｜>` must not end the document. Code that
wants a special token inserts its id (`corpus`).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from typing import Any

import numpy as np

from mla_moe import files, vocabulary
from mla_moe.config import ConfigError
from mla_moe.types import Int
from mla_moe.vocabulary import BOS as BOS
from mla_moe.vocabulary import EOS as EOS
from mla_moe.vocabulary import FIM

from . import ranks
from .ranks import RanksTokenizer


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
  """A token is a byte of UTF-8; five specials follow the 256 bytes."""

  vocab: int = 261
  bos_id: int = 256
  eos_id: int = 257
  fim_ids: tuple[int, int, int] | None = (258, 259, 260)
  fingerprint: str = 'byte'

  def encode(self, text: str) -> Int[np.ndarray, ' M']:
    """Returns the text's ids, int32, without bos and eos."""
    return np.frombuffer(_bytes(text), np.uint8).astype(np.int32)

  def encode_batch(self, texts: list[str]) -> list[Int[np.ndarray, ' _']]:
    """Returns the ids of each text."""
    return [self.encode(text) for text in texts]

  def decode(self, ids: Any) -> str:
    """Returns the text, without specials; broken UTF-8 becomes U+FFFD."""
    ids = np.asarray(ids).reshape(-1)
    return ids[ids < 256].astype(np.uint8).tobytes().decode('utf-8', 'replace')

  def byte_lengths(self) -> Int[np.ndarray, ' V']:
    """Returns the number of bytes of each id, int32; 0 for specials."""
    return (np.arange(self.vocab) < 256).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class BPETokenizer:
  """A byte-level BPE of a tokenizer.json, run by the library `tokenizers`.

  core: the library's Tokenizer.
  """

  vocab: int
  bos_id: int
  eos_id: int
  fim_ids: tuple[int, int, int] | None
  fingerprint: str
  core: Any = dataclasses.field(repr=False)

  def encode(self, text: str) -> Int[np.ndarray, ' M']:
    """Returns the text's ids, int32, without bos and eos."""
    return self.encode_batch([text])[0]

  def encode_batch(self, texts: list[str]) -> list[Int[np.ndarray, ' _']]:
    """Returns the ids of each text, computed on all cores."""
    clean = [_bytes(text).decode() for text in texts]
    encodings = self.core.encode_batch_fast(clean, add_special_tokens=False)
    return [np.array(encoding.ids, np.int32) for encoding in encodings]

  def decode(self, ids: Any) -> str:
    """Returns the text, without specials; broken UTF-8 becomes U+FFFD."""
    ids = np.asarray(ids).reshape(-1).tolist()
    return self.core.decode(ids, skip_special_tokens=True)

  def byte_lengths(self) -> Int[np.ndarray, ' V']:
    """Returns the number of bytes of each id, int32; 0 for specials."""
    lengths = np.zeros(self.vocab, np.int32)
    for token, index in self.core.get_vocab().items():
      lengths[index] = len(token)  # BPE spells each byte as one character
    for index, token in self.core.get_added_tokens_decoder().items():
      lengths[index] = 0 if token.special else len(token.content.encode())
    return lengths


Tokenizer = ByteTokenizer | BPETokenizer | RanksTokenizer


def load(
  name: str, bos_id: int = -1, eos_id: int = -1, vocab: int = 0
) -> Tokenizer:
  """Returns a tokenizer by name.

  Args:
    name: 'byte', a tokenizer.json, a tiktoken.model, or a folder with one.
    bos_id, eos_id: the model's; -1 is the tokenizer's own (`vocabulary`). The
      ids for fill-in-the-middle are found by DeepSeek's names of the tokens.
    vocab: the model's size, which the tokenizer's must not exceed; 0 is any.

  Raises:
    ConfigError: no such file, not a byte-level tokenizer.json, too many
      tokens, or ids that are no special tokens of it.
  """
  words = vocabulary.read(name)
  # Bytes can do without the last three: a small model fills in no middle.
  least = words.eos_id + 1 if name == 'byte' else words.size
  if vocab and vocab < least:
    raise ConfigError(
      f'model.vocab={vocab}: the tokenizer {name!r} has {least} tokens; '
      'set model.vocab=0, for its size, or a larger number'
    )
  ids = vocabulary.fill(name, vocab, bos_id, eos_id)
  bos_id, eos_id = ids['bos_id'], ids['eos_id']
  if name == 'byte':
    tokenizer = ByteTokenizer()
    if vocab and vocab < words.size:
      tokenizer = ByteTokenizer(least, fim_ids=None)
    for field, index in (('bos_id', bos_id), ('eos_id', eos_id)):
      own = getattr(tokenizer, field)
      if index != own:
        raise ConfigError(
          f'model.{field}={index}: the byte tokenizer has {own}; set '
          f'model.{field}={own}'
        )
    return tokenizer
  path = vocabulary.file_of(name)
  if path.suffix == '.model':
    return ranks.load(path, words, bos_id, eos_id)
  content = files.read_bytes(path)
  core = _parse(str(path), content)
  for field, index in (('bos_id', bos_id), ('eos_id', eos_id)):
    if index not in words.special:
      token = core.id_to_token(index)
      said = 'no such token' if token is None else f'the word {token!r} there'
      raise ConfigError(
        f'model.{field}={index}: {path} has {said}; set model.{field}=-1, for '
        "the tokenizer's own, or a special token: "
        f'{vocabulary.choices(words.special)}'
      )
  ids_of = {text: index for index, text in words.special.items()}
  for token in FIM:
    if token not in ids_of and core.token_to_id(token) is not None:
      raise ConfigError(
        f'{path}: {token!r} is a word there, so text would become it; list it '
        'in added_tokens, as special'
      )
  fim = tuple(ids_of.get(token, -1) for token in FIM)
  return BPETokenizer(
    vocab=words.size,
    bos_id=bos_id,
    eos_id=eos_id,
    fim_ids=None if min(fim) < 0 else fim,
    fingerprint=f'{hashlib.sha256(content).hexdigest()}:{bos_id}:{eos_id}',
    core=core,
  )


def _parse(path: str, content: bytes) -> Any:
  """Returns the library's Tokenizer of a tokenizer.json.

  Raises:
    ConfigError: not a tokenizer.json, or its tokens are not bytes.
  """
  modules = library()
  try:
    values = json.loads(content)
    decoder = values['decoder']
    for token in values.get('added_tokens') or ():
      token['special'] = vocabulary.is_special(token)
    core = modules.Tokenizer.from_str(json.dumps(values))
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
  core.encode_special_tokens = True  # a special token in a text stays text
  return core


@functools.cache
def library() -> Any:
  """Returns the library `tokenizers`.

  Raises:
    ConfigError: it is not installed.
  """
  try:
    import tokenizers
  except ImportError:
    raise ConfigError(
      'a tokenizer.json needs tokenizers: pip install "mla_moe[hf]"'
    ) from None
  return tokenizers


def _bytes(text: str) -> bytes:
  """Returns UTF-8; half a surrogate pair (JSON, terminals) becomes '?'."""
  return text.encode('utf-8', 'replace')
