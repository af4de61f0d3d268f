"""Rotary positions and YaRN (V3 section 4.3; DeepSeek's inference code).

A pair of features is rotated by the angle position * frequency. Pairs are
(i, i + R/2), the halves layout; released weights pair neighbours (2i, 2i + 1)
and are permuted once, when they are loaded (`hf.names`). YaRN extends the
context: it divides the slow frequencies by the extension factor, keeps the fast
ones, and ramps between them. The surprise is its temperature m^2: it
multiplies the whole attention logit, also the part without positions. Cosine
and sine get the ratio of two m's, which is 1 in every released model. Without
YaRN (pre-training at 4K) m is 1.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np

from mla_moe.config import MLAConfig, RopeConfig
from mla_moe.types import Array, Float, Int


def magnitude(factor: float, mscale: float) -> float:
  """Returns YaRN's m: 0.1 * mscale * ln(factor) + 1, or 1 without YaRN."""
  return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def softmax_scale(mla: MLAConfig) -> float:
  """Returns the factor of the attention logits: (H + R)^-1/2 * m^2."""
  m = magnitude(mla.rope.factor, mla.rope.mscale_all_dim)
  return (mla.nope_dim + mla.rope_dim) ** -0.5 * m * m


def frequencies(dim: int, rope: RopeConfig) -> np.ndarray:
  """Returns the radians per position of each of the dim/2 pairs, float32."""
  plain = rope.theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
  if rope.factor > 1:
    low, high = _ramp(dim, rope)
    ramp = np.clip((np.arange(dim // 2) - low) / (high - low), 0.0, 1.0)
    plain = plain * (1 - ramp) + plain / rope.factor * ramp
  return plain.astype(np.float32)


def _ramp(dim: int, rope: RopeConfig) -> tuple[float, float]:
  """Returns the pairs between which YaRN's ramp goes from 0 to 1."""

  def pair(turns):  # the pair with this many turns in the original length
    return (
      dim
      * math.log(rope.original_positions / (turns * 2 * math.pi))
      / (2 * math.log(rope.theta))
    )

  low = max(math.floor(pair(rope.beta_fast)), 0.0)
  high = min(math.ceil(pair(rope.beta_slow)), dim - 1)
  return float(low), float(high) if high != low else high + 0.001


def angles(
  positions: Int[Array, 'B T'], dim: int, rope: RopeConfig
) -> tuple[Float[Array, 'B T half'], Float[Array, 'B T half']]:
  """Returns cosine and sine of every pair's angle, float32, for all layers.

  The product of positions and frequencies is elementwise on purpose: as a
  matmul it would run in bfloat16 on a TPU, which ruins long positions.
  """
  per_position = jnp.asarray(frequencies(dim, rope))[None, None]
  theta = positions.astype(jnp.float32)[..., None] * per_position
  ratio = magnitude(rope.factor, rope.mscale) / magnitude(
    rope.factor, rope.mscale_all_dim
  )
  return jnp.cos(theta) * ratio, jnp.sin(theta) * ratio


def rotate(
  x: Float[Array, 'B T *n R'],
  cos: Float[Array, 'B T half'],
  sin: Float[Array, 'B T half'],
) -> Float[Array, 'B T *n R']:
  """Returns `x` rotated by its position: in float32, then in x's dtype."""
  if x.ndim == 4:
    cos, sin = cos[:, :, None], sin[:, :, None]
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return rotated.astype(x.dtype)
