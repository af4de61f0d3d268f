"""A released checkpoint's folder, checked: which file holds what, and it read.

`Source` opens a folder, compares its tensors' names, shapes and dtypes with
what its config.json says, all before a number is read, and then gives matrix
after matrix as floats. It keeps no state of the reading, so that several
threads may read at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Iterator

import numpy as np

from mla_moe.config import ConfigError, ModelConfig, MTPConfig
from mla_moe.hf import config_json, fp8_blocks, names, safetensors

_FLOATS = ('F32', 'F16', 'BF16', 'F8_E4M3')


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
    values = config_json.read_json(folder / 'config.json')
    self.files = _open(folder, stack)
    with _named(f'{folder}/config.json'):
      self.config = config_json.read(values, str(dtype))
      self.config = _with_present_mtp(self.config, self.files)
      self.plain_rope = values.get('rope_interleave') is False
      self.block = _block_size(values)
    fused = any(n.endswith('.mlp.experts.gate_up_proj') for n in self.files)
    self.rows = names.rows(self.config, fused)
    self.copies = names.copies(self.config)
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
      if self._entry(name).dtype == fp8_blocks.E4M3:
        scales[f'{name}_scale_inv'] = name
    shapes = {name: wanted[original] for name, original in self.copies.items()}
    extra = {
      name
      for name in self.files
      if name not in wanted
      and name not in scales
      and name not in shapes
      and not names.ignored(name)
    }
    missing = (wanted.keys() | scales.keys()) - self.files.keys()
    parts = [
      f'{word}: {", ".join(sorted(wrong))}'
      for word, wrong in (('missing', missing), ('left over', extra))
      if wrong
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
    return fp8_blocks.blocks(shape, self.block)

  def _entry(self, name: str) -> safetensors.Entry:
    return self.files[name].entries[name]

  def units(self) -> list[tuple[names.Row, dict[str, int]]]:
    """Every (row, place), in the order in which the files hold them."""
    every = [(row, at) for row in self.rows for at in row.places()]

    def where(unit):
      name = unit[0].tensor(unit[1])
      return self.files[name].path, self._entry(name).start

    return sorted(every, key=where)

  def matrix(self, row: names.Row, at: dict[str, int]) -> np.ndarray:
    """The released matrix (or vector) of a place, as floats of `dtype`.

    Raises:
      ConfigError: it holds NaN.
    """
    name, part = row.tensor(at), row.within(at)
    with _named(str(self.files[name].path)):
      wanted = config_json.F32 if row.path[0] == 'router' else self.dtype
      return self._floats(name, part).astype(wanted, copy=False)

  def _floats(self, name: str, part: tuple[slice, ...]) -> np.ndarray:
    raw = self.files[name].read(name)[part]
    fp8_blocks.check_finite(name, raw)
    if raw.dtype != fp8_blocks.E4M3:
      return raw
    scale_name = f'{name}_scale_inv'
    scale = self.files[scale_name].read(scale_name).astype(np.float32)
    fp8_blocks.check_finite(scale_name, scale)
    if raw.ndim > 2:  # experts in one tensor, of which this is one's matrix
      raw, scale = raw[0], scale[part[0].start]
    return fp8_blocks.dequantize(raw, scale, part[-2].start or 0, self.block)

  def size(self, name: str) -> int:
    """The bytes of a tensor in its file."""
    return self._entry(name).end - self._entry(name).start

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
  index = folder / config_json.INDEX
  if not index.exists():
    present = sorted(p.name for p in folder.glob('*.safetensors'))
    if len(present) != 1:
      raise ConfigError(
        f'{folder}: has {len(present)} .safetensors files and no '
        f'{config_json.INDEX}; one file, or an index that names its shards, is '
        'needed'
      )
    file = stack.enter_context(safetensors.File(folder / present[0]))
    return {name: file for name in file.entries}
  places = config_json.read_json(index).get('weight_map')
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


def _with_present_mtp(config: ModelConfig, files: dict) -> ModelConfig:
  """transformers drops the MTP modules, and keeps their number in config."""
  prefix = f'model.layers.{config.layers}.'
  if any(name.startswith(prefix) for name in files):
    return config
  return dataclasses.replace(config, mtp=MTPConfig(depth=0))


def _block_size(values: dict) -> int:
  """The side of FP8's blocks; only squares exist."""
  found = values.get('quantization_config') or {}
  size = found.get('weight_block_size') if isinstance(found, dict) else None
  if size is None:
    return fp8_blocks.BLOCK
  good = isinstance(size, list) and len(size) == 2 and size[0] == size[1]
  if not good or type(size[0]) is not int or size[0] < 1:
    raise ConfigError(
      f'quantization_config weight_block_size={size!r}: must be two equal sizes'
    )
  return size[0]
