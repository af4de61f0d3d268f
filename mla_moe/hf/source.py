"""A released checkpoint's folder: checked as a whole, then read by matrices.

`Source` opens a folder and compares its tensors' names, shapes and dtypes with
those that config.json implies, before any number is read. Then it returns
matrix after matrix as floats. It has no state of the reading, so several
threads can read at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import re
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from mla_moe.checked import ConfigWarning, few
from mla_moe.config import ConfigError, ModelConfig, MTPConfig
from mla_moe.files import read_json
from mla_moe.hf import config_json, dialects, formats, names, safetensors

_COPY_ROWS = 4096  # compared at once
_INDEX = '.safetensors.index.json'
_LAYER = re.compile(r'\blayers\.(\d{1,9})\.')
_PICKLES = ('.bin', '.pt', '.pth', '.ckpt')  # which could run code
# Beside a model: hidden files (macOS's ._*), adapters, Mistral's duplicate.
_NO_MODEL = re.compile(r'\.|adapter_model|consolidated')


class Source:
  """A folder whose tensors agree with its config.json.

  config: its ModelConfig, without MTP if the folder has none that fits. rows:
  the table of its tensors (`names`). The files are open until `stack` closes.

  Tensors of layers after those of config.json are not read, as in transformers,
  nor is an MTP module whose embedding or head is not the main model's: there is
  one array for both here. A `ConfigWarning` says so.

  Raises:
    ConfigError: they do not agree; one line names the first three that do not.
  """

  def __init__(
    self, folder: pathlib.Path, dtype: np.dtype, stack: contextlib.ExitStack
  ):
    self.folder = folder
    values = _config(folder)
    with _errors_in(str(config_path(folder))):
      words = dialects.of(values)[1]
      self.tiles = formats.blocks(words.get('quantization_config'))
      self.config = config_json.read(values, str(dtype))
    self.files = _open(
      folder, dialects.dialect(self.config.release.family).stem, stack
    )
    self.config = _with_present_mtp(self.config, self.files)
    fused = any('.mlp.experts.gate_up_proj' in name for name in self.files)
    if fused:
      release = dataclasses.replace(self.config.release, experts='fused')
      self.config = dataclasses.replace(self.config, release=release)
    self.dtype = dtype
    with _errors_in(str(folder)):
      self._check_count(fused)
      self.rows = names.rows(self.config)
      self.copies = names.copies(self.config)
      self._check()
      if not self._shares_copies():
        self.config = _without_mtp(self.config)
        self.rows = names.rows(self.config)
        self.copies = names.copies(self.config)

  def _check_count(self, fused: bool):
    """Compares the count of tensors, before their names are made.

    A config.json may ask for 10^9 experts; the bound of one tensor for each
    layer and expert leaves only names that the files' own size pays for.
    """
    model = self.config
    layers = model.layers + model.mtp.depth
    routed = model.layers > model.dense_layers
    moe_layers = layers - model.dense_layers if routed else 0
    least = layers + (0 if fused else moe_layers * model.moe.experts)
    if least > len(self.files):
      raise ConfigError(
        f'the tensors are not those of config.json; missing: it describes at '
        f'least {least} tensors, the files hold {len(self.files)}'
      )
    if fused:
      for name in self.files:
        shape = self._entry(name).shape
        if name.endswith('gate_up_proj') and shape[:1] != (model.moe.experts,):
          raise ConfigError(
            f'tensor {name!r} has shape {list(shape)}; by config.json it must '
            f'have {model.moe.experts} experts'
          )

  def _check(self):
    """Compares names with the table, then shapes and dtypes."""
    shapes = {
      row.tensor(index): row.file_shape
      for row in self.rows
      for index in row.indices()
    }
    copies = {name: shapes[original] for name, original in self.copies.items()}
    self.stored = {}
    for name, shape in (copies | shapes).items():
      stored = formats.find(name, shape, self.files, self._entry, self.tiles)
      if stored or name in shapes:
        self.stored[name] = stored or formats.Stored(name, shape)
    required = {part for s in self.stored.values() for part in s.parts}
    missing = required - self.files.keys()
    extra = {
      name for name in self.files.keys() - required if not names.ignored(name)
    }
    vision = set(filter(names.is_vision, extra))
    extra -= vision
    layers = self.config.layers + self.config.mtp.depth
    after = {
      n for n in extra if (m := _LAYER.search(n)) and int(m[1]) >= layers
    }
    kinds = {'missing': missing, 'left over': extra - after}
    parts = [f'{word}: {few(kinds[word])}' for word in kinds if kinds[word]]
    if parts:
      first = f'model.layers.{self.config.layers}.'
      if extra == after and all(name.startswith(first) for name in missing):
        parts.append('num_nextn_predict_layers=0 loads the model without MTP')
      raise ConfigError(
        f'the tensors are not those of config.json; {"; ".join(parts)}'
      )
    last = f'layers after the {layers} of config.json'
    for unread, part in ((after, last), (vision, 'the vision tower')):
      if unread:
        _warn(self.folder, f'{part}: {few(unread)}')

  def _entry(self, name: str) -> safetensors.Entry:
    return self.files[name].entries[name]

  def _shares_copies(self) -> bool:
    """Returns whether MTP's embedding and head are the main model's, if any."""
    for name, original in self.copies.items():
      if name not in self.files or self._are_equal(name, original):
        continue
      if name in names.copies(_without_mtp(self.config)):
        raise ConfigError(
          f'tensor {name!r} is not a copy of {original!r}; '
          'tie_word_embeddings=false in config.json loads both'
        )
      _warn(
        self.folder,
        f'the MTP modules, whose {name!r} is not a copy of {original!r}',
      )
      return False
    return True

  def _are_equal(self, name: str, original: str) -> bool:
    """Compares two tensors of one shape by parts, and frees their memory."""
    for start in range(0, self.stored[name].shape[0], _COPY_ROWS):
      part = (slice(start, start + _COPY_ROWS), slice(None))
      pair = [self._floats(n, part, config_json.F32) for n in (name, original)]
      if not np.array_equal(*pair):
        return False
    self.forget(name)
    self.forget(original)
    return True

  def matrices(self) -> list[tuple[names.Row, dict[str, int]]]:
    """Returns every (row, index), in the order of the files' bytes."""
    matrices = [(row, index) for row in self.rows for index in row.indices()]

    def position(matrix):
      row, index = matrix
      name = row.tensor(index)
      codes = self.stored[name].codes
      return self.files[codes].path, self._entry(codes).start

    return sorted(matrices, key=position)

  def matrix(
    self, row: names.Row, index: dict[str, int], piece: slice
  ) -> np.ndarray:
    """Returns rows of a released matrix (or vector) as floats; refuses NaN.

    They are of the source's dtype, but float32 where a row is.
    """
    name, part = row.tensor(index), row.within(index)
    part = part if piece == slice(None) else (piece, *part[1:])
    with _errors_in(str(self.files[self.stored[name].codes].path)):
      dtype = config_json.F32 if row.is_float32 else self.dtype
      return self._floats(name, part, dtype)

  def _floats(
    self, name: str, part: tuple[slice, ...], dtype: np.dtype
  ) -> np.ndarray:
    read = lambda name: self.files[name].read(name)
    return formats.read(self.stored[name], part, read, dtype)

  def size(self, name: str) -> int:
    """Returns the bytes of a weight in its file."""
    entry = self._entry(self.stored[name].codes)
    return entry.end - entry.start

  def read_ahead(self, name: str, size: int) -> None:
    """Asks the disk for `size` bytes from the beginning of this weight."""
    codes = self.stored[name].codes
    self.files[codes].read_ahead(codes, size)

  def forget(self, name: str) -> None:
    """Frees the memory of a weight that has been read."""
    for part in self.stored[name].parts:
      self.files[part].forget(part)


def _warn(folder: pathlib.Path, parts: str) -> None:
  line = f'{folder}: not read, as in transformers: {parts}'
  warnings.warn(line, ConfigWarning, stacklevel=5)


def _config(folder: pathlib.Path) -> dict[str, Any]:
  """Returns the object of config.json; refuses an adapter of a model."""
  if not folder.is_dir():
    raise ConfigError(f'{str(folder)!r}: is no folder')
  adapter = folder / 'adapter_config.json'
  if adapter.exists():
    base = read_json(adapter).get('base_model_name_or_path')
    raise ConfigError(
      f'{adapter}: an adapter of {base!r} is not computed; merge it with its '
      'base (peft: merge_and_unload, then save_pretrained) and load the result'
    )
  return read_json(config_path(folder))


def config_path(folder: pathlib.Path) -> pathlib.Path:
  """Returns the path of config.json, or of the params.json in its place."""
  params = folder / 'params.json'
  path = folder / 'config.json'
  return params if params.exists() and not path.exists() else path


@contextlib.contextmanager
def _errors_in(place: str) -> Iterator[None]:
  """Puts the place in front of a ConfigError's line."""
  try:
    yield
  except ConfigError as error:
    text = str(error)
    raise ConfigError(
      text if text.startswith(place) else f'{place}: {text}'
    ) from None


def _open(
  folder: pathlib.Path, stem: str, stack: contextlib.ExitStack
) -> dict[str, safetensors.File]:
  """Returns {tensor: its open file}, by the index if there is one.

  A file model.safetensors (`stem`) comes first, as in transformers.

  Raises:
    ConfigError: no index and not one file; an index that leaves the folder or
      does not agree with its files; files that are missing.
  """
  index, one = folder / f'{stem}{_INDEX}', f'{stem}.safetensors'
  single = (folder / one).exists()
  shard_of = _weight_map(index) if index.exists() else {}
  if single and set(shard_of.values()) - {one}:
    _warn(folder, f'the files that {index.name} names, beside {one}')
  if single or not shard_of:
    name = one if single else _only_file(folder)
    file = stack.enter_context(safetensors.File(folder / name))
    return dict.fromkeys(file.entries, file)
  shards = sorted(set(shard_of.values()))
  absent = [shard for shard in shards if not (folder / shard).is_file()]
  if absent:
    raise ConfigError(f'{folder}: shards are missing: {few(absent)}')
  opened = lambda name: stack.enter_context(safetensors.File(folder / name))
  files = {shard: opened(shard) for shard in shards}
  pairs = [(name, file) for file in files.values() for name in file.entries]
  present = dict(pairs)
  if twice := {name for name, file in pairs if present[name] is not file}:
    raise ConfigError(f'{folder}: more than one shard holds: {few(twice)}')
  missing = shard_of.keys() - present.keys()
  if missing:
    raise ConfigError(f'{index}: its shards do not hold: {few(missing)}')
  return present


def _only_file(folder: pathlib.Path) -> str:
  """Returns the name of the one file of weights; refuses none, or several."""
  files = sorted(p.name for p in folder.glob('*.safetensors'))
  files = [name for name in files if not _NO_MODEL.match(name)]
  if len(files) == 1:
    return files[0]
  others = [p.name for p in folder.glob('*') if p.suffix in _PICKLES]
  raise ConfigError(
    f'{folder}: has {len(files)} .safetensors files and no '
    f'model{_INDEX}; one file, or an index that names its shards, is '
    'needed'
    + (f' ({few(others)}: save_pretrained writes it so)' if others else '')
  )


def _weight_map(index: pathlib.Path) -> dict[str, str]:
  """Returns {tensor: file name} of an index; no file is outside the folder."""
  shard_of = read_json(index).get('weight_map')
  if not isinstance(shard_of, dict) or not shard_of:
    raise ConfigError(f'{index}: has no weight_map from tensors to files')
  for name, shard in shard_of.items():
    valid = (
      isinstance(shard, str)
      and shard.endswith('.safetensors')
      and shard == os.path.basename(shard)
      and not set(shard) & set('\\\0')
    )
    if not valid:
      raise ConfigError(
        f'{index}: tensor {name!r} is placed in {shard!r}, which is not the '
        'name of a .safetensors file in the same folder'
      )
  return shard_of


def _with_present_mtp(config: ModelConfig, files: dict) -> ModelConfig:
  """Drops MTP from a config whose folder has no tensors of it.

  transformers writes such folders: it drops the modules, but not their number.
  Where `num_hidden_layers` was made smaller, the layer after them is another.
  """
  prefix = f'model.layers.{config.layers}.'
  parts = ('enorm', 'hnorm', 'eh_proj')
  spell = dialects.dialect(config.release.family).spell
  if any(spell(f'{prefix}{part}.weight') in files for part in parts):
    return config
  return _without_mtp(config)


def _without_mtp(config: ModelConfig) -> ModelConfig:
  return dataclasses.replace(config, mtp=MTPConfig(depth=0))
