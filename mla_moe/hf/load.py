"""Released checkpoints, in: `load_huggingface`.

`hf_config` translates config.json, `hf_names` says which tensor is which part
of which leaf, `hf_fp8` does the blocks, `safetensors` maps the files and
`hf_source` checks them; here they stream. Loading takes one matrix at a time
out of the map (of a layer's experts: one expert), in the order of the files,
and puts it into each device's shard of the leaf: the host holds a few matrices
and nothing else, whatever the model's size.

On a CPU a shard is numpy's memory, which jax takes over without a copy at the
end; elsewhere it is an array on the device. What surprises is who transposes:
numpy copies 16-bit numbers against their grain at a third of the speed of
`jax.device_put`, even though that makes a copy in between. `hf_save` goes the
other way.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import pathlib
import threading
from collections.abc import Callable, Iterable
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mla_moe import sharding
from mla_moe.config import ConfigError, ModelConfig
from mla_moe.hf import config_json, names, source
from mla_moe.model import transformer
from mla_moe.types import PyTree

# How far the disk is asked to read ahead, in bytes.
_AHEAD = 128 * 2**20
_THREADS = 8  # each holds a few matrices
_ALIGNMENT = 64  # of memory that jax takes over as it is


def load_huggingface(
  path: os.PathLike | str, dtype: Any = jnp.float32, mesh: Any = None
) -> tuple[ModelConfig, dict[str, PyTree]]:
  """(config, {'params', 'router'}) of a folder with config.json and tensors.

  Args:
    path: of the releases' layout or transformers', old or new, float32,
      bfloat16, float16 or FP8 blocks.
    dtype: of the parameters, float32 or bfloat16, and of the activations in the
      config. The router's selection bias is float32 whatever it says.
    mesh: a mesh of `sharding.make_mesh`, on which each leaf is laid by its
      logical axes; one device without.

  Raises:
    ConfigError: anything wrong with the folder: a missing shard, tensors that
      are missing or left over (all of them), a wrong shape or dtype, a file
      that is not whole, NaN, another architecture.
  """
  dtype = config_json.parameter_dtype(dtype)
  folder = pathlib.Path(path)
  with contextlib.ExitStack() as stack:
    opened = source.Source(folder, dtype, stack)
    leaves = _leaves(opened, dtype, mesh)

    def move(row, at):
      block = row.take(opened.matrix(row, at), opened.plain_rope)
      leaves[row.path].put(block, row.start(at))
      opened.forget(row.tensor(at))

    wanted = [one for one in opened.units() if leaves[one[0].path].wants(*one)]
    _in_threads(move, wanted, opened)
    opened.check_copies()
    done = {path: leaf.finish() for path, leaf in leaves.items()}
    jax.block_until_ready(list(done.values()))
  variables: dict[str, PyTree] = {'params': {}, 'router': {}}
  for keys, value in done.items():
    _set(variables, keys, value)
  return opened.config, variables


def _in_threads(move: Callable, units: Iterable, opened: source.Source) -> None:
  """`move` of every unit, the disk reading ahead; raises the first error.

  Threads help, since numpy and jax copy without Python's lock.
  """
  count = min(len(os.sched_getaffinity(0)), _THREADS)
  waiting: list[futures.Future] = []
  unread = 0
  with futures.ThreadPoolExecutor(count) as pool:
    try:
      for row, at in units:
        name = row.tensor(at)
        if unread <= 0:
          opened.ahead(name, 2 * _AHEAD)
          unread = _AHEAD
        unread -= opened.size(name)
        waiting.append(pool.submit(move, row, at))
        if len(waiting) > 2 * count:
          waiting.pop(0).result()
      for one in waiting:
        one.result()
    finally:
      pool.shutdown(cancel_futures=True)


def _set(tree: dict, keys: tuple[str, ...], value: Any) -> None:
  for key in keys[:-1]:
    tree = tree.setdefault(key, {})
  tree[keys[-1]] = value


def _get(tree: Any, keys: tuple[str, ...]) -> Any:
  for key in keys:
    tree = tree[key]
  return tree


# ------------------------------------------------------------ leaves to fill


def _leaves(
  opened: source.Source, dtype: np.dtype, mesh: Any
) -> dict[tuple[str, ...], _Leaf]:
  """An empty leaf for each of the model's, where it will live."""
  shapes = {row.path: row.shape for row in opened.rows}
  places = _places(opened.config, mesh) if mesh is not None else None
  leaves = {}
  for keys, shape in shapes.items():
    kind = config_json.F32 if keys[0] == 'router' else dtype
    where = None if places is None else _get(places, keys)
    if where is not None:
      try:
        where.shard_shape(shape)
      except ValueError as error:
        raise ConfigError(
          f'{".".join(keys)} cannot be laid on the mesh ({error})'
        ) from None
    leaves[keys] = _Leaf(shape, kind, where)
  return leaves


def _places(config: ModelConfig, mesh: Any) -> PyTree:
  """The sharding of every leaf, by the model's own names of its axes."""
  tokens = jax.ShapeDtypeStruct((1, config.mtp.depth + 2), jnp.int32)
  init = transformer.Transformer(config).init
  boxed = jax.eval_shape(init, jax.random.key(0), tokens)
  return sharding.shardings(boxed, mesh)


class _Leaf:
  """One leaf of the variables, being filled: a buffer for each local shard."""

  def __init__(self, shape: tuple[int, ...], dtype: np.dtype, where: Any):
    self.shape, self.where = shape, where
    shards: dict[tuple, list] = {tuple((0, n) for n in shape): [None]}
    if where is not None:
      shards = {}
      for device, index in where.addressable_devices_indices_map(shape).items():
        ends = tuple(
          s.indices(n)[:2] for s, n in zip(index, shape, strict=True)
        )
        shards.setdefault(ends, []).append(device)
    self.buffers = [
      (ends, _buffer(tuple(b - a for a, b in ends), dtype, device))
      for ends, devices in shards.items()
      for device in devices
    ]

  def wants(self, row: names.Row, at: dict[str, int]) -> bool:
    """Whether any shard of this host has something of a place."""
    known = [
      (i, at[axis]) for i, axis in enumerate(row.ours) if axis in row.units
    ]
    return any(
      all(ends[i][0] <= place < ends[i][1] for i, place in known)
      for ends, _ in self.buffers
    )

  def put(self, block: np.ndarray, start: tuple[int, ...]) -> None:
    """Writes a block that begins at `start`."""
    stop = [s + n for s, n in zip(start, block.shape, strict=True)]
    for ends, buffer in self.buffers:
      both = zip(ends, start, stop, strict=True)
      part = [(max(a, s), min(b, e)) for (a, b), s, e in both]
      if any(a >= b for a, b in part):
        continue
      cut = lambda origin, part=part: tuple(
        slice(a - o, b - o) for (a, b), o in zip(part, origin, strict=True)
      )
      buffer.write(block[cut(start)], cut([a for a, _ in ends]))

  def finish(self) -> jax.Array:
    """The leaf, whole."""
    arrays = [buffer.finish() for _, buffer in self.buffers]
    self.buffers = []
    if self.where is None:
      return arrays[0]
    return jax.make_array_from_single_device_arrays(
      self.shape, self.where, arrays
    )


def _buffer(shape: tuple[int, ...], dtype: np.dtype, device: Any):
  """A shard to fill, by where it will live (None: the default device)."""
  (home,) = jnp.zeros((), device=device).devices()
  kind = _HostBuffer if home.platform == 'cpu' else _DeviceBuffer
  return kind(shape, dtype, device)


class _HostBuffer:
  """A shard in memory that a CPU device then takes over as it is."""

  def __init__(self, shape: tuple[int, ...], dtype: np.dtype, device: Any):
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    first = -raw.ctypes.data % _ALIGNMENT
    self.array = raw[first : first + size].view(dtype).reshape(shape)
    self.device = device

  def write(self, piece: np.ndarray, index: tuple[slice, ...]) -> None:
    """array[index] = piece; pieces that do not overlap may come at once."""
    if not piece.flags.c_contiguous:
      piece = np.asarray(jax.device_put(piece, self.device))
    self.array[index] = piece

  def finish(self) -> jax.Array:
    """The shard, to which nobody may write any more."""
    return jax.device_put(self.array, self.device, may_alias=True)


class _DeviceBuffer:
  """A shard on its device, written piece by piece."""

  def __init__(self, shape: tuple[int, ...], dtype: np.dtype, device: Any):
    self.array = jnp.zeros(shape, dtype, device=device)
    self.bits = np.dtype(f'u{dtype.itemsize}')
    self.device = device
    self._lock = threading.Lock()

  def write(self, piece: np.ndarray, index: tuple[slice, ...]) -> None:
    """array[index] = piece, which has then left the host."""
    piece = jax.device_put(piece.view(self.bits), self.device)
    at = np.array([part.start for part in index], np.int32)
    with self._lock:
      self.array = _write(self.array, piece, at)
      jax.block_until_ready(self.array)

  def finish(self) -> jax.Array:
    """The shard."""
    return self.array


@functools.partial(jax.jit, donate_argnums=0)
def _write(buffer, piece, at):
  """The buffer with the piece in place, as bits: nothing is widened."""
  bits = jax.lax.bitcast_convert_type(buffer, piece.dtype)
  bits = jax.lax.dynamic_update_slice(bits, piece, tuple(at))
  return jax.lax.bitcast_convert_type(bits, buffer.dtype)
