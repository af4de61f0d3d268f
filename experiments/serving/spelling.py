"""A token's own text, bytes and place: the words of log-probabilities.

A text is decoded from all of its tokens. But a list of alternatives needs a
name for each token alone, also for one that is half a character, or special.
Clients compare tokens by these names, so that no two tokens should share one. A
token that is no whole text is named by its bytes, as by OpenAI, and one without
any by its id, as by vLLM.
"""

from __future__ import annotations

import codecs
import functools
from collections.abc import Callable
from typing import Any

from .. import prompt
from ..data.tokenizer import Tokenizer


class Spelling:
  """The texts and bytes of a tokenizer's tokens."""

  def __init__(self, tokenizer: Tokenizer):
    special = prompt.special_tokens(tokenizer)
    self._special = {index: text for text, index in special.items()}
    self._bytes_of = _reader(tokenizer)

  def name(self, token: int, as_id: bool = False) -> str:
    """Returns the name of a token, its text if it is one."""
    data = self.data(token)
    if as_id or not data:
      return f'token_id:{token}'
    try:
      return data.decode()
    except UnicodeDecodeError:
      return 'bytes:' + ''.join(f'\\x{byte:02x}' for byte in data)

  def data(self, token: int) -> bytes:
    """Returns a token's bytes; those of its text for a special one."""
    if token in self._special:
      return self._special[token].encode()
    return self.shown(token)

  def shown(self, token: int) -> bytes:
    """Returns the bytes that a token adds to a text, none for a special one."""
    return b'' if token in self._special else self._bytes_of(token)


class Places:
  """The places of a growing text's tokens, from `start` on."""

  def __init__(self, spelling: Spelling, start: int = 0):
    self._spelling, self._place = spelling, start
    self._decoder = codecs.getincrementaldecoder('utf-8')('replace')

  def add(self, token: int) -> int:
    """Returns the place of the next token's first character."""
    place = self._place
    self._place += len(self._decoder.decode(self._spelling.shown(token)))
    return place


def _reader(tokenizer: Tokenizer) -> Callable[[int], bytes]:
  """Returns the function from a token to its bytes; an unknown one has none."""
  core = getattr(tokenizer, 'core', None)
  if core is None:
    return lambda token: bytes([token]) if token < 256 else b''
  if hasattr(core, 'decode_single_token_bytes'):  # of the library tiktoken
    return functools.partial(_of_ranks, core)
  added = core.get_added_tokens_decoder()
  texts = {token: value.content for token, value in added.items()}
  return functools.partial(_of_words, core, texts)


def _of_ranks(core: Any, token: int) -> bytes:
  try:
    return core.decode_single_token_bytes(token)
  except KeyError:
    return b''


def _of_words(core: Any, texts: dict[int, str], token: int) -> bytes:
  if token in texts:
    return texts[token].encode()
  bytes_of, word = _alphabet(), core.id_to_token(token) or ''
  letters = (bytes_of.get(letter, letter.encode()) for letter in word)
  return b''.join(letters)


@functools.cache
def _alphabet() -> dict[str, bytes]:
  """Returns the byte of each letter of a byte-level BPE (GPT-2's).

  Bytes that print stand for themselves; the others are letters from 256 on.
  """
  printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [byte for byte in range(256) if byte not in printed]
  letters = {chr(byte): bytes([byte]) for byte in printed}
  return letters | {chr(256 + i): bytes([x]) for i, x in enumerate(others)}
