"""The choice of each token's experts, their gates, and the balance of load.

A token's score for an expert is computed in float32 (V3 section 2.1.2). The
experts with the best scores plus biases are chosen, within the best groups of
experts; their gates are the scores without the biases. So a bias moves the
selection and never a gate, and load is balanced without a gradient: `rebalance`
moves each bias by a fixed step against its expert's load (Wang et al. 2024).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mla_moe import sharding
from mla_moe.config import MoEConfig
from mla_moe.types import Array, Float, Int

# Saved by rematerialisation: few numbers a token, slow to compute again.
SAVED = ('chosen', 'balance_counts')


class Routing(NamedTuple):
  """The experts of each token: ids and gates of the chosen, scores of all."""

  gates: Array  # [M, K] float32
  chosen: Array  # [M, K] int32
  scores: Array  # [M, E] float32


def route(
  x: Float[Array, 'M D'],
  w_router: Float[Array, 'D E'],
  bias: Float[Array, ' E'] | None,
  moe: MoEConfig,
) -> Routing:
  """Returns the Routing of tokens; the choice itself has no gradient."""
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
  return Routing(_gates(scores, chosen, moe), chosen, scores)


def replay(own: Routing, routes: Int[Array, 'M K'], moe: MoEConfig) -> Routing:
  """Returns the Routing to the experts `routes`; a row of -1 keeps its own."""
  pick = lambda mine, other: jnp.where(routes[:, :1] < 0, mine, other)
  gates = _gates(own.scores, routes, moe)
  return Routing(pick(own.gates, gates), pick(own.chosen, routes), own.scores)


def _gates(scores, chosen, moe):
  gates = jnp.take_along_axis(scores, chosen, axis=-1)
  return (_normalised(gates) if moe.normalize else gates) * moe.scale


def select(
  scores: Float[Array, 'M E'],
  bias: Float[Array, ' E'] | None,
  moe: MoEConfig,
) -> Int[Array, 'M K']:
  """Returns the ids of the top_k experts by biased score in the best groups.

  A group's value is its best biased score, or the sum of its best two, by the
  method. Experts of other groups get the score -inf: a 0 would win over a
  negative biased score.
  """
  if bias is not None:
    scores = scores + bias[None]
  if moe.groups > 1:
    grouped = scores.reshape(-1, moe.groups, moe.experts // moe.groups)
    best = 2 if moe.method in ('noaux_tc', 'group_top2') else 1
    value = jax.lax.top_k(grouped, best)[0].sum(-1)
    top = jax.lax.top_k(value, moe.top_groups)[1]
    is_top = (top[:, :, None] == jnp.arange(moe.groups)[None, None]).any(1)
    masked = jnp.where(is_top[:, :, None], grouped, -jnp.inf)
    scores = masked.reshape(scores.shape)
  return jax.lax.top_k(scores, moe.top_k)[1].astype(jnp.int32)


def load(
  chosen: Int[Array, 'M K'],
  experts: int,
  mask: Float[Array, ' M'] | None = None,
) -> Int[Array, ' E']:
  """Returns each expert's number of tokens; a `mask` of 0 leaves one out."""
  ones = jnp.ones(chosen.shape[0]) if mask is None else mask
  ones = jnp.broadcast_to(ones.astype(jnp.int32)[:, None], chosen.shape)
  return jnp.zeros(experts, jnp.int32).at[chosen].add(ones)


def entropy(
  scores: Float[Array, 'M E'],
  mask: Float[Array, ' M'] | None = None,
  axes: tuple[str, ...] = (),
) -> Float[Array, '']:
  """Returns the mean entropy of normalised scores, in nats; at most ln E.

  `axes` are the mesh axes that the tokens are split over.
  """
  scores = _normalised(scores)
  nats = -(scores * jnp.log(scores + 1e-20)).sum(-1)
  ones = jnp.ones_like(nats) if mask is None else mask
  sums = (sharding.psum(x.sum(), axes) for x in (nats * ones, ones))
  return jnp.divide(*sums)


def counted(routing: Routing, moe: MoEConfig) -> Int[Array, 'M K']:
  """Returns the ids of the experts that the balance loss counts.

  V2 counts the experts that a token chooses (its report, section 2.2.3), V3 the
  best by the scores alone, without bias and groups (equation 18).
  """
  if moe.method != 'noaux_tc':
    return routing.chosen
  scores = jax.lax.stop_gradient(routing.scores)
  return jax.lax.top_k(scores, moe.top_k)[1].astype(jnp.int32)


def balance(
  scores: Float[Array, 'B T E'],
  counted: Int[Array, 'B T K'],
  mask: Float[Array, 'B T'] | None = None,
  axes: tuple[str, ...] = (),
) -> Float[Array, '']:
  """Returns the sequence-wise balance loss (V3 equations 17 to 20, alpha 1).

  It is the mean over sequences of sum_i f_i P_i. f_i is the number of tokens
  that count expert i, divided by the mean of all experts. P_i is the mean of
  its normalised scores; only P_i has a gradient. Perfect balance is 1. A `mask`
  of 0 leaves a token out. `axes` are the mesh axes that split the length.
  """
  experts, top_k = scores.shape[-1], counted.shape[-1]
  total = lambda x: sharding.psum(x, axes)
  if mask is None:
    mask = jnp.ones(scores.shape[:2], jnp.float32)
  tokens = jnp.maximum(total(mask.sum(1)), 1.0)
  count = jax.vmap(lambda ids, mask: load(ids, experts, mask))
  counts = total(count(counted, mask)).astype(jnp.float32)
  counts = checkpoint_name(counts, SAVED[1])
  frequency = counts * (experts / top_k) / tokens[:, None]
  scores = _normalised(scores)
  mean = total((scores * mask[:, :, None]).sum(1)) / tokens[:, None]
  return (frequency * mean).sum(-1).mean()


def _normalised(scores):
  return scores / (scores.sum(-1, keepdims=True) + 1e-20)


def rebalance(
  bias: Float[Array, '*l E'], load: Int[Array, '*l E'], rate: Array | float
) -> Float[Array, '*l E']:
  """Returns bias + rate * sign(mean load - load).

  `load` must be of the whole global batch: all devices, all micro-batches.
  """
  load = load.astype(jnp.float32)
  return bias + rate * jnp.sign(load.mean(-1, keepdims=True) - load)
