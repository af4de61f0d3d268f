"""Token ids as text that can be shown while more tokens come.

A token may end inside a character, and the text so far inside a stop string.
Such an end is held back until later tokens complete it. Each token is
decoded with those of the last piece alone, however long the text is.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .data.tokenizer import Tokenizer

_HALF = '\ufffd'  # decodes from a part of a character
# A terminal obeys control characters, and a model may write any.
_CONTROLS = dict.fromkeys([*range(32), *range(127, 160)], '\ufffd')
_CONTROLS = {i: x for i, x in _CONTROLS.items() if chr(i) not in '\n\t'}


def show(text: str) -> None:
  """Prints a piece of text at once; a terminal gets no control characters."""
  if sys.stdout.isatty():
    text = text.replace('\r\n', '\n').translate(_CONTROLS)
  print(text, end='', flush=True)


class TextStream:
  """The text of a growing list of token ids, without special tokens.

  `ended` is true once the text has reached a stop string, which is not shown.
  """

  def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
    self.ended = False
    self._tokenizer = tokenizer
    self._stops = [stop for stop in stops if stop]
    self._ids = []  # of the last piece and after it
    self._count = 0  # how many of them are of the last piece
    self._piece = ''  # its text, decoded without the ids before it
    self._tail = ''  # decoded, but perhaps the beginning of a stop string

  def add(self, ids: Sequence[int], last: bool = False) -> str:
    """Returns the text that these tokens add; with `last`, all that is left."""
    if self.ended:
      return ''
    text = self._tail + ''.join(self._decode([int(i)]) for i in ids)
    text += self._decode([], last)
    places = [i for i in map(text.find, self._stops) if i >= 0]
    if places:
      self.ended = True
      return text[: min(places)]
    shown = len(text) if last else len(text) - self._beginning(text)
    self._tail = text[shown:]
    return text[:shown]

  def _decode(self, ids: list[int], last: bool = False) -> str:
    """Returns the next piece, or '' if it may end inside a character.

    The ids of the piece before are decoded again: some decoders drop the space
    before a first word.
    """
    self._ids += ids
    text = self._tokenizer.decode(self._ids)
    is_half = text.endswith(_HALF) and not last
    if is_half or len(text) <= len(self._piece):
      return ''
    piece = text[len(self._piece) :]
    self._ids = self._ids[self._count :]
    self._count = len(self._ids)
    self._piece = self._tokenizer.decode(self._ids)
    return piece

  def _beginning(self, text: str) -> int:
    """Returns the length of the longest end of `text` that begins a stop."""
    lengths = [
      n
      for stop in self._stops
      for n in range(1, min(len(stop), len(text) + 1))
      if text.endswith(stop[:n])
    ]
    return max(lengths, default=0)
