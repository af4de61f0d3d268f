"""The tensors of a checkpoint that is being saved: first a plan, then bytes.

`Tensors` runs the table of `names` backwards. It first lists the name, dtype
and shape of each tensor, so that the files can be planned. Then it makes one
matrix at a time from our leaves, which may lie on any device.
"""

from __future__ import annotations

import functools
import math
import pathlib
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from mla_moe.checked import few
from mla_moe.config import ConfigError, ModelConfig
from mla_moe.hf import (
  config_json,
  dialects,
  formats,
  fp8_blocks,
  names,
  safetensors,
)


class Tensors:
  """The released tensors of a model's variables.

  sources: {tensor: the (row, index) pairs whose blocks fill it}. plan: {tensor:
  (dtype, shape) in its file}, FP8's scales included. only_powers: all scales
  that were written are powers of two.

  Raises:
    ConfigError: variables that do not fit the config.
  """

  def __init__(
    self,
    config: ModelConfig,
    variables: Any,
    fp8: bool,
    power_of_two: bool,
    dtype: np.dtype | None,
  ):
    self.fp8, self.power_of_two, self.dtype = fp8, power_of_two, dtype
    self.only_powers = True
    self.sources: dict[str, list] = {}
    self.plan: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
    rows = {row.path: row for row in names.rows(config)}
    self.leaves = _checked_leaves(rows, variables)
    for row in sorted(rows.values(), key=lambda row: 'l' in row.loop_axes):
      for index in row.indices():
        self.sources.setdefault(row.tensor(index), []).append((row, index))
    originals = names.copies(config)
    if config.tie_embeddings:
      originals.pop(
        dialects.dialect(config.release.family).spell('lm_head.weight')
      )
    for name, original in originals.items():
      self.sources[name] = self.sources[original]
    for name, sources in self.sources.items():
      row = sources[0][0]
      self.plan[name] = (self._dtype(name, row), row.file_shape)
    for name in [n for n in self.plan if self.plan[n][0] == fp8_blocks.E4M3]:
      shape = formats.scale_shape(self.plan[name][1], formats.BLOCK)
      self.plan[f'{name}_scale_inv'] = (config_json.F32, shape)

  def _dtype(self, name: str, row: names.Row) -> np.dtype:
    if row.is_float32:
      return config_json.F32
    if self.fp8 and names.quantized(name):
      return fp8_blocks.E4M3
    dtype = self.dtype or np.dtype(self.leaves[row.path].dtype)
    if self.fp8 and dtype == config_json.F32:
      exact = self._matrix(name)
      lossless = (
        exact.astype(config_json.BF16).astype(config_json.F32) == exact
      ).all()
      return config_json.BF16 if lossless else config_json.F32
    return dtype

  def bytes_of(self, name: str) -> int:
    """Returns a tensor's size in its file."""
    dtype, shape = self.plan[name]
    return dtype.itemsize * math.prod(shape)

  def shards(self, limit: int) -> list[list[str]]:
    """Returns the names of each file, layer by layer.

    A weight and its scale are in the same file. A file has at most `limit`
    bytes, or one weight.
    """
    files: list[list[str]] = [[]]
    size = 0
    for name in sorted(self.sources, key=_by_layer):
      group = [name]
      if f'{name}_scale_inv' in self.plan:
        group.append(f'{name}_scale_inv')
      needed = sum(map(self.bytes_of, group))
      if size + needed > limit and files[-1]:
        files.append([])
        size = 0
      files[-1] += group
      size += needed
    return files

  def write(self, path: pathlib.Path, shard: list[str]) -> None:
    """Writes one file with the tensors of a shard.

    Raises:
      ConfigError: a tensor contains NaN.
    """
    plan = {name: self.plan[name] for name in shard}
    with safetensors.create(path, plan) as arrays:
      for name in shard:
        if name not in self.sources:
          continue  # a scale, written with its weight
        # A tensor of all experts is written one expert at a time.
        shape = plan[name][1]
        for place in range(shape[0]) if len(shape) > 2 else [...]:
          matrix = self._matrix(name, place)
          if plan[name][0] != fp8_blocks.E4M3:
            arrays[name][place] = matrix
            continue
          wide = np.asarray(matrix, np.float32)
          q, scale = fp8_blocks.quantize(wide, self.power_of_two)
          arrays[name][place] = q
          arrays[f'{name}_scale_inv'][place] = scale
          mantissas = np.frexp(scale)[0]
          self.only_powers &= bool((mantissas == 0.5).all())

  def _matrix(self, name: str, expert: Any = ...) -> np.ndarray:
    """Returns a released matrix in the leaf's dtype, or in `dtype` if set.

    expert: its number, in a tensor of all experts.
    """
    sources = self.sources[name]
    row = sources[0][0]
    shape = row.file_shape if expert is ... else row.file_shape[1:]
    out = np.empty(shape, np.dtype(self.leaves[row.path].dtype))
    for source, index in sources:
      place = source.within(index)
      if expert is not ...:
        if index['e'] != expert:
          continue
        place = place[1:]
      source.put(_block(self.leaves[source.path], source, index), out[place])
    if self.dtype is not None and not row.is_float32:
      with np.errstate(over='ignore'):  # 3.4e38 is infinity in bfloat16
        out = out.astype(self.dtype, copy=False)
    fp8_blocks.check_finite(name, out)
    return out


def _by_layer(name: str) -> tuple:
  """Returns a sorting key: embedding, layers by number, then norm and head."""
  _, layers, rest = name.partition('layers.')
  if layers:
    number, *parts = rest.split('.')
    numbers = [int(p) if p.isdigit() else -1 for p in parts[1:]]
    return (1, int(number), parts[:2], numbers, name)
  return (0 if 'embed' in name else 2, 0, [], [], name)


def _checked_leaves(rows: dict, variables: Any) -> dict[tuple[str, ...], Any]:
  """Returns {path: leaf} of the variables, which must be those of the table.

  Raises:
    ConfigError: others, or of other shapes or dtypes.
  """
  leaves = traverse_util.flatten_dict(variables)
  missing, extra = rows.keys() - leaves.keys(), leaves.keys() - rows.keys()
  join = lambda paths: few('.'.join(path) for path in paths)
  if missing or extra:
    raise ConfigError(
      'the variables are not those of the config; '
      f'missing: {join(missing) or "none"}; '
      f'left over: {join(extra) or "none"}'
    )
  for path, leaf in leaves.items():
    name = '.'.join(path)
    if tuple(leaf.shape) != rows[path].shape:
      raise ConfigError(
        f'{name} has shape {tuple(leaf.shape)}; by the config it must have '
        f'{rows[path].shape}'
      )
    if np.dtype(leaf.dtype) not in (config_json.F32, config_json.BF16):
      raise ConfigError(
        f'{name} has dtype {leaf.dtype}; it must be float32 or bfloat16'
      )
    if not getattr(leaf, 'is_fully_addressable', True):
      raise ConfigError(f'{name} lies on several hosts; save from one process')
  return leaves


def _block(leaf: Any, row: names.Row, index: dict[str, int]) -> np.ndarray:
  """Returns a matrix's block of our leaf, on the host."""
  if hasattr(leaf, 'block'):  # of a leaf that is no array
    return leaf.block(row, index)
  start = row.start(index)
  sizes = tuple(
    1 if axis in row.loop_axes else size
    for axis, size in zip(row.ours, row.shape, strict=True)
  )
  if isinstance(leaf, jax.Array) and not _is_on_host(leaf):
    return np.asarray(_slice(leaf, np.array(start, np.int32), sizes))
  part = tuple(slice(a, a + n) for a, n in zip(start, sizes, strict=True))
  return np.asarray(leaf)[part]


def _is_on_host(leaf: jax.Array) -> bool:
  """Returns whether numpy can read the array in place, without a copy."""
  devices = leaf.devices()
  return len(devices) == 1 and next(iter(devices)).platform == 'cpu'


@functools.partial(jax.jit, static_argnums=2)
def _slice(leaf, start, sizes):
  return jax.lax.dynamic_slice(leaf, tuple(start), sizes)
