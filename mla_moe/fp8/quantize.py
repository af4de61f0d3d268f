"""FP8 arrays: values in E4M3 and a scale for each tile (V3 section 3.3.2).

An E4M3 number has 4 exponent bits, 3 mantissa bits and 448 as its largest. So
an array is cut into tiles, and each tile is divided by a scale that brings its
largest magnitude (amax) to at most 448: x = values * scales, up to rounding.
Activations and gradients take tiles of 1x128 along the axis that their product
sums over, weights blocks of 128x128: an outlier then coarsens its own tile and
no other.

The scale is the smallest power of two that is not below amax / 448. That costs
up to half of E4M3's range, and buys two things: a dequantised number is exact
in bfloat16, so that all hardware computes the same product, and an array can
be tiled again along another axis without a second rounding.

Three traps are closed here. XLA's cast to E4M3 turns a number that does not
fit into NaN and does not saturate: values are clipped first. XLA may fold a
narrowing and a widening conversion into none, which undoes the quantisation
silently on GPUs: a barrier stands between them. And log2 rounds differently by
platform: exponents are taken from the bits.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from mla_moe.types import Array, Float

E4M3 = jnp.float8_e4m3fn
LARGEST = 448.0  # 1.75 * 2 ** 8
TILE = 128
WHOLE = -1  # a tile as long as its axis
# A tile whose amax is below this has scale 1, and so becomes zeros: its own
# scale would leave float32's normal numbers.
_TINY = 2.0**-100


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
  """An FP8 array: `values` * `scales`, each scale for one tile of values.

  `values` [...] are E4M3. `scales` are float32 with the same number of axes:
  along axis d there are ceil(values.shape[d] / tile(d)) of them, the last tile
  may be partial. `tiles` are the tile's lengths along the last axes; along the
  axes before, a tile has length 1, so that a scan or an index over leading
  axes leaves `tiles` true. Products need scales that are powers of two;
  `dequantize` takes any.

  The two arrays are typed Any because the same class also holds their shapes
  (jax.eval_shape), their PartitionSpecs (shard_map, jit) or their bits (uint8,
  as FSDP moves them).
  """

  values: Any
  scales: Any
  tiles: tuple[int, ...] = dataclasses.field(metadata={'static': True})

  @property
  def shape(self) -> tuple[int, ...]:
    return self.values.shape

  @property
  def ndim(self) -> int:
    return self.values.ndim

  def tile(self, axis: int) -> int:
    """The tile's length along `axis` (0 is the first)."""
    index = axis - (self.ndim - len(self.tiles))
    return self.tiles[index] if index >= 0 else 1


@functools.partial(jax.jit, static_argnums=(1, 2))
def quantize(
  x: Float[Array, '*axes'],
  tiles: tuple[int, ...],
  shards: tuple[int, ...] = (),
) -> Quantized:
  """Returns `x` in E4M3 with a scale for each tile of the last axes.

  Args:
    x: any float dtype; a NaN or an infinity makes its own tile NaN.
    tiles: lengths along the last axes. WHOLE is the axis's length, and a tile
      longer than its axis is cut to it.
    shards: of each axis, on a mesh (or none). Where they end within a tile, a
      device finds the amax of its parts, and no other number leaves it.
  """
  lead = x.ndim - len(tiles)
  fit = lambda t, n: max(n if t == WHOLE else min(t, n), 1)
  tiles = tuple(map(fit, tiles, x.shape[lead:]))
  lengths = (1,) * lead + tiles
  splits = zip(lengths, x.shape, shards or (1,) * x.ndim, strict=True)
  parts = [math.gcd(t, n // s) if s > 1 else t for t, n, s in splits]
  x_tiled, inside = tiled(x, parts)
  # Without it a CPU computes x twice, and a TPU lays it out in tiles as floats.
  x_tiled = jax.lax.platform_dependent(
    x_tiled, cuda=lambda x: x, default=jax.lax.optimization_barrier
  ).astype(jnp.float32)
  counts = [n for d, n in enumerate(x_tiled.shape) if d not in inside]
  padded = [n * x_tiled.shape[d] for n, d in zip(counts, inside, strict=True)]
  whole = [t // p for t, p in zip(lengths, parts, strict=True)]
  amax, inner = tiled(jnp.max(jnp.abs(x_tiled), axis=inside), whole)
  scale = _scale(jnp.max(amax, axis=inner))
  # A power of two has an exact reciprocal, and multiplying is cheaper.
  each = jnp.expand_dims(_repeated(1 / scale, whole, counts), inside)
  values = jnp.clip(x_tiled * each, -LARGEST, LARGEST).astype(E4M3)
  values = values.reshape(padded)[tuple(slice(n) for n in x.shape)]
  values, scale = jax.lax.optimization_barrier((values, scale))
  return Quantized(values, scale, tiles)


def tiled(
  x: Float[Array, '*axes'], tiles: Sequence[int]
) -> tuple[Float[Array, '*split'], tuple[int, ...]]:
  """Returns `x` with each axis split in two, and which axes lie in a tile.

  Axis d becomes axes 2 d (which tile) and 2 d + 1 (where in the tile). Partial
  tiles are filled up with zeros.
  """
  lengths = (1,) * (x.ndim - len(tiles)) + tuple(tiles)
  pads = [(0, -n % t) for n, t in zip(x.shape, lengths, strict=True)]
  if any(high for _, high in pads):
    x = jnp.pad(x, pads)
  counts = [n // t for n, t in zip(x.shape, lengths, strict=True)]
  split = [n for pair in zip(counts, lengths, strict=True) for n in pair]
  return x.reshape(split), tuple(range(1, 2 * x.ndim, 2))


def _scale(amax: Float[Array, '*tiles']) -> Float[Array, '*tiles']:
  """Returns the smallest power of two with amax / scale <= 448, float32.

  A tile of zeros has scale 1; one that is not finite, a scale that is not.
  """
  bits = jax.lax.bitcast_convert_type(amax, jnp.int32)
  # 448 is 1.75 * 2 ** 8: a larger mantissa needs the next power.
  above = (bits & 0x7FFFFF) > 0x600000
  exponent = (bits >> 23) - 8 + above.astype(jnp.int32)
  power = jnp.clip(exponent, 1, 254) << 23
  scale = jax.lax.bitcast_convert_type(power, jnp.float32)
  scale = jnp.where(jnp.isfinite(amax), scale, amax)
  return jnp.where(amax < _TINY, 1.0, scale)


def repeat_scales(
  q: Quantized, axes: tuple[int, ...]
) -> Float[Array, '*scales']:
  """Returns the scales, repeated along `axes` to the length of the values."""
  times = [q.tile(axis) if axis in axes else 1 for axis in range(q.ndim)]
  return _repeated(q.scales, times, q.shape)


def _repeated(scales, times, shape):
  """Returns scales, each `times` along an axis, up to the lengths `shape`."""
  for axis, n in enumerate(times):
    if n > 1:
      scales = jnp.repeat(scales, n, axis=axis)
      scales = jax.lax.slice_in_dim(scales, 0, shape[axis], axis=axis)
  return scales


def dequantize(
  q: Quantized, dtype: DTypeLike = jnp.float32
) -> Float[Array, '*axes']:
  """Returns values * scales, multiplied in float32 and cast to `dtype`.

  The cast to bfloat16 is exact where scales are powers of two.
  """
  scales = repeat_scales(q, tuple(range(q.ndim)))
  return (q.values.astype(jnp.float32) * scales).astype(dtype)


def joined(q: Quantized) -> Quantized | None:
  """Returns `q` with its last two axes as one; None if a tile would cross."""
  outer, inner = q.tiles[-2:]
  apart = outer == 1 and q.shape[-1] % inner == 0
  if not apart and (outer, inner) != q.shape[-2:]:
    return None
  flat = lambda x: x.reshape(*x.shape[:-2], -1)
  tiles = (*q.tiles[:-2], outer * inner)
  return Quantized(flat(q.values), flat(q.scales), tiles)


def exact(q: Quantized) -> Float[Array, '*axes']:
  """Returns the numbers in bfloat16; scales must be powers of two."""
  scales = repeat_scales(q, tuple(range(q.ndim))).astype(jnp.bfloat16)
  return q.values.astype(jnp.bfloat16) * scales


def retile(q: Quantized, tiles: tuple[int, ...]) -> Quantized:
  """Returns `q` in other tiles.

  No value changes but those that the new tile's amax exceeds by more than
  2 ** 14: they lose low bits to underflow.
  """
  return quantize(dequantize(q), tiles)
