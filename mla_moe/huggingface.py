"""Released checkpoints, in and out: `load_huggingface`, `save_huggingface`.

`hf_config` translates config.json, `hf_names` says which tensor is which part
of which leaf, `hf_fp8` does the blocks, `safetensors` maps the files; here they
stream. Loading takes one matrix at a time out of the map (of a layer's experts:
one expert), in the order of the files, and puts it into each device's shard of
the leaf, which is made beforehand on that device: the host holds a few matrices
and nothing else, whatever the model's size. The transposition costs nothing on
the way, since jax copies strided memory as fast as it can.

Saving runs the same table backwards, into a temporary folder beside the target
that becomes the target only when all of it is on the disk.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import linen as nn

from mla_moe import config as config_lib
from mla_moe import hf_config, hf_fp8, hf_names, model, safetensors, sharding
from mla_moe.config import ConfigError
from mla_moe.types import PyTree

# What stands beside the weights and goes with them: tokenizer and generation.
EXTRAS = (
  'tokenizer.json',
  'tokenizer_config.json',
  'generation_config.json',
  'special_tokens_map.json',
  'added_tokens.json',
  'chat_template.jinja',
  'vocab.json',
  'merges.txt',
  'tiktoken.model',
)
_INDEX = 'model.safetensors.index.json'
_FLOATS = ('F32', 'F16', 'BF16', 'F8_E4M3')
_BF16 = np.dtype(ml_dtypes.bfloat16)
_F32 = np.dtype(np.float32)
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
  dtype = _parameter_dtype(dtype)
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


def _parameter_dtype(dtype: Any) -> np.dtype:
  try:
    found = np.dtype(dtype)
  except TypeError:
    found = None
  if found not in (_F32, _BF16):
    raise ConfigError(f'dtype={dtype!r}: must be float32 or bfloat16')
  return found


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
      wanted = _F32 if row.path[0] == 'router' else self.dtype
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
  index = folder / _INDEX
  if not index.exists():
    present = sorted(p.name for p in folder.glob('*.safetensors'))
    if len(present) != 1:
      raise ConfigError(
        f'{folder}: has {len(present)} .safetensors files and no {_INDEX}; '
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
  for keys, leaf in _flat(nn.unbox(boxed)):
    kind = _F32 if keys[0] == 'router' else dtype
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


def _flat(tree: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple, Any]]:
  if not hasattr(tree, 'items'):
    yield keys, tree
    return
  for key, value in tree.items():
    yield from _flat(value, (*keys, key))


# -------------------------------------------------------------------- saving


def save_huggingface(
  path: os.PathLike | str,
  config: config_lib.ModelConfig,
  variables: Any,
  fp8: bool = False,
  *,
  power_of_two: bool = False,
  dtype: Any = None,
  extras: os.PathLike | str | None = None,
  force: bool = False,
  shard_bytes: int = 4 * 10**9,
) -> None:
  """Writes a folder in the layout of the releases, whole or not at all.

  Args:
    path: the new folder.
    config: the model's.
    variables: {'params', 'router'}; 'router' may be absent without biases.
    fp8: the blocks' matrices as float8_e4m3fn with weight_scale_inv; those that
      came from such a file get the same bytes again. What is not quantised is
      then bfloat16 where that loses nothing.
    power_of_two: new FP8 scales are powers of two (V3.1), not float32 (V3).
    dtype: the tensors' dtype; the variables' own when None.
    extras: a folder from which tokenizer and generation settings are copied.
    force: replace a checkpoint that is there.
    shard_bytes: about how large a file may grow.

  Raises:
    ConfigError: a target that exists, a model that no release computes, arrays
      of other shapes than the config's, NaN.
  """
  target = pathlib.Path(path)
  _check_target(target, force)
  if dtype is not None:
    dtype = _parameter_dtype(dtype)
  tensors = _Outgoing(config, variables, fp8, power_of_two, dtype)
  main = tensors.dtype_of('model.embed_tokens.weight')
  if fp8:
    main = _BF16
  # Before anything is written: a model that cannot be described is refused.
  hf_config.write(config, str(main), fp8)
  shards = tensors.shards(shard_bytes)
  target.parent.mkdir(parents=True, exist_ok=True)
  scratch = pathlib.Path(
    tempfile.mkdtemp('.partial', f'.{target.name}.', target.parent)
  )
  try:
    places, total = {}, 0
    for number, names in enumerate(shards, start=1):
      name = 'model.safetensors'
      if len(shards) > 1:
        name = f'model-{number:05d}-of-{len(shards):05d}.safetensors'
      tensors.write(scratch / name, names)
      for tensor in names:
        places[tensor] = name
        total += tensors.bytes_of(tensor)
    copy_extras(extras, scratch)
    if len(shards) > 1:
      index = {'metadata': {'total_size': total}, 'weight_map': places}
      _write_json(scratch / _INDEX, index)
    values = hf_config.write(
      config, str(main), fp8, tensors.all_powers_of_two()
    )
    _write_json(scratch / 'config.json', values)
    scratch.chmod(0o755)
    _take_place(scratch, target)
  except BaseException:
    shutil.rmtree(scratch, ignore_errors=True)
    raise


def _check_target(target: pathlib.Path, force: bool) -> None:
  if not target.exists():
    return
  if not target.is_dir():
    raise ConfigError(f'{str(target)!r}: is a file; name a folder')
  if not any(target.iterdir()):
    return
  if not force:
    raise ConfigError(
      f'{str(target)!r}: exists; name another folder, or replace it with '
      '--force'
    )
  if not (target / 'config.json').exists():
    raise ConfigError(
      f'{str(target)!r}: holds no checkpoint, so it is not replaced; name '
      'another folder'
    )


def _take_place(scratch: pathlib.Path, target: pathlib.Path) -> None:
  """Renames onto the target; an old one goes aside first, and only then goes."""
  if not target.exists():
    os.replace(scratch, target)
  else:
    old = tempfile.mkdtemp('.old', f'.{target.name}.', target.parent)
    os.replace(target, old)  # onto an empty folder
    os.replace(scratch, target)
    shutil.rmtree(old)
  folder = os.open(target.parent, os.O_RDONLY)
  try:
    os.fsync(folder)
  finally:
    os.close(folder)


def _write_json(path: pathlib.Path, values: dict) -> None:
  with open(path, 'w', encoding='utf-8') as file:
    json.dump(values, file, indent=2)
    file.write('\n')
    file.flush()
    os.fsync(file.fileno())


def copy_extras(source: Any, target: pathlib.Path) -> list[str]:
  """Copies tokenizer and generation settings; returns the names it found."""
  if source is None:
    return []
  copied = []
  for name in EXTRAS:
    path = pathlib.Path(source) / name
    if path.is_file():
      shutil.copyfile(path, target / name)
      copied.append(name)
  return copied


class _Outgoing:
  """The tensors to write: their names, shapes and dtypes, and then they."""

  def __init__(self, config, variables, fp8, power_of_two, dtype):
    self.fp8, self.power_of_two, self.dtype = fp8, power_of_two, dtype
    self._only_powers = True
    self.sources: dict[str, list] = {}
    self.plan: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
    leaves = {row.path: row for row in hf_names.rows(config)}
    self.leaves = _checked_leaves(leaves, variables)
    for row in sorted(leaves.values(), key=lambda row: 'l' in row.units):
      for at in row.places():
        self.sources.setdefault(row.tensor(at), []).append((row, at))
    originals = hf_names.copies(config)
    if config.tie_embeddings:
      originals.pop('lm_head.weight')
    for name, original in originals.items():
      self.sources[name] = self.sources[original]
    for name, rows in self.sources.items():
      self.plan[name] = (self._dtype(name, rows), rows[0][0].file_shape)
    for name in [n for n in self.plan if self.plan[n][0] == hf_fp8.E4M3]:
      shape = hf_fp8.blocks(self.plan[name][1])
      self.plan[f'{name}_scale_inv'] = (_F32, shape)

  def _dtype(self, name: str, rows: list) -> np.dtype:
    if rows[0][0].path[0] == 'router':
      return _F32
    if self.fp8 and hf_names.quantized(name):
      return hf_fp8.E4M3
    kind = self.dtype or np.dtype(self.leaves[rows[0][0].path].dtype)
    if self.fp8 and kind == _F32:
      exact = self._matrix(name)
      lossless = (exact.astype(_BF16).astype(_F32) == exact).all()
      return _BF16 if lossless else _F32
    return kind

  def dtype_of(self, name: str) -> np.dtype:
    """The dtype in which a tensor is written."""
    return self.plan[name][0]

  def bytes_of(self, name: str) -> int:
    """The bytes that a tensor takes in its file."""
    dtype, shape = self.plan[name]
    return dtype.itemsize * math.prod(shape)

  def all_powers_of_two(self) -> bool:
    """Whether every scale written so far is a power of two."""
    return self._only_powers

  def shards(self, limit: int) -> list[list[str]]:
    """Names by file, layer after layer; a weight and its scale stay together."""
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

  def write(self, path: pathlib.Path, names: list[str]) -> None:
    """One file with these tensors."""
    plan = {name: self.plan[name] for name in names}
    with safetensors.create(path, plan) as out:
      for name in names:
        if name not in self.sources:
          continue  # a scale, written with its weight
        matrix = self._matrix(name)
        if plan[name][0] == hf_fp8.E4M3:
          wide = np.asarray(matrix, np.float32)
          q, scale = hf_fp8.quantize(wide, self.power_of_two)
          out[name][:] = q
          out[f'{name}_scale_inv'][:] = scale
          mantissas = np.frexp(scale)[0]
          self._only_powers &= bool((mantissas == 0.5).all())
        else:
          out[name][:] = matrix

  def _matrix(self, name: str) -> np.ndarray:
    """The released matrix of a name, in the leaf's dtype (or `dtype`).

    Raises:
      ConfigError: it holds NaN.
    """
    rows = self.sources[name]
    first = self.leaves[rows[0][0].path]
    out = np.empty(rows[0][0].file_shape, np.dtype(first.dtype))
    for row, at in rows:
      row.put(_block(self.leaves[row.path], row, at), out)
    hf_fp8.check_finite(name, out)
    if self.dtype is not None and rows[0][0].path[0] != 'router':
      out = out.astype(self.dtype, copy=False)
    return out


def _by_layer(name: str) -> tuple:
  """Embedding first, layers by number, then norm and head."""
  parts = name.split('.')
  if parts[:2] == ['model', 'layers']:
    numbers = [int(p) if p.isdigit() else -1 for p in parts[4:]]
    return (1, int(parts[2]), parts[3:5], numbers, name)
  return (0 if 'embed' in name else 2, 0, [], [], name)


def _checked_leaves(rows: dict, variables: Any) -> dict[tuple[str, ...], Any]:
  """The arrays of the table's rows; they are all there are.

  Raises:
    ConfigError: others, or of other shapes or dtypes.
  """
  given = dict(_flat(variables))
  missing, extra = rows.keys() - given.keys(), given.keys() - rows.keys()
  names = lambda keys: ', '.join('.'.join(k) for k in sorted(keys))
  if missing or extra:
    raise ConfigError(
      'the variables are not those of the config; '
      f'missing: {names(missing) or "none"}; left over: {names(extra) or "none"}'
    )
  for keys, leaf in given.items():
    if tuple(leaf.shape) != rows[keys].shape:
      raise ConfigError(
        f'{".".join(keys)} has shape {tuple(leaf.shape)}; by the config it '
        f'must have {rows[keys].shape}'
      )
    if np.dtype(leaf.dtype) not in (_F32, _BF16):
      raise ConfigError(
        f'{".".join(keys)} has dtype {leaf.dtype}; it must be float32 or '
        'bfloat16'
      )
    here = getattr(leaf, 'is_fully_addressable', True)
    if not here:
      raise ConfigError(
        f'{".".join(keys)} lies on several hosts; save from one process'
      )
  return given


def _block(leaf: Any, row: hf_names.Row, at: dict[str, int]) -> np.ndarray:
  """A place's block of our leaf, on the host."""
  start = row.start(at)
  sizes = tuple(
    1 if axis in row.units else size
    for axis, size in zip(row.ours, row.shape, strict=True)
  )
  if isinstance(leaf, jax.Array) and not _on_host(leaf):
    return np.asarray(_slice(leaf, np.array(start, np.int32), sizes))
  where = tuple(slice(a, a + n) for a, n in zip(start, sizes, strict=True))
  return np.asarray(leaf)[where]


def _on_host(leaf: jax.Array) -> bool:
  """Whether numpy may look at the array where it is, without a copy."""
  devices = leaf.devices()
  return len(devices) == 1 and next(iter(devices)).platform == 'cpu'


@functools.partial(jax.jit, static_argnums=2)
def _slice(leaf, start, sizes):
  return jax.lax.dynamic_slice(leaf, tuple(start), sizes)
