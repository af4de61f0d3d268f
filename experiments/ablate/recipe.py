"""Recipes: an arm at one size, the price of its step, and its schedule.

A schedule belongs to a run's length, so an arm that gets other steps gets its
own schedule stretched over them (Hoffmann et al. 2022, section 3.1: a run that
is stopped before its rate has fallen looks worse than it is).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from mla_moe import cost
from mla_moe.config import Config
from mla_moe.train import state, step

from ..training import evaluation


class Recipe(NamedTuple):
  """An arm at one size: a config, and the functions that train and judge it.

  init: (key, config=) -> `State`. train: `step.train_step` or its like;
  metrics main_loss, load and skipped are read. evaluate: `eval_step` or its
  like. flops: (config, sequence length) -> training FLOPs of a token.
  """

  config: Config
  init: Callable = state.init_state
  train: Callable = step.train_step
  evaluate: Callable = evaluation.eval_step
  flops: Callable = functools.partial(cost.train_flops_per_token, mtp=True)


def with_functions(config: Config, functions: Any) -> Recipe:
  """Returns the recipe of a config with `block.Functions` of one's own."""
  return Recipe(
    config,
    train=functools.partial(step.train_step, functions=functions),
    evaluate=functools.partial(_evaluate, functions=functions),
  )


def _evaluate(state, batch, *, config: Config, functions: Any) -> dict:
  """Returns `eval_step`'s sums of a batch, with these functions."""
  import jax
  import jax.numpy as jnp

  def one(micro):
    out = step.predictions(state.params, state.router, micro, config, functions)
    return out.nll[0].sum(), jnp.sum(micro.targets >= 0)

  parts = batch._replace(count=jnp.zeros(len(batch.tokens)))
  nll, tokens = jax.lax.map(one, parts)
  return {'nll': nll.sum(), 'tokens': tokens.sum()}


def tokens_of_step(config: Config) -> int:
  """Returns the tokens of one step."""
  return config.data.batch_size * config.data.seq_len


def flops_of_step(recipe: Recipe) -> float:
  """Returns the training FLOPs of one step."""
  config = recipe.config
  of_token = recipe.flops(config, config.data.seq_len)
  return tokens_of_step(config) * of_token


def price(recipe: Recipe, equal: str, seconds: float) -> float:
  """Returns a step's price in the budget; `seconds` are those of a step."""
  return {
    'steps': 1.0,
    'tokens': float(tokens_of_step(recipe.config)),
    'flops': flops_of_step(recipe),
    'seconds': seconds,
  }[equal]


def stretched(config: Config, schedule: Config, steps: int) -> Config:
  """Returns the config with `steps` steps, and its schedule over all of them.

  The schedule of `config` is that of a run of `schedule`'s tokens.
  """
  whole = schedule.run.steps * tokens_of_step(schedule)
  along = steps * tokens_of_step(config) / whole
  turns = steps / schedule.run.steps
  optim = config.optim
  phases = tuple((kind, n * along, end) for kind, n, end in optim.phases)
  optim = dataclasses.replace(
    optim,
    phases=phases,
    warmup_steps=round(optim.warmup_steps * turns),
    bias_tokens=optim.bias_tokens * along,
    mtp_tokens=optim.mtp_tokens * along,
  )
  run = dataclasses.replace(config.run, steps=steps)
  return dataclasses.replace(config, optim=optim, run=run)


def toy(config: Config, i: int) -> Config:
  """Returns a size at toy size, `i` its place in the ladder: 12 steps.

  It has one layer, of experts; an arm may make it a dense one.
  """
  change, model = dataclasses.replace, config.model
  mla = change(model.mla, heads=2, kv_rank=8, nope_dim=8, rope_dim=4)
  mla = change(mla, value_dim=8, query_rank=min(model.mla.query_rank, 8))
  model = change(
    model,
    dim=16 + 8 * i,
    layers=1,
    dense_layers=0,
    dense_width=8 * (model.moe.top_k + model.moe.shared),
    mla=mla,
    moe=change(model.moe, width=8),
  )
  data = change(config.data, seq_len=32, batch_size=4, micro_batch=0)
  run = change(config.run, eval_batches=4)
  small = change(config, model=model, data=data, run=run)
  return stretched(small, config, 12)
