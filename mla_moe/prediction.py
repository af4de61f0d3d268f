"""The loss of hidden states on a mesh: tokens and vocabulary both split.

Without a mesh this is `losses.token_nll`. On one, each device computes its own
tokens' logits of its own columns of the head; what is left to exchange are two
numbers a token, the target's logit and the logsumexp (Shoeybi et al. 2019).

The main model's states and the MTP modules' come in one pass (S of them): they
share the head, whose gradient is the largest array of a step and would else be
there once for each, and once more for their sum.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mla_moe import losses, sharding
from mla_moe.types import Array, Float, Int


def token_nll(
  hidden: Float[Array, 'S B T D'],
  head: Float[Array, 'D V'],
  targets: Int[Array, 'S B T'],
) -> tuple[Float[Array, 'S B T'], Float[Array, 'S B T']]:
  """-log p(target) and the logits' logsumexp, as in `losses.token_nll`."""
  every = sharding.automatic()
  if not every:
    flat = hidden.reshape(-1, hidden.shape[-1]), head, targets.reshape(-1)
    nll, lse = losses.token_nll(*flat)
    return nll.reshape(targets.shape), lse.reshape(targets.shape)
  stream = sharding.partition((None, 'batch', 'length', 'stream'), hidden)
  part = sharding.partition((None, 'batch', 'part'), targets)
  rows, length = sharding.laid(('batch', 'part'), targets.shape[1:])
  across = 'tensor' in sharding.laid(('length',), hidden.shape[2:3])[0]
  over, columns = sharding.laid(('embed', 'vocab'), head.shape)
  same = tuple(a for a in every if a not in rows + length + ('tensor',))
  vocab = head.shape[1]

  def local(hidden, head, targets):
    head = sharding.varying(head)  # so that its gradient's shards are summed
    if across:
      hidden = jax.lax.all_gather(hidden, 'tensor', axis=2, tiled=True)
    if over:
      head = jax.lax.all_gather(head, over, axis=0, tiled=True)
    hidden = sharding.varying(hidden)
    flat, at = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    first = 0
    if columns:
      first = jax.lax.axis_index('tensor') * head.shape[1]
    here = (at >= first) & (at < first + head.shape[1])
    local_at = sharding.varying(jnp.where(here, at - first, -1))
    picked, lse = losses.picked_and_lse(flat, head, local_at, losses.BLOCK)
    picked = jnp.where(here, picked, 0.0)
    if columns:
      peak = jax.lax.pmax(jax.lax.stop_gradient(lse), columns)
      lse = peak + jnp.log(jax.lax.psum(jnp.exp(lse - peak), columns))
      picked = jax.lax.psum(picked, columns)
    else:
      picked, lse = jax.lax.pmean((picked, lse), 'tensor')
    picked = jnp.where(at >= vocab, jnp.nan, picked)
    nll = jnp.where(at >= 0, lse - picked, 0.0)
    out = nll.reshape(targets.shape), lse.reshape(targets.shape)
    return jax.lax.pmean(out, same) if same else out

  specs = stream, sharding.partition(('embed', 'vocab'), head), part
  return sharding.local(local, specs, (part, part))(hidden, head, targets)
