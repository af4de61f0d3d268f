"""Prompts and completions in rows of one length, each with its own attention.

Column t of a row predicts token t + 1. So completion token j of a prompt of P
tokens stands in column P + j - 1 of its stretch: its target is there, and
whatever else belongs to it. Which columns have a target follows from lengths,
never from token values, so that an end token which is also the padding is
learned. Attention and positions end with each pair.

Rows are filled best-fit, longest pair first: a pair goes where it leaves the
least room. Padding has segment -1, and is counted nowhere.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np


class Rows(NamedTuple):
  """Packed rows, [R, T] int32; the fields are those of `batches.Batch`."""

  tokens: np.ndarray
  targets: np.ndarray
  segments: np.ndarray
  positions: np.ndarray


class Place(NamedTuple):
  """The columns [first, stop) of a row that predict a completion."""

  index: int
  row: int
  first: int
  stop: int


def columns(prompt: int, completion: int) -> int:
  """Returns the columns of a pair: its last token is predicted, not read."""
  return prompt + completion - 1


def best_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
  """Returns rows of indices whose lengths fit in `room`; all are at most it."""
  rows: list[list[int]] = []
  free: list[int] = []  # rising
  open_rows: dict[int, list[int]] = {}  # by their free columns
  order = np.argsort(-np.asarray(lengths, np.int64), kind='stable')
  for index in order.tolist():
    length = int(lengths[index])
    place = bisect.bisect_left(free, length)
    if place == len(free):
      row, rest = len(rows), room
      rows.append([])
    else:
      rest = free[place]
      row = open_rows[rest].pop()
      if not open_rows[rest]:
        del open_rows[rest], free[place]
    rows[row].append(index)
    rest -= length
    if rest not in open_rows:
      bisect.insort(free, rest)
    open_rows.setdefault(rest, []).append(row)
  return rows


def fill(
  pairs: Sequence[tuple[np.ndarray, np.ndarray]],
  rows: Sequence[Sequence[int]],
  length: int,
) -> tuple[Rows, list[Place]]:
  """Returns rows of `length` columns with the pairs that `rows` lists.

  `pairs` are (prompt [P], completion [C]) of token ids. The places are in the
  order of the rows.
  """
  shape = len(rows), length
  out = Rows(*(np.zeros(shape, np.int32) for _ in Rows._fields))
  out.targets[:], out.segments[:] = -1, -1
  places = list(_places(pairs, rows))
  start = {}
  for index, row, first, stop in places:
    prompt, completion = pairs[index]
    begin = first + 1 - len(prompt)
    segment = start[row] = start.get(row, -1) + 1
    ids = np.concatenate([prompt, completion])
    out.tokens[row, begin:stop] = ids[:-1]
    out.targets[row, first:stop] = completion
    out.segments[row, begin:stop] = segment
    out.positions[row, begin:stop] = np.arange(stop - begin)
  return out, places


def _places(pairs, rows) -> Iterator[Place]:
  for row, members in enumerate(rows):
    start = 0
    for index in members:
      prompt, completion = map(len, pairs[index])
      stop = start + columns(prompt, completion)
      yield Place(index, row, start + prompt - 1, stop)
      start = stop
