"""Checkpoints lie on a disk, or in a bucket of Google Cloud Storage (gs://).

A disk has folders: one is renamed in an instant, and its files are hashed by
reading them. A bucket has objects and no folders: nothing can be renamed, and a
write is whole or absent. The service computes the CRC-32C of each object as it
arrives, so one listing has size and checksum of all: nothing is read back.

`of` returns a folder of either kind. All that differs between them is here.
"""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import os
import pathlib
import re
import shutil
from typing import Any

from mla_moe import files
from mla_moe.config import ConfigError

SCHEME = 'gs://'
COMMIT = 'commit_success.txt'  # Orbax's name for a whole step's last file
BEGUN = '_CHECKPOINT_METADATA'  # in every folder that Orbax has begun
_REMOVED = '.removed'
_THREADS = 4
_BLOCK = 1 << 22


class Damaged(ConfigError):
  """A checkpoint differs from its seal; one line names the file and how."""


class Disk:
  """A folder of a disk.

  path: its pathlib.Path. mode: of folders that it makes. checksum: the kind
  that `records` returns. is_service: whether a read that fails says nothing
  about the content, as where a network is down; of a disk it is damage.
  """

  mode: int | None = 0o700
  checksum, is_service = 'SHA-256', False

  def __init__(self, path: pathlib.Path):
    self.path = path

  def make(self) -> None:
    """Makes the folder, readable by this user only."""
    self.path.mkdir(parents=True, exist_ok=True, mode=self.mode)

  def exists(self) -> bool:
    """Whether the folder is there."""
    return self.path.is_dir()

  def free(self) -> str:
    """Returns the disk's free space as the end of a line."""
    try:
      free = shutil.disk_usage(self.path).free
      return f'; {free / 2**20:,.0f} MiB are free'
    except OSError:
      return '; the folder is gone'

  def size(self) -> int:
    """Returns the bytes of all files."""
    return sum(p.stat().st_size for p in self.path.rglob('*') if p.is_file())

  def moment(self, name: str) -> float:
    """Returns the time of a file's last change, in seconds since 1970."""
    return (self.path / name).stat().st_mtime

  def read(self, name: str) -> bytes:
    """Returns a file's content.

    Raises:
      ConfigError: it is no regular file, or a huge one.
    """
    return files.read_bytes(self.path / name)

  def write(self, name: str, text: str) -> None:
    """Writes a file, whole or absent, and on the disk when this ends."""
    scratch = self.path / f'{name}.new'
    with open(scratch, 'w', encoding='utf-8') as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    os.replace(scratch, self.path / name)
    for path in (self.path, self.path.parent):
      files.sync(path)

  def listed(self) -> dict[str, list]:
    """Returns {name: [size]} of all files; reads none.

    Raises:
      Damaged: one is no regular file: a device never ends, a pipe never begins.
    """
    paths = [path for path in sorted(self.path.rglob('*')) if not path.is_dir()]
    for path in paths:
      if not path.is_file():
        raise Damaged(f'{path}: is no regular file')
    return {
      path.relative_to(self.path).as_posix(): [path.stat().st_size]
      for path in paths
    }

  def records(self, process: int = 0, processes: int = 1) -> dict[str, list]:
    """Returns {name: [size, SHA-256]} of the files of one of `processes`."""
    names = [x for x in self.listed() if _owner(x, processes) == process]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
      values = threads.map(_record, (self.path / name for name in names))
      return dict(zip(names, values, strict=True))

  def retire(self) -> None:
    """Takes a step out of the list of steps; here a rename does it."""

  def move(self, target: pathlib.Path) -> None:
    """Renames the folder."""
    os.rename(self.path, target)

  def delete(self) -> None:
    """Deletes a step. It is renamed first: a kill leaves no half step.

    What such a kill left is deleted by its own, new name.
    """
    doomed = self.path.with_suffix(_REMOVED)
    if doomed.exists():
      shutil.rmtree(doomed)
    if self.path.exists():
      os.rename(self.path, doomed)
      shutil.rmtree(doomed)

  def half_deleted(self) -> list[pathlib.Path]:
    """Returns the folders here whose deletion has begun and not ended."""
    return sorted(self.path.glob(f'*{_REMOVED}'))


class Bucket:
  """A folder of a bucket: the objects whose names begin with its path.

  path: its epath.Path, which has pathlib's methods. The rest is as of `Disk`.
  """

  mode: int | None = None
  checksum, is_service = 'CRC-32C', True

  def __init__(self, path: Any):
    self.path = path

  def make(self) -> None:
    """Does nothing: a folder is there with its first object."""

  def exists(self) -> bool:
    """Whether objects can be written: each name is a folder."""
    return True

  def free(self) -> str:
    """Returns '': a bucket has no end."""
    return ''

  def size(self) -> int:
    """Returns the bytes of all objects."""
    return sum(size for size, _ in objects(self.path).values())

  def moment(self, name: str) -> float:
    """Returns the time of an object's last change, in seconds since 1970."""
    return (self.path / name).stat().mtime

  def read(self, name: str) -> bytes:
    """Returns an object's content."""
    return (self.path / name).read_bytes()

  def write(self, name: str, text: str) -> None:
    """Writes an object, whole or absent."""
    (self.path / name).write_text(text, encoding='utf-8')

  def listed(self) -> dict[str, list]:
    """Returns {name: [size, CRC-32C]} of all objects; reads none."""
    return objects(self.path)

  def records(self, process: int = 0, processes: int = 1) -> dict[str, list]:
    """Returns `listed` on process 0 of `processes`, and {} on the others."""
    return {} if process else self.listed()

  def retire(self) -> None:
    """Takes a step out of the list of steps, before it is copied."""
    (self.path / COMMIT).unlink(missing_ok=True)

  def move(self, target: Any) -> None:
    """Copies each object, without its way through this machine, and deletes."""
    name, _, source = os.fspath(self.path).removeprefix(SCHEME).partition('/')
    place = os.fspath(target).removeprefix(f'{SCHEME}{name}/')
    bucket = client().bucket(name)
    for each in objects(self.path):
      blob = bucket.blob(f'{source}/{each}')
      bucket.copy_blob(blob, bucket, f'{place}/{each}')
      blob.delete()

  def delete(self) -> None:
    """Deletes a step: its commit first, and last the object that Orbax began.

    So a kill leaves no step, but a folder that is known as one's remains.
    """
    self.retire()
    for child in self.path.iterdir():
      if child.name != BEGUN:
        child.rmtree() if child.is_dir() else child.unlink(missing_ok=True)
    if self.path.exists():
      self.path.rmtree()

  def half_deleted(self) -> list:
    """Returns nothing: without its commit a step is uncommitted."""
    return []


def is_bucket(path: os.PathLike | str) -> bool:
  """Whether the path is in a bucket."""
  return os.fspath(path).startswith(SCHEME)


def of(folder: os.PathLike | str) -> Disk | Bucket:
  """Returns the folder, of the kind that its path says."""
  if not is_bucket(folder):
    return Disk(pathlib.Path(folder).resolve())
  import fsspec
  from etils import epath

  for name in ('gs', 'gcs'):  # other hosts write, too: never an old listing
    fsspec.config.conf.setdefault(name, {})['use_listings_cache'] = False
  return Bucket(epath.Path(folder))


def path(folder: os.PathLike | str) -> Any:
  """Returns the absolute pathlib.Path, or an epath.Path with its methods."""
  return of(folder).path


@functools.cache
def client() -> Any:
  """Returns the client of Google's library, of the extra [gcs].

  Raises:
    ConfigError: the extra is not installed, or nothing says who asks.
  """
  try:
    import gcsfs  # noqa: F401, of Orbax
    from google.auth.exceptions import DefaultCredentialsError
    from google.cloud import storage
  except ImportError:
    raise ConfigError(
      'gs://: needs Google\'s libraries; pip install "mla_moe[gcs]"'
    ) from None
  try:
    return storage.Client()
  except (DefaultCredentialsError, OSError) as error:
    text = ' '.join(str(error).split())[:200]
    raise ConfigError(f'gs://: no credentials ({text})') from None


def objects(folder: os.PathLike | str) -> dict[str, list]:
  """Returns {name: [size, CRC-32C]} of all objects below the folder."""
  bucket, _, prefix = os.fspath(folder).removeprefix(SCHEME).partition('/')
  prefix = f'{prefix.rstrip("/")}/'
  return {
    blob.name.removeprefix(prefix): [blob.size, blob.crc32c]
    for blob in client().list_blobs(bucket, prefix=prefix)
    if not blob.name.endswith('/')
  }


def _owner(name: str, processes: int) -> int:
  """Returns the process that hashes a file: its writer, where Orbax says."""
  folder = re.search(r'ocdbt\.process_(\d+)/', name)
  return int(folder[1]) % processes if folder else 0


def _record(path: pathlib.Path) -> list:
  digest, size = hashlib.sha256(), 0
  files.sync(path)  # a seal vouches for the bytes on the disk
  with open(path, 'rb') as file:
    while block := file.read(_BLOCK):
      digest.update(block)
      size += len(block)
  return [size, digest.hexdigest()]
