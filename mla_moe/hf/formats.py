"""The formats of released weights: codes, and scales that tiles of them share.

A quantised weight is w[i, j] = code[i, j] * scale[i // r, j // c] for tiles of
r x c numbers: a block of 128 x 128 (DeepSeek), a group of 32 in a row (int4,
MXFP4), a row, or the whole tensor. The surprise is that no file needs to be
believed about its format: the code's dtype and shape say how many bits it has,
the scale's shape says the tile, and the names of the parts are few. config.json
is asked where shapes leave a choice. Zero points, rotations and code books are
refused.

  F8_E4M3 [R, C]          E4M3 numbers
  I8 [R, C]               integers
  I32 [R, C/8] or C/4     4 or 8 bits each, unsigned around 8 or 128, low first
  U8 or I8 [R, C/2]       E2M1 numbers (MXFP4, NVFP4), the low half first

NVFP4 has one number more for the tensor, a divisor or (ModelOpt) a factor.
Products are rounded to float32, then to the asked dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from mla_moe.config import ConfigError
from mla_moe.hf import dialects, fp8_blocks
from mla_moe.types import Float

BLOCK = 2 * (fp8_blocks.TILE,)
_TILES = (BLOCK, *((1, size) for size in (16, 32, 64, 128)))
_E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
_FP4 = np.float32([0, 0.5, 1, 1.5, 2, 3, 4, 6])
_NIBBLES = {'fp4': np.r_[_FP4, -_FP4], 'int4': np.arange(-8, 8, dtype='f4')}
# The numbers of each byte. Two of four bits are one item, for one `take`.
_CODES = {
  'fp8': fp8_blocks.VALUES,
  'int8': np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float32),
  'uint8': np.arange(-128, 128, dtype=np.float32),
} | {
  kind: np.ascontiguousarray(
    np.stack([table[np.arange(256) & 15], table[np.arange(256) >> 4]], 1)
  ).view(np.uint64)[:, 0]
  for kind, table in _NIBBLES.items()
}
_FLOATS = ('F32', 'F16', 'BF16')
_SCALES = (*_FLOATS, 'F8_E8M0', 'U8')


class Stored(NamedTuple):
  """The tensors of one weight ('' is none), its shape, its kind (`_CODES`).

  tile: rows and columns that share a number of `scale`. sizes: the shape.
  """

  codes: str
  shape: tuple[int, ...]
  kind: str = 'float'
  scale: str = ''
  tile: tuple[int, int] = (0, 0)
  divisor: str = ''
  factor: str = ''
  sizes: str = ''

  @property
  def parts(self) -> tuple[str, ...]:
    return tuple(filter(None, (self.codes, self.scale, *self[5:])))


def blocks(quantization: Any) -> tuple[tuple[int, int], ...]:
  """Returns the tiles that a config's quantisation names, or refuses it."""
  place, data = 'quantization_config', dialects.tables()['quantization']
  values = {'quant_method': 'fp8'} | (quantization or {})
  method, groups = values['quant_method'], values.get('config_groups') or {}
  try:
    weights = [dict((g or {}).get('weights') or {}) for g in groups.values()]
    sparsity = dict(values.get('sparsity_config') or {})
  except (AttributeError, TypeError, ValueError):
    groups = weights = None
  if None in (method, groups) or (
    method == 'compressed-tensors' and not groups
  ):
    rule = f'no config_groups; read: {", ".join(data["top"]["quant_method"])}'
    raise ConfigError(f'{place} quant_method={method!r}: {rule}')
  parts = {'': values, 'sparsity_config ': sparsity}
  parts |= {f'group {n} ': group for n, group in enumerate(weights)}
  for part, group in parts.items():
    for key, read in data[part.split(' ')[0] or 'top'].items():
      foreign = part == '' and method != 'compressed-tensors'
      foreign = foreign and key == 'format'
      if group.get(key) not in (None, {}, *read) and not foreign:
        raise ConfigError(
          f'{place} {part}{key}={repr(group[key])[:40]}: only '
          f'{", ".join(map(str, read)) or "null"} is read; take a release in '
          'such a format, or in bfloat16'
        )
  sizes = [values.get('weight_block_size')]
  for group in weights:
    size = group.get('group_size') or -1
    sizes += [group.get('block_structure'), [1, size] if size != -1 else None]
  for size in filter(None, sizes):
    valid = isinstance(size, list) and len(size) == 2
    if not valid or any(type(n) is not int or n < 1 for n in size):
      raise ConfigError(
        f'{place} weight_block_size={size!r}: must be two sizes'
      )
  return tuple((r, c) for r, c in filter(None, sizes))


def find(
  weight: str,
  shape: tuple[int, ...],
  files: Container[str],
  entry: Callable[[str], Any],
  tiles: tuple[tuple[int, int], ...],
) -> Stored | None:
  """Returns the tensors that a weight is stored in; None if there are none.

  `files` are the names of all tensors, `entry` has dtype and shape of one,
  `tiles` are the config's `blocks`. A wrong shape or dtype is a ConfigError.
  """
  stem = weight.removesuffix('.weight')
  first = lambda *names: next((name for name in names if name in files), '')
  codes = first(weight, f'{weight}_packed')
  if not codes:
    return None
  kind, own = _kind(entry(codes), shape), entry(codes)
  if not kind and own.shape != shape:
    raise ConfigError(
      f'tensor {codes!r} has shape {list(own.shape)}; by config.json it must '
      f'have {list(shape)}'
    )
  if not kind:
    _check_dtype(codes, own, (*_FLOATS, 'F8_E4M3', 'I8')[: 2 * len(shape) + 1])
  if kind == 'float':
    return Stored(codes, shape)
  names = f'{weight}_scale_inv', f'{weight}_scale', f'{stem}.scale'
  scale = first(*names, f'{stem}.qscale_weight')
  if not scale:
    return Stored(codes, shape, kind, names[0])
  own = entry(scale)
  _check_dtype(scale, own, (*_SCALES, 'F8_E4M3')[: 5 + (kind == 'fp4')])
  tile = _tile(own.shape, shape, tiles or _TILES)
  if tile is None:
    raise ConfigError(
      f'tensor {scale!r} has shape {list(own.shape)}; by config.json it must '
      f'have {list(scale_shape(shape, (tiles or _TILES)[0]))}'
    )
  more = (f'{weight}_global_scale', f'{weight}_scale_2', f'{weight}_shape')
  return Stored(codes, shape, kind, scale, tile, *map(first, more))


def _check_dtype(name: str, own: Any, allowed: tuple[str, ...]) -> None:
  if own.name not in allowed:
    raise ConfigError(
      f'tensor {name!r} has dtype {own.name}; it must be one of '
      f'{", ".join(allowed)}'
    )


def _kind(own: Any, shape: tuple[int, ...]) -> str:
  """Returns the kind of codes by dtype and shape, '' if they do not fit."""
  if len(shape) < 2:
    return 'float' if own.shape == shape and own.name in _FLOATS else ''
  columns = lambda bits, item: (*shape[:-1], -(-shape[-1] * bits // item))
  kinds = dict.fromkeys(((name, shape) for name in _FLOATS), 'float') | {
    ('F8_E4M3', shape): 'fp8',
    ('I8', shape): 'int8',
    ('I32', columns(8, 32)): 'uint8',
    ('I32', columns(4, 32)): 'int4',
    ('U8', columns(4, 8)): 'fp4',
    ('I8', columns(4, 8)): 'fp4',
  }
  return kinds.get((own.name, own.shape), '')


def _tile(
  scale: tuple[int, ...], shape: tuple[int, ...], tiles: tuple
) -> tuple[int, int] | None:
  """Returns the tile of scales of this shape; None if no tile has it."""
  *leading, rows, columns = shape
  if math.prod(scale) == math.prod(leading):  # a number for each matrix
    return rows, columns
  if scale in (shape[:-1], (*shape[:-1], 1)):
    return 1, columns
  return next((t for t in tiles if scale_shape(shape, t) == scale), None)


def scale_shape(
  shape: tuple[int, ...], tile: tuple[int, int]
) -> tuple[int, ...]:
  """Returns the shape of a weight's scales: its last two axes in tiles."""
  return (*shape[:-2], -(-shape[-2] // tile[0]), -(-shape[-1] // tile[1]))


def read(
  stored: Stored,
  part: tuple[slice, ...],
  tensor: Callable[[str], np.ndarray],
  dtype: np.dtype,
) -> np.ndarray:
  """Returns a part of a weight as finite floats; `tensor` reads one by name.

  Of three axes, the first has length 1 in the part, and is dropped. NaN is a
  ConfigError, and so is a second scale that is no number.
  """
  raw = tensor(stored.codes)[part]
  if stored.kind in ('float', 'fp8'):
    fp8_blocks.check_finite(stored.codes, raw)
  if stored.kind == 'float' and raw.dtype == dtype:
    return raw
  if stored.kind == 'float':
    with np.errstate(over='ignore'):  # 3.4e38 is infinity in bfloat16
      out = raw.astype(dtype)
  else:
    rows, columns = stored.shape[-2:]
    first, end, _ = part[-2].indices(rows)
    scale = scales(stored, part, first, end, tensor)
    raw = raw if raw.ndim == 2 else raw[0]
    first %= stored.tile[0]
    out = decode(stored.kind, raw, scale, stored.tile, columns, first, dtype)
  fp8_blocks.check_finite(stored.codes, out)
  return out


def scales(
  stored: Stored, part: tuple, first: int, end: int, tensor: Callable
) -> Float[np.ndarray, 'r c']:
  """Returns the scales of rows [first, end) as float32, second ones in them.

  Eight bits without a sign are the exponents of powers of two.
  """
  scale, size = tensor(stored.scale), stored.tile[0]
  scale = scale.view(_E8M0) if scale.dtype == np.uint8 else scale
  scale = scale.reshape(scale_shape(stored.shape, stored.tile))
  rows = slice(first // size, -(-end // size))
  scale = scale[*(s.start for s in part[:-2]), rows].astype(np.float32)
  for name, power in ((stored.divisor, -1.0), (stored.factor, 1.0)):
    if name and tensor(name).size != 1:
      raise ConfigError(f'tensor {name!r} must be one number')
    if name:
      number = tensor(name).astype(np.float64).item()
      with np.errstate(all='ignore'):
        scale = (scale * np.float64(number) ** power).astype(np.float32)
  if stored.sizes and (*tensor(stored.sizes).tolist(),) != stored.shape:
    raise ConfigError(
      f'tensor {stored.sizes!r} is {tensor(stored.sizes).tolist()}; by '
      f'config.json it must be {list(stored.shape)}'
    )
  with np.errstate(over='ignore'):
    fp8_blocks.check_finite(stored.scale, scale * fp8_blocks.LARGEST)
  return scale


def decode(
  kind: str,
  codes: np.ndarray,
  scale: Float[np.ndarray, 'r c'],
  tile: tuple[int, int],
  columns: int,
  first_row: int = 0,
  dtype: np.dtype = np.dtype(np.float32),
) -> Float[np.ndarray, 'R C']:
  """Returns codes times scales, of the asked dtype.

  `scale` begins with the tile that has the first row, its `first_row`-th.
  """
  rows, table = len(codes), _CODES[kind]
  raw = np.ascontiguousarray(codes).view(np.uint8).reshape(rows, -1)
  out = np.empty((rows, columns), dtype)
  step = max(1, fp8_blocks.CHUNK // max(columns, 1))
  wide = np.empty((step, raw.shape[1]), table.dtype)
  for start in range(0, rows, step):
    end = min(start + step, rows)
    # 'clip' needs no copy of the indices; all of them exist.
    part = np.take(table, raw[start:end], out=wide[: end - start], mode='clip')
    part = part.view(np.float32)[:, :columns]
    tiles = (first_row + np.arange(start, end)) // tile[0]
    tiles = tiles[:1] if tiles[0] == tiles[-1] else tiles
    part *= np.repeat(scale[tiles], tile[1], axis=1)[:, :columns]
    with np.errstate(over='ignore'):  # 3.4e38 is infinity in bfloat16
      out[start:end] = part
  return out
