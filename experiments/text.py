"""Tokens that come one by one, as text that a person may see already."""

from __future__ import annotations

from collections.abc import Sequence

from mla_moe.data import tokenizer

_BROKEN = '\ufffd'  # what decoding makes of half a character


class Growing:
  """The text of a row's tokens so far.

  `ended` once a stop string is reached, which is no part of the text. What may
  still change is held back: half a character, the beginning of a stop string.
  """

  def __init__(self, words: tokenizer.Tokenizer, stops: Sequence[str] = ()):
    self.ended = False
    self._words, self._stops = words, [s for s in stops if s]
    self._ids, self._shown = [], ''

  def add(self, ids: Sequence[int], last: bool = False) -> str:
    """What can be shown more with these tokens; all if they are the last."""
    if self.ended:
      return ''
    self._ids.extend(int(i) for i in ids)
    text = self._words.decode(self._ids)
    found = [at for at in map(text.find, self._stops) if at >= 0]
    if found:
      self.ended, text = True, text[: min(found)]
    elif not last:
      text = text.rstrip(_BROKEN)
      text = text[: len(text) - self._beginning(text)]
    # A late byte may change what was decoded before it; never take back text.
    new = text[len(self._shown) :]
    self._shown += new
    return new

  def _beginning(self, text: str) -> int:
    """The length of the longest end of `text` that begins a stop string."""
    lengths = [
      n
      for stop in self._stops
      for n in range(1, len(stop))
      if text.endswith(stop[:n])
    ]
    return max(lengths, default=0)
