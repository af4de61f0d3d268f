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

from .. import prompt
from ..data.tokenizer import Tokenizer


class Spelling:
  """The texts and bytes of a tokenizer's tokens."""

  def __init__(self, tokenizer: Tokenizer):
    special = prompt.special_tokens(tokenizer)
    self._special = {index: text for text, index in special.items()}
    self._core = getattr(tokenizer, 'core', None)
    self._added = {}
    if self._core is not None:
      added = self._core.get_added_tokens_decoder()
      self._added = {i: token.content for i, token in added.items()}

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
    if token in self._special:
      return b''
    if self._core is None:
      return bytes([token]) if token < 256 else b''
    if token in self._added:
      return self._added[token].encode()
    word = self._core.id_to_token(token) or ''
    return b''.join(map(_bytes_of, word))


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


def _bytes_of(letter: str) -> bytes:
  byte = _alphabet().get(letter)
  return letter.encode() if byte is None else bytes([byte])


@functools.cache
def _alphabet() -> dict[str, int]:
  """Returns the byte of each letter of a byte-level BPE (GPT-2's).

  Bytes that print stand for themselves; the others are letters from 256 on.
  """
  printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [byte for byte in range(256) if byte not in printed]
  letters = {chr(byte): byte for byte in printed}
  return letters | {chr(256 + i): byte for i, byte in enumerate(others)}
