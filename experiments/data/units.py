"""Units of work: parts of a text, of which each becomes a shard.

A unit is some files, a range of bytes of a .jsonl, or row groups of a .parquet.
Its tokens depend on nothing outside it, and units follow from the files alone.
So any process may write any unit at any time: the shards in a row are the same
stream, bit for bit. A unit is done when its facts have their name; a kill costs
the units that were being written.

Each document becomes bos, its tokens, eos. A fraction of the training documents
is rearranged for fill-in-the-middle: prefix, suffix, middle (PSM; V3's report,
section 4.1).
"""

from __future__ import annotations

import array
import collections
import itertools
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mla_moe.config import DataConfig

from .. import workdir
from . import documents, holdout, shards, sources
from .documents import Document
from .tokenizer import Tokenizer

_LEAST_BYTES = 16 << 20  # of a unit
_MOST_UNITS = 1 << 13  # a system maps some 65,000 files


class Piece(NamedTuple):
  """A file, or its bytes or row groups from start to stop."""

  file: sources.File
  start: int = 0
  stop: int | None = None


class Unit(NamedTuple):
  """Pieces that become one shard. size: their bytes on the disk."""

  number: int
  pieces: tuple[Piece, ...]
  size: int


class Job(NamedTuple):
  """All that units have in common.

  folder: of the shards. by_key: keys alone decide what is held out, as in any
  text of many documents (`holdout`).
  """

  folder: pathlib.Path
  data: DataConfig
  tokenizer: Tokenizer
  by_key: bool

  @property
  def dtype(self) -> str:
    """The type of the ids: the smaller one that the vocabulary allows."""
    return 'uint16' if self.tokenizer.vocab <= 1 << 16 else 'uint32'


def of(files: Sequence[sources.File]) -> list[Unit]:
  """Returns the units of a text, in its order.

  A text of few documents is one unit: they are weighed against each other.
  """
  total = sum(file.size for file in files)
  size = max(_LEAST_BYTES, total // _MOST_UNITS)
  units: list[Unit] = []
  pieces, filled = [], 0
  for file in files:
    ranges = documents.ranges(file, size)
    for start, stop in ranges:
      pieces.append(Piece(file, start, stop))
      filled += size if len(ranges) > 1 else file.size
      if filled >= size:
        units.append(Unit(len(units), tuple(pieces), round(filled)))
        pieces, filled = [], 0
  if pieces:
    units.append(Unit(len(units), tuple(pieces), round(filled)))
  if len(units) > 1 and _are_few(units):
    pieces = itertools.chain(*(unit.pieces for unit in units))
    return [Unit(0, tuple(pieces), total)]
  return units


def _are_few(units: Sequence[Unit]) -> bool:
  rows = itertools.chain(*(_read(unit, _Facts()) for unit in units))
  return len(list(itertools.islice(rows, holdout.MOST + 1))) <= holdout.MOST


def is_done(folder: pathlib.Path, unit: Unit) -> bool:
  """Whether the unit's shard is whole."""
  return shards.file_of(folder, unit.number, 'json').exists()


class _Facts:
  """Facts that are collected while the documents of a unit stream by.

  rows: of `documents.read`. replaced, broken: pieces of invalid UTF-8, and the
  first file that has any. hashes: of each document's content; they are no part
  of the facts, but a file beside them until the text is whole.
  """

  def __init__(self):
    self.hashes = array.array('Q')
    self.rows: collections.Counter = collections.Counter()
    self.documents = self.replaced = 0
    self.text_bytes = 0
    self.broken = self.prompt = ''


def write(
  job: Job,
  unit: Unit,
  encode: Callable[[list[str]], list[np.ndarray]],
  tell: Callable[[int], None] = lambda size: None,
) -> None:
  """Writes the shard of a unit: its two token files, then its facts.

  Args:
    job, unit: see there.
    encode: the ids of each text.
    tell: is called with the bytes of text so far.

  Raises:
    ConfigError: as `documents.read`.
  """
  facts = _Facts()
  stream = _read(unit, facts)
  split = holdout.by_key if job.by_key else holdout.sides
  path = lambda part: shards.file_of(job.folder, unit.number, part)
  ends = job.tokenizer.bos_id, job.tokenizer.eos_id
  bos, eos = (np.array([index], np.int32) for index in ends)
  with (
    shards.Writer(path('train'), job.dtype) as train,
    shards.Writer(path('heldout'), job.dtype) as heldout,
  ):
    for group in split(stream, job.data.heldout):
      texts = [document.text for document, _ in group]
      for (document, is_heldout), ids in zip(group, encode(texts), strict=True):
        size = len(document.text.encode('utf-8', 'replace'))
        facts.text_bytes += size
        if is_heldout:
          facts.prompt = facts.prompt or document.text[:400]
        else:
          ids = _fim(ids, document.key, job.data, job.tokenizer)
        (heldout if is_heldout else train).add(bos, ids, eos)
      tell(facts.text_bytes)
    writers = dict(zip(shards.PARTS, (train, heldout), strict=True))
    for writer in writers.values():
      writer.seal()
  lengths = {part: writer.length for part, writer in writers.items()}
  checksums = {part: writer.checksums for part, writer in writers.items()}
  largest = max(writer.largest for writer in writers.values())
  values = vars(facts) | dict(lengths=lengths, largest=largest)
  path('hashes').write_bytes(values.pop('hashes').tobytes())
  text = json.dumps(values | dict(checksums=checksums))
  workdir.write(path('json'), text)


def _read(unit: Unit, facts: _Facts) -> Iterator[Document]:
  """Yields the documents of a unit in order; counts them."""
  for file, start, stop in unit.pieces:
    for document in documents.read(file, facts.rows, start, stop):
      facts.documents += 1
      facts.hashes.append(document.content)
      if document.replaced:
        facts.replaced += document.replaced
        facts.broken = facts.broken or file.name
      yield document


def _fim(
  ids: np.ndarray, key: int, data: DataConfig, tokenizer: Tokenizer
) -> np.ndarray:
  """Returns the ids, in the order PSM for `fim_rate` of the documents."""
  if not tokenizer.fim_ids or len(ids) < 3:
    return ids
  random = np.random.default_rng((data.seed, key))
  if random.random() >= data.fim_rate:
    return ids
  begin, hole, end = tokenizer.fim_ids
  a, b = np.sort(random.integers(0, len(ids) + 1, 2))
  prefix, middle, suffix = ids[:a], ids[a:b], ids[b:]
  return np.concatenate([[begin], prefix, [hole], suffix, [end], middle])
