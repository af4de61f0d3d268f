"""Answers packed into the rows of updates, every array at its target's place.

An update has as many rows as its answers alone would need, and `count` says how
many micro-batches are real: the shapes of all updates of a run are the same,
and only real micro-batches are computed. `data.packing` has the columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mla_moe.config import ConfigError
from mla_moe.types import Float, Int

from ..data import packing
from .objective import Episodes


class Answer(NamedTuple):
  """A prompt's continuation with what an update has to know of it.

  prompt [P] and tokens [C]: ids, the end token included. rollout [C]: the
  log-probability of each token when it was drawn. advantage, and weight of each
  token. routes [P + C - 1, L, K]: the experts of each token read, or None.
  """

  prompt: Int[np.ndarray, ' P']
  tokens: Int[np.ndarray, ' C']
  rollout: Float[np.ndarray, ' C']
  advantage: float
  weight: float
  routes: Int[np.ndarray, 'S L K'] | None = None


def pack(
  answers: Sequence[Answer],
  length: int,
  micro: int,
  fresh: bool = True,
  prompt: str = 'copied',
) -> Episodes:
  """Returns the answers in rows of `length`, `micro` rows a micro-batch.

  A prompt and its answer take P + C - 1 columns: the last token is predicted,
  and not read. A 'shared' prompt takes P - 1 columns of a row for all answers
  that follow it there, and each answer C (`packing.shared`).

  Raises:
    ConfigError: an answer that no row can hold.
  """
  pairs = [(answer.prompt, answer.tokens) for answer in answers]
  lengths = [packing.columns(len(p), len(c)) for p, c in pairs]
  if max(lengths) > length:
    raise ConfigError(
      f'a prompt and its answer need {max(lengths)} columns: more than the '
      f'data.seq_len={length} of a row'
    )
  most = -(-len(answers) // micro)
  if prompt == 'shared':
    rows = packing.shared(pairs, length)
    places = [place for row in rows for place in row]
    packed = packing.placed(pairs, places, most * micro, length)
  else:
    rows = packing.best_fit(lengths, length)
    empty = [[]] * (most * micro - len(rows))
    packed, places = packing.fill(pairs, rows + empty, length)
  real = -(-len(rows) // micro)
  floats = np.zeros((5, most * micro, length), np.float32)
  rollout, _, _, advantage, weight = floats
  for index, row, _, first, stop, *_ in places:
    rollout[row, first:stop] = answers[index].rollout
    advantage[row, first:stop] = answers[index].advantage
    weight[row, first:stop] = answers[index].weight
  arrays = (x.reshape(most, micro, length) for x in (*packed, *floats))
  routes = None
  if answers[0].routes is not None:
    each = answers[0].routes.shape[1:]
    routes = np.full((most * micro, length, *each), -1, np.int16)
    for index, row, start, first, stop, *_ in places:
      before = len(answers[index].prompt) - 1
      routes[row, start : start + before] = answers[index].routes[:before]
      routes[row, first:stop] = answers[index].routes[before:]
    routes = routes.reshape(most, micro, length, *each)
  return Episodes(*arrays, np.int32(real), np.int32(fresh), routes)
