"""Rollouts: answers drawn from the policy that the trainer holds.

There is one tree of parameters: the decoder reads the trainer's, so no weights
are sent to an engine. A prompt is read once for all its answers. Draws depend
on the seed of an answer and on the position alone; the seed is a hash of the
run's, the rollout's and the answer's number, because neighbouring seeds would
give neighbouring answers the same random numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from mla_moe.config import CacheConfig, ModelConfig, RLConfig
from mla_moe.decode import generation

from ..data import batches

_SHORT = 64  # tokens: answers so short are rounded up to 16 and not to 64
_LONG = 32  # tokens: of answers so long, the first end well before the last
_FEWEST = 64  # rows: fewer, and a step is no faster
_PAGE = 16  # of the cache, where a prompt and its answer are so short together


class Drawn(NamedTuple):
  """Answers to Q prompts, G each; a question's answers follow each other.

  tokens: the ids of each answer, int32, the end token included. log_probs: of
  each token under the distribution that it was drawn from, float32. ended [Q,
  G]: whether the answer has an end token. routes: of each prompt and answer, if
  they were recorded (`generation.Rollout`), without the last token. drafts:
  passes over rows, and accepted drafts among them.
  """

  tokens: list[np.ndarray]
  log_probs: list[np.ndarray]
  ended: np.ndarray
  routes: list[np.ndarray] | None = None
  drafts: tuple[int, int] = (0, 0)

  @property
  def bodies(self) -> list[np.ndarray]:
    """The ids of each answer before its end token.

    They make its text, whether or not the tokenizer knows that the end token is
    a special one. A body of `max_new` tokens was cut.
    """
    ends = self.ended.reshape(-1)
    pairs = zip(self.tokens, ends, strict=True)
    return [ids[: len(ids) - int(end)] for ids, end in pairs]

  @property
  def lengths(self) -> list[int]:
    """The tokens of each body."""
    return list(map(len, self.bodies))


def seeds(run: int, rollout: int, count: int) -> np.ndarray:
  """Returns the seeds of a rollout's answers, [count] int64 below 2**31."""
  x = np.arange(count, dtype=np.uint64)
  for number in (run, rollout):
    x = batches.mix(x, number)
  return (x >> np.uint64(33)).astype(np.int64)


def draw(
  model: ModelConfig,
  rl: RLConfig,
  variables: Any,
  prompts: Sequence[np.ndarray],
  seeds: np.ndarray | None,
  **options,
) -> Drawn:
  """Returns the answers to the prompts, those of all `parts`."""
  drawn = list(parts(model, rl, variables, prompts, seeds, **options))
  routes = [row for part in drawn for row in part.routes or ()]
  return Drawn(
    [ids for part in drawn for ids in part.tokens],
    [row for part in drawn for row in part.log_probs],
    np.concatenate([part.ended for part in drawn]),
    routes or None,
    tuple(np.sum([part.drafts for part in drawn], axis=0).tolist()),
  )


def parts(
  model: ModelConfig,
  rl: RLConfig,
  variables: Any,
  prompts: Sequence[np.ndarray],
  seeds: np.ndarray | None,
  first: int = 0,
  **options,
) -> Iterator[Drawn]:
  """Yields the answers to the prompts, `rl.rows` at a time (0: all at once).

  Args:
    model: the config of the model.
    rl: `samples`, `max_new`, `temperature` and `rows` count here.
    variables: the model's.
    prompts: token ids.
    seeds: one an answer, [Q * G]. Without them each prompt has one answer, the
      likeliest token at each place.
    first: parts before the one with this prompt are left out. The others are
      the same as without.
    **options: of `generation.rollout`; an answer ends with eos_id by default.
  """
  options = {'stop_ids': (model.eos_id,)} | options
  samples = 1 if seeds is None else rl.samples
  count = per_part(rl, samples, len(prompts))
  width = max(map(len, prompts))
  if width + rl.max_new <= _SHORT:  # else each row would read a page of 128
    cache = options.get('cache', CacheConfig())
    if cache.impl in ('auto', 'xla'):
      options['cache'] = dataclasses.replace(cache, page=_PAGE)
  if rl.max_new >= _LONG:
    options.setdefault('fewest', _FEWEST)
  for start in range(first // count * count, len(prompts), count):
    part = prompts[start : start + count]
    real = len(part) * samples
    # The last part has as many rows as the others, so that nothing compiles.
    part = [*part, *[part[-1]] * (count - len(part))]
    knobs = {'temperature': 0.0}
    if seeds is not None:
      index = start * samples + np.arange(len(part) * samples)
      knobs = {'temperature': rl.temperature}
      knobs['seed'] = seeds[np.minimum(index, len(seeds) - 1)]
    padded = np.zeros((len(part), width), np.int32)
    for row, ids in zip(padded, part, strict=True):
      row[: len(ids)] = ids
    out = generation.rollout(
      model,
      variables,
      padded,
      rl.max_new,
      lengths=[len(ids) for ids in part],
      samples=samples,
      multiple=16 if rl.max_new <= _SHORT else 64,
      **options,
      **knobs,
    )
    yield _drawn(out, [len(ids) for ids in part], real, samples)


def _drawn(out, lengths, real: int, samples: int) -> Drawn:
  """Returns the first `real` rows of a rollout; `lengths` are the prompts'."""
  rows = list(enumerate(out.counts[:real]))
  routes = None
  if out.routes is not None:
    stops = [lengths[row // samples] + n - 1 for row, n in rows]
    # Copies: a view would hold the array of all rows at full length.
    routes = [out.routes[row, :n].copy() for row, n in enumerate(stops)]
  return Drawn(
    [out.tokens[row, :n] for row, n in rows],
    [out.drawn[row, :n] for row, n in rows],
    out.ended[:real].reshape(-1, samples),
    routes,
    (out.passes, out.accepted),
  )


def per_part(rl: RLConfig, samples: int, questions: int) -> int:
  """Returns the questions whose answers are drawn at a time."""
  rows = rl.rows or questions * samples
  return min(max(rows // samples, 1), questions)
