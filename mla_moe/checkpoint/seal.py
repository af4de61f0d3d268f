"""The seal of a checkpoint: what its files were when it was whole.

`seal.json` lists the size and SHA-256 of every file of a step's folder, with
facts about what is inside, and ends with its own hash. It is written last, to
another name that is then renamed, so it is there whole or not at all: a folder
without it was cut off, or is older than seals. Orbax checks its indices but
not the values: a flipped bit in an array loads without a word.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
import pathlib

from mla_moe.config import ConfigError

NAME = 'seal.json'
FORMAT = 1
_THREADS = 4
_BLOCK = 1 << 22


class Damaged(ConfigError):
  """A checkpoint that is not what it was; one line says which file, and how."""


def write(folder: pathlib.Path, facts: dict) -> None:
  """Seals the folder as it is now, on the disk and not in its cache alone."""
  files = _files(folder)
  body = {'format': FORMAT, 'files': files, **facts}
  body['sha256'] = _of(body)
  scratch = folder / f'{NAME}.new'
  with open(scratch, 'w') as file:
    json.dump(body, file, indent=1)
    file.flush()
    os.fsync(file.fileno())
  os.replace(scratch, folder / NAME)
  for path in (folder, folder.parent):
    _sync(path)


def read(folder: pathlib.Path) -> dict | None:
  """The seal, or None where there is none.

  Raises:
    Damaged: it is not as it was written, or of a later format.
  """
  path = folder / NAME
  try:
    body = json.loads(path.read_bytes())
    told = body.pop('sha256')
    version = body['format']
  except FileNotFoundError:
    return None
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise Damaged(f'{path}: cannot be read ({error!r})') from None
  if told != _of(body):
    raise Damaged(f'{path}: is not as it was written')
  if version > FORMAT:
    raise Damaged(
      f'{path}: is of format {version}, written by mla_moe '
      f'{body.get("versions", {}).get("mla_moe", "?")}; this version reads '
      f'up to {FORMAT}'
    )
  return body


def check(folder: pathlib.Path, seal: dict) -> None:
  """Compares every file with the seal.

  Raises:
    Damaged: names the first file that is absent, new or different.
  """
  told = seal['files']
  there = {str(path.relative_to(folder)) for path in _paths(folder)}
  for name in sorted(told.keys() | there):
    if name not in there:
      raise Damaged(f'{folder}/{name}: is missing')
    if name not in told:
      raise Damaged(f'{folder}/{name}: is not of this checkpoint')
    size = (folder / name).stat().st_size
    if size != told[name][0]:
      raise Damaged(f'{folder}/{name}: has {size} bytes, had {told[name][0]}')
  found = _files(folder)
  for name in sorted(told):
    if found[name] != told[name]:
      raise Damaged(f'{folder}/{name}: its SHA-256 is not what it was')


def _of(body: dict) -> str:
  text = json.dumps(body, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def _paths(folder: pathlib.Path) -> list[pathlib.Path]:
  ours = (NAME, f'{NAME}.new')
  return [
    path
    for path in sorted(folder.rglob('*'))
    if not path.is_dir() and not (path.parent == folder and path.name in ours)
  ]


def _files(folder: pathlib.Path) -> dict[str, list]:
  """{name: [size, SHA-256]} of every file."""
  paths = _paths(folder)
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
    found = list(threads.map(_file, paths))
  return {
    str(path.relative_to(folder)): facts
    for path, facts in zip(paths, found, strict=True)
  }


def _file(path: pathlib.Path) -> list:
  digest, size = hashlib.sha256(), 0
  with open(path, 'rb') as file:
    os.fsync(file.fileno())
    while block := file.read(_BLOCK):
      digest.update(block)
      size += len(block)
  return [size, digest.hexdigest()]


def _sync(folder: pathlib.Path):
  handle = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)
