"""Shards of a corpus in a bucket, as a source: read in chunks when touched.

Their facts and one listing are read at a start, the checksums of a shard with
its first id. So a corpus that `prepare` has made elsewhere is trained on from
where it was copied to.
"""

from __future__ import annotations

import array
import functools
import json
import pathlib
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from mla_moe.config import ConfigError

from . import chunks, corpus_folder, remote, shards
from .corpus_folder import Corpus
from .tokenizer import Tokenizer

REMEDY = 'copy it there again'


def opened(
  url: str, tokenizer: Tokenizer, cache: pathlib.Path
) -> tuple[Corpus, dict]:
  """Returns the corpus in a folder of a bucket, and the facts in corpus.json.

  Raises:
    ConfigError: it is damaged, or cannot be read.
  """
  root, objects = remote.listed(url)
  known = {file.path: file for file in objects}
  path = f'{root}/corpus.json'
  try:
    values = corpus_folder.parsed(_content(known[path]))
    read = functools.cache(_sums)  # of all shards: the next row is of any
    args = root, known, values, cache, read
    streams = [_tokens(*args, part) for part in shards.PARTS]
    name = root.rpartition('/')[2]
    return corpus_folder.of_values(values, streams, name, tokenizer), values
  except (ValueError, KeyError, TypeError) as error:
    raise corpus_folder.damaged(path, error, REMEDY) from None


def _content(file: remote.Object) -> bytes:
  return remote.part(file.path, 0, file.size)


def _tokens(
  root: str,
  known: dict[str, remote.Object],
  values: dict[str, Any],
  cache: pathlib.Path,
  read: Callable,
  part: str,
) -> shards.Tokens:
  streams, dtype = [], values['dtype']
  for number, length in enumerate(values['lengths'][part]):
    path = f'{root}/{number:05}.{part}'
    size = length * np.dtype(dtype).itemsize
    file = known.get(path) or remote.Object(path, 0, '')
    if file.size != size:
      raise ConfigError(
        f'{path}: has {file.size} bytes, not {size}: it is damaged; {REMEDY}'
      )
    if length:
      facts = known.get(f'{root}/{number:05}.json')
      args = read, path, facts, part, values['block']
      check = functools.partial(_check, *args)
      folder = cache / chunks.name_of(file)
      streams.append(chunks.Chunks(path, dtype, length, folder, check))
  return shards.Tokens(streams, dtype)


def _check(read, path, facts, part, block: int, start: int, ids) -> None:
  """Compares the checksums of the blocks of a chunk."""
  try:
    sums = read(facts)[part]
    place, step = start * ids.itemsize, block // ids.itemsize
    own = [zlib.crc32(ids[i : i + step]) for i in range(0, len(ids), step)]
    first = place // block
    pairs = zip(own, sums[first : first + len(own)], strict=True)
    wrong = [i for i, (one, other) in enumerate(pairs) if one != other]
  except (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
  ) as error:
    where = facts.path if facts else f'the facts of {path}'
    raise corpus_folder.damaged(where, error, REMEDY) from None
  if wrong:
    place += wrong[0] * block
    raise ConfigError(
      f'{path}: MiB {place >> 20} is damaged (from byte {place}); {REMEDY}'
    )


def _sums(facts: remote.Object) -> dict[str, array.array]:
  """Returns the checksums of a shard's parts: 4 bytes for 64 KiB of ids."""
  sums = json.loads(_content(facts))['checksums']
  return {part: array.array('I', values) for part, values in sums.items()}
