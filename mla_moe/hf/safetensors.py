"""Reads and writes .safetensors files through a memory map, float8 included.

The library of that name (0.8) cannot return F8_E4M3 to numpy, jax or flax,
which is the dtype of DeepSeek's releases: that is why this reader exists. The
format is small. A file has eight bytes with the length of a header, the header
(JSON: each tensor's dtype, shape and byte range), then the tensors' bytes, one
after the other without gaps.

The reader trusts nothing in the header. Every length, range and shape is
checked against the file's size before anything is mapped, so a hostile or torn
file gives one line of error, never a crash or a large allocation.

Arrays are views of the map. `File.forget` gives their memory back, so a file
larger than the memory can be read.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import mmap
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from mla_moe import files
from mla_moe.config import ConfigError

DTYPES = {
  'BOOL': np.dtype(np.bool_),
  'U8': np.dtype(np.uint8),
  'I8': np.dtype(np.int8),
  'F8_E4M3': np.dtype(ml_dtypes.float8_e4m3fn),
  'F8_E5M2': np.dtype(ml_dtypes.float8_e5m2),
  'F8_E8M0': np.dtype(ml_dtypes.float8_e8m0fnu),
  'I16': np.dtype(np.int16),
  'U16': np.dtype(np.uint16),
  'F16': np.dtype(np.float16),
  'BF16': np.dtype(ml_dtypes.bfloat16),
  'I32': np.dtype(np.int32),
  'U32': np.dtype(np.uint32),
  'F32': np.dtype(np.float32),
  'I64': np.dtype(np.int64),
  'U64': np.dtype(np.uint64),
  'F64': np.dtype(np.float64),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

# A quarter of the format's own limit: 200,000 tensors in one file. A header
# takes up to 26 times its size while it is parsed.
_HEADER_LIMIT = 25_000_000
_RANK_LIMIT = 16


class Entry(NamedTuple):
  """One tensor: dtype, shape, and its bytes [start, end) of the data."""

  dtype: np.dtype
  shape: tuple[int, ...]
  start: int
  end: int

  @property
  def name(self) -> str:
    """The dtype, as the file names it."""
    return NAMES[self.dtype]


def parse(header: bytes, size: int) -> dict[str, Entry]:
  """Returns the checked entries of a header; the data has `size` bytes.

  Raises:
    ConfigError: the first thing that breaks the format.
  """
  try:
    items = json.loads(header, object_pairs_hook=_no_duplicates)
  except (ValueError, RecursionError) as error:
    raise ConfigError(f'the header is not JSON ({error})') from None
  if not isinstance(items, dict):
    raise ConfigError('the header is not an object')
  metadata = items.pop('__metadata__', {})
  if not isinstance(metadata, dict) or not all(
    isinstance(text, str) for text in metadata.values()
  ):
    raise ConfigError('__metadata__ does not map texts to texts')
  entries = {name: _entry(name, info, size) for name, info in items.items()}
  end = 0
  for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
    if entry.start != end:
      word = 'overlaps' if entry.start < end else 'leaves a gap after'
      raise ConfigError(
        f'tensor {name!r} at {entry.start} {word} the one before, which ends '
        f'at {end}'
      )
    end = entry.end
  if end != size:
    raise ConfigError(
      f'the header places {end} bytes of data, but the file has {size}; it is '
      'truncated or incomplete: download it again'
    )
  return entries


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  values = dict(pairs)
  if len(values) != len(pairs):
    raise ValueError('a name stands twice')
  return values


def _is_size(value: Any, limit: int) -> bool:
  return type(value) is int and 0 <= value <= limit


def _require(name: str, valid: bool, rule: str) -> None:
  if not valid:
    raise ConfigError(f'tensor {name!r}: {rule}')


def _entry(name: str, info: Any, size: int) -> Entry:
  """Returns the entry of one tensor after checking its description."""
  require = functools.partial(_require, name)
  require(isinstance(info, dict), 'is not described by an object')
  code, shape, offsets = (
    info.get(key) for key in ('dtype', 'shape', 'data_offsets')
  )
  require(
    isinstance(code, str) and code in DTYPES,
    f'dtype {code!r} is not one of {", ".join(DTYPES)}',
  )
  valid = isinstance(shape, list) and len(shape) <= _RANK_LIMIT
  # A dimension may exceed the data only where another one is 0.
  require(
    valid and all(_is_size(n, 2**62) for n in shape),
    f'shape {shape!r} is not a list of sizes',
  )
  valid = isinstance(offsets, list) and len(offsets) == 2
  valid = valid and all(_is_size(n, size) for n in offsets)
  require(
    valid and offsets[0] <= offsets[1],
    f'data_offsets {offsets!r} do not lie within the {size} bytes of data; the '
    'file is truncated or incomplete: download it again',
  )
  dtype, length = DTYPES[code], offsets[1] - offsets[0]
  require(
    math.prod(shape) * dtype.itemsize == length,
    f'{code} of shape {shape} does not take {length} bytes',
  )
  return Entry(dtype, tuple(shape), offsets[0], offsets[1])


class File:
  """A mapped file; use it in a `with` block.

  entries: {name: Entry}, all of them checked.

  Raises:
    ConfigError: no such file, or not a .safetensors file; names the file.
  """

  def __init__(self, path: os.PathLike | str):
    self.path = pathlib.Path(path)
    files.check_regular(self.path)
    try:
      with open(self.path, 'rb') as file:
        total = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), 'little')
        if total < 8 or length > min(total - 8, _HEADER_LIMIT):
          raise ConfigError(
            f'a header of {length} bytes does not fit the file of {total}; it '
            'is truncated or no safetensors file'
          )
        self.entries = parse(file.read(length), total - 8 - length)
        self._map = mmap.mmap(file.fileno(), total, access=mmap.ACCESS_READ)
    except ConfigError as error:
      raise ConfigError(f'{self.path}: {error}') from None
    except OSError as error:
      raise ConfigError(
        f'{self.path}: cannot be read ({error.strerror})'
      ) from None
    self._data = 8 + length

  def read(self, name: str) -> np.ndarray:
    """Returns the tensor, a read-only view of the map."""
    dtype, shape, start, end = self.entries[name]
    flat = np.frombuffer(self._map, np.uint8, end - start, self._data + start)
    out = flat.view(dtype).reshape(shape)
    return out if out.flags.aligned else out.copy()

  def read_ahead(self, name: str, size: int) -> None:
    """Asks the kernel for `size` bytes from the tensor's start on."""
    start = self._data + self.entries[name].start
    first = start // mmap.PAGESIZE * mmap.PAGESIZE
    size = min(size, len(self._map) - first)
    self._map.madvise(mmap.MADV_WILLNEED, first, size)

  def forget(self, name: str) -> None:
    """Frees the tensor's pages; they can still be read again."""
    _, _, start, end = self.entries[name]
    first = (self._data + start) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > start:
      size = self._data + end - first
      self._map.madvise(mmap.MADV_DONTNEED, first, size)

  def __enter__(self) -> File:
    return self

  def __exit__(self, *_: object) -> None:
    # A map with living views cannot be closed; it is freed with the last one.
    with contextlib.suppress(BufferError):
      self._map.close()


@contextlib.contextmanager
def create(
  path: os.PathLike | str,
  tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
) -> Iterator[dict[str, np.ndarray]]:
  """Yields {name: array} of a new file's map; the caller fills the arrays.

  Args:
    path: the file to write.
    tensors: {name: (dtype, shape)}. Wider dtypes come first in the file, so
      every tensor is aligned.

  The header is written when the block ends, and is zeros until then: a file
  that was cut short is refused by `File`. All bytes are allocated before they
  are mapped: on a full disk a store to a map of a sparse file would end the
  process by SIGBUS.

  Raises:
    OSError: the disk cannot take the file; it names the path.
  """
  order = sorted(tensors, key=lambda n: (-tensors[n][0].itemsize, n))
  header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
  size = 0
  for name in order:
    dtype, shape = tensors[name]
    end = size + math.prod(shape) * dtype.itemsize
    header[name] = {
      'dtype': NAMES[dtype],
      'shape': list(shape),
      'data_offsets': [size, end],
    }
    size = end
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)
  data = 8 + len(text)
  with open(path, 'w+b') as file:
    _allocate(file.fileno(), data + size, path)
    mapped = mmap.mmap(file.fileno(), data + size)
    arrays = {}
    for name in order:
      start, end = header[name]['data_offsets']
      flat = np.frombuffer(mapped, np.uint8, end - start, data + start)
      dtype, shape = tensors[name]
      arrays[name] = flat.view(dtype).reshape(shape)
      del flat
    yield arrays
    mapped[8:data] = text
    mapped[:8] = len(text).to_bytes(8, 'little')
    mapped.flush()
    os.fsync(file.fileno())
  arrays.clear()
  # A map with living views cannot be closed; it is freed with the last one.
  with contextlib.suppress(BufferError):
    mapped.close()


def _allocate(handle: int, size: int, path: os.PathLike | str) -> None:
  try:
    os.posix_fallocate(handle, 0, size)
  except OSError as error:
    error.filename = os.fspath(path)
    raise
