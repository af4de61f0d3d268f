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
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

from mla_moe.config import ConfigError, ModelConfig
from mla_moe.hf import config_json, outgoing

# Files that accompany the weights: the tokenizer and settings of generation.
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
    extras: a folder from which tokenizer and settings of generation are copied.
    force: replace an existing checkpoint.
    shard_bytes: largest size of a file, but for a single larger tensor.

  Raises:
    ConfigError: a target that exists, a model that no release computes, arrays
      of other shapes than the config's, NaN.
  """
  target = pathlib.Path(path)
  _check_target(target, force)
  if dtype is not None:
    dtype = config_json.parameter_dtype(dtype)
  tensors = outgoing.Tensors(config, variables, fp8, power_of_two, dtype)
  main_dtype = tensors.dtype_of('model.embed_tokens.weight')
  if fp8:
    main_dtype = config_json.BF16
  # Refuses a model that cannot be described, before anything is written.
  config_json.write(config, str(main_dtype), fp8)
  shards = tensors.shards(shard_bytes)
  with replacing(target) as scratch:
    weight_map, total = {}, 0
    for number, shard in enumerate(shards, start=1):
      file = 'model.safetensors'
      if len(shards) > 1:
        file = f'model-{number:05d}-of-{len(shards):05d}.safetensors'
      tensors.write(scratch / file, shard)
      for name in shard:
        weight_map[name] = file
        total += tensors.bytes_of(name)
    copy_extras(extras, scratch)
    if len(shards) > 1:
      index = {'metadata': {'total_size': total}, 'weight_map': weight_map}
      _write_json(scratch / config_json.INDEX, index)
    values = config_json.write(
      config, str(main_dtype), fp8, tensors.all_powers_of_two()
    )
    _write_json(scratch / 'config.json', values)
    scratch.chmod(0o755)


@contextlib.contextmanager
def replacing(target: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a scratch folder that becomes `target` when the block ends.

  After an error the target is unchanged and the scratch folder deleted.
  """
  target.parent.mkdir(parents=True, exist_ok=True)
  scratch = pathlib.Path(
    tempfile.mkdtemp('.partial', f'.{target.name}.', target.parent)
  )
  try:
    yield scratch
    _replace(target, scratch)
  except BaseException:
    shutil.rmtree(scratch, ignore_errors=True)
    raise


def copy_extras(source: Any, target: pathlib.Path) -> list[str]:
  """Copies the files of `EXTRAS` that `source` has; returns their names."""
  if source is None:
    return []
  copied = []
  for name in EXTRAS:
    path = pathlib.Path(source) / name
    if path.is_file():
      shutil.copyfile(path, target / name)
      copied.append(name)
  return copied


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


def _replace(target: pathlib.Path, scratch: pathlib.Path) -> None:
  """Renames `scratch` to `target`; an old target is moved away, then deleted.

  At every instant the target is the old folder, absent, or the new one.
  """
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
