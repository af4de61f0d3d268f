"""Which experts a token goes to, with what weight, and how load is balanced.

Scores are computed in float32 (V3 section 2.1.2). The selection bias, and the
limit to a few groups, decide who is chosen; the weights are the scores without
the bias. So moving a bias never changes a gate value, only the selection, and
balance costs no gradient: `rebalance` moves each bias by a fixed step against
its expert's load (Wang et al. 2024).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mla_moe import sharding
from mla_moe.config import MoEConfig
from mla_moe.types import Array, Float, Int

# Kept by rematerialisation: few numbers a token, slow to compute again.
SAVED = ('chosen', 'balance_counts')


class Routing(NamedTuple):
  """weights [M, K] float32, chosen [M, K] int32, scores [M, E] float32."""

  weights: Array
  chosen: Array
  scores: Array


def route(
  x: Float[Array, 'M D'],
  w_router: Float[Array, 'D E'],
  bias: Float[Array, ' E'] | None,
  moe: MoEConfig,
) -> Routing:
  """Scores every expert and picks top_k for each token.

  The gradient flows through the weights alone.
  """
  logits = jnp.einsum(
    'md,de->me',
    x.astype(jnp.float32),
    w_router,
    precision=jax.lax.Precision.HIGHEST,
  )
  sigmoid = moe.scoring == 'sigmoid'
  scores = jax.nn.sigmoid(logits) if sigmoid else jax.nn.softmax(logits, -1)
  chosen = select(jax.lax.stop_gradient(scores), bias, moe)
  chosen = checkpoint_name(chosen, SAVED[0])
  weights = jnp.take_along_axis(scores, chosen, axis=-1)
  if moe.normalize:
    weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
  return Routing(weights * moe.scale, chosen, scores)


def select(
  scores: Float[Array, 'M E'],
  bias: Float[Array, ' E'] | None,
  moe: MoEConfig,
) -> Int[Array, 'M K']:
  """The top_k experts by biased score, within the best groups.

  Experts of other groups are masked with -inf: 0 would win over a kept expert
  whose biased score is negative.
  """
  if bias is not None:
    scores = scores + bias[None]
  if moe.groups > 1:
    grouped = scores.reshape(len(scores), moe.groups, -1)
    best = 2 if moe.method == 'noaux_tc' else 1
    value = jax.lax.top_k(grouped, best)[0].sum(-1)
    kept = jax.lax.top_k(value, moe.top_groups)[1]
    keep = (kept[:, :, None] == jnp.arange(moe.groups)[None, None]).any(1)
    scores = jnp.where(keep[:, :, None], grouped, -jnp.inf).reshape(
      scores.shape
    )
  return jax.lax.top_k(scores, moe.top_k)[1].astype(jnp.int32)


def count(
  chosen: Int[Array, 'M K'],
  experts: int,
  mask: Float[Array, ' M'] | None = None,
) -> Int[Array, ' E']:
  """Tokens sent to each expert; tokens whose `mask` is 0 are not counted."""
  ones = jnp.ones(chosen.shape[0]) if mask is None else mask
  ones = jnp.broadcast_to(ones.astype(jnp.int32)[:, None], chosen.shape)
  return jnp.zeros(experts, jnp.int32).at[chosen].add(ones)


def entropy(
  scores: Float[Array, 'M E'],
  mask: Float[Array, ' M'] | None = None,
  axes: tuple[str, ...] = (),
) -> Float[Array, '']:
  """Mean entropy in nats of the tokens' normalised scores; at most ln E.

  Of all the tokens that are split over the mesh's `axes`.
  """
  share = scores / (scores.sum(-1, keepdims=True) + 1e-20)
  nats = -(share * jnp.log(share + 1e-20)).sum(-1)
  ones = jnp.ones_like(nats) if mask is None else mask
  sums = (sharding.psum(x.sum(), axes) for x in (nats * ones, ones))
  return jnp.divide(*sums)


def balance(
  scores: Float[Array, 'B T E'],
  top_k: int,
  mask: Float[Array, 'B T'] | None = None,
  axes: tuple[str, ...] = (),
) -> Float[Array, '']:
  """V3's sequence-wise balance loss, equations 17 to 20, without alpha.

  sum_i f_i P_i of each sequence, averaged: f counts the top_k of the raw
  scores (no bias, no groups, no gradient), P is the mean normalised score.
  Perfect balance is 1. `mask` 0 leaves a token out. Sequences whose length is
  split over the mesh's `axes` are summed over them before the product.
  """
  experts = scores.shape[-1]
  total = lambda x: sharding.psum(x, axes)
  if mask is None:
    mask = jnp.ones(scores.shape[:2], jnp.float32)
  tokens = jnp.maximum(total(mask.sum(1)), 1.0)
  chosen = jax.lax.top_k(jax.lax.stop_gradient(scores), top_k)[1]
  add = lambda chosen, mask: (
    jnp.zeros(experts).at[chosen].add(jnp.broadcast_to(mask, chosen.shape))
  )
  counts = total(jax.vmap(add)(chosen, mask[:, :, None]))
  counts = checkpoint_name(counts, SAVED[1])
  frequency = counts * (experts / top_k) / tokens[:, None]
  share = scores / (scores.sum(-1, keepdims=True) + 1e-20)
  mean = total((share * mask[:, :, None]).sum(1)) / tokens[:, None]
  return (frequency * mean).sum(-1).mean()


def rebalance(
  bias: Float[Array, '*l E'], load: Int[Array, '*l E'], rate: Array | float
) -> Float[Array, '*l E']:
  """bias + rate * sign(mean load - load).

  `load` must be of the whole global batch: all shards, all micro-batches.
  """
  load = load.astype(jnp.float32)
  return bias + rate * jnp.sign(load.mean(-1, keepdims=True) - load)
