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

import hashlib
import json
import os

from mla_moe.config import ConfigError

from . import storage

NAME = 'seal.json'
FORMAT = 1
_SEALS = NAME, f'{NAME}.new'
_NO_SEAL = ValueError, KeyError, TypeError, AttributeError, RecursionError

Damaged = storage.Damaged


def records(
  folder: os.PathLike, process: int = 0, processes: int = 1
) -> dict[str, list]:
  """Returns {name: [size, checksum]} of the files of one of `processes`."""
  return _without_seals(storage.of(folder).records(process, processes))


def write(folder: os.PathLike, records: dict, facts: dict) -> None:
  """Seals the folder with its files' records, on the disk when this ends."""
  body = {'format': FORMAT, 'files': records, **facts}
  body['sha256'] = digest(body)
  storage.of(folder).write(NAME, json.dumps(body, indent=1))


def read(folder: os.PathLike) -> dict | None:
  """Returns the seal's facts and files, or None where there is no seal.

  Raises:
    Damaged: its own hash does not match, or it is of a later format.
  """
  path = folder / NAME
  try:
    if not path.exists():
      return None
    body = json.loads(storage.of(folder).read(NAME))
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

  Of a bucket's objects it compares the checksums, too: they are in the listing.

  Raises:
    Damaged: names the first file that is absent, new or different.
  """
  place, sealed = storage.of(folder), seal['files']
  present, kind = _without_seals(place.listed()), place.checksum
  is_copy = _kind(seal) != kind  # of which only sizes can be compared
  for name in sorted(sealed.keys() | present):
    if name not in present:
      raise Damaged(f'{folder}/{name}: is missing')
    if name not in sealed:
      raise Damaged(f'{folder}/{name}: is not of this checkpoint')
    size, *checksum = present[name]
    if size != sealed[name][0]:
      raise Damaged(f'{folder}/{name}: has {size} bytes, had {sealed[name][0]}')
    if checksum and not is_copy and present[name] != sealed[name]:
      was = sealed[name][1]
      raise Damaged(f'{folder}/{name}: its {kind} is {checksum[0]}, was {was}')


def _kind(seal: dict) -> str:
  """Returns the kind of a seal's checksums: a disk's, or a bucket's."""
  is_listed = any(len(checksum) < 64 for _, checksum in seal['files'].values())
  return (storage.Bucket if is_listed else storage.Disk).checksum


def damage(
  folder: os.PathLike, seal: dict, process: int = 0, processes: int = 1
) -> str:
  """Returns a line on the first file with another hash than in the seal.

  It reads the files of one of `processes`, and is '' if all are as they were.

  Raises:
    ConfigError: a copy, from a bucket to a disk or the other way round.
  """
  kind, place = _kind(seal), storage.of(folder)
  if kind != place.checksum:
    source, where = ('bucket', 'in its bucket, gs://')
    if kind == storage.Disk.checksum:
      source, where = 'disk', 'on a disk'
    raise ConfigError(
      f'{folder}: is a copy from a {source}, and was sealed with {kind} there; '
      f'verify it {where}'
    )
  for name, record in records(folder, process, processes).items():
    if record != seal['files'].get(name):
      return f'{folder}/{name}: its {kind} is not what it was'
  return ''


def digest(body: dict) -> str:
  """Returns the hash that a seal has of itself."""
  text = json.dumps(body, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def _without_seals(names: dict[str, list]) -> dict[str, list]:
  return {name: names[name] for name in names if name not in _SEALS}
