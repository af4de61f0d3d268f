"""Codes and scales of a frozen base, from a release's own bytes where they fit.

A frozen weight (`frozen`) has a scale for each group of 32 or 128 numbers
of a released row. A file's tiles that such groups divide keep every byte of
their codes: E4M3 blocks of 128 x 128, integers by row or group, int4 by groups
of 32 or 128. Every other format is decoded and quantised while it is read, by
pieces of a matrix; a scale is the group's largest magnitude over 448, 127 or 7.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from mla_moe.hf import formats, fp8_blocks, names
from mla_moe.types import Float

from .frozen import GROUPS, Frozen

_LARGEST = {'fp8': fp8_blocks.LARGEST, 'int8': 127.0, 'int4': 7.0}
# The codes of a file that a base takes over, byte by byte.
_SAME = {'fp8': ('fp8',), 'int8': ('int8', 'uint8'), 'int4': ('int4',)}
_PIECE = 2**18  # numbers that are floats at once
_BF16 = np.dtype(ml_dtypes.bfloat16)


def read(
  stored: formats.Stored,
  part: tuple[slice, ...],
  tensor: Callable[[str], np.ndarray],
  kind: str,
) -> tuple[np.ndarray, np.ndarray]:
  """Returns codes [R, C] (int4: [R, C / 2]) and scales [R, C / g] of rows.

  The arguments are those of `formats.read`; `kind` is of `GROUPS`.

  Raises:
    ConfigError: NaN, or int4's released scales outside of bfloat16's numbers.
  """
  group, columns = GROUPS[kind], stored.shape[-1]
  whole = stored.scale and stored.tile[1] >= columns
  if stored.kind not in _SAME[kind] or not (
    whole or (stored.scale and stored.tile[1] % group == 0)
  ):
    return _decoded(stored, part, tensor, kind)
  raw = tensor(stored.codes)[part]
  if stored.kind == 'fp8':
    fp8_blocks.check_finite(stored.codes, raw)
  raw = np.ascontiguousarray(raw if raw.ndim == 2 else raw[0])
  first, end, _ = part[-2].indices(stored.shape[-2])
  scale = formats.scales(stored, part, first, end, tensor)
  size = stored.tile[0]
  scale = scale[np.arange(first, end) // size - first // size]
  times = 1 if whole and scale.shape[1] == 1 else stored.tile[1] // group
  count = -(-columns // group)
  scale = np.repeat(scale, count if whole else times, axis=1)[:, :count]
  codes = raw.view(np.uint8)
  if kind == 'int4':
    narrow = scale.astype(_BF16)
    if not (narrow.astype(np.float32) == scale).all():
      return _decoded(stored, part, tensor, kind)
    return codes[:, : columns // 2], narrow
  if stored.kind == 'uint8':
    codes = codes ^ 0x80
  codes = codes[:, :columns]
  return codes.view(np.int8) if kind == 'int8' else codes, scale


def _decoded(stored, part, tensor, kind) -> tuple[np.ndarray, np.ndarray]:
  """Returns `read` of another format: some rows of floats are there at a time.

  A matrix whose rows are heads is one piece, of 19 million numbers in Kimi K2.
  """
  first, end, _ = part[-2].indices(stored.shape[-2])
  step, both = max(1, _PIECE // stored.shape[-1]), []
  for start in range(first, end, step):
    some = (*part[:-2], slice(start, min(start + step, end)), part[-1])
    rows = formats.read(stored, some, tensor, np.dtype(np.float32))
    both.append(quantize(rows, kind))
  codes, scales = zip(*both, strict=True)
  return np.concatenate(codes), np.concatenate(scales)


def quantize(
  w: Float[np.ndarray, 'R C'], kind: str
) -> tuple[np.ndarray, np.ndarray]:
  """Returns codes and scales of finite float32 rows, rounded to nearest."""
  rows, columns = w.shape
  group, top = GROUPS[kind], np.float32(_LARGEST[kind])
  count = -(-columns // group)
  tiles = np.zeros((rows, count * group), np.float32)
  tiles[:, :columns] = w
  tiles = tiles.reshape(rows, count, group)
  scale = np.maximum(tiles.max(2), -tiles.min(2)) / top
  scale = np.where(scale < np.finfo(np.float32).tiny, np.float32(1), scale)
  if kind == 'int4':
    scale = scale.astype(_BF16)
  tiles /= scale.astype(np.float32)[:, :, None]
  np.clip(tiles, -top, top, out=tiles)
  flat = tiles.reshape(rows, -1)[:, :columns]
  if kind == 'fp8':
    return flat.astype(fp8_blocks.E4M3).view(np.uint8), scale
  codes = np.rint(flat, out=flat).astype(np.int8)
  if kind == 'int8':
    return codes, scale
  codes = (codes + 8).astype(np.uint8)
  return codes[:, ::2] | codes[:, 1::2] << 4, scale


@functools.lru_cache(4096)
def resized(row: names.Row, length: int) -> names.Row:
  """Returns the row with so many numbers along the axis of its columns."""
  first, *others = row.released[-1]
  own = {first: length} | dict.fromkeys(others, 1)
  sizes = tuple((letter, own.get(letter, n)) for letter, n in row.sizes)
  return dataclasses.replace(row, sizes=sizes)


def _joined(row: names.Row, start: tuple, shape: tuple) -> tuple[tuple, tuple]:
  """Returns a block's start and shape, heads and dimensions as one axis."""
  axes = [i for i, axis in enumerate(row.ours) if axis != 'n']
  times = lambda i: shape[i - 1] if i and row.ours[i - 1] == 'n' else 1
  joined = tuple(shape[i] * times(i) for i in axes)
  return tuple(start[i] for i in axes), joined  # all heads are in a block


class Leaf:
  """A frozen leaf while it is loaded: two of `leaves.Leaf`."""

  def __init__(self, shapes: Frozen, of_codes: Any, of_scales: Any):
    self._shapes = shapes
    self.codes, self.scales = of_codes, of_scales

  def is_local(self, row: names.Row, index: dict[str, int]) -> bool:
    return self.codes.is_local(row, index)

  def put(self, row, index, piece, arrays) -> None:
    """Writes codes and scales of rows of a released matrix."""
    codes, scales = arrays
    if scales.dtype == _BF16:
      scales = scales.view(np.uint16)
    for leaf, matrix in ((self.codes, codes), (self.scales, scales)):
      own = resized(row, matrix.shape[1])
      block = own.take(matrix)
      start, shape = _joined(row, own.start(index, piece), block.shape)
      leaf.put(block.reshape(shape), start)

  def finish(self) -> Frozen:
    """Returns the leaf; call it once, after the last `put`."""
    codes, scales = self.codes.finish(), self.scales.finish()
    return dataclasses.replace(self._shapes, codes=codes, scales=scales)
