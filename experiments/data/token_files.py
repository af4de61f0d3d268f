"""Token ids as a source: text that another program has tokenised.

Files are of the kinds of `id_layouts`, and are read where they lie: on a disk
(`shards`) or in a bucket (`chunks`). Ids are taken as they are: nothing is
added between documents, and nothing is rearranged. The end of the ids is held
out, as of a book.

The first start reads all ids on a disk, for their checksums and their largest:
later ones compare names, sizes and times, and each block when it is touched. In
a bucket there may be terabytes: they stand for their stamps, and the ids of a
chunk are looked at when it is.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import pathlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from mla_moe.config import ConfigError, DataConfig

from .. import cli, workdir
from . import chunks, id_layouts, making, remote, shards
from .id_layouts import Layout
from .tokenizer import Tokenizer

_FORMAT = 3
_PIECE = 1 << 22  # ids that are read at once
_REMEDY = 'its time is that of its first reading: bring its copy, or touch it'
_SAMPLE = 1 << 21  # held-out ids whose text is compressed


class Part:
  """The ids of a stream from start to stop, as a stream.

  Attributes:
    begins: marks the ids of a slice that begin documents; None if unknown.
  """

  def __init__(
    self,
    tokens: shards.Tokens,
    start: int,
    stop: int,
    starts: np.ndarray | None,
  ):
    self._tokens, self._start, self._stop = tokens, start, stop
    self._starts = starts
    self.begins = None if starts is None else self._begins
    self.dtype = tokens.dtype

  def __len__(self) -> int:
    return self._stop - self._start

  def __getitem__(self, place: slice) -> np.ndarray:
    return self._tokens[self._shifted(place)]

  def _shifted(self, place: slice) -> slice:
    start, stop, _ = place.indices(len(self))
    return slice(self._start + start, self._start + max(start, stop))

  def _begins(self, place: slice) -> np.ndarray:
    place = self._shifted(place)
    marks = np.zeros(place.stop - place.start, bool)
    first, last = np.searchsorted(self._starts, (place.start, place.stop))
    marks[np.asarray(self._starts[first:last]) - place.start] = True
    return marks

  def pieces(self, size: int = 1 << 22) -> Iterator[np.ndarray]:
    """Yields all ids in order, some at a time, each block checked."""
    for start in range(0, len(self), size):
      yield self[start : start + size]


def files(source: str, field: str = 'text') -> list[remote.Object]:
  """Returns the files of ids that a source names, or none: it is text.

  A .parquet is text if it has the column `field`; of a glob the first decides.

  Raises:
    ConfigError: a bucket that cannot be read.
  """
  suffix = os.path.splitext(source)[1].lower()
  if suffix not in id_layouts.KINDS:
    return []
  if remote.is_remote(source):
    objects = remote.listed(source)[1]
  else:
    path = str(cli.path('data.source', source))
    paths = sorted(glob.glob(path, recursive=True)) or [path]
    objects = [x for x in map(id_layouts.lookup, paths) if x]
  if suffix == '.parquet':
    has_ids = bool(objects) and id_layouts.has_ids(objects[0].path, field)
    return objects if has_ids else []
  return objects


def opened(
  objects: Sequence[remote.Object],
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
  paths = [file.path for file in objects]
  indices = id_layouts.indices(data.source, paths)
  pairs = list(zip(objects, indices, strict=True))
  facts = dict(
    format=_FORMAT,
    files=[_stamp(x) for pair in pairs for x in pair if x],
    options=(data.dtype, data.heldout, tokenizer.fingerprint),
  )
  stamp = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]
  folder = cache / f'ids-{stamp}'
  if not (folder / 'ids.json').exists():
    handle = making.locked(folder, False, say)
    try:
      if not (folder / 'ids.json').exists():  # another process was first
        _announce(objects, data, say)
        _adopt(pairs, folder, data, tokenizer)
    finally:
      os.close(handle)
  try:
    values = json.loads((folder / 'ids.json').read_text(encoding='utf-8'))
  except (OSError, ValueError):
    raise ConfigError(
      f'{folder}/ids.json: is damaged; delete {folder} and start again'
    ) from None
  train, heldout = _parts(folder, values, data, tokenizer)
  bos, first = tokenizer.bos_id, train.begins is None
  if data.packing == 'separate' and first:
    if bos == tokenizer.eos_id or bos not in train[:_SAMPLE]:
      raise ConfigError(
        f"data.packing='separate': no document of {data.source!r} begins with "
        f"bos_id={bos} and ends with another; use 'joined', or Megatron's .idx"
      )
  return train, heldout, values


def _announce(objects, data: DataConfig, say: Callable[[str], None]) -> None:
  say(f'Reading the ids of {data.source!r} (once), which are as they are: '
      'data.fim_rate is of no effect.')  # fmt: skip
  rows = chunks.CHUNK // (data.seq_len * np.dtype(data.dtype).itemsize)
  total = sum(file.size for file in objects)
  if remote.is_remote(data.source) and not data.block_rows and rows > 1:
    say(
      f'Each of their rows brings {chunks.CHUNK >> 20} MiB, until all '
      f'{total / 1e9:,.1f} GB are on this disk; with data.block_rows={rows} '
      'the rows of these follow each other.'
    )


def _parts(
  folder: pathlib.Path, values: dict, data: DataConfig, tokenizer: Tokenizer
) -> tuple[Part, Part]:
  """Returns the ids, checked when they are touched, in two parts."""

  def shard(layout: Layout, checksums: list[int], chunk: str) -> Any:
    path, dtype, offset, length = layout
    if chunk:
      check = lambda _, ids: id_layouts.check_ids(path, ids, tokenizer)
      place = folder.parent / chunk
      return chunks.Chunks(path, dtype, length, place, check, offset)
    place = folder / path  # an absolute path is itself
    args = place, dtype, length, shards.BLOCK, lambda: checksums
    # Only the copy of a table can be made again.
    remedy = '' if place.parent == folder else _REMEDY
    return shards.Shard(*args, offset=offset, remedy=remedy)

  rows = (values[name] for name in ('layouts', 'checksums', 'chunks'))
  whole = [shard(Layout(*x), *rest) for x, *rest in zip(*rows, strict=True)]
  tokens = shards.Tokens(whole, values['dtype'])
  path, starts = folder / 'starts.npy', None
  if values['has_starts']:
    starts = np.load(path, mmap_mode='r', allow_pickle=False)
  cut = len(tokens) - round(len(tokens) * data.heldout)
  end = len(tokens)
  return Part(tokens, 0, cut, starts), Part(tokens, cut, end, starts)


def _adopt(pairs, folder, data: DataConfig, tokenizer: Tokenizer) -> None:
  """Writes the places of all ids, and of those on a disk checksums."""
  digest = hashlib.sha256()
  values: dict[str, Any] = dict(layouts=[], checksums=[], chunks=[])
  starts, length = [], 0
  for number, (file, index) in enumerate(pairs):
    copy = folder / f'{number:05}.ids'
    layout, firsts = id_layouts.of(file, index, copy, data, tokenizer)
    starts.append(None if firsts is None else firsts + length)
    length += layout.length
    sums, chunk = [], ''
    if remote.is_remote(layout.path):
      chunk = chunks.name_of(file)
      digest.update(json.dumps((file.stamp, *layout[1:])).encode())
    else:
      sums = _checksums(file.path, layout, digest, tokenizer)
      # The cache may move, and starts have other working folders.
      is_copy = os.path.dirname(layout.path) == str(folder)
      name = os.path.basename if is_copy else os.path.abspath
      layout = layout._replace(path=name(layout.path))
    for name, x in (('layouts', layout), ('checksums', sums)):
      values[name].append(x)
    values['chunks'].append(chunk)
  digest.update(json.dumps((data.heldout, tokenizer.fingerprint)).encode())
  dtype = np.result_type(*(layout.dtype for layout in values['layouts']))
  # That of uint64 with int64 is float64.
  values['dtype'] = dtype.name if dtype.kind in 'iu' else 'int64'
  values['fingerprint'] = digest.hexdigest()[:24]
  values['has_starts'] = all(part is not None for part in starts)
  if values['has_starts']:
    np.save(folder / 'starts.npy', np.concatenate(starts).astype('<i8'))
  _, heldout = _parts(folder, values, data, tokenizer)
  text = tokenizer.decode(heldout[:_SAMPLE]).encode('utf-8', 'replace')
  bits = 8 * len(zlib.compress(text, 9)) / max(len(text), 1)
  values['gzip_bits_per_byte'] = bits
  values['prompt'] = text[:400].decode('utf-8', 'replace')
  workdir.write(folder / 'ids.json', json.dumps(values))


def _checksums(path, layout: Layout, digest, tokenizer) -> list[int]:
  """Returns the checksums of a file's blocks; adds its ids to the digest."""
  sums = []
  for ids in _pieces(layout):
    id_layouts.check_ids(path, ids, tokenizer)
    block = shards.BLOCK // ids.itemsize
    ids = np.ascontiguousarray(ids)
    starts = range(0, len(ids), block)
    sums += [zlib.crc32(ids[i : i + block]) for i in starts]
    digest.update(ids.astype('<i8').tobytes())
  return sums


def _stamp(file: remote.Object) -> tuple[str, int, str]:
  path, size, stamp = file
  return path if remote.is_remote(path) else os.path.abspath(path), size, stamp


def _pieces(layout: Layout) -> Iterator[np.ndarray]:
  """Yields the ids of a file in pieces of whole blocks."""
  ids = np.memmap(
    layout.path, layout.dtype, 'r', layout.offset, (layout.length,)
  )
  for start in range(0, len(ids), _PIECE):
    yield ids[start : start + _PIECE]
