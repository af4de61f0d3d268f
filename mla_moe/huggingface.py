"""Released checkpoints, in: `load_huggingface`.

`hf_config` translates config.json, `hf_names` says which tensor is which part
of which leaf, `hf_fp8` does the blocks, `safetensors` maps the files; here they
stream. Loading takes one matrix at a time out of the map (of a layer's experts:
one expert), in the order of the files, and puts it into each device's shard of
the leaf, which is made beforehand on that device: the host holds a few matrices
and nothing else, whatever the model's size. The transposition costs nothing on
the way, since jax copies strided memory as fast as it can. `hf_save` goes the
other way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mla_moe import config as config_lib
from mla_moe import hf_config, hf_fp8, hf_names, model, safetensors, sharding
from mla_moe.config import ConfigError
from mla_moe.types import PyTree

_FLOATS = ('F32', 'F16', 'BF16', 'F8_E4M3')
# Matrices on their way to a device, in bytes, before loading waits for it.
_IN_FLIGHT = 128 * 2**20


def load_huggingface(
  path: os.PathLike | str, dtype: Any = jnp.float32, mesh: Any = None
) -> tuple[config_lib.ModelConfig, dict[str, PyTree]]:
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
  dtype = hf_config.parameter_dtype(dtype)
  folder = pathlib.Path(path)
  with contextlib.ExitStack() as stack:
    source = Source(folder, dtype, stack)
    leaves = _leaves(source.config, dtype, mesh)
    flying = unread = 0
    for row, at in source.units():
      leaf = leaves[row.path]
      if not leaf.wants(row, at):
        continue
      if unread <= 0:  # the disk works while the host copies
        source.ahead(row.tensor(at), 2 * _IN_FLIGHT)
        unread = _IN_FLIGHT
      block = row.take(source.matrix(row, at), source.plain_rope)
      unread -= block.nbytes
      arrays = leaf.put(block, row.start(at))
      flying += block.nbytes
      if flying > _IN_FLIGHT:
        jax.block_until_ready(arrays)
        flying = 0
      source.forget(row.tensor(at))
    source.check_copies()
    done = {path: leaf.finish() for path, leaf in leaves.items()}
    jax.block_until_ready(list(done.values()))
  variables: dict[str, PyTree] = {'params': {}, 'router': {}}
  for keys, value in done.items():
    _set(variables, keys, value)
  return source.config, variables


def _set(tree: dict, keys: tuple[str, ...], value: Any) -> None:
  for key in keys[:-1]:
    tree = tree.setdefault(key, {})
  tree[keys[-1]] = value


def _get(tree: Any, keys: tuple[str, ...]) -> Any:
  for key in keys:
    tree = tree[key]
  return tree


# ---------------------------------------------------------------- the source


class Source:
  """A folder whose tensors are all there, and are what its config says.

  config: its ModelConfig, MTP as deep as its tensors go. rows: the table that
  its names follow. Files are open until `stack` closes.

  Raises:
    ConfigError: they are not; one line that names everything.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    dtype: np.dtype,
    stack: contextlib.ExitStack,
  ):
    self.folder = folder
    if not folder.is_dir():
      raise ConfigError(f'{str(folder)!r}: is no folder')
    values = hf_config.read_json(folder / 'config.json')
    self.files = _open(folder, stack)
    with _named(f'{folder}/config.json'):
      self.config = hf_config.read(values, str(dtype))
      self.config = _with_present_mtp(self.config, self.files)
      self.plain_rope = values.get('rope_interleave') is False
      self.block = _block_size(values)
    fused = any(n.endswith('.mlp.experts.gate_up_proj') for n in self.files)
    self.rows = hf_names.rows(self.config, fused)
    self.copies = hf_names.copies(self.config)
    self.dtype = dtype
    with _named(str(folder)):
      self._check()

  def _check(self):
    """Names against the table, then shapes and dtypes."""
    wanted = {
      row.tensor(at): row.file_shape for row in self.rows for at in row.places()
    }
    scales = {}
    for name in wanted.keys() & self.files.keys():
      if self._entry(name).dtype == hf_fp8.E4M3:
        scales[f'{name}_scale_inv'] = name
    shapes = {name: wanted[original] for name, original in self.copies.items()}
    extra = {
      name
      for name in self.files
      if name not in wanted
      and name not in scales
      and name not in shapes
      and not hf_names.ignored(name)
    }
    missing = (wanted.keys() | scales.keys()) - self.files.keys()
    parts = [
      f'{word}: {", ".join(sorted(names))}'
      for word, names in (('missing', missing), ('left over', extra))
      if names
    ]
    if parts:
      raise ConfigError(
        f'the tensors are not those of config.json; {"; ".join(parts)}'
      )
    shapes |= wanted
    shapes |= {
      scale: self._scale_shape(wanted[name]) for scale, name in scales.items()
    }
    for name, shape in shapes.items():
      if name in self.files:
        self._check_entry(name, shape, name in scales)

  def _check_entry(self, name: str, shape: tuple[int, ...], scale: bool):
    entry = self._entry(name)
    if entry.shape != shape:
      raise ConfigError(
        f'tensor {name!r} has shape {list(entry.shape)}; by config.json it '
        f'must have {list(shape)}'
      )
    good = ('F32', 'BF16', 'F8_E8M0') if scale else _FLOATS
    if not scale and len(shape) < 2:
      good = _FLOATS[:3]
    code = safetensors.NAMES[entry.dtype]
    if code not in good:
      raise ConfigError(
        f'tensor {name!r} has dtype {code}; it must be one of {", ".join(good)}'
      )

  def _scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
    return hf_fp8.blocks(shape, self.block)

  def _entry(self, name: str) -> safetensors.Entry:
    return self.files[name].entries[name]

  def units(self) -> list[tuple[hf_names.Row, dict[str, int]]]:
    """Every (row, place), in the order in which the files hold them."""
    every = [(row, at) for row in self.rows for at in row.places()]

    def where(unit):
      name = unit[0].tensor(unit[1])
      return self.files[name].path, self._entry(name).start

    return sorted(every, key=where)

  def matrix(self, row: hf_names.Row, at: dict[str, int]) -> np.ndarray:
    """The released matrix (or vector) of a place, as floats of `dtype`.

    Raises:
      ConfigError: it holds NaN.
    """
    name, part = row.tensor(at), row.within(at)
    with _named(str(self.files[name].path)):
      wanted = hf_config.F32 if row.path[0] == 'router' else self.dtype
      return self._floats(name, part).astype(wanted, copy=False)

  def _floats(self, name: str, part: tuple[slice, ...]) -> np.ndarray:
    raw = self.files[name].read(name)[part]
    hf_fp8.check_finite(name, raw)
    if raw.dtype != hf_fp8.E4M3:
      return raw
    scale_name = f'{name}_scale_inv'
    scale = self.files[scale_name].read(scale_name).astype(np.float32)
    hf_fp8.check_finite(scale_name, scale)
    if raw.ndim > 2:  # experts in one tensor, of which this is one's matrix
      raw, scale = raw[0], scale[part[0].start]
    return hf_fp8.dequantize(raw, scale, part[-2].start or 0, self.block)

  def ahead(self, name: str, size: int) -> None:
    """Lets the disk read what comes from this tensor on."""
    self.files[name].ahead(name, size)

  def forget(self, name: str) -> None:
    """Gives back the memory of a tensor that has been read."""
    self.files[name].forget(name)

  def check_copies(self) -> None:
    """MTP's embedding and head must be the main model's: here they are one.

    Raises:
      ConfigError: they are not.
    """
    for name, original in self.copies.items():
      if name not in self.files:
        continue
      rows = self._entry(name).shape[0]
      for start in range(0, rows, 4096):
        part = (slice(start, start + 4096), slice(None))
        same = np.array_equal(
          self._floats(name, part).astype(np.float32),
          self._floats(original, part).astype(np.float32),
        )
        if not same:
          raise ConfigError(
            f'{self.folder}: tensor {name!r} is not a copy of {original!r}; '
            'the modules share the main model’s embedding and head here'
          )
      self.forget(name)
      self.forget(original)


@contextlib.contextmanager
def _named(where: str) -> Iterator[None]:
  """Puts the place in front of what is wrong there."""
  try:
    yield
  except ConfigError as error:
    text = str(error)
    raise ConfigError(
      text if text.startswith(where) else f'{where}: {text}'
    ) from None


def _open(
  folder: pathlib.Path, stack: contextlib.ExitStack
) -> dict[str, safetensors.File]:
  """Tensor name -> the open file that holds it, by the index if there is one.

  Raises:
    ConfigError: no index and not one file; an index that leaves the folder or
      does not agree with its files; files that are missing (all of them).
  """
  index = folder / hf_config.INDEX
  if not index.exists():
    present = sorted(p.name for p in folder.glob('*.safetensors'))
    if len(present) != 1:
      raise ConfigError(
        f'{folder}: has {len(present)} .safetensors files and no {hf_config.INDEX}; '
        'one file, or an index that names its shards, is needed'
      )
    file = stack.enter_context(safetensors.File(folder / present[0]))
    return {name: file for name in file.entries}
  places = hf_config.read_json(index).get('weight_map')
  if not isinstance(places, dict) or not places:
    raise ConfigError(f'{index}: has no weight_map from tensors to files')
  for name, place in places.items():
    good = isinstance(place, str) and place.endswith('.safetensors')
    if not good or place != os.path.basename(place) or set(place) & set('\\\0'):
      raise ConfigError(
        f'{index}: tensor {name!r} is placed in {place!r}, which is not the '
        'name of a .safetensors file in the same folder'
      )
  shards = sorted(set(places.values()))
  absent = [shard for shard in shards if not (folder / shard).is_file()]
  if absent:
    raise ConfigError(f'{folder}: shards are missing: {", ".join(absent)}')
  files = {
    shard: stack.enter_context(safetensors.File(folder / shard))
    for shard in shards
  }
  there = {name: file for file in files.values() for name in file.entries}
  lost = sorted(n for n, p in places.items() if n not in files[p].entries)
  if lost:
    raise ConfigError(
      f'{index}: its shards do not hold, missing: {", ".join(lost)}'
    )
  return there | {name: files[place] for name, place in places.items()}


def _with_present_mtp(
  config: config_lib.ModelConfig, files: dict
) -> config_lib.ModelConfig:
  """transformers drops the MTP modules, and keeps their number in the config."""
  prefix = f'model.layers.{config.layers}.'
  if any(name.startswith(prefix) for name in files):
    return config
  return dataclasses.replace(config, mtp=config_lib.MTPConfig(depth=0))


def _block_size(values: dict) -> int:
  """The side of FP8's blocks; only squares exist."""
  found = values.get('quantization_config') or {}
  size = found.get('weight_block_size') if isinstance(found, dict) else None
  if size is None:
    return hf_fp8.BLOCK
  good = isinstance(size, list) and len(size) == 2 and size[0] == size[1]
  if not good or type(size[0]) is not int or size[0] < 1:
    raise ConfigError(
      f'quantization_config weight_block_size={size!r}: must be two equal sizes'
    )
  return size[0]


# ------------------------------------------------------------ leaves to fill


class _Leaf:
  """One leaf of the variables, being filled: a buffer for each local shard."""

  def __init__(self, shape: tuple[int, ...], dtype: np.dtype, where: Any):
    self.shape, self.dtype, self.where = shape, dtype, where
    self.bits = np.dtype(f'u{dtype.itemsize}')
    whole = tuple(slice(0, n) for n in shape)
    self.shards: list[tuple[tuple[slice, ...], list]] = [(whole, [None])]
    if where is not None:
      groups: dict[tuple, list] = {}
      for device, index in where.addressable_devices_indices_map(shape).items():
        ends = tuple(
          s.indices(n)[:2] for s, n in zip(index, shape, strict=True)
        )
        groups.setdefault(ends, []).append(device)
      self.shards = [
        (tuple(slice(*end) for end in ends), devices)
        for ends, devices in groups.items()
      ]
    size = lambda index: tuple(part.stop - part.start for part in index)
    self.buffers = [
      [jnp.zeros(size(index), dtype, device=device) for device in devices]
      for index, devices in self.shards
    ]

  def wants(self, row: hf_names.Row, at: dict[str, int]) -> bool:
    """Whether any shard of this host has something of a place."""
    known = [
      (i, at[axis]) for i, axis in enumerate(row.ours) if axis in row.units
    ]
    return any(
      all(index[i].start <= place < index[i].stop for i, place in known)
      for index, _ in self.shards
    )

  def put(self, block: np.ndarray, start: tuple[int, ...]) -> list[jax.Array]:
    """Writes a block that begins at `start`; returns what to wait for."""
    block = block.view(self.bits)
    written = []
    for (index, devices), buffers in zip(
      self.shards, self.buffers, strict=True
    ):
      first = [max(p.start, s) for p, s in zip(index, start, strict=True)]
      last = [
        min(p.stop, s + n)
        for p, s, n in zip(index, start, block.shape, strict=True)
      ]
      if any(a >= b for a, b in zip(first, last, strict=True)):
        continue
      part = tuple(
        slice(a - s, b - s) for a, b, s in zip(first, last, start, strict=True)
      )
      at = np.array(
        [a - p.start for a, p in zip(first, index, strict=True)], np.int32
      )
      for i, device in enumerate(devices):
        piece = jax.device_put(block[part], device)
        buffers[i] = _write(buffers[i], piece, at)
        written.append(buffers[i])
    return written

  def finish(self) -> jax.Array:
    """The leaf, whole."""
    arrays = [buffer for each in self.buffers for buffer in each]
    self.buffers = []
    if self.where is None:
      return arrays[0]
    return jax.make_array_from_single_device_arrays(
      self.shape, self.where, arrays
    )


@functools.partial(jax.jit, donate_argnums=0)
def _write(buffer, piece, at):
  """The buffer with the piece in place, as bits.

  XLA's CPU backend would widen a whole bfloat16 buffer to float32 and back.
  """
  bits = jax.lax.bitcast_convert_type(buffer, piece.dtype)
  bits = jax.lax.dynamic_update_slice(bits, piece, tuple(at))
  return jax.lax.bitcast_convert_type(bits, buffer.dtype)


def _leaves(
  config: config_lib.ModelConfig, dtype: np.dtype, mesh: Any
) -> dict[tuple[str, ...], _Leaf]:
  """An empty leaf for each of the model's, where it will live."""
  network = model.Transformer(config)
  tokens = jax.ShapeDtypeStruct((1, config.mtp.depth + 2), jnp.int32)
  boxed = jax.eval_shape(network.init, jax.random.key(0), tokens)
  where = sharding.shardings(boxed, mesh) if mesh is not None else None
  leaves = {}
  for keys, leaf in hf_names.flat(nn.unbox(boxed)):
    kind = hf_config.F32 if keys[0] == 'router' else dtype
    place = None if where is None else _get(where, keys)
    if place is not None:
      try:
        place.shard_shape(leaf.shape)
      except ValueError as error:
        raise ConfigError(
          f'{".".join(keys)} cannot be laid on the mesh ({error})'
        ) from None
    leaves[keys] = _Leaf(leaf.shape, kind, place)
  return leaves
