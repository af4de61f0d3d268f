"""Rotary positions and YaRN (V3 section 4.3; DeepSeek's inference code).

A pair of features is rotated by the angle position * frequency. Pairs are
(i, i + R/2), the halves layout; released weights pair neighbours (2i, 2i + 1)
and are permuted once, when they are loaded (`hf.names`). YaRN extends the
context: it divides the slow frequencies by the extension factor, keeps the fast
ones, and ramps between them. The surprise is its temperature m^2: it
multiplies the whole attention logit, also the part without positions. Cosine
and sine get the ratio of two m's, which is 1 in every released model. Mistral's
queries grow with their position, by 1 + beta ln(1 + floor(position / length)).
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

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
    ratio = rope.original_positions / (turns * 2 * math.pi)
    return dim * math.log(ratio) / (2 * math.log(rope.theta))

  low = max(math.floor(pair(rope.beta_fast)), 0.0)
  high = min(math.ceil(pair(rope.beta_slow)), dim - 1)
  return float(low), float(high) if high != low else high + 0.001


class Angles(NamedTuple):
  """Of each token's position, float32, for all layers."""

  cos: Array  # [B, T, R / 2], of every pair's angle
  sin: Array  # [B, T, R / 2]
  growth: Array | None  # [B, T]: factor of the queries; None is 1


def angles(positions: Int[Array, 'B T'], dim: int, rope: RopeConfig) -> Angles:
  """Returns the Angles; positions times frequencies is elementwise on purpose.

  As a matmul it would run in bfloat16 on a TPU, which ruins long positions.
  """
  per_position = jnp.asarray(frequencies(dim, rope))[None, None]
  theta = positions.astype(jnp.float32)[..., None] * per_position
  m = functools.partial(magnitude, rope.factor)
  ratio = m(rope.mscale) / m(rope.mscale_all_dim)
  cos, sin = jnp.cos(theta) * ratio, jnp.sin(theta) * ratio
  if not rope.query_beta:
    return Angles(cos, sin, None)
  steps = positions // rope.query_positions
  return Angles(cos, sin, 1 + rope.query_beta * jnp.log1p(steps))


def queries(q: Float[Array, 'B T N qk'], nope_dim: int, angles: Angles) -> list:
  """Returns the grown queries: [B, T, N, H], and the rotated ones."""
  if angles.growth is not None:
    q = (q * angles.growth[:, :, None, None]).astype(q.dtype)
  return [q[..., :nope_dim], rotate(q[..., nope_dim:], angles)]


def rotate(
  x: Float[Array, 'B T *n R'], angles: Angles
) -> Float[Array, 'B T *n R']:
  """Returns `x` rotated by its position: in float32, then in x's dtype."""
  fit = lambda a: a[:, :, None] if x.ndim == 4 else a
  cos, sin = fit(angles.cos), fit(angles.sin)
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return rotated.astype(x.dtype)
