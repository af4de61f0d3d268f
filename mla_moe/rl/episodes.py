"""Answers packed into the rows of updates, every array at its target's place.

Column t of a row predicts token t + 1. So answer token j of a prompt of P
tokens stands in column P + j - 1 of its stretch: there are its target, its
log-probabilities, its advantage and its weight. The mask comes from lengths,
never from token values, so an end token that is also the padding is learned.

Rows are filled first-fit, longest answer first; attention and positions end
with each answer. An update has as many rows as its answers alone would need,
and `count` says how many micro-batches are real: the shapes of all updates of a
run are the same, and only real micro-batches are computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mla_moe.config import ConfigError
from mla_moe.types import Float, Int


class Answer(NamedTuple):
  """A prompt's continuation with what an update has to know of it.

  prompt [P] and tokens [C]: ids, the end token included. rollout [C]: the
  log-probability of each token when it was drawn. advantage, and weight of each
  token.
  """

  prompt: Int[np.ndarray, ' P']
  tokens: Int[np.ndarray, ' C']
  rollout: Float[np.ndarray, ' C']
  advantage: float
  weight: float


class Episodes(NamedTuple):
  """The rows of one update in n micro-batches, as `data.batches.Batch`.

  tokens, targets (-1: none), segments (-1: padding) and positions are [n, B, T]
  int32; rollout, old, reference, advantage and weight [n, B, T] float32, 0
  where there is no target. count: the number of real micro-batches.
  """

  tokens: np.ndarray
  targets: np.ndarray
  segments: np.ndarray
  positions: np.ndarray
  rollout: np.ndarray
  old: np.ndarray
  reference: np.ndarray
  advantage: np.ndarray
  weight: np.ndarray
  count: np.ndarray


def first_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
  """Returns rows of indices whose lengths fit `room`; longest first.

  Raises:
    ConfigError: one is longer than `room`.
  """
  rows: list[list[int]] = []
  free: list[int] = []
  for index in np.argsort(np.asarray(lengths), kind='stable')[::-1].tolist():
    length = int(lengths[index])
    if length > room:
      raise ConfigError(
        f'a prompt and its answer have {length} tokens: more than the '
        f'data.seq_len={room} of a row'
      )
    row = next((i for i, rest in enumerate(free) if rest >= length), None)
    if row is None:
      row = len(rows)
      rows.append([])
      free.append(room)
    rows[row].append(index)
    free[row] -= length
  return rows


def pack(answers: Sequence[Answer], length: int, micro: int) -> Episodes:
  """Returns the answers in rows of `length`, `micro` rows a micro-batch.

  A prompt and its answer take P + C - 1 columns: the last token is predicted,
  and not read.

  Raises:
    ConfigError: an answer that no row can hold.
  """
  rows = first_fit([len(a.prompt) + len(a.tokens) - 1 for a in answers], length)
  most = -(-len(answers) // micro)
  shape = most * micro, length
  ints = {name: np.zeros(shape, np.int32) for name in Episodes._fields[:4]}
  ints['targets'][:], ints['segments'][:] = -1, -1
  floats = {name: np.zeros(shape, np.float32) for name in Episodes._fields[4:9]}
  for row, members in enumerate(rows):
    start = 0
    for segment, index in enumerate(members):
      answer = answers[index]
      ids = np.concatenate([answer.prompt, answer.tokens])
      stop = start + len(ids) - 1
      first = start + len(answer.prompt) - 1
      ints['tokens'][row, start:stop] = ids[:-1]
      ints['targets'][row, first:stop] = answer.tokens
      ints['segments'][row, start:stop] = segment
      ints['positions'][row, start:stop] = np.arange(stop - start)
      floats['rollout'][row, first:stop] = answer.rollout
      floats['advantage'][row, first:stop] = answer.advantage
      floats['weight'][row, first:stop] = answer.weight
      start = stop
  arrays = (ints | floats).values()
  arrays = (x.reshape(most, micro, length) for x in arrays)
  return Episodes(*arrays, np.int32(-(-len(rows) // micro)))
