"""Checkpoints lie on a disk, or in a bucket of Google Cloud Storage (gs://).

A bucket has objects and no folders: nothing can be renamed, and a write is
whole or absent. The service computes the CRC-32C of each object as it arrives,
so one listing has size and checksum of all: nothing is read back.
"""

from __future__ import annotations

import functools
import os
import pathlib
from typing import Any

SCHEME = 'gs://'


def is_bucket(path: os.PathLike | str) -> bool:
  """Whether the path is in a bucket."""
  return os.fspath(path).startswith(SCHEME)


def path(folder: os.PathLike | str) -> Any:
  """Returns the absolute pathlib.Path, or an epath.Path with its methods."""
  if not is_bucket(folder):
    return pathlib.Path(folder).resolve()
  import fsspec
  from etils import epath

  for name in ('gs', 'gcs'):  # other hosts write, too: never an old listing
    fsspec.config.conf.setdefault(name, {})['use_listings_cache'] = False
  return epath.Path(folder)


@functools.cache
def client() -> Any:
  """Returns the client of Google's library, of the extra [gcs]."""
  from google.cloud import storage

  return storage.Client()


def objects(folder: os.PathLike | str) -> dict[str, list]:
  """Returns {name: [size, CRC-32C]} of all objects below the folder."""
  bucket, _, prefix = os.fspath(folder).removeprefix(SCHEME).partition('/')
  prefix = f'{prefix.rstrip("/")}/'
  return {
    blob.name.removeprefix(prefix): [blob.size, blob.crc32c]
    for blob in client().list_blobs(bucket, prefix=prefix)
    if not blob.name.endswith('/')
  }
