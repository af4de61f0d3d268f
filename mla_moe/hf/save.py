"""Saves variables as a released checkpoint, complete or not at all.

All files are written into a scratch folder beside the target, which is renamed
to the target when everything is on the disk. `outgoing` makes the tensors, with
the table that `load` reads in the other direction.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

from mla_moe import files
from mla_moe.config import ConfigError, ModelConfig
from mla_moe.hf import config_json, dialects, outgoing, settings

_GENERATION = 'generation_config.json'
# Files that accompany the weights: the tokenizer and settings of generation.
EXTRAS = (
  'tokenizer.json',
  'tokenizer_config.json',
  _GENERATION,
  'special_tokens_map.json',
  'added_tokens.json',
  'chat_template.jinja',
  'vocab.json',
  'merges.txt',
  'tiktoken.model',
)
_WEIGHTS = re.compile(r'(model|consolidated)(-\d{5,}-of-\d{5,})?\.safetensors')
_CONFIGS = ('config.json', 'params.json')
_INDEX = '.safetensors.index.json'


def save_huggingface(
  path: os.PathLike | str,
  config: ModelConfig,
  variables: Any,
  fp8: bool = False,
  *,
  power_of_two: bool = False,
  dtype: Any = None,
  extras: os.PathLike | str | Mapping[str, pathlib.Path | bytes] | None = None,
  force: bool = False,
  shard_bytes: int = 4 * 10**9,
) -> None:
  """Writes a folder in the layout of the releases, complete or not at all.

  Args:
    path: the new folder.
    config: the model's.
    variables: {'params', 'router'}; 'router' may be absent without biases.
    fp8: write the blocks' matrices as float8_e4m3fn with weight_scale_inv.
      Weights that were loaded from such a file get the same bytes again. Other
      tensors are bfloat16 if that loses nothing.
    power_of_two: new FP8 scales are powers of two (V3.1), not float32 (V3).
    dtype: of the tensors; None keeps that of the variables.
    extras: a folder from which tokenizer and settings of generation are copied,
      or {name: file or content} of them. Settings that are missing are written
      (`settings`).
    force: replace an existing export. A folder with any file that an export
      does not write is never replaced.
    shard_bytes: largest size of a file, but for a single larger tensor.

  Raises:
    ConfigError: a target that exists, a model that no release computes, arrays
      of other shapes than the config's, NaN.
    OSError: the disk is full; the target is unchanged.
  """
  target = pathlib.Path(path).resolve()
  _check_target(target, force)
  if not isinstance(extras, Mapping):
    extras = extras_of(extras) if extras is not None else {}
  extras = settings.completed(config, extras)
  if dtype is not None:
    dtype = config_json.parameter_dtype(dtype)
  tensors = outgoing.Tensors(config, variables, fp8, power_of_two, dtype)
  main_dtype = next(iter(tensors.plan.values()))[0]
  if fp8:
    main_dtype = config_json.BF16
  # Refuses a model that cannot be described, before anything is written.
  config_json.write(config, str(main_dtype), fp8)
  shards = tensors.shards(shard_bytes)
  own = dialects.dialect(config.release.family)
  with replacing(target) as scratch:
    weight_map, total = {}, 0
    for number, shard in enumerate(shards, start=1):
      file = f'{own.stem}.safetensors'
      if len(shards) > 1:
        file = f'{own.stem}-{number:05d}-of-{len(shards):05d}.safetensors'
      tensors.write(scratch / file, shard)
      for name in shard:
        weight_map[name] = file
        total += tensors.bytes_of(name)
    for name, file in extras.items():
      if isinstance(file, bytes):
        (scratch / name).write_bytes(file)
      else:
        shutil.copyfile(file, scratch / name)
    if len(shards) > 1:
      index = {'metadata': {'total_size': total}, 'weight_map': weight_map}
      _write_json(scratch / f'{own.stem}{_INDEX}', index)
    values = config_json.write(
      config, str(main_dtype), fp8, tensors.only_powers
    )
    ends = _object(extras.get(_GENERATION)).get('eos_token_id')
    if isinstance(ends, list) and ends[:1] == [values.get('eos_token_id')]:
      values['eos_token_id'] = ends
    _write_json(scratch / own.config, values)
    scratch.chmod(0o755)


@contextlib.contextmanager
def replacing(target: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a scratch folder that becomes `target` when the block ends.

  After an error the target is unchanged and the scratch folder deleted.

  Raises:
    ConfigError: the folder around the target cannot be written, or the target
      cannot be moved away, as a mount point cannot: both are tried before
      anything is written. Or another process filled the target meanwhile.
  """
  target = target.resolve()  # a link stays, and its folder is replaced
  try:
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = pathlib.Path(
      tempfile.mkdtemp('.partial', f'.{target.name}.', target.parent)
    )
  except OSError as error:
    raise ConfigError(
      f'{str(target)!r}: cannot be written ({error.strerror})'
    ) from None
  try:
    filled = target.exists() and any(target.iterdir())
    if target.exists():
      _check_movable(target, scratch)
    yield scratch
    _replace(target, scratch, filled)
  except BaseException:
    shutil.rmtree(scratch, ignore_errors=True)
    raise


def extras_of(folder: os.PathLike | str) -> dict[str, pathlib.Path | bytes]:
  """Returns {name: file} of the files of `EXTRAS` that the folder has.

  Of several ends of a text in config.json, a model's config has the first: the
  content of generation_config.json gets them all.

  Raises:
    ConfigError: a file is a device, or a link that leads out of the folder: its
      content, which may be private, would lie in a folder that is uploaded.
      Links of the Hub's cache are followed.
  """
  folder = pathlib.Path(folder)
  home = folder.resolve()
  roots = [home]
  if home.parent.name == 'snapshots':  # MODEL/snapshots/REVISION
    roots.append(home.parent.parent / 'blobs')
  extras = {}
  for name in EXTRAS:
    path = folder / name
    if not path.exists():
      continue
    files.check_regular(path)
    if not any(path.resolve().is_relative_to(root) for root in roots):
      raise ConfigError(
        f'{path}: is a link out of the folder; put a copy of the file there'
      )
    extras[name] = path
  config = folder / 'config.json'
  words = _object(config if config.exists() else None)
  inner = words.get('text_config')  # of a model that also sees
  ends = (inner if isinstance(inner, dict) else words).get('eos_token_id')
  if isinstance(ends, list):
    values = _object(extras.get(_GENERATION))
    own = values.get('eos_token_id', [])
    own = own if isinstance(own, list) else [own]
    values['eos_token_id'] = [*ends, *(i for i in own if i not in ends)]
    extras[_GENERATION] = json.dumps(values, indent=2).encode()
  return extras


def _object(file: pathlib.Path | bytes | None) -> dict[str, Any]:
  """Returns the object in a JSON file or in its content; of None, {}."""
  if isinstance(file, pathlib.Path):
    return files.read_json(file)
  return json.loads(file or '{}')


def _check_target(target: pathlib.Path, force: bool) -> None:
  """Refuses a target that exists, but an export with `force`."""
  if not target.exists():
    return
  if not target.is_dir():
    raise ConfigError(f'{str(target)!r}: is a file; name a folder')
  present = {path.name for path in target.iterdir()}
  if not present:
    return
  if not force:
    raise ConfigError(
      f'{str(target)!r}: exists; name another folder, or replace it with '
      '--force'
    )
  weights = {name for name in present if _WEIGHTS.fullmatch(name)}
  ours = {*_CONFIGS, f'model{_INDEX}', f'consolidated{_INDEX}', *EXTRAS}
  ours |= weights
  others = {n for n in present if n not in ours or (target / n).is_dir()}
  if others:
    raise ConfigError(
      f'{str(target)!r}: holds {min(others)!r}, which no export writes, so it '
      'is not replaced; name another folder'
    )
  if not weights or not present.intersection(_CONFIGS):
    raise ConfigError(
      f'{str(target)!r}: holds no checkpoint, so it is not replaced; name '
      'another folder'
    )


def _check_movable(target: pathlib.Path, scratch: pathlib.Path) -> None:
  """Moves the target into the scratch folder and back."""
  moved = scratch / 'moved'
  try:
    os.rename(target, moved)
  except OSError as error:
    raise ConfigError(
      f'{str(target)!r}: cannot be replaced ({error.strerror}); name a folder '
      'inside it, or one that does not exist'
    ) from None
  os.rename(moved, target)


def _replace(target: pathlib.Path, scratch: pathlib.Path, filled: bool) -> None:
  """Renames `scratch` to `target`; a filled one is moved away, then deleted.

  At every instant the target is the old folder, absent, or the new one. If the
  new one cannot take the place, the old one goes back to it.
  """
  if filled:
    old = tempfile.mkdtemp('.old', f'.{target.name}.', target.parent)
    os.replace(target, old)  # onto an empty folder
  try:
    os.replace(scratch, target)  # fails if the target is filled
  except OSError as error:
    if filled:
      os.rename(old, target)
    raise ConfigError(
      f'{str(target)!r}: cannot be replaced ({error.strerror}); another '
      'process writes there'
    ) from None
  if filled:
    shutil.rmtree(old)
  files.sync(target.parent)


def _write_json(path: pathlib.Path, values: dict) -> None:
  with open(path, 'w', encoding='utf-8') as file:
    json.dump(values, file, indent=2)
    file.write('\n')
    file.flush()
    os.fsync(file.fileno())
