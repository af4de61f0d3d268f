"""The seal of a checkpoint: size and SHA-256 of every file, written last.

Orbax checks its indices but not the values: a flipped bit in an array loads
without a word. So `seal.json` records every file of a step's folder, facts
about the contents, and its own hash. It is written under another name and then
renamed, so it is complete or absent: a folder without it was cut off, or is
older than seals.

Of several processes each hashes the files that it wrote, which Orbax puts into
a folder `ocdbt.process_N`; process 0 hashes the others.
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

NAME = 'seal.json'
FORMAT = 1
_THREADS = 4
_BLOCK = 1 << 22
_NO_SEAL = ValueError, KeyError, TypeError, AttributeError, RecursionError


class Damaged(ConfigError):
  """A checkpoint differs from its seal; one line names the file and how."""


def records(
  folder: pathlib.Path, process: int = 0, processes: int = 1
) -> dict[str, list]:
  """Returns {name: [size, SHA-256]} of the files of one of `processes`."""
  names = _names(folder)
  own = [name for name in names if _owner(name, processes) == process]
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
    values = list(threads.map(_record, (folder / name for name in own)))
  return dict(zip(own, values, strict=True))


def write(folder: pathlib.Path, records: dict, facts: dict) -> None:
  """Seals the folder with its files' records, on the disk when this ends."""
  body = {'format': FORMAT, 'files': records, **facts}
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
  """Compares the files' names and sizes with the seal; reads none of them.

  Raises:
    Damaged: names the first file that is absent, new or different.
  """
  sealed = seal['files']
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


def damage(
  folder: pathlib.Path, seal: dict, process: int = 0, processes: int = 1
) -> str:
  """Returns a line on the first file with another hash than in the seal.

  It reads the files of one of `processes`, and is '' if all are as they were.
  """
  for name, record in records(folder, process, processes).items():
    if record != seal['files'].get(name):
      return f'{folder}/{name}: its SHA-256 is not what it was'
  return ''


def _hash(body: dict) -> str:
  text = json.dumps(body, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def _names(folder: pathlib.Path) -> list[str]:
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
