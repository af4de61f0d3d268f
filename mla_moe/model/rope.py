"""Rotary positions and YaRN (V3 section 4.3; DeepSeek's inference code).

A pair of features turns by position * frequency. Pairs are (i, i + R/2), the
halves layout; released weights pair neighbours, (2i, 2i + 1), and are permuted
once when they are loaded. YaRN divides the slow frequencies by the extension
factor, leaves the fast ones, and ramps between. The surprise: its temperature
m^2 multiplies the whole attention logit, the part without positions included,
while cos and sin keep the ratio of two factors, which is 1 in every released
model. Without YaRN (pre-training at 4K) there is no m at all.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np

from mla_moe.config import MLAConfig, RopeConfig
from mla_moe.types import Array, Float, Int


def magnitude(factor: float, mscale: float) -> float:
  """YaRN's m: 0.1 * mscale * ln(factor) + 1, and 1 when nothing is extended."""
  return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def softmax_scale(mla: MLAConfig) -> float:
  """What attention logits are multiplied by: (H + R)^-1/2 * m^2."""
  m = magnitude(mla.rope.factor, mla.rope.mscale_all_dim)
  return (mla.nope_dim + mla.rope_dim) ** -0.5 * m * m


def frequencies(dim: int, rope: RopeConfig) -> np.ndarray:
  """Radians per position of each of the dim/2 pairs, float32."""
  plain = rope.theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
  if rope.factor > 1:
    low, high = _ramp(dim, rope)
    ramp = np.clip((np.arange(dim // 2) - low) / (high - low), 0.0, 1.0)
    plain = plain * (1 - ramp) + plain / rope.factor * ramp
  return plain.astype(np.float32)


def _ramp(dim: int, rope: RopeConfig) -> tuple[float, float]:
  """Between which pairs YaRN goes from extrapolating to interpolating."""

  def pair(turns):  # the pair that turns so often in the original length
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
  """Cosine and sine of every pair's angle, float32; once a step for all layers.

  An elementwise product on purpose: as a matmul it would run in bfloat16 on a
  TPU, which ruins long positions.
  """
  turn = jnp.asarray(frequencies(dim, rope))[None, None]
  theta = positions.astype(jnp.float32)[..., None] * turn
  ratio = magnitude(rope.factor, rope.mscale) / magnitude(
    rope.factor, rope.mscale_all_dim
  )
  return jnp.cos(theta) * ratio, jnp.sin(theta) * ratio


def rotate(
  x: Float[Array, 'B T *n R'],
  cos: Float[Array, 'B T half'],
  sin: Float[Array, 'B T half'],
) -> Float[Array, 'B T *n R']:
  """`x` turned by its position, in float32, in x's dtype."""
  if x.ndim == 4:
    cos, sin = cos[:, :, None], sin[:, :, None]
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return turned.astype(x.dtype)
