"""The fastest encoder that gives a tokenizer's own ids.

gigatoken (extra [fast]) encodes a byte-level BPE many times faster than the
library `tokenizers`. It is young, and so never believed: it encodes the
first documents of a text, and a text that spells every added token, and is used
only if all ids are those of `tokenizers`. Each unit of work begins with such a
comparison of some KB; one that fails is encoded by `tokenizers`, to its end.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .tokenizer import BPETokenizer, Tokenizer

Encode = Callable[[list[str]], list[np.ndarray]]

_FIRST_BYTES = 1 << 18  # of the first comparison of a process
_LATER_BYTES = 1 << 14  # of those of later units
_ESCAPES = {'r': '\r', 'n': '\n', "'": "'"}


class Encoder:
  """The ids of texts, by gigatoken where it is proven, else by the tokenizer.

  Attributes:
    line: which library encodes, or why not the fast one; '' before a text.
  """

  def __init__(self, tokenizer: Tokenizer):
    self._own = tokenizer.encode_batch
    self._fast, self.line = _gigatoken(tokenizer)
    self._probe = _added(tokenizer) if self._fast else ''
    self._rest = _FIRST_BYTES
    self._is_proven = True

  def next_unit(self) -> None:
    """Begins another unit, whose first documents are compared."""
    if self._fast:
      self._rest = max(self._rest, _LATER_BYTES)
    self._is_proven = True

  def __call__(self, texts: list[str]) -> list[np.ndarray]:
    if not self._fast or not self._is_proven:
      return self._own(texts)
    ids = self._fast([_clean(text) for text in texts])
    if self._rest > 0:
      first = _within(texts, self._rest)
      self._rest -= sum(map(len, first))
      same = self._agrees(first, ids)
      if self._probe:
        spelled, self._probe = [self._probe], ''
        same = same and self._agrees(spelled, self._fast(spelled))
      if not same:
        self._is_proven = False
        self.line = 'gigatoken gave other ids than tokenizers, which is used'
        return self._own(texts)
    return ids

  def _agrees(self, texts: list[str], ids: Sequence[np.ndarray]) -> bool:
    expected = self._own(texts)
    pairs = zip(expected, ids[: len(texts)], strict=True)
    return all(np.array_equal(one, other) for one, other in pairs)


def _within(texts: list[str], most: int) -> list[str]:
  """Returns the first texts of about this many characters, at least one."""
  count, size = 0, 0
  while count < len(texts) and (not count or size < most):
    size += len(texts[count])
    count += 1
  return texts[:count]


def _gigatoken(tokenizer: Tokenizer) -> tuple[Encode | None, str]:
  """Returns the fast encoder, if it can be, and a line about it."""
  if not isinstance(tokenizer, BPETokenizer):
    return None, ''
  try:
    import awkward
    import gigatoken
  except ImportError:
    return None, 'tokenizers encodes (pip install "mla_moe[fast]" is faster)'
  try:
    fast = gigatoken.Tokenizer.from_json(_plain(tokenizer.core))
  except Exception as error:  # it knows some splits alone
    why = ' '.join(str(error).split())[:80]
    return None, f'tokenizers encodes: gigatoken cannot ({why})'

  def encode(texts: list[str]) -> list[np.ndarray]:
    rows = fast.encode_batch(texts)
    ids = np.asarray(awkward.flatten(rows)).astype(np.int32)
    ends = np.cumsum(np.asarray(awkward.num(rows)))
    return np.split(ids, ends[:-1])

  return encode, 'gigatoken encodes, its ids compared with those of tokenizers'


def _plain(core: Any) -> str:
  """Returns a tokenizer.json without special tokens: text becomes none.

  gigatoken knows splits by their exact text. Ours of V3 spell a line's end as
  an escape, and V3's own as itself: the same pattern.
  """
  values = json.loads(core.to_str())
  added = values.get('added_tokens') or []
  values['added_tokens'] = [token for token in added if not token['special']]

  def unescaped(match: re.Match) -> str:
    return _ESCAPES.get(match[1], match[0])

  splits = values.get('pre_tokenizer') or {}
  for split in splits.get('pretokenizers', [splits]):
    pattern = split.get('pattern', {})
    if 'Regex' in pattern:
      pattern['Regex'] = re.sub(r'\\(.)', unescaped, pattern['Regex'])
  return json.dumps(values)


def _added(tokenizer: BPETokenizer) -> str:
  """Returns a text that spells each added token, alone and in words."""
  tokens = tokenizer.core.get_added_tokens_decoder().values()
  return ''.join(f' {t.content} a{t.content}b\n' for t in tokens) or ' '


def _clean(text: str) -> str:
  return text.encode('utf-8', 'replace').decode()
