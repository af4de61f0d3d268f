"""The corpus: documents are tokenised once, into two flat files of token ids.

Each document becomes bos, its tokens, eos. A fraction of the training documents
is rearranged for fill-in-the-middle: prefix, suffix, middle (PSM; V3's report,
section 4.1). The files lie in a folder whose name is a fingerprint of all that
the tokens depend on, so a changed text or option makes another folder. They are
read through a memory map, which returns a flipped bit without a word: therefore
a checksum of every MiB is compared when the folder is opened.

About `data.heldout` of the text is held out (`holdout`), of a single book its
end. A line says how much it is, and which files were left out.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import json
import mmap
import os
import pathlib
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from mla_moe.config import ConfigError, DataConfig

from . import documents, encodings, holdout, sources
from .tokenizer import Tokenizer

_BLOCK = 1 << 20  # bytes per checksum
_FORMAT = 2
_SCRATCH = '.making-'
_OLDER = (*sources.TEXT, '.jsonl', '.parquet')  # the kinds of format 1


class Corpus(NamedTuple):
  """Two streams of token ids, and facts about the held-out text.

  train, heldout: [tokens] uint16 or uint32, memory maps. heldout_bytes: of the
  text in UTF-8. gzip_bits_per_byte: of the same text under gzip -9, to compare
  the model's with. prompt: the beginning of a held-out document. fingerprint:
  of everything that the tokens depend on.
  """

  train: np.ndarray
  heldout: np.ndarray
  heldout_bytes: int
  gzip_bits_per_byte: float
  prompt: str
  bos_id: int
  fingerprint: str


def prepare(
  data: DataConfig,
  tokenizer: Tokenizer,
  cache: os.PathLike | str,
  say: Callable[[str], None] = print,
  known: str = '',
) -> Corpus:
  """Returns the corpus of `data.source`; tokenises it if `cache` has it not.

  `known` is the fingerprint of a run that goes on. If its text is gone, the
  tokens in `cache` are taken; so are those that an earlier version wrote.

  Raises:
    ConfigError: no text, unreadable text, another text than the run's, a
      damaged cache, or one token that begins and ends documents, which packing
      'separate' cannot tell apart.
  """
  bos = tokenizer.bos_id
  if data.packing == 'separate' and bos == tokenizer.eos_id:
    raise ConfigError(
      f"data.packing='separate': bos_id={bos} is eos_id, too, so ends would "
      "begin documents; use 'joined', or another token"
    )
  cache = pathlib.Path(cache)
  is_here = bool(known) and (cache / known / 'corpus.json').exists()
  try:
    files, left_out = sources.listed(data.source, data.heldout)
  except sources.Absent as error:
    if known and not is_here:
      raise ConfigError(
        f'{error}, and {cache} has not the tokens of this run; name its text, '
        f'or bring {cache.name}/{known} from where the run began'
      ) from None
    if not is_here:
      raise
    say(f'{error}. The run goes on with its tokens in {cache / known}.')
    return _open(cache / known, tokenizer, known)
  fingerprint = _fingerprint(files, data, tokenizer)
  if known not in ('', fingerprint):
    if is_here and known == _older_fingerprint(files, data, tokenizer):
      return _open(cache / known, tokenizer, known)
    raise ConfigError(
      f'data.source={data.source!r}: the text has changed since the run began; '
      'restore it, or start anew from its weights in another --workdir: '
      '--init=DIR, with the folder of this run'
    )
  folder = cache / fingerprint
  if not (folder / 'corpus.json').exists():
    many = f'{len(files)} files' if len(files) > 1 else 'the file'
    say(f'Tokenising {many} of {data.source!r} (once) ...')
    if left_out:
      say(left_out)
    _write(folder, files, data, tokenizer, say)
  return _open(folder, tokenizer, fingerprint)


def check(corpus: Corpus, data: DataConfig) -> None:
  """Refuses a corpus with too little text.

  Raises:
    ConfigError: fewer tokens than a batch.
  """
  batch = data.batch_size * data.seq_len + 1
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


def _fingerprint(files, data, tokenizer) -> str:
  facts = dict(
    format=_FORMAT,
    files=[_identity(file) for file in files],
    tokenizer=tokenizer.fingerprint,
    ids=(tokenizer.bos_id, tokenizer.eos_id, tokenizer.fim_ids),
    options=(data.fim_rate, data.heldout, data.seed),
  )
  return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]


def _older_fingerprint(files, data, tokenizer) -> str:
  """Returns the fingerprint of format 1, whose token files are still read.

  It had the names of all files, and knew neither compression nor .json.
  """
  known = [f for f in files if f.path.lower().endswith(_OLDER)]
  is_document = lambda f: (
    data.source == 'stdlib'
    or (len(known) > 1 and os.path.getsize(f.path) <= 1 << 20)
  )
  facts = dict(
    format=1,
    files=[(f.name, is_document(f), documents.digest(f)) for f in known],
    tokenizer=tokenizer.fingerprint,
    ids=(tokenizer.bos_id, tokenizer.eos_id, tokenizer.fim_ids),
    options=(data.fim_rate, data.heldout, data.seed),
  )
  return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]


def _identity(file: sources.File) -> tuple[str, ...]:
  """Returns all of a file that its tokens depend on.

  Its name is the key of a document, and is of no use elsewhere.
  """
  _, compression = encodings.suffixes(file.path)
  name = file.name if file.is_document else ''
  return name, sources.kind(file.path), compression, documents.digest(file)


@dataclasses.dataclass
class _Counts:
  """Facts that are collected while the documents stream by.

  rows: of `documents.read`. tokens: of both sides. broken: a file with pieces
  of invalid UTF-8.
  """

  rows: collections.Counter = dataclasses.field(
    default_factory=collections.Counter
  )
  documents: int = 0
  tokens: int = 0
  heldout_tokens: int = 0
  replaced: int = 0
  broken: str = ''
  heldout_bytes: int = 0
  gzip_bytes: int = 0
  prompt: str = ''


def _write(folder, files, data, tokenizer, say):
  """Writes a scratch folder and renames it: `folder` is complete or absent."""
  folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
  with _scratch(folder.parent) as scratch:
    _write_into(scratch, folder, files, data, tokenizer, say)


@contextlib.contextmanager
def _scratch(cache: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a folder in `cache`, locked; deletes it, and those of killed ones.

  A lock ends with its process. Folders are made and judged under a lock of the
  cache, so that none is judged before it has its own.
  """
  with contextlib.ExitStack() as stack:
    with _locked(cache):
      for path in cache.glob(f'{_SCRATCH}*'):
        with _locked(path, wait=False) as free:
          if free:  # its process has ended
            shutil.rmtree(path, ignore_errors=True)
      scratch = pathlib.Path(tempfile.mkdtemp(dir=cache, prefix=_SCRATCH))
      stack.callback(shutil.rmtree, scratch, ignore_errors=True)
      stack.enter_context(_locked(scratch))
    yield scratch


@contextlib.contextmanager
def _locked(folder: pathlib.Path, wait: bool = True) -> Iterator[bool]:
  """Holds the lock of a folder; yields whether it could be had.

  A file system without locks has none to give.
  """
  import fcntl  # Windows has none: `cli` says so

  handle, has = os.open(folder, os.O_RDONLY), True
  try:
    try:
      fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
      has = False
    yield has
  finally:
    os.close(handle)


def _write_into(scratch, folder, files, data, tokenizer, say):
  dtype = np.uint16 if tokenizer.vocab <= 1 << 16 else np.uint32
  paths = {part: scratch / f'{part}.bin' for part in ('train', 'heldout')}
  counts = _tokenise(paths, files, data, tokenizer, dtype, say)
  if not counts.documents:
    raise ConfigError(f'data.source={data.source!r}: holds no text')
  for line in _notices(counts, data):
    say(line)
  facts = dict(
    dtype=np.dtype(dtype).name,
    heldout_bytes=counts.heldout_bytes,
    gzip_bits_per_byte=8 * counts.gzip_bytes / max(counts.heldout_bytes, 1),
    prompt=counts.prompt,
    checksums={part: _checksums(path) for part, path in paths.items()},
  )
  (scratch / 'corpus.json').write_text(json.dumps(facts), encoding='utf-8')
  try:
    os.rename(scratch, folder)
  except OSError:  # another process was first, with the same content
    if not (folder / 'corpus.json').exists():
      raise


def _notices(counts: _Counts, data: DataConfig) -> Iterator[str]:
  """Yields lines about the text that a person should know."""
  if counts.replaced:
    yield (
      f'{counts.replaced} pieces of invalid UTF-8 were replaced by U+FFFD, the '
      f'first in {counts.broken}.'
    )
  for kind, count in counts.rows.items():
    yield f'{count} {kind} were skipped.'
  part = counts.heldout_tokens / counts.tokens
  line = f'{counts.documents:,} documents; {part:.1%} of the text is held out'
  if data.heldout / 2 <= part <= 2 * data.heldout:
    yield f'{line}.'
  else:
    yield (
      f'ATTENTION: {line}, where data.heldout={data.heldout:g}: the text is '
      'short, or a document outweighs the others.'
    )


def _tokenise(paths, files, data, tokenizer, dtype, say) -> _Counts:
  """Writes the token ids of all documents to `paths` (train, heldout)."""
  counts, gzip = _Counts(), zlib.compressobj(9, wbits=31)
  stream = _documents(files, counts, say)
  with (
    open(paths['train'], 'wb') as train,
    open(paths['heldout'], 'wb') as heldout,
  ):
    for group in holdout.sides(stream, data.heldout):
      ids = tokenizer.encode_batch([document.text for document, _ in group])
      for (document, is_heldout), tokens in zip(group, ids, strict=True):
        if is_heldout:
          text = document.text.encode('utf-8', 'replace')
          counts.heldout_bytes += len(text)
          counts.gzip_bytes += len(gzip.compress(text))
          counts.prompt = counts.prompt or document.text[:400]
        else:
          tokens = _fim(tokens, document.key, data, tokenizer)
        parts = ([tokenizer.bos_id], tokens, [tokenizer.eos_id])
        row = np.concatenate(parts).astype(dtype)
        (heldout if is_heldout else train).write(row.tobytes())
        counts.tokens += len(row)
        counts.heldout_tokens += len(row) * is_heldout
  counts.gzip_bytes += len(gzip.flush())
  return counts


def _documents(
  files: Iterable[sources.File], counts: _Counts, say: Callable[[str], None]
) -> Iterator[documents.Document]:
  """Yields the documents in order; counts them, and reports progress."""
  files, reported = list(files), 0
  for number, file in enumerate(files):
    for document in documents.read(file, counts.rows):
      counts.documents += 1
      if document.replaced:
        counts.replaced += document.replaced
        counts.broken = counts.broken or file.name
      yield document
    tenths = 10 * (number + 1) // len(files)
    if tenths > reported and len(files) > 5000:
      reported = tenths
      say(f'  {10 * tenths} % of {len(files)} files')


def _fim(tokens, key, data, tokenizer):
  """Returns `tokens`, in the order PSM for `fim_rate` of the documents."""
  if not tokenizer.fim_ids or len(tokens) < 3:
    return tokens
  random = np.random.default_rng((data.seed, key))
  if random.random() >= data.fim_rate:
    return tokens
  begin, hole, end = tokenizer.fim_ids
  a, b = np.sort(random.integers(0, len(tokens) + 1, 2))
  prefix, middle, suffix = tokens[:a], tokens[a:b], tokens[b:]
  return np.concatenate([[begin], prefix, [hole], suffix, [end], middle])


def _mapped(path: pathlib.Path, dtype: str) -> np.ndarray:
  """Returns the tokens of a file, mapped, and read without read-ahead.

  Rows come from all over the file: the system would read many times what a row
  needs.
  """
  if not path.stat().st_size:  # no empty file is mapped
    return np.zeros(0, dtype)
  with open(path, 'rb') as file:
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
  mapped.madvise(mmap.MADV_RANDOM)
  return np.frombuffer(mapped, dtype)


def _checksums(path: pathlib.Path) -> list[int]:
  with open(path, 'rb') as file:
    return [zlib.crc32(block) for block in iter(lambda: file.read(_BLOCK), b'')]


def _open(folder: pathlib.Path, tokenizer, fingerprint: str) -> Corpus:
  """Returns the corpus in `folder`, its checksums compared.

  Raises:
    ConfigError: names the first MiB that differs.
  """
  facts = json.loads((folder / 'corpus.json').read_text(encoding='utf-8'))
  streams = {}
  for part, expected in facts['checksums'].items():
    path = folder / f'{part}.bin'
    actual = _checksums(path)
    for i in range(max(len(actual), len(expected))):
      if actual[i : i + 1] != expected[i : i + 1]:
        raise ConfigError(
          f'{path}: MiB {i} is damaged; delete the folder and start again'
        )
    streams[part] = _mapped(path, facts['dtype'])
  return Corpus(
    train=streams['train'],
    heldout=streams['heldout'],
    heldout_bytes=facts['heldout_bytes'],
    gzip_bits_per_byte=facts['gzip_bits_per_byte'],
    prompt=facts['prompt'],
    bos_id=tokenizer.bos_id,
    fingerprint=fingerprint,
  )
