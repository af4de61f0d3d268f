"""Models of one seed, trained in pairs: their difference is one measurement.

They begin with the same weights, read the same text in the same order and are
judged on the same held-out text. So the difference between two of them has
nothing of the seed in it. Its statistics are those of `ablate.differences`; a
change of a config is compared by `experiments.ablate`, and the rest is here.

A model is one row of a .jsonl file. A run that is stopped goes on with the next
row.
"""

from __future__ import annotations

import contextlib
import functools
import pathlib
from collections.abc import Callable, Iterable

import jax

from mla_moe import config as c
from mla_moe.train import step
from mla_moe.train.state import init_state

from .. import workdir
from ..data import corpus, tokenizer
from ..training import evaluation

DATA = c.DataConfig(seq_len=128, batch_size=8)


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
  return jit(init_state), train, jit(evaluation.eval_step)


def rows(file: pathlib.Path) -> list[dict]:
  """Returns the rows of `file`, each with `name`, `seed` and the loss `nll`."""
  return workdir.rows(file)


def add(
  file: pathlib.Path,
  names: Iterable[str],
  seeds: Iterable[int],
  measure: Callable[[str, int], dict],
) -> None:
  """Appends measure(name, seed) to `file` for every pair that it lacks."""
  done = {(row['name'], row['seed']) for row in rows(file)}
  with contextlib.closing(workdir.Rows(file)) as lines:
    for seed in seeds:
      for name in names:
        if (name, seed) not in done:
          lines.append({'name': name, 'seed': seed, **measure(name, seed)})
