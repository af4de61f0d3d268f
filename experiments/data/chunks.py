"""Ids in a bucket: read in chunks, each once, which stay in a local folder.

An answer of a bucket takes as long for a row as for some MiB. So the first
touch of an id brings its chunk of 8 MiB, and later starts find it on the disk,
with a checksum. `data.block_rows` lets the rows of a chunk follow each other.
When the disk is nearly full the chunks go that were opened the longest ago, and
on a full one they are read without being stored: the text may be larger.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import hashlib
import json
import mmap
import os
import pathlib
import shutil
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from .. import cli
from . import remote

CHUNK = 8 << 20
# Of a process: an open chunk has a file handle, of which it has 1,024 by
# default.
_OPEN = 256
_FREE = 0.05  # of the disk
_CHECKSUM_BYTES = 4


@functools.cache
def _maps() -> collections.OrderedDict[tuple[Chunks, int], np.ndarray]:
  """Returns the open chunks of this process, the last one used at the end."""
  return collections.OrderedDict()


def name_of(file: remote.Object) -> str:
  """Returns the name of the folder of an object's chunks."""
  facts = json.dumps(file).encode()
  return f'chunks-{hashlib.sha256(facts).hexdigest()[:24]}'


class Chunks:
  """The ids of an object: `length` of a type from byte `offset`.

  Args:
    path: of the object.
    dtype, length, offset: of its ids.
    folder: of its chunks on the disk.
    check: refuses the ids of a chunk from a place on; called once for each.
  """

  def __init__(
    self,
    path: str,
    dtype: str,
    length: int,
    folder: pathlib.Path,
    check: Callable[[int, np.ndarray], None],
    offset: int = 0,
  ):
    self._path, self._dtype, self._length = path, np.dtype(dtype), length
    self._folder, self._check, self._offset = folder, check, offset
    self._checked: set[int] = set()

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, place: slice) -> np.ndarray:
    """Returns the ids of a slice without a step, its chunks checked.

    Raises:
      ConfigError: the object has other ids, or ends before.
      cli.Stopped: it cannot be read.
    """
    start, stop, _ = place.indices(self._length)
    size = CHUNK // self._dtype.itemsize
    parts = [np.zeros(0, self._dtype)]
    while start < stop:
      number, first = start // size, start // size * size
      last = min(stop, first + size)
      parts.append(self._chunk(number)[start - first : last - first])
      start = last
    return parts[1] if len(parts) == 2 else np.concatenate(parts)

  def _chunk(self, number: int) -> np.ndarray:
    maps, key = _maps(), (self, number)
    ids = maps.pop(key, None)  # at once: threads share them
    if ids is None:
      ids = self._opened(number)
    maps[key] = ids
    while len(maps) > _OPEN:
      maps.popitem(last=False)
    return ids

  def _opened(self, number: int) -> np.ndarray:
    first = number * CHUNK
    size = min(CHUNK, self._length * self._dtype.itemsize - first)
    path = self._folder / f'{number:07}'
    content = self._stored(path, number, size)
    if content is None:
      content = self._fetched(first, size)
      _store(path, content)
      # A map costs no memory; the bytes stay where the disk is full.
      content = self._stored(path, number, size) or content
    ids = np.frombuffer(content, self._dtype, size // self._dtype.itemsize)
    if number not in self._checked:
      self._check(first // self._dtype.itemsize, ids)
      self._checked.add(number)
    return ids

  def _fetched(self, first: int, size: int) -> bytes:
    start = self._offset + first
    try:
      return remote.part(self._path, start, start + size)
    except remote.Unread as error:  # a run that trains may go on later
      raise cli.Stopped(str(error)) from None

  def _stored(self, path: pathlib.Path, number: int, size: int) -> Any:
    """Returns a chunk on the disk, or None if it is not there, or damaged."""
    try:
      with open(path, 'rb') as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):  # an empty file cannot be mapped
      return None
    with contextlib.suppress(OSError):  # another's cache, or read-only
      os.utime(path)
    if len(content) != size + _CHECKSUM_BYTES:
      return None
    if number not in self._checked:
      ids = memoryview(content)[:size]
      if zlib.crc32(ids).to_bytes(_CHECKSUM_BYTES, 'little') != content[size:]:
        return None
    return content


def _store(path: pathlib.Path, content: bytes) -> None:
  """Writes a chunk and its checksum, if the disk has room."""
  draft = path.with_name(f'{path.name}.{os.getpid()}.new')
  try:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    _make_room(path.parent.parent)
    with open(draft, 'wb') as file:
      file.write(content)
      file.write(zlib.crc32(content).to_bytes(_CHECKSUM_BYTES, 'little'))
    os.replace(draft, path)
  except OSError:  # it stays in memory
    with contextlib.suppress(OSError):
      draft.unlink(missing_ok=True)


def _make_room(cache: pathlib.Path) -> None:
  """Removes the chunks that were opened the longest ago from a full disk."""
  usage = shutil.disk_usage(cache)
  least = max(_FREE * usage.total, 4 * CHUNK)
  if usage.free >= least:
    return
  room = usage.free
  for _, size, path in sorted(_files(cache)):
    path.unlink(missing_ok=True)
    room += size
    if room >= 1.1 * least:
      break


def _files(cache: pathlib.Path) -> Iterator[tuple[int, int, pathlib.Path]]:
  """Yields (time of opening, size, path) of all chunks of a cache."""
  for path in cache.glob('chunks-*/*'):
    with contextlib.suppress(OSError):  # another process was first
      facts = path.stat()
      yield facts.st_mtime_ns, facts.st_size, path
