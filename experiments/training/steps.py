"""One step of a run: its tokens, its rates and the compiled program.

The loop (`experiments.train`) and the check of a single step (`replay`) take
their steps from here, so that both compute the same bits.
"""

from __future__ import annotations

import bisect
from typing import Any

from mla_moe.config import Config, RunConfig
from mla_moe.train import optim

from ..data import batches


def tokens(config: Config, number: int) -> tuple[int, int]:
  """Returns the tokens of text before step `number` (from 1), and in it."""
  before, size = batches.span(config.data, number - 1)
  return before * config.data.seq_len, size * config.data.seq_len


def rates(config: Config, number: int) -> optim.Rates:
  """Returns the values of the schedules at step `number` (from 1)."""
  return optim.rates(config.optim, number - 1, tokens(config, number)[0])


def schedule_end(config: Config) -> str:
  """Returns a line about a schedule that does not end with the run, or ''."""
  last = config.run.steps
  end = sum(length for _, length, _ in config.optim.phases)
  if abs(end - sum(tokens(config, last))) <= 0.01 * end:
    return ''
  before = lambda number: tokens(config, number)[0]
  steps = bisect.bisect_left(range(1, 10**15), end, key=before)
  rate = rates(config, last).learning_rate / config.optim.learning_rate
  return (
    f'The schedule ends at step {steps:,}, the run at {last:,}: there the '
    f'learning rate is {rate:.0%} of its peak.'
  )


def take(
  setup: Any, state: Any, batch: batches.Batch, rates: optim.Rates
) -> tuple[Any, dict]:
  """Returns the state after a step, and its metrics; `state` is donated."""
  batch, rates = setup.place(batch), setup.place(rates)
  return setup.train(state, batch, rates, setup.base.params)


def is_due(run: RunConfig, number: int, period: int) -> bool:
  """Whether a chore of this period (0: never) is due after step `number`.

  After the last step every chore is.
  """
  return bool(period) and (number % period == 0 or number == run.steps)


def is_checked(run: RunConfig, number: int) -> bool:
  """Whether the state's fingerprints are recorded after step `number`.

  They are so, too, one step after each save: to replay that step is cheap.
  """
  after_save = run.save_every and (number - 1) % run.save_every == 0
  due = is_due(run, number, run.check_every) or bool(after_save)
  return bool(run.check_every) and due
