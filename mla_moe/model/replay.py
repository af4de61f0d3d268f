"""Routing replay: experts that another pass of the model has chosen.

A rollout and a trainer are two programs. Where two scores of a router are
nearly equal, a rounding error sends a token to other experts, and the token's
likelihood jumps. With a record of the rollout's choices (R3, arXiv 2510.11370)
or of the trainer's own before its updates (R2, arXiv 2507.18071), the trainer
takes those experts; their gates are of its own scores and have gradients.

A record is [B, T, L, K] int16, of input tokens in natural order, L layers with
experts, and -1 where the router shall choose. The choices that the routers
would have made come back beside the layers' statistics. MTP modules have none.
"""

from __future__ import annotations

import jax.numpy as jnp

from mla_moe.model import sequence
from mla_moe.types import Array, Int


def by_layer(
  routes: Int[Array, 'B T L K'] | None, mode: str
) -> Int[Array, 'L B T K'] | None:
  """Returns a record as `Transformer.features` replays it.

  With the mode 'compare' (`RLConfig.replay`) all routers choose.
  """
  if routes is not None:
    routes = jnp.full_like(routes, -1) if mode == 'compare' else routes
    routes = jnp.moveaxis(sequence.arrange(routes), 2, 0).astype(jnp.int32)
  return routes


def record(chosen: Int[Array, 'L B T K']) -> Int[Array, 'B T L K']:
  """Returns the record of the choices of all layers, int16."""
  return sequence.restore(jnp.moveaxis(chosen.astype(jnp.int16), 0, 2))
