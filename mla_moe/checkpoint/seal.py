"""The seal of a checkpoint: size and SHA-256 of every file, written last.

Orbax checks its indices but not the values: a flipped bit in an array loads
without a word. So `seal.json` records every file of a step's folder, facts
about the contents, and its own hash. It is written under another name and then
renamed, so it is complete or absent: a folder without it was cut off, or is
older than seals.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
import pathlib

from mla_moe import files
from mla_moe.config import ConfigError

NAME = 'seal.json'
FORMAT = 1
_THREADS = 4
_BLOCK = 1 << 22
_NO_SEAL = ValueError, KeyError, TypeError, AttributeError, RecursionError


class Damaged(ConfigError):
  """A checkpoint differs from its seal; one line names the file and how."""


def write(folder: pathlib.Path, facts: dict) -> None:
  """Seals the folder as it is now, and waits until all of it is on the disk."""
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
    list(threads.map(files.sync, _paths(folder)))
  body = {'format': FORMAT, 'files': _records(folder), **facts}
  body['sha256'] = _hash(body)
  scratch = folder / f'{NAME}.new'
  with open(scratch, 'w', encoding='utf-8') as file:
    json.dump(body, file, indent=1)
    file.flush()
    os.fsync(file.fileno())
  os.replace(scratch, folder / NAME)
  for path in (folder, folder.parent):
    files.sync(path)


def read(folder: pathlib.Path) -> dict | None:
  """Returns the seal's facts and files, or None where there is no seal.

  Raises:
    Damaged: its own hash does not match, or it is of a later format.
  """
  path = folder / NAME
  try:
    if not path.exists():
      return None
    body = json.loads(files.read_bytes(path))
    expected = body.pop('sha256')
    version = body['format']
  except _NO_SEAL as error:
    raise Damaged(f'{path}: cannot be read ({error!r})') from None
  if expected != _hash(body):
    raise Damaged(f'{path}: is not as it was written')
  if version > FORMAT:
    raise Damaged(
      f'{path}: is of format {version}, written by mla_moe '
      f'{body.get("versions", {}).get("mla_moe", "?")}; this version reads '
      f'up to {FORMAT}'
    )
  return body


def check(folder: pathlib.Path, seal: dict) -> None:
  """Compares every file with the seal: names and sizes first, then hashes.

  Raises:
    Damaged: names the first file that is absent, new or different.
  """
  sealed = seal['files']
  present = {str(path.relative_to(folder)) for path in _paths(folder)}
  for name in sorted(sealed.keys() | present):
    if name not in present:
      raise Damaged(f'{folder}/{name}: is missing')
    if name not in sealed:
      raise Damaged(f'{folder}/{name}: is not of this checkpoint')
    size = (folder / name).stat().st_size
    if size != sealed[name][0]:
      raise Damaged(f'{folder}/{name}: has {size} bytes, had {sealed[name][0]}')
  records = _records(folder)
  for name in sorted(sealed):
    if records[name] != sealed[name]:
      raise Damaged(f'{folder}/{name}: its SHA-256 is not what it was')


def _hash(body: dict) -> str:
  text = json.dumps(body, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def _paths(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns every file of the folder but the seal."""
  seals = (NAME, f'{NAME}.new')
  return [
    path
    for path in sorted(folder.rglob('*'))
    if not path.is_dir() and not (path.parent == folder and path.name in seals)
  ]


def _records(folder: pathlib.Path) -> dict[str, list]:
  """Returns {name: [size, SHA-256]} of every file."""
  paths = _paths(folder)
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
    records = list(threads.map(_record, paths))
  return {
    str(path.relative_to(folder)): record
    for path, record in zip(paths, records, strict=True)
  }


def _record(path: pathlib.Path) -> list:
  digest, size = hashlib.sha256(), 0
  if not path.is_file():  # a device never ends, and a pipe never begins
    raise Damaged(f'{path}: is no regular file')
  with open(path, 'rb') as file:
    while block := file.read(_BLOCK):
      digest.update(block)
      size += len(block)
  return [size, digest.hexdigest()]
