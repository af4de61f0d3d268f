"""Leaves of the variables while they are loaded, shard by shard.

A leaf has one buffer for each shard on this host's devices. A block of the leaf
is written into every shard that it overlaps, and `finish` makes the shards one
`jax.Array`.

On a CPU device a buffer is numpy's memory, and jax takes it over at the end
without a copy. On other devices it is an array on the device, which is updated
in place. The surprise is the transposition of a block: numpy copies 16-bit
numbers against their memory order at a third of the speed of `jax.device_put`,
although the latter makes a copy in between.
"""

from __future__ import annotations

import functools
import math
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mla_moe import sharding
from mla_moe.config import ConfigError, ModelConfig
from mla_moe.hf import config_json, names
from mla_moe.model import transformer
from mla_moe.types import PyTree

_ALIGNMENT = 64  # bytes; jax copies host memory that is aligned to less


class Leaf:
  """One leaf that is being filled.

  shape: of the global array. placement: its NamedSharding, or None for the
  default device.
  """

  def __init__(
    self,
    shape: tuple[int, ...],
    dtype: np.dtype,
    placement: jax.sharding.Sharding | None,
  ):
    self.shape, self.placement = shape, placement
    # {(first, end) along each axis: devices with this shard}
    shards: dict[tuple, list] = {tuple((0, n) for n in shape): [None]}
    if placement is not None:
      shards = {}
      indices = placement.addressable_devices_indices_map(shape)
      for device, index in indices.items():
        bounds = tuple(
          s.indices(n)[:2] for s, n in zip(index, shape, strict=True)
        )
        shards.setdefault(bounds, []).append(device)
    self.buffers = [
      (bounds, _buffer(tuple(b - a for a, b in bounds), dtype, device))
      for bounds, devices in shards.items()
      for device in devices
    ]

  def is_local(self, row: names.Row, index: dict[str, int]) -> bool:
    """Returns whether a matrix overlaps any shard of this host."""
    positions = [
      (i, index[axis]) for i, axis in enumerate(row.ours) if axis in index
    ]
    return any(
      all(bounds[i][0] <= n < bounds[i][1] for i, n in positions)
      for bounds, _ in self.buffers
    )

  def put(self, block: np.ndarray, start: tuple[int, ...]) -> None:
    """Writes a block that begins at `start` into the shards it overlaps."""
    end = [s + n for s, n in zip(start, block.shape, strict=True)]
    for bounds, buffer in self.buffers:
      overlap = [
        (max(a, s), min(b, e))
        for (a, b), s, e in zip(bounds, start, end, strict=True)
      ]
      if any(a >= b for a, b in overlap):
        continue
      slices = lambda origin, overlap=overlap: tuple(
        slice(a - o, b - o) for (a, b), o in zip(overlap, origin, strict=True)
      )
      buffer.write(block[slices(start)], slices([a for a, _ in bounds]))

  def finish(self) -> jax.Array:
    """Returns the leaf; call it once, after the last `put`."""
    arrays = [buffer.finish() for _, buffer in self.buffers]
    self.buffers = []
    if self.placement is None:
      return arrays[0]
    return jax.make_array_from_single_device_arrays(
      self.shape, self.placement, arrays
    )


def empty(
  config: ModelConfig, rows: list[names.Row], dtype: np.dtype, mesh: Any
) -> dict[tuple[str, ...], Leaf]:
  """Returns {path: empty leaf} of a model, on the mesh or on one device.

  Raises:
    ConfigError: a leaf whose shape the mesh does not divide.
  """
  placements = _placements(config, mesh) if mesh is not None else None
  leaves = {}
  for row in rows:
    path, shape = row.path, row.shape
    leaf_dtype = config_json.F32 if row.is_float32 else dtype
    placement = placements
    if placement is not None:
      for key in path:
        placement = placement[key]
      try:
        placement.shard_shape(shape)
      except ValueError as error:
        raise ConfigError(
          f'{".".join(path)} cannot be laid on the mesh ({error})'
        ) from None
    leaves[path] = Leaf(shape, leaf_dtype, placement)
  return leaves


def _placements(config: ModelConfig, mesh: Any) -> PyTree:
  """Returns the sharding of every leaf, by its logical axes in the model."""
  tokens = jax.ShapeDtypeStruct((1, config.mtp.depth + 2), jnp.int32)
  init = transformer.Transformer(config).init
  boxed = jax.eval_shape(init, jax.random.key(0), tokens)
  return sharding.shardings(boxed, mesh)


def _buffer(shape: tuple[int, ...], dtype: np.dtype, device: Any):
  """Returns a buffer for a shard on a device; None is the default device."""
  (home,) = jnp.zeros((), device=device).devices()
  buffer = _HostBuffer if home.platform == 'cpu' else _DeviceBuffer
  return buffer(shape, dtype, device)


class _HostBuffer:
  """A shard in numpy's memory, for a CPU device."""

  def __init__(self, shape: tuple[int, ...], dtype: np.dtype, device: Any):
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    first = -raw.ctypes.data % _ALIGNMENT
    self.array = raw[first : first + size].view(dtype).reshape(shape)
    self.device = device

  def write(self, block: np.ndarray, index: tuple[slice, ...]) -> None:
    """Sets array[index]; threads may write blocks that do not overlap."""
    if not block.flags.c_contiguous:
      block = np.asarray(jax.device_put(block, self.device))
    self.array[index] = block

  def finish(self) -> jax.Array:
    """Returns the shard in the same memory; no write may follow."""
    return jax.device_put(self.array, self.device, may_alias=True)


class _DeviceBuffer:
  """A shard on its device, updated in place block by block."""

  def __init__(self, shape: tuple[int, ...], dtype: np.dtype, device: Any):
    self.array = jnp.zeros(shape, dtype, device=device)
    self.bits = np.dtype(f'u{dtype.itemsize}')
    self.device = device
    self._lock = threading.Lock()

  def write(self, block: np.ndarray, index: tuple[slice, ...]) -> None:
    """Sets array[index]; when it returns, the block's memory is free."""
    block = jax.device_put(block.view(self.bits), self.device)
    start = np.array([part.start for part in index], np.int32)
    with self._lock:
      self.array = _write(self.array, block, start)
      jax.block_until_ready(self.array)

  def finish(self) -> jax.Array:
    """Returns the shard."""
    return self.array


@functools.partial(jax.jit, donate_argnums=0)
def _write(buffer, block, start):
  """Returns the buffer with the block at `start`; bits are not converted."""
  bits = jax.lax.bitcast_convert_type(buffer, block.dtype)
  bits = jax.lax.dynamic_update_slice(bits, block, tuple(start))
  return jax.lax.bitcast_convert_type(bits, buffer.dtype)
