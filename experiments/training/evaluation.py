"""The loss of held-out text, as sums that batches and hosts add up."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from mla_moe.config import Config, MTPConfig
from mla_moe.train import step
from mla_moe.train.state import State
from mla_moe.types import Array, Batch


def eval_step(
  state: State, batch: Batch, *, config: Config
) -> dict[str, Array]:
  """Returns sums over a batch: 'nll' in nats, and 'tokens' predicted."""
  # All hidden states go through the head at once: without the MTP modules'.
  main = dataclasses.replace(config.model, mtp=MTPConfig(depth=0))
  config = dataclasses.replace(config, model=main)

  def one(micro):
    out = step.predictions(state.params, state.router, micro, config)
    return out.nll[0].sum(), jnp.sum(micro.targets >= 0)

  parts = batch._replace(count=jnp.zeros(len(batch.tokens)))
  nll, tokens = jax.lax.map(one, parts)
  return {'nll': nll.sum(), 'tokens': tokens.sum()}
