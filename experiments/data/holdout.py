"""The held-out side of a text: about a fraction of it, however few its files.

A document is held out if its key, uniform in [0, 2**64), is below the fraction
of that range. Of many documents of like sizes that is the fraction of the text.
Of few, or of one that outweighs the others, it may be nothing or nearly all. So
the documents of a text with at most `MOST` of them are weighed first. If the
keys hold out less than half of the fraction or more than twice as much, the
documents with the lowest keys are held out up to the fraction, and the last of
them is cut: its end, from a line's beginning, is held out.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from .documents import Document

MOST = 256  # documents that are weighed before any is written
# Of a very small text more is held out, or it would be no sequence.
_LEAST_BYTES = 4096
_LEAST_PART = 0.1

Sides = list[tuple[Document, bool]]  # whether each is held out


def sides(documents: Iterator[Document], fraction: float) -> Iterator[Sides]:
  """Yields the documents with their sides, in order, `MOST` at a time."""
  first = list(itertools.islice(documents, MOST + 1))
  if len(first) <= MOST:
    yield from [_weighed(first, fraction)] if first else []
    return
  yield from by_key(itertools.chain(first, documents), fraction)


def by_key(documents: Iterator[Document], fraction: float) -> Iterator[Sides]:
  """Yields the same of a part of a text that has more than `MOST` of them."""
  while group := list(itertools.islice(documents, MOST)):
    yield [(document, _is_heldout(document, fraction)) for document in group]


def _is_heldout(document: Document, fraction: float) -> bool:
  return document.key < fraction * 2**64


def _weighed(documents: Sequence[Document], fraction: float) -> Sides:
  sizes = [len(d.text.encode('utf-8', 'replace')) for d in documents]
  total = sum(sizes)
  least = min(_LEAST_BYTES, _LEAST_PART * total)
  target = max(fraction * total, least)
  by_key = [_is_heldout(document, fraction) for document in documents]
  part = sum(itertools.compress(sizes, by_key))
  if target / 2 <= part <= min(2 * target, (target + total) / 2):
    return list(zip(documents, by_key, strict=True))
  return _up_to(documents, sizes, target)


def _up_to(
  documents: Sequence[Document], sizes: Sequence[int], target: float
) -> Sides:
  """Returns the sides where about `target` bytes are held out.

  Equal documents stay on one side, but in a text that has few others.
  """
  key = lambda i: documents[i].key
  order = sorted(range(len(documents)), key=key)
  groups = [list(equal) for _, equal in itertools.groupby(order, key)]
  heldout, part, cut = _lowest(groups, sizes, target)
  if part < target / 2 and cut is None:
    heldout, part, cut = _lowest([[i] for i in order], sizes, target)
  result: Sides = []
  for i, document in enumerate(documents):
    if i == cut:
      head, tail = _cut(document, (target - part) / sizes[i])
      result += [(head, False)] if head.text else []
      result.append((tail, True))
    else:
      result.append((document, i in heldout))
  return result


def _lowest(
  groups: Sequence[Sequence[int]], sizes: Sequence[int], target: float
) -> tuple[set[int], int, int | None]:
  """Returns (documents of the first groups, their bytes, the one to cut).

  A group of several that is too large is left out, as it is not cut.
  """
  heldout, part = set(), 0
  most = min(1.5 * target, (target + sum(sizes)) / 2)
  for group in groups:
    size = sum(sizes[i] for i in group)
    if part + size <= most:
      heldout.update(group)
      part += size
    elif part >= target / 2:
      break
    elif len(group) == 1:
      return heldout, part, group[0]
  return heldout, part, None


def _cut(document: Document, part: float) -> tuple[Document, Document]:
  """Returns a document's beginning and its end, about this part of it.

  The end begins with a line, or with a word of a long line.
  """
  text = document.text
  # The beginning has a character, too, if there are two.
  size = max(1, min(round(len(text) * part), len(text) - 1))
  place = len(text) - size
  line, later = text.rfind('\n', 0, place) + 1, text.find('\n', place, -1) + 1
  if line and len(text) - line <= 2 * size:
    place = line
  elif later:
    place = later
  else:
    place = text.rfind(' ', place - size, place) + 1 or place
  tail = document._replace(text=text[place:], replaced=0)
  return document._replace(text=text[:place]), tail
