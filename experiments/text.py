"""Token ids as text that can be shown while more tokens come.

A token may end inside a character, and the text so far inside a stop string.
Such an end is held back until later tokens decide what it is. Each token is
decoded once or twice, however long the text is: by the standard library's
incremental UTF-8 decoder if tokens are bytes, else by `tokenizers`.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from mla_moe.data.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer


class TextStream:
  """The text of a growing list of token ids, without special tokens.

  `ended` is true once the text has reached a stop string, which is not shown.
  """

  def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
    self.ended = False
    is_bytes = isinstance(tokenizer, ByteTokenizer)
    self._decoder = (_Bytes if is_bytes else _Pieces)(tokenizer)
    self._stops = [stop for stop in stops if stop]
    self._tail = ''

  def add(self, ids: Sequence[int], last: bool = False) -> str:
    """Returns the text that these tokens add; with `last`, all that is left."""
    if self.ended:
      return ''
    text = self._tail + self._decoder.decode(map(int, ids), last)
    places = [i for i in map(text.find, self._stops) if i >= 0]
    if places:
      self.ended = True
      return text[: min(places)]
    shown = len(text) if last else len(text) - self._beginning(text)
    self._tail = text[shown:]
    return text[:shown]

  def _beginning(self, text: str) -> int:
    """Returns the length of the longest end of `text` that begins a stop."""
    lengths = [
      n
      for stop in self._stops
      for n in range(1, len(stop))
      if text.endswith(stop[:n])
    ]
    return max(lengths, default=0)


class _Bytes:
  """Decodes ids that are bytes; all others are special."""

  def __init__(self, _: ByteTokenizer):
    self._core = codecs.getincrementaldecoder('utf-8')('replace')

  def decode(self, ids, last: bool) -> str:
    return self._core.decode(bytes(i for i in ids if i < 256), last)


class _Pieces:
  """Decodes ids of a tokenizer.json.

  `DecodeStream` holds back half a character and has no method that returns it
  at the end. So `_pending` has the ids after its last piece, too.
  """

  def __init__(self, tokenizer: BPETokenizer):
    from tokenizers.decoders import DecodeStream

    self._tokenizer = tokenizer
    special = tokenizer.bos_id, tokenizer.eos_id, *(tokenizer.fim_ids or ())
    self._special = frozenset(special)
    self._stream = DecodeStream(skip_special_tokens=True)
    self._pending = []

  def decode(self, ids, last: bool) -> str:
    text = ''
    for i in ids:
      if i in self._special:
        continue
      piece = self._stream.step(self._tokenizer.core, i)
      self._pending.append(i)
      if piece:
        text += piece
        self._pending = []
    return text + self._tokenizer.decode(self._pending) if last else text
