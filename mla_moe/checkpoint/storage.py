"""Checkpoints lie on a disk, or in a bucket of Google Cloud Storage (gs://).

A bucket has objects and no folders: nothing can be renamed, and a write is
whole or absent. The service computes the CRC-32C of each object as it arrives,
so one listing has size and checksum of all: nothing is read back.
"""

from __future__ import annotations

import functools
import os
import pathlib
import shutil
from typing import Any

from mla_moe.config import ConfigError

SCHEME = 'gs://'


def is_bucket(path: os.PathLike | str) -> bool:
  """Whether the path is in a bucket."""
  return os.fspath(path).startswith(SCHEME)


def path(folder: os.PathLike | str) -> Any:
  """Returns the absolute pathlib.Path, or an epath.Path with its methods."""
  if not is_bucket(folder):
    return pathlib.Path(folder).resolve()
  client()
  import fsspec
  from etils import epath

  for name in ('gs', 'gcs'):  # other hosts write, too: never an old listing
    fsspec.config.conf.setdefault(name, {})['use_listings_cache'] = False
  return epath.Path(folder)


@functools.cache
def client() -> Any:
  """Returns the client of Google's library.

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


def private(folder: os.PathLike | str) -> dict[str, int]:
  """Returns the mode of new folders as mkdir's option; a bucket has none."""
  return {} if is_bucket(folder) else {'mode': 0o700}


def delete(folder: Any) -> None:
  """Deletes a folder and all below."""
  folder.rmtree() if is_bucket(folder) else shutil.rmtree(folder)


def move(folder: os.PathLike, target: os.PathLike) -> None:
  """Renames a folder; of a bucket, each object is copied by the service."""
  if not is_bucket(folder):
    os.rename(folder, target)
    return
  whole, names = os.fspath(folder), objects(folder)
  name, _, source = whole.removeprefix(SCHEME).partition('/')
  place = os.fspath(target).removeprefix(f'{SCHEME}{name}/')
  bucket = client().bucket(name)
  for each in names:
    blob = bucket.blob(f'{source}/{each}')
    bucket.copy_blob(blob, bucket, f'{place}/{each}')
    blob.delete()
