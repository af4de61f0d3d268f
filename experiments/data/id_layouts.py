"""The place of the ids in each kind of file, on a disk or in a bucket.

A .bin is Megatron's if an .idx lies beside it, whose document ends are known,
or raw (`data.dtype`). An .npy has one axis. A .parquet or .arrow has a column
of lists, `input_ids` or `tokens`, which are copied to a file of ids. Of a file
in a bucket only the parts are read that say where its ids are.
"""

from __future__ import annotations

import io
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from mla_moe.config import ConfigError, DataConfig

from . import remote, shards
from .tokenizer import Tokenizer

KINDS = ('.bin', '.npy', '.arrow', '.parquet')
_COLUMNS = ('input_ids', 'tokens')
_MAGIC = b'MMIDIDX\x00\x00'  # of Megatron's .idx
# Its codes of types.
_TYPES = {1: 'uint8', 3: 'int16', 4: 'int32', 5: 'int64', 8: 'uint16'}
_HEAD_BYTES = 4096  # of an .npy, whose header is far shorter


class Layout(NamedTuple):
  """The place of the ids in a file: `length` of a type from byte `offset`."""

  path: str
  dtype: str
  offset: int
  length: int


def lookup(path: str) -> remote.Object | None:
  """Returns a file, whose stamp changes with it, or None if there is none.

  Raises:
    ConfigError: a bucket that cannot be read.
  """
  if remote.is_remote(path):
    return remote.lookup(path)
  if not os.path.isfile(path):
    return None
  facts = os.stat(path)
  return remote.Object(path, facts.st_size, f'mtime={facts.st_mtime_ns}')


def indices(source: str, paths: Sequence[str]) -> list[remote.Object | None]:
  """Returns the .idx beside each .bin of a source, or None.

  Those of a glob in a bucket are listed once: a question takes as long.

  Raises:
    ConfigError: a bucket that cannot be read.
  """
  name = lambda path: f'{os.path.splitext(path)[0]}.idx'
  is_bin = lambda path: path.lower().endswith('.bin')
  find = lookup
  if remote.is_remote(source) and '*' in source and is_bin(source):
    find = {x.path: x for x in remote.listed(name(source))[1]}.get
  return [find(name(path)) if is_bin(path) else None for path in paths]


def of(
  file: remote.Object,
  index: remote.Object | None,
  copy: pathlib.Path,
  data: DataConfig,
  tokenizer: Tokenizer,
) -> tuple[Layout, np.ndarray | None]:
  """Returns the place of a file's ids, and its documents' first ids if known.

  A table's ids are copied to `copy`.

  Raises:
    ConfigError: a file without ids, or a damaged one.
  """
  path, size, _ = file
  suffix, starts = os.path.splitext(path)[1].lower(), None
  if suffix == '.npy':
    layout = _of_numpy(path, size)
  elif suffix == '.bin':
    dtype = data.dtype
    if index:
      dtype, starts = _of_megatron(index, size)
    width = np.dtype(dtype).itemsize
    if size % width:
      raise ConfigError(
        f'{path}: {size} bytes are no whole number of {dtype}; set data.dtype'
      )
    layout = Layout(path, dtype, 0, size // width)
  else:
    layout = _of_table(path, copy, tokenizer)
  if not layout.length:
    raise ConfigError(f'{path}: holds no ids')
  return layout, starts


def check_ids(path: str, ids: np.ndarray, tokenizer: Tokenizer) -> None:
  """Refuses ids that the tokenizer has not.

  Raises:
    ConfigError: names one.
  """
  for worst in (int(ids.max()), int(ids.min())):
    if not 0 <= worst < tokenizer.vocab:
      raise ConfigError(
        f'{path}: has the id {worst}, and data.tokenizer those below '
        f'{tokenizer.vocab}; name the tokenizer of its text, and of raw files '
        'the data.dtype'
      )


def _opened(path: str) -> BinaryIO:
  return remote.opened(path) if remote.is_remote(path) else open(path, 'rb')


def _part(path: str, start: int, stop: int) -> bytes:
  if remote.is_remote(path):
    return remote.part(path, start, stop)
  try:
    with open(path, 'rb') as file:
      file.seek(start)
      return file.read(stop - start)
  except OSError as error:
    raise ConfigError(f'{path}: cannot be read ({error.strerror})') from None


def _of_numpy(path: str, size: int) -> Layout:
  file = io.BytesIO(_part(path, 0, min(size, _HEAD_BYTES)))
  numpy = np.lib.format
  try:
    version = numpy.read_magic(file)
    first = version == (1, 0)
    read = numpy.read_array_header_1_0 if first else numpy.read_array_header_2_0
    shape, _, dtype = read(file)
  except (ValueError, EOFError) as error:
    why = ' '.join(str(error).split())[:80]
    raise ConfigError(f'{path}: not a readable .npy ({why})') from None
  if len(shape) != 1 or dtype.kind not in 'iu' or not dtype.isnative:
    raise ConfigError(
      f'{path}: has {dtype} of shape {shape}, and ids are integers of one axis'
    )
  rest = size - file.tell() - shape[0] * dtype.itemsize
  if rest < 0:
    raise ConfigError(f'{path}: not a readable .npy (its end is missing)')
  if rest:
    raise ConfigError(f'{path}: has {rest} bytes after its ids; write it again')
  return Layout(path, dtype.name, file.tell(), shape[0])


def _of_megatron(index: remote.Object, size: int) -> tuple[str, np.ndarray]:
  """Returns (type of the ids beside an index, first id of each document).

  Its lengths must be those of the .bin.
  """
  path = index.path
  content = _part(path, 0, index.size)
  dtype = _TYPES.get(content[17]) if len(content) >= 34 else None
  if content[:9] != _MAGIC or not dtype:
    raise ConfigError(f'{path}: is no index of Megatron, version 1')
  count, documents = (
    int.from_bytes(content[i : i + 8], 'little') for i in (18, 26)
  )
  if len(content) < 34 + 12 * count + 8 * documents:
    raise ConfigError(
      f'{path}: ends within its {count} lengths and {documents} documents'
    )
  lengths = np.frombuffer(content, '<i4', count, 34)
  width = np.dtype(dtype).itemsize
  whole = int(lengths.sum(dtype=np.int64)) * width
  if whole != size:
    raise ConfigError(
      f'{path}: its documents have {whole} bytes, and the .bin {size}: they '
      'are of two texts, or one is cut'
    )
  # A document has sequences, which have places in bytes.
  places = np.frombuffer(content, '<i8', count, 34 + 4 * count)
  firsts = np.frombuffer(content, '<i8', documents, 34 + 12 * count)
  firsts = firsts[firsts < count]  # the last one is the end of all
  if firsts.min(initial=0) < 0 or not 0 <= places.min() <= places.max() <= size:
    raise ConfigError(f'{path}: is damaged (it has places outside the .bin)')
  return dtype, np.unique(places[firsts] // width)


def _arrow() -> Any:
  try:
    import pyarrow.ipc
    import pyarrow.parquet  # noqa: F401 (an attribute of the package)
  except ImportError:
    raise ConfigError(
      '.parquet and .arrow need pyarrow: pip install "mla_moe[data]"'
    ) from None
  return pyarrow


def has_ids(path: str, field: str) -> bool:
  """Whether a .parquet has ids and no text; a damaged one counts as text."""
  try:
    from pyarrow import ArrowException, parquet
  except ImportError:
    return False
  try:
    with _opened(path) as file:
      names = parquet.read_schema(file).names
  except (ArrowException, OSError):
    return False
  is_text = field in names or field != 'text'  # a column of that name was meant
  return not is_text and any(name in names for name in _COLUMNS)


def _columns(path: str) -> Iterator[Any]:
  """Yields the lists of ids of a table, some rows at a time."""
  arrow = _arrow()
  if path.lower().endswith('.parquet'):
    with _opened(path) as source, arrow.parquet.ParquetFile(source) as file:
      column = _column(path, file.schema_arrow.names)
      for batch in file.iter_batches(1024, columns=[column]):
        yield batch.column(0)
    return
  with _opened(path) as file:
    try:
      table = arrow.ipc.open_stream(file).read_all()
    except arrow.ArrowInvalid:
      file.seek(0)
      table = arrow.ipc.open_file(file).read_all()
    yield from table.column(_column(path, table.column_names)).chunks


def _column(path: str, names: Sequence[str]) -> str:
  column = next((name for name in _COLUMNS if name in names), None)
  if column is None:
    raise ConfigError(
      f'{path}: has no column {" or ".join(_COLUMNS)}, only {", ".join(names)}'
    )
  return column


def _of_table(path: str, copy: pathlib.Path, tokenizer: Tokenizer) -> Layout:
  arrow = _arrow()
  dtype = 'uint16' if tokenizer.vocab <= 1 << 16 else 'uint32'
  with shards.Writer(copy, dtype) as writer:
    try:
      for lists in _columns(path):
        ids = lists.flatten().to_numpy(zero_copy_only=False)
        if ids.dtype.kind not in 'iu':
          raise ConfigError(f'{path}: its ids are {ids.dtype}, not integers')
        if len(ids):
          check_ids(path, ids, tokenizer)
        writer.add(ids)
    except (arrow.ArrowException, AttributeError, OSError) as error:
      why = ' '.join(str(error).split())[:80]
      raise ConfigError(
        f'{path}: not a readable table of ids ({why})'
      ) from None
    writer.seal()
  return Layout(str(copy), dtype, 0, writer.length)
