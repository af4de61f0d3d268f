"""The seal of a checkpoint: size and SHA-256 of every file, written last.

Orbax checks its indices but not the values: a flipped bit in an array loads
without a word. So `seal.json` records every file of a step's folder, facts
about the contents, and its own hash. It is written under another name and then
renamed, so it is complete or absent: a folder without it was cut off, or is
older than seals.

Of several processes each hashes the files that it wrote, which Orbax puts into
a folder `ocdbt.process_N`; process 0 hashes the others. In a bucket the hash is
the service's own, of one listing by process 0 (`storage`).
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
import pathlib
import re

from mla_moe import files
from mla_moe.config import ConfigError

from . import storage

NAME = 'seal.json'
FORMAT = 1
_THREADS = 4
_BLOCK = 1 << 22
_NO_SEAL = ValueError, KeyError, TypeError, AttributeError, RecursionError


class Damaged(ConfigError):
  """A checkpoint differs from its seal; one line names the file and how."""


def records(
  folder: os.PathLike, process: int = 0, processes: int = 1
) -> dict[str, list]:
  """Returns {name: [size, SHA-256]} of the files of one of `processes`."""
  if storage.is_bucket(folder):
    listed = {} if process else storage.objects(folder)
    return {name: listed[name] for name in listed if name != NAME}
  names = _names(folder)
  own = [name for name in names if _owner(name, processes) == process]
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
    values = list(threads.map(_record, (folder / name for name in own)))
  return dict(zip(own, values, strict=True))


def read(folder: os.PathLike) -> dict | None:
  """Returns the seal's facts and files, or None where there is no seal.

  Raises:
    Damaged: its own hash does not match, or it is of a later format.
  """
  path = folder / NAME
  try:
    if not path.exists():
      return None
    if storage.is_bucket(path):
      body = json.loads(path.read_bytes())
    else:
      body = json.loads(files.read_bytes(path))
    expected = body.pop('sha256')
    version = body['format']
  except _NO_SEAL as error:
    raise Damaged(f'{path}: cannot be read ({error!r})') from None
  if expected != digest(body):
    raise Damaged(f'{path}: is not as it was written')
  if version > FORMAT:
    raise Damaged(
      f'{path}: is of format {version}, written by mla_moe '
      f'{body.get("versions", {}).get("mla_moe", "?")}; this version reads '
      f'up to {FORMAT}'
    )
  return body


def check(folder: os.PathLike, seal: dict) -> None:
  """Compares the files' names and sizes with the seal; reads none of them.

  Of a bucket's objects it compares the hashes, too: they are in the listing.

  Raises:
    Damaged: names the first file that is absent, new or different.
  """
  sealed = seal['files']
  if storage.is_bucket(folder):
    _check_objects(folder, sealed)
    return
  present = set(_names(folder))
  for name in sorted(sealed.keys() | present):
    if name not in present:
      raise Damaged(f'{folder}/{name}: is missing')
    if name not in sealed:
      raise Damaged(f'{folder}/{name}: is not of this checkpoint')
    path = folder / name
    if not path.is_file():  # a device never ends, and a pipe never begins
      raise Damaged(f'{path}: is no regular file')
    size = path.stat().st_size
    if size != sealed[name][0]:
      raise Damaged(f'{path}: has {size} bytes, had {sealed[name][0]}')


def _check_objects(folder: os.PathLike, sealed: dict) -> None:
  present = records(folder)
  if not _is_listed(sealed):  # copied from a disk: only sizes can be compared
    present = {name: present[name][:1] for name in present}
    sealed = {name: sealed[name][:1] for name in sealed}
  for name in sorted(sealed.keys() | present.keys()):
    if present.get(name) != sealed.get(name):
      raise Damaged(
        f'{folder}/{name}: has (bytes, CRC-32C) {present.get(name)}, '
        f'had {sealed.get(name)}'
      )


def _is_listed(sealed: dict[str, list]) -> bool:
  """Whether the hashes are a bucket's, and no SHA-256."""
  return any(len(hash_) < 64 for _, hash_ in sealed.values())


def damage(
  folder: os.PathLike, seal: dict, process: int = 0, processes: int = 1
) -> str:
  """Returns a line on the first file with another hash than in the seal.

  It reads the files of one of `processes`, and is '' if all are as they were.
  """
  is_listed = _is_listed(seal['files'])
  if is_listed and not storage.is_bucket(folder):
    raise ConfigError(
      f'{folder}: is a copy from a bucket, and was sealed with the checksums '
      'there; verify it in its bucket, gs://'
    )
  if storage.is_bucket(folder) and not is_listed:
    raise ConfigError(
      f'{folder}: is a copy from a disk, and was sealed with SHA-256 there; '
      'verify it on a disk'
    )
  for name, record in records(folder, process, processes).items():
    if record != seal['files'].get(name):
      return f'{folder}/{name}: its SHA-256 is not what it was'
  return ''


def digest(body: dict) -> str:
  """Returns the hash that a seal has of itself."""
  text = json.dumps(body, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def _names(folder: os.PathLike) -> list[str]:
  """Returns the names of all files of the folder but the seal."""
  seals = (NAME, f'{NAME}.new')
  names = [
    str(path.relative_to(folder))
    for path in sorted(folder.rglob('*'))
    if not path.is_dir()
  ]
  return [name for name in names if name not in seals]


def _owner(name: str, processes: int) -> int:
  """Returns the process that hashes a file: its writer, where Orbax says."""
  folder = re.search(r'ocdbt\.process_(\d+)/', name)
  return int(folder[1]) % processes if folder else 0


def _record(path: pathlib.Path) -> list:
  digest, size = hashlib.sha256(), 0
  if not path.is_file():
    raise Damaged(f'{path}: is no regular file')
  files.sync(path)  # a seal vouches for the bytes on the disk
  with open(path, 'rb') as file:
    while block := file.read(_BLOCK):
      digest.update(block)
      size += len(block)
  return [size, digest.hexdigest()]
