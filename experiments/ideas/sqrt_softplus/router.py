"""A router whose scores are sqrt(softplus(logits)), those of DeepSeek-V4.

A sigmoid is flat above 2: two experts with the logits 4 and 6 have the scores
0.98 and 1.00. This score goes on to grow, as the root of the logit, and falls
off below 0 as exp(x / 2). Its gradient vanishes at both ends as the sigmoid's
does, but falls off more slowly: as x ** -1/2 and exp(x / 2), the sigmoid's as
exp(-x) and exp(x). All else is V3's, and is taken from the library: choice by
score plus bias, gates divided by their sum.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mla_moe.config import MoEConfig
from mla_moe.model import router
from mla_moe.types import Array, Float


def route(
  x: Float[Array, 'M D'],
  w_router: Float[Array, 'D E'],
  bias: Float[Array, ' E'] | None,
  moe: MoEConfig,
) -> router.Routing:
  """Returns the Routing of tokens, as `router.route` does."""
  highest = jax.lax.Precision.HIGHEST
  logits = jnp.einsum(
    'md,de->me', x.astype(jnp.float32), w_router, precision=highest
  )
  scores = jnp.sqrt(jax.nn.softplus(logits))
  chosen = router.select(jax.lax.stop_gradient(scores), bias, moe)
  chosen = checkpoint_name(chosen, router.SAVED[0])
  gates = jnp.take_along_axis(scores, chosen, axis=-1)
  if moe.normalize:
    gates = gates / (gates.sum(-1, keepdims=True) + 1e-20)
  return router.Routing(gates * moe.scale, chosen, scores)
