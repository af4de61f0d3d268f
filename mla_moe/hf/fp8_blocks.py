"""FP8 weights in DeepSeek's format: E4M3 with one scale per 128x128 tile.

A weight is w[i, j] = q[i, j] * scale[i // 128, j // 128]. The files call the
scale `weight_scale_inv`, although it is a multiplier. The last tile of a row or
a column may be partial. All of it is numpy, on the host, matrix by matrix.

Quantising a dequantised weight must return the same bytes, or a model would
change each time it is loaded and saved. The usual scale, the tile's largest
value over 448, does not do that: 448 * scale was rounded, and a power of two
leaves the largest q below 448. But with its own scale each q * scale rounded to
float32 *is* the weight, so `quantize` searches for it first: a power of two, or
the largest value over each E4M3 number above 224, with its two float32
neighbours (below 224 all q could be doubled). Of two powers the larger comes
first: a tile of the smaller has odd multiples of its least number. If none
fits, the weights are new, and the scale is the largest value over 448 or the
next power of two. A tile of zeros gets scale 1; where two neighbours fit, the
weights are equal to the bit.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from mla_moe.config import ConfigError
from mla_moe.types import Float

TILE = 128
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
LARGEST = 448.0
CHUNK = 2**17  # numbers that fit into a core's cache
VALUES = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32)
# The possible largest q of a tile, if all q cannot be doubled.
_TOPS = tuple(float(v) for v in sorted(VALUES[VALUES > 224], reverse=True))


def quantize(
  weight: Float[np.ndarray, 'R C'], power_of_two: bool = False
) -> tuple[np.ndarray, Float[np.ndarray, 'r c']]:
  """Returns (q [R, C] E4M3, scale [r, c] float32) of finite float32 weights.

  A tile that is the product of E4M3 numbers and a scale gives those numbers
  back. Other tiles are rounded to nearest; with `power_of_two` their scales are
  powers of two.
  """
  rows, columns = weight.shape
  r, c = -(-rows // TILE), -(-columns // TILE)
  padded = np.zeros((r * TILE, c * TILE), np.float32)
  padded[:rows, :columns] = weight
  tiles = padded.reshape(r, TILE, c, TILE).swapaxes(1, 2)
  tiles = np.ascontiguousarray(tiles).reshape(r * c, TILE, TILE)
  largest = np.maximum(tiles.max((1, 2)), -tiles.min((1, 2)))
  scale = _scales(tiles, largest, power_of_two)
  q = _round(tiles, scale).reshape(r, c, TILE, TILE).swapaxes(1, 2)
  q = q.reshape(r * TILE, c * TILE)[:rows, :columns]
  return np.ascontiguousarray(q), scale.reshape(r, c)


def _round(tiles: np.ndarray, scale: np.ndarray) -> np.ndarray:
  """Returns tiles / scale, rounded to E4M3."""
  # A cast would not saturate: 449 becomes NaN.
  scaled = tiles / scale.reshape(-1, *[1] * (tiles.ndim - 1))
  return np.clip(scaled, -LARGEST, LARGEST, out=scaled).astype(E4M3)


def _next_power_of_two(x: np.ndarray) -> np.ndarray:
  """Returns the least power of two that is not below x, float32."""
  fraction, exponent = np.frexp(x)
  exponent = np.where(fraction == 0.5, exponent - 1, exponent)
  # Scales stay normal numbers, whose products are exact.
  return np.ldexp(np.float32(1), np.maximum(exponent, -126)).astype(np.float32)


def _scales(
  tiles: np.ndarray, largest: np.ndarray, power_of_two: bool
) -> np.ndarray:
  """Returns each tile's scale: its original one if any, else a new one.

  tiles: [n, 128, 128]. largest: [n], the largest magnitudes.
  """
  usual = largest / np.float32(LARGEST)
  powers = _next_power_of_two(usual)
  tiny = np.finfo(np.float32).tiny
  scale = powers if power_of_two else np.maximum(usual, tiny)
  scale = np.where(largest == 0, np.float32(1), scale)
  unknown = np.flatnonzero(largest > 0)  # tiles whose scale is not known yet
  for candidate in _candidates(largest, powers):
    # Cheap tests first: the largest value, then one row, then the whole tile.
    products = VALUES[:127, None] * candidate[unknown][None]
    distance = np.abs(products - largest[unknown])
    fitting = unknown[distance.min(0) == 0] if distance.size else unknown
    for part in (slice(0, 1), slice(None)):
      fitting = fitting[_fits(tiles[fitting, part], candidate[fitting])]
    scale[fitting] = candidate[fitting]
    unknown = np.setdiff1d(unknown, fitting, assume_unique=True)
    if not unknown.size:
      break
  return scale


def _candidates(largest, powers):
  """Yields scales [n] to try, the most frequent first."""
  yield np.where(largest == np.float32(LARGEST) * powers, 2 * powers, powers)
  yield powers
  for top in _TOPS:
    scale = largest / np.float32(top)
    up, down = np.float32(np.inf), np.float32(0)
    yield scale
    yield np.nextafter(scale, up)
    yield np.nextafter(scale, down)


def _fits(tiles: np.ndarray, scale: np.ndarray) -> np.ndarray:
  """Returns which tiles are exactly E4M3 numbers times their scale."""
  if not len(tiles):
    return np.zeros(0, bool)
  q = _round(tiles, scale)
  product = np.take(VALUES, q.view(np.uint8)) * scale[:, None, None]
  return (product == tiles).all((1, 2))


def check_finite(name: str, values: np.ndarray) -> None:
  """Refuses NaN and infinity, by their bits: numpy cannot compute in float8.

  Raises:
    ConfigError: names the tensor.
  """
  kind = ml_dtypes.finfo(values.dtype)
  # Finite numbers are, by magnitude, the bit patterns below the largest's.
  bits, signed = (np.dtype(f'{sign}{values.itemsize}') for sign in 'ui')
  top = int(np.asarray(kind.max, values.dtype).view(bits))
  negative = top + (1 << (8 * values.itemsize - 1))
  flat = values.reshape(-1)
  for start in range(0, flat.size, CHUNK):
    part = flat[start : start + CHUNK]
    if part.view(bits).max() > negative or part.view(signed).max() > top:
      raise ConfigError(f'tensor {name!r} holds NaN or infinity')
