"""Models of one seed, trained in pairs: their difference is one measurement.

They begin with the same weights, read the same text in the same order and are
judged on the same held-out text. So the difference between two of them has
nothing of the seed in it. It still has chance of its own, for any rounding
sends two runs apart; the mean of many seeds wears that off, and its standard
error says how far.

A model is one row of a .jsonl file. A run that is stopped goes on with the next
row.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterable

import jax
import numpy as np

from mla_moe import config as c
from mla_moe.train import optim, step
from mla_moe.train.state import init_state

from ..data import batches, corpus, tokenizer

DATA = c.DataConfig(seq_len=128, batch_size=8)
HELDOUT = 48  # batches


@functools.cache
def text():
  """Returns the training and the held-out tokens, as bytes."""
  words = tokenizer.load('byte', 256, 257)
  return corpus.prepare(DATA, words, pathlib.Path('runs/.corpus'))


@functools.cache
def programs(config: c.Config):
  """Returns the first state, a step and an evaluation, compiled once."""
  jit = lambda f, **k: jax.jit(functools.partial(f, config=config), **k)
  train = jit(step.train_step, donate_argnums=0)
  return jit(init_state), train, jit(step.eval_step)


def trained(
  config: c.Config,
  seed: int,
  change: Callable[[optim.Rates], optim.Rates] = lambda rates: rates,
) -> tuple[float, list[dict]]:
  """Trains `config` for `config.run.steps` from `seed`.

  Args:
    config: of the model and its training.
    seed: of the weights and of the order of the text.
    change: replaces some of a step's rates; one program serves them all.

  Returns:
    The held-out loss in nats a byte, and the values that each step returned.
  """
  init, train, evaluate = programs(config)
  state = init(jax.random.key(seed))
  data = dataclasses.replace(config.data, seed=seed)
  tokens = data.seq_len * data.batch_size
  values = []
  for number in range(config.run.steps):
    batch = batches.batch_at(text().train, data, number, text().bos_id)
    rates = change(optim.rates(config.optim, number, number * tokens))
    state, of_step = train(state, batch, rates)
    values.append(of_step)
  heldout = batches.eval_batches(text().heldout, DATA, text().bos_id, HELDOUT)
  sums = [evaluate(state, batch) for batch in heldout]
  nll = sum(float(s['nll']) for s in sums) / sum(int(s['tokens']) for s in sums)
  return nll, values


def rows(file: pathlib.Path) -> list[dict]:
  """Returns the rows of `file`, each with `name`, `seed` and the loss `nll`."""
  if not file.exists():
    return []
  return [
    json.loads(line) for line in file.read_text(encoding='utf-8').splitlines()
  ]


def add(
  file: pathlib.Path,
  names: Iterable[str],
  seeds: Iterable[int],
  measure: Callable[[str, int], dict],
) -> None:
  """Appends measure(name, seed) to `file` for every pair that it lacks."""
  done = {(row['name'], row['seed']) for row in rows(file)}
  for seed in seeds:
    for name in names:
      if (name, seed) not in done:
        row = {'name': name, 'seed': seed, **measure(name, seed)}
        with file.open('a', encoding='utf-8') as lines:
          lines.write(json.dumps(row) + '\n')


def mean(values) -> tuple[float, float]:
  """Returns the mean of independent values and its standard error."""
  values = np.asarray(values, np.float64)
  error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0
  return float(values.mean()), float(error)


def interval(values) -> tuple[float, float]:
  """Returns the mean, and half the width of its 95 % interval; 0 of one.

  The interval is Student's: of few runs, whose spread is estimated, too.
  """
  from scipy import stats  # which jax needs, too

  average, error = mean(values)
  few = len(values) < 2
  return average, 0.0 if few else stats.t.ppf(0.975, len(values) - 1) * error
