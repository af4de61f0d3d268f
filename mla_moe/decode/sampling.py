"""From logits to tokens: greedy, temperature, top-k, top-p, min-p, penalty.

Every knob is a number a row, so that requests with different ones share a
batch and a program. `distribution` gives explicit log-probabilities, a single
certain token for a greedy row: what speculative decoding needs to be exact.
A row's draws come from its seed and the token's position alone, so that they do
not depend on the rows beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mla_moe.config import ConfigError
from mla_moe.types import Array, Bool, Float, Int, PyTree

# What a position's random numbers are for: each has a stream of its own.
TOKEN, ACCEPT, RESIDUAL, DRAFT = range(4)


@struct.dataclass
class Knobs:
  """Of each row, [B]: temperature (0: greedy), top_k (0: off), top_p, min_p,
  repetition penalty (1: off), float32, and the seed, uint32."""

  temperature: PyTree
  top_k: PyTree
  top_p: PyTree
  min_p: PyTree
  penalty: PyTree
  seed: PyTree


def knobs(
  batch: int,
  *,
  temperature: float | Sequence | Array = 0.0,
  top_k: int | Sequence | Array = 0,
  top_p: float | Sequence | Array = 1.0,
  min_p: float | Sequence | Array = 0.0,
  repetition_penalty: float | Sequence | Array = 1.0,
  seed: int | Sequence | Array = 0,
) -> Knobs:
  """Checked knobs, one value for all rows or one a row.

  A single seed gives row i the seed `seed + i`.

  Raises:
    ConfigError: a value outside its range, or not `batch` of them.
  """

  def rows(name, values, good, rule, dtype):
    array = np.atleast_1d(np.asarray(values))
    if array.shape not in ((1,), (batch,)):
      raise ConfigError(f'{name}: {array.size} values for {batch} rows')
    for value in array.tolist():
      number = isinstance(value, (int, float)) and not isinstance(value, bool)
      if not number or not math.isfinite(value) or not good(value):
        raise ConfigError(f'{name}={value!r}: {rule}')
    return np.broadcast_to(array, (batch,)).astype(dtype)

  def some(name, values, good, rule):
    return rows(name, values, good, rule, np.float32)

  whole = lambda x: float(x).is_integer() and 0 <= x < 2**31
  seeds = rows('seed', seed, whole, 'must be from 0 to 2**31 - 1', np.uint32)
  if np.ndim(seed) == 0:
    seeds = seeds + np.arange(batch, dtype=np.uint32)
  positive = 'must be 0 (greedy) or a positive number'
  unit = lambda x: 0 <= x <= 1
  return Knobs(
    temperature=some('temperature', temperature, lambda x: x >= 0, positive),
    top_k=rows('top_k', top_k, whole, 'must be 0 (off) or more', np.int32),
    top_p=some(
      'top_p', top_p, lambda x: 0 < x <= 1, 'must be above 0 and at most 1'
    ),
    min_p=some('min_p', min_p, unit, 'must be from 0 to 1'),
    penalty=some(
      'repetition_penalty',
      repetition_penalty,
      lambda x: x > 0,
      'must be above 0 (1: off)',
    ),
    seed=seeds,
  )


def distribution(
  logits: Float[Array, 'B V'], seen: Bool[Array, 'B V'], how: Knobs
) -> Float[Array, 'B V']:
  """Log-probabilities to draw from; -inf for what cannot be drawn.

  Args:
    logits: float32.
    seen: tokens of the row so far, for the penalty.
    how: in the order in which transformers applies them: penalty,
      temperature, top-k, top-p, min-p.
  """
  penalty = how.penalty[:, None]
  lower = jnp.where(logits > 0, logits / penalty, logits * penalty)
  logits = jnp.where(seen, lower, logits)
  greedy = how.temperature[:, None] == 0
  ids = jnp.arange(logits.shape[-1])[None]
  best = jnp.where(ids == logits.argmax(-1)[:, None], 0.0, -jnp.inf)

  def warm(logits):
    x = logits / jnp.where(greedy, 1.0, how.temperature[:, None])
    cut = jnp.any((how.top_k > 0) | (how.top_p < 1))
    x = jax.lax.cond(cut, _nucleus, lambda x, _: x, x, how)
    floor = x.max(-1, keepdims=True) + jnp.log(how.min_p)[:, None]
    x = jnp.where(x < floor, -jnp.inf, x)
    return jnp.where(greedy, best, jax.nn.log_softmax(x))

  return jax.lax.cond(jnp.all(greedy), lambda _: best, warm, logits)


def _nucleus(x, how):
  """Without what top-k and top-p leave out; equals of the last one stay."""
  falling = -jnp.sort(-x, axis=-1)
  at = jnp.arange(x.shape[-1])[None]
  count = jnp.where(how.top_k > 0, how.top_k, x.shape[-1])[:, None]
  falling = jnp.where(at < count, falling, -jnp.inf)
  share = jax.nn.softmax(falling)
  before = jnp.cumsum(share, axis=-1) - share
  kept = (before < how.top_p[:, None]) & (falling > -jnp.inf)
  last = jnp.where(kept, falling, jnp.inf).min(-1, keepdims=True)
  return jnp.where(x < last, -jnp.inf, x)


def draw(
  log_probs: Float[Array, 'B V'],
  how: Knobs,
  position: Int[Array, ' B'],
  use: int = TOKEN,
) -> Int[Array, ' B']:
  """A token of each row for `position`, int32."""

  def warm(x):
    one = lambda key, x: jax.random.categorical(key, x)
    return jax.vmap(one)(_keys(how, position, use), x)

  best = lambda x: x.argmax(-1)
  greedy = jnp.all(how.temperature == 0)
  return jax.lax.cond(greedy, best, warm, log_probs).astype(jnp.int32)


def uniform(
  how: Knobs, position: Int[Array, ' B'], use: int
) -> Float[Array, ' B']:
  """A number from [0, 1) for each row."""
  return jax.vmap(jax.random.uniform)(_keys(how, position, use))


def _keys(how, position, use):
  def one(seed, position):
    key = jax.random.fold_in(jax.random.key(seed), position)
    return jax.random.fold_in(key, use)

  return jax.vmap(one)(how.seed, position)


def log_prob(
  logits: Float[Array, 'B V'], tokens: Int[Array, ' B']
) -> Float[Array, ' B']:
  """The model's own log-probability of a token, before every knob: what
  reinforcement learning compares with the training forward."""
  picked = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
  return picked - jax.nn.logsumexp(logits, axis=-1)
