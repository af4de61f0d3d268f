"""FP8 arrays: values in E4M3 and a scale for each tile (V3 section 3.3.2).

A tile's scale is its largest magnitude over 448, E4M3's largest number, so
value = values * scales. Activations and gradients take tiles of 1x128 along
the axis that their product sums over, weights blocks of 128x128: an outlier
then coarsens its own tile and no other. What surprises is the default scale,
the power of two above amax / 448: it costs a little accuracy in tiles with
outliers, and makes dequantised values exact in bfloat16 (so that any hardware
computes the same product) and another tiling of stored values lossless.

Three traps are closed here. XLA's cast to E4M3 turns what does not fit into
NaN and does not saturate: values are clipped first. XLA may fold a narrowing
and a widening conversion into none, which undoes the quantisation silently on
GPUs: a barrier stands between them. And log2 rounds differently by platform:
exponents are taken from the bits.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from mla_moe.types import Array, Float

E4M3 = jnp.float8_e4m3fn
LARGEST = 448.0  # 1.75 * 2 ** 8
TILE = 128
WHOLE = -1  # a tile as long as its axis
# A tile below this is zero: its scale would leave float32's normal numbers.
_TINY = 2.0**-100


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
  """E4M3 `values`, float32 `scales`; they belong together as values * scales.

  `tiles` are the tile's lengths along the last axes, 1 along those before, so
  that a scan or an index over leading axes leaves it true. Along axis d there
  are ceil(values.shape[d] / tile) scales; the last tile may be partial. `kind`
  is 'pow2' or 'float32', what the scales are. Fields are not checked: a
  transformation may put specs or shapes in the arrays' place.
  """

  values: Any
  scales: Any
  tiles: tuple[int, ...] = dataclasses.field(metadata={'static': True})
  kind: str = dataclasses.field(default='pow2', metadata={'static': True})

  @property
  def shape(self) -> tuple[int, ...]:
    return self.values.shape

  @property
  def ndim(self) -> int:
    return self.values.ndim

  def tile(self, axis: int) -> int:
    """The tile's length along `axis` (0 is the first)."""
    at = axis - (self.ndim - len(self.tiles))
    return self.tiles[at] if at >= 0 else 1


@functools.partial(jax.jit, static_argnums=(1, 2))
def quantize(
  x: Float[Array, ' ...'], tiles: tuple[int, ...], scales: str = 'pow2'
) -> Quantized:
  """`x` in E4M3 with a scale for each tile of the last axes.

  Args:
    x: any float dtype; a NaN or an infinity makes its own tile NaN.
    tiles: lengths along the last axes; WHOLE is the axis's, and a tile longer
      than its axis is as long as the axis.
    scales: 'pow2' or 'float32'.
  """
  lead = x.ndim - len(tiles)
  fit = lambda t, n: n if t == WHOLE else min(t, n)
  tiles = tuple(map(fit, tiles, x.shape[lead:]))
  every = (1,) * lead + tiles
  # A CPU's fusions would make what comes before once for amax, once for values.
  x = jax.lax.platform_dependent(
    x, cpu=jax.lax.optimization_barrier, default=lambda x: x
  )
  tiled, inside = split(x.astype(jnp.float32), tiles)
  counts = [n for d, n in enumerate(tiled.shape) if d not in inside]
  padded = [n * t for n, t in zip(counts, every, strict=True)]
  amax = jnp.max(jnp.abs(tiled), axis=inside, keepdims=True)
  scale = scale_of(amax, scales)
  # A power of two has an exact reciprocal, and multiplying is cheaper.
  small = tiled * (1 / scale) if scales == 'pow2' else tiled / scale
  values = jnp.clip(small, -LARGEST, LARGEST).astype(E4M3).reshape(padded)
  values = values[tuple(slice(n) for n in x.shape)]
  values, scale = jax.lax.optimization_barrier((values, scale.reshape(counts)))
  return Quantized(values, scale, tiles, scales)


def split(
  x: Float[Array, ' ...'], tiles: tuple[int, ...]
) -> tuple[Float[Array, ' ...'], tuple[int, ...]]:
  """`x` with each axis as (tiles, inside a tile), and which axes are inside.

  Partial tiles are filled up with zeros.
  """
  every = (1,) * (x.ndim - len(tiles)) + tuple(tiles)
  pads = [(0, -n % t) for n, t in zip(x.shape, every, strict=True)]
  if any(high for _, high in pads):
    x = jnp.pad(x, pads)
  counts = [n // t for n, t in zip(x.shape, every, strict=True)]
  parts = [n for pair in zip(counts, every, strict=True) for n in pair]
  return x.reshape(parts), tuple(range(1, 2 * x.ndim, 2))


def scale_of(amax: Float[Array, ' ...'], scales: str) -> Float[Array, ' ...']:
  """The scale of a tile by its largest magnitude, float32.

  'pow2' is the smallest power of two with amax / scale <= 448; a tile of zeros
  has scale 1, one that is not finite has a scale that is not finite either.
  """
  if scales == 'float32':
    scale = amax / LARGEST
  else:
    bits = jax.lax.bitcast_convert_type(amax, jnp.int32)
    # 448 is 1.75 * 2 ** 8: a larger mantissa needs the next power.
    over = (bits & 0x7FFFFF) > 0x600000
    exponent = (bits >> 23) - 8 + over.astype(jnp.int32)
    power = jnp.clip(exponent, 1, 254) << 23
    scale = jax.lax.bitcast_convert_type(power, jnp.float32)
    scale = jnp.where(jnp.isfinite(amax), scale, amax)
  return jnp.where(amax < _TINY, 1.0, scale)


def spread(q: Quantized, axes: tuple[int, ...]) -> Float[Array, ' ...']:
  """The scales, repeated along `axes` so that each of their places has one."""
  scales = q.scales
  for axis in axes:
    if q.tile(axis) > 1:
      scales = jnp.repeat(scales, q.tile(axis), axis=axis)
      scales = jax.lax.slice_in_dim(scales, 0, q.shape[axis], axis=axis)
  return scales


def dequantize(q: Quantized, dtype=jnp.float32) -> Float[Array, ' ...']:
  """values * scales, multiplied in float32; exact in bfloat16 for 'pow2'."""
  scales = spread(q, tuple(range(q.ndim)))
  return (q.values.astype(jnp.float32) * scales).astype(dtype)


def retile(q: Quantized, tiles: tuple[int, ...]) -> Quantized:
  """`q` in other tiles, with power-of-two scales.

  If `q` has such scales, too, no value changes but those that the new tile's
  amax exceeds by more than 2 ** 14, which lose low bits to underflow.
  """
  return quantize(dequantize(q), tiles, 'pow2')
