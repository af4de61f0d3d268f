"""From logits to a token: penalty, temperature, top-k, top-p, min-p, a draw.

Each knob is one number a row, so that requests with different ones share a
batch and a compiled program. `distribution` returns log-probabilities, with all
mass on one token for a greedy row: speculative decoding needs them to be exact.
The random numbers of a row depend on its seed and the token's position alone,
so the rows beside it do not matter.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mla_moe.config import ConfigError
from mla_moe.types import Array, Bool, Float, Int, PyTree

# The uses of random numbers at one position: each has a stream of its own.
TOKEN, ACCEPT, RESIDUAL, DRAFT = range(4)


@struct.dataclass
class Knobs:
  """Sampling parameters of each row, [B].

  temperature (0: greedy), top_p, min_p and penalty (of repetition, 1: off) are
  float32; top_k (0: off) is int32; seed is uint32.
  """

  temperature: PyTree
  top_k: PyTree
  top_p: PyTree
  min_p: PyTree
  penalty: PyTree
  seed: PyTree


def make_knobs(
  batch: int,
  *,
  temperature: float | Sequence | Array = 0.0,
  top_k: int | Sequence | Array = 0,
  top_p: float | Sequence | Array = 1.0,
  min_p: float | Sequence | Array = 0.0,
  repetition_penalty: float | Sequence | Array = 1.0,
  seed: int | Sequence | Array = 0,
) -> Knobs:
  """Returns checked knobs; an argument is one value for all rows, or one a row.

  One seed for all gives row i the seed `seed + i`.

  Raises:
    ConfigError: a value outside its range, or not `batch` of them.
  """

  def rows(name, values, is_good, rule, dtype=np.float32):
    array = np.atleast_1d(np.asarray(values))
    if array.shape not in ((1,), (batch,)):
      raise ConfigError(f'{name}: {array.size} values for {batch} rows')
    for value in array.tolist():
      number = isinstance(value, (int, float)) and not isinstance(value, bool)
      if not number or not abs(value) < 2**31 or not is_good(value):
        raise ConfigError(f'{name}={value!r:.40}: {rule}')
    return np.broadcast_to(array, (batch,)).astype(dtype)

  whole = lambda x: float(x).is_integer() and 0 <= x
  seeds = rows('seed', seed, whole, 'must be from 0 to 2**31 - 1', np.uint32)
  if np.ndim(seed) == 0:
    seeds = seeds + np.arange(batch, dtype=np.uint32)
  return Knobs(
    temperature=rows(
      'temperature',
      temperature,
      # A logit divided by it, or multiplied by the penalty, is finite.
      lambda x: x == 0 or 1e-4 <= x,
      'must be 0 (greedy), or from 1e-4 to 2**31',
    ),
    top_k=rows(
      'top_k', top_k, whole, 'must be 0 (off), or up to 2**31 - 1', np.int32
    ),
    top_p=rows(
      'top_p', top_p, lambda x: 1e-30 < x <= 1, 'must be above 0, at most 1'
    ),
    min_p=rows('min_p', min_p, lambda x: 0 <= x <= 1, 'must be from 0 to 1'),
    penalty=rows(
      'repetition_penalty',
      repetition_penalty,
      lambda x: 1e-4 <= x <= 1e4,
      'must be from 1e-4 to 1e4 (1: off)',
    ),
    seed=seeds,
  )


def distribution(
  logits: Float[Array, 'B V'], seen: Bool[Array, 'B V'], knobs: Knobs
) -> Float[Array, 'B V']:
  """Returns the log-probabilities of the next token, -inf for impossible ones.

  The knobs apply in the order of Hugging Face transformers: penalty,
  temperature, top-k, top-p, min-p.

  Args:
    logits: float32.
    seen: whether the row already has the token, for the penalty.
    knobs: of the rows.
  """
  penalty = knobs.penalty[:, None]
  lower = jnp.where(logits > 0, logits / penalty, logits * penalty)
  logits = jnp.where(seen, lower, logits)
  greedy = knobs.temperature[:, None] == 0
  ids = jnp.arange(logits.shape[-1])[None]
  best = jnp.where(ids == _argmax(logits)[:, None], 0.0, -jnp.inf)

  def warm(logits):
    x = logits / jnp.where(greedy, 1.0, knobs.temperature[:, None])
    cut = jnp.any((knobs.top_k > 0) | (knobs.top_p < 1))
    x = jax.lax.cond(cut, _nucleus, lambda x, _: x, x, knobs)
    floor = x.max(-1, keepdims=True) + jnp.log(knobs.min_p)[:, None]
    x = jnp.where(x < floor, -jnp.inf, x)
    return jnp.where(greedy, best, jax.nn.log_softmax(x))

  return jax.lax.cond(jnp.all(greedy), lambda _: best, warm, logits)


def _nucleus(x, knobs):
  """Returns `x` with -inf for tokens outside top-k and top-p (Holtzman 2019).

  The smallest set whose mass reaches top_p remains. Tokens as likely as its
  last one remain, too.
  """
  falling = -jnp.sort(-x, axis=-1)
  rank = jnp.arange(x.shape[-1])[None]
  count = jnp.where(knobs.top_k > 0, knobs.top_k, x.shape[-1])[:, None]
  falling = jnp.where(rank < count, falling, -jnp.inf)
  probs = jax.nn.softmax(falling)
  mass_before = jnp.cumsum(probs, axis=-1) - probs
  inside = (mass_before < knobs.top_p[:, None]) & (falling > -jnp.inf)
  lowest = jnp.where(inside, falling, jnp.inf).min(-1, keepdims=True)
  return jnp.where(x < lowest, -jnp.inf, x)


def draw(
  log_probs: Float[Array, 'B V'],
  knobs: Knobs,
  position: Int[Array, ' B'],
  use: int = TOKEN,
) -> Int[Array, ' B']:
  """Returns a token of each row for `position`, int32."""

  def warm(x):
    noise = lambda key: jax.random.gumbel(key, x.shape[1:])
    return _argmax(x + jax.vmap(noise)(_keys(knobs, position, use)))

  greedy = jnp.all(knobs.temperature == 0)
  return jax.lax.cond(greedy, _argmax, warm, log_probs)


def _argmax(x: Float[Array, 'B V']) -> Int[Array, ' B']:
  """Returns the first column of each row's largest number; the last, of NaN.

  Not by `jnp.argmax`: into that, XLA's CPU backend would fuse the random
  numbers, and then compute them one by one.
  """
  ids = jnp.arange(x.shape[-1], dtype=jnp.int32)
  largest = x == x.max(-1, keepdims=True)
  return jnp.where(largest, ids, ids[-1]).min(-1)


def uniform(
  knobs: Knobs, position: Int[Array, ' B'], use: int
) -> Float[Array, ' B']:
  """Returns a number from [0, 1) for each row."""
  return jax.vmap(jax.random.uniform)(_keys(knobs, position, use))


def _keys(knobs, position, use):
  def one(seed, position):
    key = jax.random.fold_in(jax.random.key(seed), position)
    return jax.random.fold_in(key, use)

  return jax.vmap(one)(knobs.seed, position)


def log_prob(
  logits: Float[Array, 'B V'], tokens: Int[Array, ' B']
) -> Float[Array, ' B']:
  """Returns the model's own log-probability of each token, before every knob.

  Reinforcement learning compares it with that of the training forward.
  """
  picked = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
  return picked - jax.nn.logsumexp(logits, axis=-1)


def drawn_log_prob(
  logits: Float[Array, 'B V'],
  tokens: Int[Array, ' B'],
  temperature: Float[Array, ' B'],
) -> Float[Array, ' B']:
  """Returns `log_prob` at each row's temperature; at 1 where it is greedy."""
  warmth = jnp.where(temperature == 0, 1.0, temperature)
  return jax.lax.cond(
    jnp.all(warmth == 1),
    lambda: log_prob(logits, tokens),
    lambda: log_prob(logits / warmth[:, None], tokens),
  )
