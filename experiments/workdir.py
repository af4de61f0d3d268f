"""A run's folder: claimed by one process, bound to one config."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib

from mla_moe import config as config_lib
from mla_moe.config import ConfigError

# What may change between the starts of one run: nothing that the numbers of a
# step depend on.
_HARMLESS = ('config.run.', 'config.data.loader')


@contextlib.contextmanager
def claim(folder: os.PathLike | str, config: config_lib.Config):
  """Makes the folder if need be, holds its lock, and writes config.json.

  Raises:
    ConfigError: it is a file, another process writes to it, or it holds a run
      of a different config (says which fields differ).
  """
  path = pathlib.Path(folder)
  if path.exists() and not path.is_dir():
    raise ConfigError(f'workdir={str(path)!r}: is a file; name a folder')
  try:
    path.mkdir(parents=True, exist_ok=True)
    lock = open(path / 'lock', 'a+')
  except OSError as error:
    raise ConfigError(
      f'workdir={str(path)!r}: cannot be written ({error.strerror})'
    ) from None
  with lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      lock.seek(0)
      raise ConfigError(
        f'workdir={str(path)!r}: process {lock.read().strip() or "?"} is '
        'writing to it; wait, or name another folder'
      ) from None
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    _bind(path, config)
    yield path


def read_config(path: pathlib.Path) -> config_lib.Config:
  """The config that a run's folder was made with."""
  try:
    return config_lib.freeze(json.loads((path / 'config.json').read_text()))
  except (OSError, json.JSONDecodeError) as error:
    raise ConfigError(f'{path}/config.json: cannot be read ({error})') from None


def _bind(path: pathlib.Path, config: config_lib.Config):
  if (path / 'config.json').exists():
    lines = config_lib.differences(config, read_config(path))
    seed = 'config.run.seed'
    wrong = [x for x in lines if not x.startswith(_HARMLESS) or seed in x]
    if wrong:
      raise ConfigError(
        f'workdir={str(path)!r}: holds a run of another config '
        f'({"; ".join(wrong)}); name another folder'
      )
  scratch = path / 'config.json.new'
  scratch.write_text(json.dumps(dataclasses.asdict(config), indent=1))
  scratch.rename(path / 'config.json')


def rows(path: pathlib.Path) -> list[dict]:
  """The rows of a .jsonl file; a torn last line is left out."""
  found = []
  if path.exists():
    for line in path.read_text().splitlines():
      try:
        found.append(json.loads(line))
      except json.JSONDecodeError:
        break
  return found


def rewind(path: pathlib.Path, step: int) -> list[dict]:
  """Drops the rows of a .jsonl file after `step`; returns those that stay."""
  kept = [row for row in rows(path) if row['step'] <= step]
  if path.exists():
    scratch = path.with_suffix('.new')
    scratch.write_text(''.join(json.dumps(row) + '\n' for row in kept))
    scratch.rename(path)
  return kept
