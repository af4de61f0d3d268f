"""Token ids as a source: text that another program has tokenised.

Files are Megatron's .bin beside its .idx, raw .bin (`data.dtype`), .npy of one
axis, and .parquet or .arrow with a column of lists, `input_ids` or `tokens`,
which are copied once. The others are read where they lie. Ids are taken as they
are: nothing is added between documents, and nothing is rearranged. The end of
the ids is held out, as of a book.

The first start reads all ids, for their checksums and their largest: later ones
compare names, sizes and times, and each block when it is touched (`shards`).
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import pathlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from mla_moe.config import ConfigError, DataConfig

from .. import cli, workdir
from . import shards
from .tokenizer import Tokenizer

KINDS = ('.bin', '.npy', '.arrow', '.parquet')
_COLUMNS = ('input_ids', 'tokens')
_MAGIC = b'MMIDIDX\x00\x00'  # of Megatron's .idx
# Its codes of types.
_TYPES = {1: 'uint8', 3: 'int16', 4: 'int32', 5: 'int64', 8: 'uint16'}
_PIECE = 1 << 22  # ids that are read at once
_REMEDY = 'its time is that of its first reading: bring its copy, or touch it'
_SAMPLE = 1 << 21  # held-out ids whose text is compressed


class Layout(NamedTuple):
  """The place of the ids in a file: `length` of a type from byte `offset`."""

  path: str
  dtype: str
  offset: int
  length: int


class Part:
  """The ids of a stream from start to stop, as a stream."""

  def __init__(self, tokens: shards.Tokens, start: int, stop: int):
    self._tokens, self._start, self._stop = tokens, start, stop
    self.dtype = tokens.dtype

  def __len__(self) -> int:
    return self._stop - self._start

  def __getitem__(self, place: slice) -> np.ndarray:
    start, stop, _ = place.indices(len(self))
    return self._tokens[self._start + start : self._start + max(start, stop)]

  def pieces(self, size: int = 1 << 22) -> Iterator[np.ndarray]:
    """Yields all ids in order, some at a time, each block checked."""
    for start in range(0, len(self), size):
      yield self[start : start + size]


def files(source: str) -> list[str]:
  """Returns the files of ids that a source names, or none: it is text.

  A .parquet is text if it has the column of one.
  """
  if '://' in source:
    return []
  path = str(cli.path('data.source', source))
  if not path.lower().endswith(KINDS):
    return []
  paths = sorted(glob.glob(path, recursive=True)) or [path]
  paths = [p for p in paths if os.path.isfile(p)]
  if path.lower().endswith('.parquet'):
    return paths if any(map(_has_ids, paths)) else []
  return paths


def opened(
  paths: Sequence[str],
  data: DataConfig,
  tokenizer: Tokenizer,
  cache: pathlib.Path,
  say: Callable[[str], None] = print,
) -> tuple[Part, Part, dict[str, Any]]:
  """Returns (training ids, held-out ids, facts) of files of ids.

  Raises:
    ConfigError: a damaged file, ids that the tokenizer lacks, or no documents
      for packing 'separate'.
  """
  facts = dict(
    format=2,
    files=[_stamp(path) for path in paths],
    indices=[_stamp(path) for path in map(_index, paths) if path],
    options=(data.dtype, data.heldout, tokenizer.fingerprint),
  )
  stamp = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]
  folder = cache / f'ids-{stamp}'
  if not (folder / 'ids.json').exists():
    say(f'Reading the ids of {data.source!r} (once), which are as they are: '
        'data.fim_rate is of no effect.')  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    _adopt(paths, folder, data, tokenizer)
  try:
    values = json.loads((folder / 'ids.json').read_text(encoding='utf-8'))
  except (OSError, ValueError):
    raise ConfigError(
      f'{folder}/ids.json: is damaged; delete {folder} and start again'
    ) from None
  parts = _parts(folder, values, data)
  if data.packing == 'separate' and tokenizer.bos_id not in parts[0][:_SAMPLE]:
    raise ConfigError(
      f"data.packing='separate': no document of {data.source!r} begins with "
      f"bos_id={tokenizer.bos_id}; use 'joined'"
    )
  return *parts, values


def _parts(folder, values: dict, data: DataConfig) -> tuple[Part, Part]:
  """Returns the ids, each block checked when it is touched, in two parts."""

  def shard(layout: Layout, checksums: list[int]) -> shards.Shard:
    path, dtype, offset, length = layout
    place = folder / path  # an absolute path is itself
    args = place, dtype, length, shards.BLOCK, lambda: checksums
    # Only the copy of a table can be made again.
    remedy = '' if place.parent == folder else _REMEDY
    return shards.Shard(*args, offset=offset, remedy=remedy)

  pairs = zip(values['layouts'], values['checksums'], strict=True)
  whole = [shard(Layout(*layout), sums) for layout, sums in pairs]
  tokens = shards.Tokens(whole, values['dtype'])
  cut = len(tokens) - round(len(tokens) * data.heldout)
  return Part(tokens, 0, cut), Part(tokens, cut, len(tokens))


def _adopt(paths, folder, data: DataConfig, tokenizer: Tokenizer) -> None:
  """Reads all ids once; writes their places and checksums into `folder`."""
  layouts, checksums, digest = [], [], hashlib.sha256()
  for number, path in enumerate(paths):
    layout = _layout(path, folder / f'{number:05}.ids', data, tokenizer)
    sums = []
    for ids in _pieces(layout):
      _check_ids(path, ids, tokenizer)
      block = shards.BLOCK // ids.itemsize
      ids = np.ascontiguousarray(ids)
      starts = range(0, len(ids), block)
      sums += [zlib.crc32(ids[i : i + block]) for i in starts]
      digest.update(ids.astype('<i8').tobytes())
    # The cache may move, and starts have other working folders.
    is_copy = os.path.dirname(layout.path) == str(folder)
    name = os.path.basename if is_copy else os.path.abspath
    layouts.append(layout._replace(path=name(layout.path)))
    checksums.append(sums)
  digest.update(json.dumps((data.heldout, tokenizer.fingerprint)).encode())
  dtype = np.result_type(*(layout.dtype for layout in layouts))
  dtype = dtype.name if dtype.kind in 'iu' else 'int64'  # uint64 with int64
  values = dict(layouts=layouts, checksums=checksums, dtype=dtype)
  values['fingerprint'] = digest.hexdigest()[:24]
  _, heldout = _parts(folder, values, data)
  lengths = tokenizer.byte_lengths()
  pieces = range(0, len(heldout), _PIECE)
  size = sum(int(lengths[heldout[i : i + _PIECE]].sum()) for i in pieces)
  text = tokenizer.decode(heldout[:_SAMPLE]).encode('utf-8', 'replace')
  values['heldout_bytes'] = size
  values['gzip_bits_per_byte'] = (
    8 * len(zlib.compress(text, 9)) / max(len(text), 1)
  )
  values['prompt'] = text[:400].decode('utf-8', 'replace')
  workdir.write(folder / 'ids.json', json.dumps(values))


def _stamp(path: str) -> tuple[str, int, int]:
  try:
    state = os.stat(path)
  except OSError as error:
    raise ConfigError(f'{path}: cannot be read ({error.strerror})') from None
  return os.path.abspath(path), state.st_size, state.st_mtime_ns


def _pieces(layout: Layout) -> Iterator[np.ndarray]:
  """Yields the ids of a file in pieces of whole blocks."""
  ids = np.memmap(
    layout.path, layout.dtype, 'r', layout.offset, (layout.length,)
  )
  for start in range(0, len(ids), _PIECE):
    yield ids[start : start + _PIECE]


def _check_ids(path: str, ids: np.ndarray, tokenizer: Tokenizer) -> None:
  for worst in (int(ids.max()), int(ids.min())):
    if not 0 <= worst < tokenizer.vocab:
      raise ConfigError(
        f'{path}: has the id {worst}, and data.tokenizer those below '
        f'{tokenizer.vocab}; name the tokenizer of its text, and of raw files '
        'the data.dtype'
      )


def _layout(path, copy, data: DataConfig, tokenizer: Tokenizer) -> Layout:
  """Returns the place of a file's ids; a table's are copied to `copy`.

  Raises:
    ConfigError: a file without ids, or a damaged one.
  """
  suffix = os.path.splitext(path)[1].lower()
  size = os.path.getsize(path)
  if suffix == '.npy':
    layout = _of_numpy(path)
  elif suffix == '.bin':
    index = _index(path)
    dtype = _of_megatron(index, size) if index else data.dtype
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
  return layout


def _index(path: str) -> str:
  """Returns the .idx beside a .bin, or ''."""
  stem, suffix = os.path.splitext(path)
  is_there = suffix.lower() == '.bin' and os.path.exists(f'{stem}.idx')
  return f'{stem}.idx' if is_there else ''


def _of_numpy(path: str) -> Layout:
  try:
    ids = np.load(path, mmap_mode='r', allow_pickle=False)
  except (OSError, ValueError, EOFError) as error:
    why = ' '.join(str(error).split())[:80]
    raise ConfigError(f'{path}: not a readable .npy ({why})') from None
  if ids.ndim != 1 or ids.dtype.kind not in 'iu' or not ids.dtype.isnative:
    raise ConfigError(
      f'{path}: has {ids.dtype} of shape {ids.shape}, and ids are integers of '
      'one axis'
    )
  rest = os.path.getsize(path) - ids.offset - ids.nbytes
  if rest:
    raise ConfigError(f'{path}: has {rest} bytes after its ids; write it again')
  return Layout(path, ids.dtype.name, ids.offset, len(ids))


def _of_megatron(index: str, size: int) -> str:
  """Returns the type of the ids beside an index, whose lengths must fit."""
  content = pathlib.Path(index).read_bytes()
  dtype = _TYPES.get(content[17]) if len(content) >= 34 else None
  if content[:9] != _MAGIC or not dtype:
    raise ConfigError(f'{index}: is no index of Megatron, version 1')
  count = int.from_bytes(content[18:26], 'little')
  if len(content) < 34 + 12 * count:
    raise ConfigError(f'{index}: ends within its {count} lengths')
  lengths = np.frombuffer(content, '<i4', count, 34)
  whole = int(lengths.sum(dtype=np.int64)) * np.dtype(dtype).itemsize
  if whole != size:
    raise ConfigError(
      f'{index}: its documents have {whole} bytes, and the .bin {size}: they '
      'are of two texts, or one is cut'
    )
  return dtype


def _arrow() -> Any:
  try:
    import pyarrow.ipc
    import pyarrow.parquet  # noqa: F401 (an attribute of the package)
  except ImportError:
    raise ConfigError(
      '.parquet and .arrow need pyarrow: pip install "mla_moe[data]"'
    ) from None
  return pyarrow


def _has_ids(path: str) -> bool:
  """Whether a .parquet has ids and no text; a damaged one counts as text."""
  try:
    from pyarrow import ArrowException, parquet
  except ImportError:
    return False
  try:
    names = parquet.read_schema(path).names
  except (ArrowException, OSError):
    return False
  return 'text' not in names and any(name in names for name in _COLUMNS)


def _columns(path: str) -> Iterator[Any]:
  """Yields the lists of ids of a table, some rows at a time."""
  arrow = _arrow()
  if path.lower().endswith('.parquet'):
    with arrow.parquet.ParquetFile(path) as file:
      column = _column(path, file.schema_arrow.names)
      for batch in file.iter_batches(1024, columns=[column]):
        yield batch.column(0)
    return
  with arrow.memory_map(path) as file:
    try:
      table = arrow.ipc.open_stream(file).read_all()
    except arrow.ArrowInvalid:
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
          _check_ids(path, ids, tokenizer)
        writer.add(ids)
    except (arrow.ArrowException, AttributeError, OSError) as error:
      why = ' '.join(str(error).split())[:80]
      raise ConfigError(
        f'{path}: not a readable table of ids ({why})'
      ) from None
    writer.seal()
  return Layout(str(copy), dtype, 0, writer.length)
