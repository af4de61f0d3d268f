"""The pages of the cache that are free, and how many users the others have.

A page with several users is shared by samples of one prompt. Page 0 has no
user, ever: it stays empty, and rows without a sample read it.
"""

from __future__ import annotations

import numpy as np


class PagePool:
  """Pages 1 to `pages`, all free at first."""

  def __init__(self, pages: int):
    self._free = list(range(pages, 0, -1))
    self._users = np.zeros(pages + 1, np.int32)
    self._spoilt = set()
    self.pages = pages

  @property
  def free(self) -> int:
    """Free pages."""
    return len(self._free)

  def take(self, count: int) -> list[int]:
    """Returns `count` pages that were free, with one user each."""
    pages = [self._free.pop() for _ in range(count)]
    self._users[pages] = 1
    return pages

  def share(self, pages: list[int]) -> list[int]:
    """Returns the pages, with one user more each."""
    self._users[pages] += 1
    return pages

  def spoil(self, pages: list[int]) -> None:
    """Notes that the pages hold NaN."""
    self._spoilt.update(pages)

  def release(self, pages: list[int]) -> list[int]:
    """Drops one user of each page; without any, it is free.

    Returns those that must be overwritten: a NaN times a probability of zero
    would spoil the next row, too.
    """
    self._users[pages] -= 1
    free = [page for page in pages if not self._users[page]]
    self._free += free
    spoilt = [page for page in free if page in self._spoilt]
    self._spoilt.difference_update(spoilt)
    return spoilt
