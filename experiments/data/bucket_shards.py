"""Shards of a corpus in a bucket, as a source: read in chunks when touched.

Their facts and one listing are read at a start, the checksums of a shard with
its first id. So a corpus that `prepare` has made elsewhere is trained on from
where it was copied to.
"""

from __future__ import annotations

import functools
import json
import pathlib
import zlib

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
    streams = [_tokens(root, known, p, values, cache) for p in shards.PARTS]
    name = root.rpartition('/')[2]
    return corpus_folder.of_values(values, streams, name, tokenizer), values
  except (ValueError, KeyError, TypeError) as error:
    raise corpus_folder.damaged(path, error, REMEDY) from None


def _content(file: remote.Object) -> bytes:
  return remote.part(file.path, 0, file.size)


def _tokens(root, known, part: str, values: dict, cache) -> shards.Tokens:
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
      check = functools.partial(_check, path, facts, part, values['block'])
      folder = cache / chunks.name_of(file)
      streams.append(chunks.Chunks(path, dtype, length, folder, check))
  return shards.Tokens(streams, dtype)


def _check(path, facts, part: str, block: int, start: int, ids) -> None:
  """Compares the checksums of the blocks of a chunk."""
  try:
    sums = _sums(facts)[part]
    place, step = start * ids.itemsize, block // ids.itemsize
    own = [zlib.crc32(ids[i : i + step]) for i in range(0, len(ids), step)]
    first = place // block
    pairs = zip(own, sums[first : first + len(own)], strict=True)
    wrong = [i for i, (one, other) in enumerate(pairs) if one != other]
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    where = facts.path if facts else f'the facts of {path}'
    raise corpus_folder.damaged(where, error, REMEDY) from None
  if wrong:
    place += wrong[0] * block
    raise ConfigError(
      f'{path}: MiB {place >> 20} is damaged (from byte {place}); {REMEDY}'
    )


@functools.lru_cache(maxsize=64)
def _sums(facts: remote.Object) -> dict[str, list[int]]:
  return json.loads(_content(facts))['checksums']
