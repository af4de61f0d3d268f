"""The folder of a corpus: shards of ids, and facts about them in corpus.json.

Opening it reads no token. Damaged facts are found by their checksum, damaged
tokens when they are touched (`shards`).
"""

from __future__ import annotations

import json
import pathlib
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mla_moe.config import ConfigError, DataConfig

from . import shards
from .shards import Tokens
from .tokenizer import Tokenizer

_OLDER_BLOCK = 1 << 20
_SHARD_FACTS = {'documents', 'rows', 'lengths', 'largest', 'checksums'}
FACTS = ('documents', 'text_bytes', 'replaced', 'duplicates')


class Corpus(NamedTuple):
  """Two streams of token ids, and facts about the text.

  train, heldout: [tokens] uint16 or uint32, read and checked when touched.
  gzip_bits_per_byte: of the first 8 MiB of the held-out text under gzip -9, to
  compare the model's with. prompt: the beginning of a
  held-out document. fingerprint: of everything that the tokens depend on.
  facts: numbers of the documents, of bytes of text, of pieces of invalid UTF-8
  and of documents equal to one before; tokens of an earlier version lack some.
  """

  train: Tokens
  heldout: Tokens
  gzip_bits_per_byte: float
  prompt: str
  bos_id: int
  fingerprint: str
  facts: dict[str, int]


def opened(
  folder: pathlib.Path, tokenizer: Tokenizer, remedy: str = ''
) -> Corpus:
  """Returns the corpus in `folder`, of which no token is read.

  `remedy` is the way out of damage; '' where the folder can be made again.

  Raises:
    ConfigError: it is damaged.
  """
  path = folder / 'corpus.json'
  try:
    values = parsed(path.read_text(encoding='utf-8'))
    read = tokens_of if 'lengths' in values else _older_tokens
    streams = [read(folder, part, values, remedy) for part in shards.PARTS]
    return of_values(values, streams, folder.name, tokenizer)
  except ConfigError:
    raise
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise damaged(path, error, remedy) from None


def parsed(text: str) -> dict[str, Any]:
  """Returns the facts in corpus.json.

  Raises:
    ValueError, KeyError, TypeError: they are damaged.
  """
  values = json.loads(text)
  if 'lengths' in values and values['check'] != checksum(values):
    raise ValueError('its checksum differs')
  return values


def of_values(
  values: dict[str, Any],
  streams: Sequence[Tokens],
  fingerprint: str,
  tokenizer: Tokenizer,
) -> Corpus:
  """Returns the corpus with these facts, and ids of training and held out."""
  return Corpus(
    *streams,
    gzip_bits_per_byte=values['gzip_bits_per_byte'],
    prompt=values['prompt'],
    bos_id=tokenizer.bos_id,
    fingerprint=fingerprint,
    facts={name: values[name] for name in FACTS if name in values},
  )


def tokens_of(
  folder: pathlib.Path, part: str, values: dict, remedy: str = ''
) -> Tokens:
  """Returns the ids of all shards of a part, of the facts in corpus.json."""

  def shard(number: int, length: int) -> shards.Shard:
    return shards.Shard(
      shards.file_of(folder, number, part),
      values['dtype'],
      length,
      values['block'],
      lambda: _checksums(folder, number, part, remedy),
      remedy=remedy,
    )

  lengths = values['lengths'][part]
  numbered = [(i, length) for i, length in enumerate(lengths) if length]
  return Tokens([shard(*one) for one in numbered], values['dtype'])


def _older_tokens(
  folder: pathlib.Path, part: str, values: dict, remedy: str
) -> Tokens:
  """Returns the tokens of one file, and checksums of MiB in corpus.json."""
  path, expected = folder / f'{part}.bin', values['checksums'][part]
  size = path.stat().st_size if path.is_file() else 0
  if -(-size // _OLDER_BLOCK) != len(expected):
    raise damaged(path, ValueError(f'has {size} bytes'), remedy)
  length = size // np.dtype(values['dtype']).itemsize
  args = path, values['dtype'], length, _OLDER_BLOCK, lambda: expected
  shard = lambda: shards.Shard(*args, remedy=remedy)
  return Tokens([shard()] if length else [], values['dtype'])


def facts_of(folder: pathlib.Path, number: int, remedy: str = '') -> dict:
  """Returns the facts of a shard.

  Raises:
    ConfigError: they are damaged.
  """
  path = shards.file_of(folder, number, 'json')
  try:
    facts = json.loads(path.read_text(encoding='utf-8'))
    if not isinstance(facts, dict) or not facts.keys() >= _SHARD_FACTS:
      raise ValueError('facts are missing')
    return facts
  except (OSError, ValueError) as error:
    raise damaged(path, error, remedy) from None


def _checksums(folder, number: int, part: str, remedy: str) -> list[int]:
  """Returns the checksums of a shard's blocks, of facts that may be edited."""
  try:
    return list(facts_of(folder, number, remedy)['checksums'][part])
  except (KeyError, TypeError) as error:
    path, why = shards.file_of(folder, number, 'json'), f'no checksums: {error}'
    raise damaged(path, ValueError(why), remedy) from None


def damaged(path: Any, error: Exception, remedy: str) -> ConfigError:
  """Returns a line about a damaged file and the way out: `remedy`, or ''."""
  why = ' '.join(str(error).split())[:80]
  remedy = remedy or f'delete {path.parent} and start again'
  return ConfigError(f'{path}: is damaged ({why}); {remedy}')


def checksum(values: dict) -> int:
  """Returns a checksum of the facts in corpus.json."""
  rest = {name: value for name, value in values.items() if name != 'check'}
  return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def check(corpus: Corpus, data: DataConfig, rows: int = 0) -> None:
  """Refuses a corpus with fewer tokens than `rows` rows; 0 is a batch.

  Raises:
    ConfigError: too little text.
  """
  batch = (rows or data.batch_size) * data.seq_len + 1
  for name, stream, least, remedy in (
    ('training', corpus.train, batch, 'lower data.batch_size or data.seq_len'),
    (
      'held-out',
      corpus.heldout,
      data.seq_len + 1,
      f'raise data.heldout={data.heldout:g}, or lower data.seq_len',
    ),
  ):
    if len(stream) < least:
      raise ConfigError(
        f'data.source={data.source!r}: {len(stream)} {name} tokens, but a '
        f'batch needs {least}; give more text, or {remedy}'
      )


def table(corpus: Corpus) -> list[tuple[str, str]]:
  """Returns the text in numbers, for people: (name, value)."""
  facts = corpus.facts
  heldout, tokens = len(corpus.heldout), len(corpus.train) + len(corpus.heldout)
  rows = [('tokens', f'{tokens:,}')]
  if facts:
    rows += [
      ('documents', f'{facts["documents"]:,}'),
      ('bytes of text', f'{facts["text_bytes"]:,}'),
      ('bytes a token', f'{facts["text_bytes"] / tokens:.2f}'),
      ('pieces of invalid UTF-8', f'{facts["replaced"]:,}'),
    ]
  if 'duplicates' in facts:
    part = facts['duplicates'] / facts['documents']
    rows.append(('duplicates', f'{facts["duplicates"]:,} ({part:.1%})'))
  rows += [
    ('tokens held out', f'{heldout:,} ({heldout / tokens:.1%})'),
    ('bits a byte by gzip -9', f'{corpus.gzip_bits_per_byte:.3f}'),
  ]
  return rows


def verify(corpus: Corpus) -> int:
  """Reads all tokens of a corpus, and compares their checksums.

  Returns their number.

  Raises:
    ConfigError: names the first block that differs.
  """
  streams = (corpus.train, corpus.heldout)
  return sum(len(piece) for tokens in streams for piece in tokens.pieces())
