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
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

_ANSWERS = 2**11 - 1  # of a row: their numbers are above 20 bits of an int32


class Rows(NamedTuple):
  """Packed rows, [R, T] int32; the fields are those of `batches.Batch`."""

  tokens: np.ndarray
  targets: np.ndarray
  segments: np.ndarray
  positions: np.ndarray


class Place(NamedTuple):
  """Pair `index` in a row, whose columns [first, stop) predict its completion.

  The prompt without its last token begins at `start`. `outer` is its segment,
  `segment` that of the rest.
  """

  index: int
  row: int
  start: int
  first: int
  stop: int
  outer: int
  segment: int


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


def shared(
  pairs: Sequence[tuple[np.ndarray, np.ndarray]], room: int
) -> list[list[Place]]:
  """Returns rows in which neighbouring pairs with one prompt share it.

  Each completion stands after a copy of the prompt's last token, which predicts
  its first one. Of the completions that still fit, the longest comes first;
  those that no longer fit get the prompt once more, in the next row.
  """
  rows, free, answers = [], 0, 0
  of_prompt = itertools.groupby(range(len(pairs)), lambda i: list(pairs[i][0]))
  for prompt, group in of_prompt:
    outer, left = (
      len(prompt) - 1,
      sorted(group, key=lambda i: -len(pairs[i][1])),
    )
    while left:
      shortest = len(pairs[left[-1]][1])
      if outer + shortest > free or answers == _ANSWERS:
        rows.append([])
        free, answers, prompts = room, 0, 0
      start, column = room - free, room - free + outer
      rest = []
      for index in left:
        stop = column + len(pairs[index][1])
        if stop > room or answers == _ANSWERS:
          rest.append(index)
          continue
        answers += 1
        segment = answers << 20 | prompts
        place = index, len(rows) - 1, start, column, stop, prompts, segment
        rows[-1].append(Place(*place))
        column = stop
      free, left, prompts = room - column, rest, prompts + 1
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
  places = list(_places(pairs, rows))
  return placed(pairs, places, len(rows), length), places


def placed(pairs, places: Sequence[Place], rows: int, length: int) -> Rows:
  """Returns `rows` rows of `length` columns with the pairs in their places."""
  out = Rows(*(np.zeros((rows, length), np.int32) for _ in Rows._fields))
  out.targets[:], out.segments[:] = -1, -1
  for index, row, start, first, stop, outer, segment in places:
    prompt, completion = pairs[index]
    before, count = len(prompt) - 1, stop - first
    end = start + before
    out.tokens[row, start:end] = prompt[:-1]
    out.segments[row, start:end] = outer
    out.positions[row, start:end] = np.arange(before)
    out.tokens[row, first] = prompt[-1]
    out.tokens[row, first + 1 : stop] = completion[:-1]
    out.targets[row, first:stop] = completion
    out.segments[row, first:stop] = segment
    out.positions[row, first:stop] = np.arange(before, before + count)
  return out


def _places(pairs, rows) -> Iterator[Place]:
  for row, members in enumerate(rows):
    start = 0
    for segment, index in enumerate(members):
      prompt, completion = map(len, pairs[index])
      stop = start + columns(prompt, completion)
      first = start + prompt - 1
      yield Place(index, row, start, first, stop, segment, segment)
      start = stop
