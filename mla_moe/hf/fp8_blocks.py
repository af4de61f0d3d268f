"""FP8 weights as DeepSeek releases them: E4M3 with a scale for a 128x128 block.

A weight is q[i, j] * scale[i // 128, j // 128]; the file calls the scale
`weight_scale_inv`, and it is a multiplier all the same. The last blocks of a
row or a column may be partial.

Quantising what was dequantised must give the same bytes, or a model would
change each time it passes through. Dividing the block's largest value by 448
does not: the product of scale and 448 was rounded, and may round back to a
neighbour of the scale; and scales that are powers of two leave the largest q
below 448. But the weights still contain their scale: it is the one with which
every q * scale, rounded to float32, *is* the weight. `quantize` looks for it
first, among a power of two and the largest value divided by each E4M3 number
above 224 (below that, all q double and the scale halves), each with its
neighbours; only where there is none is the block new, and its scale is the
largest value over 448, or the next power of two.

A block's scale is thus found wherever the block determines it: always when one
of its q is a power of two, whose product is exact. A block of zeros has lost
its scale (1 is written), and one of a few numbers may fit two neighbouring
scales; its weights are still the same to the bit.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from mla_moe.config import ConfigError
from mla_moe.types import Float

BLOCK = 128
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
LARGEST = 448.0
_AT_ONCE = 2**17  # numbers that fit a core's cache
_VALUES = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32)
# The numbers that a block's largest q may be, once it cannot be doubled.
_TOPS = tuple(float(v) for v in sorted(_VALUES[_VALUES > 224], reverse=True))


def blocks(shape: tuple[int, ...], block: int = BLOCK) -> tuple[int, ...]:
  """The shape of a tensor's scales: blocks of its last two axes."""
  return (*shape[:-2], *(-(-n // block) for n in shape[-2:]))


def dequantize(
  q: np.ndarray,
  scale: Float[np.ndarray, 'r c'],
  first_row: int = 0,
  block: int = BLOCK,
) -> Float[np.ndarray, 'R C']:
  """q [R, C] E4M3 in float32 times its block's scale.

  q may be rows `first_row` and on of the tensor that `scale` belongs to.
  """
  rows, columns = q.shape
  out = np.empty(q.shape, np.float32)
  raw = q.view(np.uint8)
  at = 0
  while at < rows:
    row = (first_row + at) // block
    end = min(rows, (row + 1) * block - first_row)
    # 'clip' needs no copy of the indices; all of them exist.
    np.take(_VALUES, raw[at:end], out=out[at:end], mode='clip')
    out[at:end] *= np.repeat(scale[row], block)[None, :columns]
    at = end
  return out


def quantize(
  weight: Float[np.ndarray, 'R C'], power_of_two: bool = False
) -> tuple[np.ndarray, Float[np.ndarray, 'r c']]:
  """(q [R, C] E4M3, scale [r, c] float32) of finite float32 weights.

  Exact where the weights are products of E4M3 numbers and a scale: then it
  gives those numbers back, whatever `power_of_two` says. Other blocks are
  rounded to nearest, and their scales are powers of two if so asked.
  """
  rows, columns = weight.shape
  r, c = blocks(weight.shape)
  padded = np.zeros((r * BLOCK, c * BLOCK), np.float32)
  padded[:rows, :columns] = weight
  tiles = padded.reshape(r, BLOCK, c, BLOCK).swapaxes(1, 2)
  tiles = np.ascontiguousarray(tiles).reshape(r * c, BLOCK, BLOCK)
  largest = np.maximum(tiles.max((1, 2)), -tiles.min((1, 2)))
  scale = _scales(tiles, largest, power_of_two)
  q = _round(tiles, scale).reshape(r, c, BLOCK, BLOCK).swapaxes(1, 2)
  q = q.reshape(r * BLOCK, c * BLOCK)[:rows, :columns]
  return np.ascontiguousarray(q), scale.reshape(r, c)


def _round(tiles: np.ndarray, scale: np.ndarray) -> np.ndarray:
  # A cast would not saturate: 449 becomes NaN.
  scaled = tiles / scale.reshape(-1, *[1] * (tiles.ndim - 1))
  return np.clip(scaled, -LARGEST, LARGEST, out=scaled).astype(E4M3)


def _next_power_of_two(x: np.ndarray) -> np.ndarray:
  """The least power of two that is not below x, float32."""
  fraction, exponent = np.frexp(x)
  exponent = np.where(fraction == 0.5, exponent - 1, exponent)
  # Scales stay normal numbers, whose products are exact.
  return np.ldexp(np.float32(1), np.maximum(exponent, -126)).astype(np.float32)


def _scales(
  tiles: np.ndarray, largest: np.ndarray, power_of_two: bool
) -> np.ndarray:
  """The scale of each tile: the one that it was made with, or a new one."""
  fresh = largest / np.float32(LARGEST)
  powers = _next_power_of_two(fresh)
  tiny = np.finfo(np.float32).tiny
  scale = powers if power_of_two else np.maximum(fresh, tiny)
  scale = np.where(largest == 0, np.float32(1), scale)
  unknown = np.flatnonzero(largest > 0)
  for candidate in _candidates(largest, fresh, powers):
    # Cheap questions first: the largest value, then one row, then all.
    one = candidate[unknown]
    near = np.abs(_VALUES[:127, None] * one[None] - largest[unknown])
    left = unknown[near.min(0) == 0] if near.size else unknown
    for part in (slice(0, 1), slice(None)):
      left = left[_fits(tiles[left, part], candidate[left])]
    scale[left] = candidate[left]
    unknown = np.setdiff1d(unknown, left, assume_unique=True)
    if not unknown.size:
      break
  return scale


def _candidates(largest, fresh, powers):
  yield powers
  for top in _TOPS:
    scale = largest / np.float32(top)
    up, down = np.float32(np.inf), np.float32(0)
    yield scale
    yield np.nextafter(scale, up)
    yield np.nextafter(scale, down)


def _fits(tiles: np.ndarray, scale: np.ndarray) -> np.ndarray:
  """Which tiles are exactly E4M3 numbers times their scale."""
  if not len(tiles):
    return np.zeros(0, bool)
  q = _round(tiles, scale)
  product = np.take(_VALUES, q.view(np.uint8)) * scale[:, None, None]
  return (product == tiles).all((1, 2))


def check_finite(name: str, values: np.ndarray) -> None:
  """Refuses NaN and infinities, by the bits: no float8 arithmetic exists.

  Raises:
    ConfigError: names the tensor.
  """
  kind = ml_dtypes.finfo(values.dtype)
  # Finite numbers are, by magnitude, the bit patterns below the largest's.
  bits, signed = (np.dtype(f'{sign}{values.itemsize}') for sign in 'ui')
  top = int(np.asarray(kind.max, values.dtype).view(bits))
  negative = top + (1 << (8 * values.itemsize - 1))
  flat = values.reshape(-1)
  for start in range(0, flat.size, _AT_ONCE):
    part = flat[start : start + _AT_ONCE]
    if part.view(bits).max() > negative or part.view(signed).max() > top:
      raise ConfigError(f'tensor {name!r} holds NaN or infinity')
