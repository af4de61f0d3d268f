"""Routing replay: experts that another pass of the model has chosen.

A rollout and a trainer are two programs. Where two scores of a router are
nearly equal, a rounding error sends a token to other experts, and the token's
likelihood jumps. With a record of the rollout's choices (R3, arXiv 2510.11370)
or of the trainer's own before its updates (R2, arXiv 2507.18071), the trainer
takes those experts; their gates are of its own scores and have gradients.

A record is [B, T, L, K] int16, of input tokens in natural order, L layers with
experts, and -1 where the router shall choose. It enters the network as a
variable of each MoE layer, so that the scan over layers cuts it up, and comes
back as the choice that the routers would have made. MTP modules have none.
"""

from __future__ import annotations

import jax.numpy as jnp

from mla_moe.model import sequence
from mla_moe.types import Array, Bool, Int, PyTree


def variables(routes: Int[Array, 'B T L K'] | None, mode: str) -> PyTree:
  """Returns the variables of `Transformer` that replay a record.

  With the mode 'compare' (`RLConfig.replay`) all routers choose.
  """
  if routes is None:
    return {}
  if mode == 'compare':
    routes = jnp.full_like(routes, -1)
  chosen = jnp.moveaxis(sequence.arrange(routes), 2, 0).astype(jnp.int32)
  return {'routes': {'moe': {'ffn': {'chosen': chosen}}}}


def record(variables: PyTree) -> Int[Array, 'B T L K'] | None:
  """Returns the routers' own choices, of the variables after a pass.

  It is None where the pass has had no record.
  """
  if 'routes' not in variables:
    return None
  chosen = variables['routes']['moe']['ffn']['chosen'].astype(jnp.int16)
  return sequence.restore(jnp.moveaxis(chosen, 0, 2))


def flips(
  one: Int[Array, '*b K'], two: Int[Array, '*b K']
) -> Bool[Array, '*b']:
  """Whether two choices of a token in a layer differ as sets of experts.

  A choice of -1 equals any.
  """
  differ = (jnp.sort(one, axis=-1) != jnp.sort(two, axis=-1)).any(-1)
  return differ & (one[..., 0] >= 0) & (two[..., 0] >= 0)
