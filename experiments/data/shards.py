"""Token files: the shards of a corpus, memory-mapped, and checked when touched.

A shard has the token ids of one unit of work (`units`), in two flat files: one
for training, one held out. A memory map returns a flipped bit without a word.
Therefore each shard has a checksum of every 64 KiB, and a block is compared
when its first token is read. So a start reads no token, whatever the corpus'
size, and no step trains on a damaged one. Maps are made then, too: a corpus of
terabytes has thousands of shards.
"""

from __future__ import annotations

import bisect
import itertools
import mmap
import os
import pathlib
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from mla_moe.config import ConfigError

BLOCK = 1 << 16  # bytes per checksum
PARTS = ('train', 'heldout')


def file_of(folder: pathlib.Path, number: int, part: str) -> pathlib.Path:
  """Returns the file of a shard: of 'train', of 'heldout', or its facts."""
  return folder / f'{number:05}.{part}'


class Shard:
  """The tokens of one file, mapped and checked when they are read.

  Args:
    path: of the file.
    dtype: of its ids.
    length: its number of ids.
    block: bytes per checksum.
    checksums: reads the CRC-32 of every block, when the first is read.
    offset: the byte of the first id.
    remedy: of damage; '' if the file's folder can be made again.

  Raises:
    ConfigError: the file is missing, or has another length.
  """

  def __init__(
    self,
    path: pathlib.Path,
    dtype: str,
    length: int,
    block: int,
    checksums: Callable[[], list[int]],
    offset: int = 0,
    remedy: str = '',
  ):
    self._path, self._dtype, self._length = path, np.dtype(dtype), length
    self._block, self._checksums = block, checksums
    self._ids: np.ndarray | None = None
    self._checked = bytearray()
    self._offset = offset
    self._remedy = remedy or f'delete {path.parent} and start again'
    size = path.stat().st_size - offset if path.is_file() else -1
    if size != length * self._dtype.itemsize:
      state = 'is missing' if size < 0 else f'has {size} bytes'
      raise ConfigError(
        f'{path}: {state}, not {length * self._dtype.itemsize}: it is damaged; '
        f'{self._remedy}'
      )

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, place: slice) -> np.ndarray:
    """Returns the ids of a slice without a step, its blocks checked.

    Raises:
      ConfigError: names the first block that differs.
    """
    start, stop, _ = place.indices(self._length)
    if start >= stop:
      return np.zeros(0, self._dtype)
    if self._ids is None:
      self._open()
    size = self._dtype.itemsize
    first, last = start * size // self._block, (stop * size - 1) // self._block
    number = self._checked.find(0, first, last + 1)
    while number >= 0:
      self._check(number)
      number = self._checked.find(0, number, last + 1)
    return self._ids[start:stop]

  def _open(self) -> None:
    """Maps the file without read-ahead: rows come from all over it."""
    try:
      with open(self._path, 'rb') as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
      raise ConfigError(
        f'{self._path}: cannot be read ({error.strerror})'
      ) from None
    mapped.madvise(mmap.MADV_RANDOM)
    self._expected = self._checksums()
    self._ids = np.frombuffer(mapped, self._dtype, -1, self._offset)
    self._checked = bytearray(-(-self._ids.nbytes // self._block))

  def _check(self, number: int) -> None:
    place = number * self._block
    step = self._block // self._dtype.itemsize
    block = self._ids[number * step : (number + 1) * step]
    if [zlib.crc32(block)] != self._expected[number : number + 1]:
      raise ConfigError(
        f'{self._path}: MiB {place >> 20} is damaged (the {len(block.data)} '
        f'ids from byte {place}); {self._remedy}'
      )
    self._checked[number] = 1


class Tokens:
  """The ids of many shards, one after the other, as one stream.

  Its slices are arrays. `np.asarray` reads, and checks, all of it. `begins`
  marks the ids of a slice that begin documents, where all shards know it.
  """

  def __init__(self, shards: Iterable[Any], dtype: Any):
    self._shards, self.dtype = list(shards), np.dtype(dtype)
    known = [getattr(shard, 'begins', None) for shard in self._shards]
    self.begins = self._begins if known and all(known) else None
    sizes = map(len, self._shards)
    self._starts = list(itertools.accumulate(sizes, initial=0))

  def __len__(self) -> int:
    return self._starts[-1]

  def __getitem__(self, place: slice) -> np.ndarray:
    return self._joined(place, lambda shard, part: shard[part], self.dtype)

  def _begins(self, place: slice) -> np.ndarray:
    return self._joined(place, lambda shard, part: shard.begins(part), bool)

  def _joined(self, place: slice, read: Callable, dtype: Any) -> np.ndarray:
    """Returns the arrays of a slice's shards in a row."""
    start, stop, _ = place.indices(len(self))
    parts = []
    number = bisect.bisect_right(self._starts, start) - 1
    while start < stop:
      first, last = self._starts[number], min(self._starts[number + 1], stop)
      part = slice(start - first, last - first)
      parts.append(read(self._shards[number], part))
      start, number = max(start, last), number + 1
    if len(parts) == 1:
      return parts[0]
    none = np.zeros(0, dtype)
    return np.concatenate([none, *parts], dtype=dtype)

  def __array__(self, dtype: Any = None, copy: bool | None = None):
    ids = self[:]
    return ids if dtype is None else ids.astype(dtype)

  def pieces(self, size: int = 1 << 22) -> Iterator[np.ndarray]:
    """Yields all ids in order, some at a time, each block checked."""
    for start in range(0, len(self), size):
      yield self[start : start + size]


class Writer:
  """Writes ids to a file, whole or not at all; use it in a `with` block.

  The file has its name when `seal` has forced it to the disk.

  Attributes:
    length: ids so far. checksums: of the blocks so far. largest: id so far.
  """

  def __init__(self, path: pathlib.Path, dtype: Any):
    self._path, self._dtype = path, np.dtype(dtype)
    self.length, self.largest = 0, -1
    self.checksums: list[int] = []
    self._ids: list[np.ndarray] = []
    self._waiting = 0

  def __enter__(self) -> Writer:
    self._file = open(f'{self._path}.new', 'wb')
    return self

  def __exit__(self, *_) -> None:
    self._file.close()

  def add(self, *ids: np.ndarray) -> None:
    """Appends ids."""
    self._ids += ids
    self._waiting += sum(map(len, ids))
    if self._waiting >= 16 * BLOCK:
      self._flush(BLOCK // self._dtype.itemsize)

  def _flush(self, multiple: int) -> None:
    """Writes a multiple of so many ids."""
    ids = np.concatenate([np.zeros(0, np.int32), *self._ids])
    size = len(ids) // multiple * multiple
    whole, rest = ids[:size], ids[size:]
    self._ids, self._waiting = [rest], len(rest)
    self.length += size
    self.largest = max(self.largest, int(whole.max(initial=-1)))
    content = whole.astype(self._dtype).data.cast('B')
    blocks = (content[i : i + BLOCK] for i in range(0, len(content), BLOCK))
    self.checksums += map(zlib.crc32, blocks)
    self._file.write(content)

  def seal(self) -> None:
    """Ends the file, and gives it its name."""
    self._flush(1)
    self._file.flush()
    os.fsync(self._file.fileno())
    os.replace(f'{self._path}.new', self._path)
