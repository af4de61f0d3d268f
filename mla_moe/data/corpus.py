"""Text to token files, once: documents are tokenised into a flat memmap.

Each document is bos, its tokens, eos. A share of the training documents is
rearranged for fill-in-the-middle (prefix, suffix, middle: PSM; V3 section 4.1).
The folder's name is a fingerprint of all that the tokens depend on, so a
changed file or option makes a new one. A checksum for every MiB is compared
when the folder is opened, because a memmap by itself reads a flipped bit
without a word.

Which documents are held out is decided by their keys (`documents`). Of a text
so small that no key falls to that side, the document of the lowest key is, or,
where there is but one, its end: a book in a file of its own can be trained on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from mla_moe.config import Config, ConfigError, DataConfig
from mla_moe.data import documents
from mla_moe.data import tokenizer as tokenizer_lib

_BLOCK = 1 << 20
_BATCH = 256  # documents tokenised at once
_FORMAT = 1


class Corpus(NamedTuple):
  """Token streams, and what evaluation needs of the held-out text."""

  train: np.ndarray  # [tokens] uint16 or uint32, a memmap
  heldout: np.ndarray
  heldout_bytes: int
  gzip_bits_per_byte: float
  prompt: str  # how a held-out document begins
  bos_id: int
  fingerprint: str


def prepare(
  data: DataConfig,
  tokenizer: tokenizer_lib.Tokenizer,
  cache: os.PathLike | str,
  say: Callable[[str], None] = print,
) -> Corpus:
  """The corpus of `data.source`, tokenised into `cache` unless it is there.

  Raises:
    ConfigError: no text, unreadable text, a damaged cache.
  """
  files = documents.files(data.source)
  mark = _fingerprint(files, data, tokenizer)
  folder = pathlib.Path(cache) / mark
  if not (folder / 'corpus.json').exists():
    many = f'{len(files)} files' if len(files) > 1 else 'the file'
    say(f'Tokenising {many} of {data.source!r} (once) ...')
    _write(folder, files, data, tokenizer, say)
  return _open(folder, tokenizer, mark)


def check(corpus: Corpus, config: Config):
  """Refuses a corpus that the config cannot train on.

  Raises:
    ConfigError: fewer tokens than a batch, or ids that the model lacks.
  """
  data = config.data
  need = data.batch_size * data.seq_len + 1
  for name, stream, least, less in (
    ('training', corpus.train, need, 'lower data.batch_size or data.seq_len'),
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
        f'batch needs {least}; give more text, or {less}'
      )
    top = int(stream.max())
    if top >= config.model.vocab:
      raise ConfigError(
        f'model.vocab={config.model.vocab}: the {name} text holds token id '
        f"{top}; raise model.vocab to the tokenizer's size"
      )


def _fingerprint(files, data, tokenizer) -> str:
  facts = dict(
    format=_FORMAT,
    files=[(file.name, file.whole, documents.digest(file)) for file in files],
    tokenizer=tokenizer.fingerprint,
    ids=(tokenizer.bos_id, tokenizer.eos_id, tokenizer.fim_ids),
    options=(data.fim_rate, data.heldout, data.seed),
  )
  return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]


@dataclasses.dataclass
class _Tally:
  """What is counted while documents stream by."""

  documents: int = 0
  replaced: int = 0
  heldout_bytes: int = 0
  compressed: int = 0
  prompt: str = ''


def _write(folder, files, data, tokenizer, say):
  """Writes beside `folder`, then renames: it is whole or it is not there."""
  folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
  scratch = pathlib.Path(tempfile.mkdtemp(dir=folder.parent, prefix='.making-'))
  dtype = np.uint16 if tokenizer.vocab <= 1 << 16 else np.uint32
  tally, gzip = _Tally(), zlib.compressobj(9, wbits=31)
  try:
    paths = {part: scratch / f'{part}.bin' for part in ('train', 'heldout')}
    with (
      open(paths['train'], 'wb') as train,
      open(paths['heldout'], 'wb') as heldout,
    ):
      for group in _some_held_out(_groups(files, say), data.heldout):
        ids = tokenizer.encode_batch([document.text for document in group])
        for document, tokens in zip(group, ids, strict=True):
          tally.documents += 1
          tally.replaced += document.replaced
          held = _held_out(document, data.heldout)
          if held:
            text = document.text.encode('utf-8', 'replace')
            tally.heldout_bytes += len(text)
            tally.compressed += len(gzip.compress(text))
            tally.prompt = tally.prompt or document.text[:400]
          else:
            tokens = _fim(tokens, document.key, data, tokenizer)
          ends = ([tokenizer.bos_id], tokens, [tokenizer.eos_id])
          whole = np.concatenate(ends).astype(dtype)
          (heldout if held else train).write(whole.tobytes())
    tally.compressed += len(gzip.flush())
    if not tally.documents:
      raise ConfigError(f'data.source={data.source!r}: holds no text')
    if tally.replaced:
      say(f'{tally.replaced} pieces of invalid UTF-8 were replaced by U+FFFD.')
    facts = dict(
      dtype=np.dtype(dtype).name,
      heldout_bytes=tally.heldout_bytes,
      gzip_bits_per_byte=8 * tally.compressed / max(tally.heldout_bytes, 1),
      prompt=tally.prompt,
      checksums={part: _checksums(path) for part, path in paths.items()},
    )
    (scratch / 'corpus.json').write_text(json.dumps(facts))
    try:
      os.rename(scratch, folder)
    except OSError:  # another process was first, with the same content
      if not (folder / 'corpus.json').exists():
        raise
  finally:
    shutil.rmtree(scratch, ignore_errors=True)


def _groups(files, say) -> Iterator[list[documents.Document]]:
  """Documents in order, some at a time; says how far it is now and then."""
  group, told = [], 0
  for number, file in enumerate(files):
    for document in documents.read(file):
      group.append(document)
      if len(group) == _BATCH:
        yield group
        group = []
    done = 10 * (number + 1) // len(files)
    if done > told and len(files) > 5000:
      told = done
      say(f'  {10 * done} % of {len(files)} files')
  yield group


def _held_out(document: documents.Document, share: float) -> bool:
  return document.key < share * 2**64


def _some_held_out(
  groups: Iterator[list[documents.Document]], share: float
) -> Iterator[list[documents.Document]]:
  """The groups; where there is only one, something in it is held out."""
  first, second = next(groups), next(groups, None)
  if second:
    yield first
    yield second
    yield from groups
    return
  if first and not any(_held_out(document, share) for document in first):
    lowest = min(document.key for document in first)
    if all(document.key == lowest for document in first):
      text = first[0].text  # equal ones would be on both sides: one is enough
      cut = round(len(text) * (1 - share))
      cut = text.rfind('\n', 0, cut) + 1 or cut
      first = [
        first[0]._replace(text=text[:cut]),
        first[0]._replace(text=text[cut:], key=0, replaced=0),
      ]
    else:
      first = [
        document._replace(key=0) if document.key == lowest else document
        for document in first
      ]
  yield first


def _fim(tokens, key, data, tokenizer):
  """`tokens` in PSM order for a `fim_rate` share of the documents."""
  if not tokenizer.fim_ids or len(tokens) < 3:
    return tokens
  random = np.random.default_rng((data.seed, key))
  if random.random() >= data.fim_rate:
    return tokens
  begin, hole, end = tokenizer.fim_ids
  a, b = np.sort(random.integers(0, len(tokens) + 1, 2))
  prefix, middle, suffix = tokens[:a], tokens[a:b], tokens[b:]
  return np.concatenate([[begin], prefix, [hole], suffix, [end], middle])


def _checksums(path: pathlib.Path) -> list[int]:
  with open(path, 'rb') as file:
    return [zlib.crc32(block) for block in iter(lambda: file.read(_BLOCK), b'')]


def _open(folder: pathlib.Path, tokenizer, mark: str) -> Corpus:
  facts = json.loads((folder / 'corpus.json').read_text())
  streams = {}
  for part, expected in facts['checksums'].items():
    path = folder / f'{part}.bin'
    found = _checksums(path)
    for i in range(max(len(found), len(expected))):
      if found[i : i + 1] != expected[i : i + 1]:
        raise ConfigError(
          f'{path}: MiB {i} is damaged; delete the folder and start again'
        )
    empty = np.zeros(0, facts['dtype'])
    streams[part] = (
      np.memmap(path, facts['dtype'], 'r') if path.stat().st_size else empty
    )
  return Corpus(
    train=streams['train'],
    heldout=streams['heldout'],
    heldout_bytes=facts['heldout_bytes'],
    gzip_bits_per_byte=facts['gzip_bits_per_byte'],
    prompt=facts['prompt'],
    bos_id=tokenizer.bos_id,
    fingerprint=mark,
  )
