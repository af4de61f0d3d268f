"""Released checkpoints, out: `save_huggingface`.

The table of `hf_names` run backwards, tensor by tensor, into a temporary folder
beside the target that becomes the target only when all of it is on the disk.
"""

from __future__ import annotations

import functools
import json
import math
import os
import pathlib
import shutil
import tempfile
from typing import Any

import jax
import numpy as np

from mla_moe.config import ConfigError, ModelConfig
from mla_moe.hf import config_json, fp8_blocks, names, safetensors

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


def save_huggingface(
  path: os.PathLike | str,
  config: ModelConfig,
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
    dtype = config_json.parameter_dtype(dtype)
  tensors = _Outgoing(config, variables, fp8, power_of_two, dtype)
  main = tensors.dtype_of('model.embed_tokens.weight')
  if fp8:
    main = config_json.BF16
  # Before anything is written: a model that cannot be described is refused.
  config_json.write(config, str(main), fp8)
  shards = tensors.shards(shard_bytes)
  target.parent.mkdir(parents=True, exist_ok=True)
  scratch = pathlib.Path(
    tempfile.mkdtemp('.partial', f'.{target.name}.', target.parent)
  )
  try:
    places, total = {}, 0
    for number, shard in enumerate(shards, start=1):
      name = 'model.safetensors'
      if len(shards) > 1:
        name = f'model-{number:05d}-of-{len(shards):05d}.safetensors'
      tensors.write(scratch / name, shard)
      for tensor in shard:
        places[tensor] = name
        total += tensors.bytes_of(tensor)
    copy_extras(extras, scratch)
    if len(shards) > 1:
      index = {'metadata': {'total_size': total}, 'weight_map': places}
      _write_json(scratch / config_json.INDEX, index)
    values = config_json.write(
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
  """Renames onto the target; an old one goes aside first, then for good."""
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
    leaves = {row.path: row for row in names.rows(config)}
    self.leaves = _checked_leaves(leaves, variables)
    for row in sorted(leaves.values(), key=lambda row: 'l' in row.units):
      for at in row.places():
        self.sources.setdefault(row.tensor(at), []).append((row, at))
    originals = names.copies(config)
    if config.tie_embeddings:
      originals.pop('lm_head.weight')
    for name, original in originals.items():
      self.sources[name] = self.sources[original]
    for name, rows in self.sources.items():
      self.plan[name] = (self._dtype(name, rows), rows[0][0].file_shape)
    for name in [n for n in self.plan if self.plan[n][0] == fp8_blocks.E4M3]:
      shape = fp8_blocks.blocks(self.plan[name][1])
      self.plan[f'{name}_scale_inv'] = (config_json.F32, shape)

  def _dtype(self, name: str, rows: list) -> np.dtype:
    if rows[0][0].path[0] == 'router':
      return config_json.F32
    if self.fp8 and names.quantized(name):
      return fp8_blocks.E4M3
    kind = self.dtype or np.dtype(self.leaves[rows[0][0].path].dtype)
    if self.fp8 and kind == config_json.F32:
      exact = self._matrix(name)
      lossless = (
        exact.astype(config_json.BF16).astype(config_json.F32) == exact
      ).all()
      return config_json.BF16 if lossless else config_json.F32
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
    """Names by file, layer by layer; a weight and its scale stay together."""
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
    """One file with these tensors."""
    plan = {name: self.plan[name] for name in shard}
    with safetensors.create(path, plan) as out:
      for name in shard:
        if name not in self.sources:
          continue  # a scale, written with its weight
        matrix = self._matrix(name)
        if plan[name][0] == fp8_blocks.E4M3:
          wide = np.asarray(matrix, np.float32)
          q, scale = fp8_blocks.quantize(wide, self.power_of_two)
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
    fp8_blocks.check_finite(name, out)
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
  given = dict(names.flat(variables))
  missing, extra = rows.keys() - given.keys(), given.keys() - rows.keys()
  join = lambda keys: ', '.join('.'.join(k) for k in sorted(keys))
  if missing or extra:
    raise ConfigError(
      'the variables are not those of the config; '
      f'missing: {join(missing) or "none"}; '
      f'left over: {join(extra) or "none"}'
    )
  for keys, leaf in given.items():
    if tuple(leaf.shape) != rows[keys].shape:
      raise ConfigError(
        f'{".".join(keys)} has shape {tuple(leaf.shape)}; by the config it '
        f'must have {rows[keys].shape}'
      )
    if np.dtype(leaf.dtype) not in (config_json.F32, config_json.BF16):
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


def _block(leaf: Any, row: names.Row, at: dict[str, int]) -> np.ndarray:
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
