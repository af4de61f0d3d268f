"""Makes the folder of a corpus: units become shards, and facts join them.

The units lie in a folder that has another name until all are done, so a corpus
is whole or absent. A lock keeps two processes from the same work.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import pathlib
import zlib
from collections.abc import Iterator

import numpy as np

from mla_moe.config import ConfigError, DataConfig

from .. import workdir
from . import corpus_folder, identity, shards, units, workers
from .shards import Tokens
from .tokenizer import Tokenizer

_PART = '.part-'  # begins the name of a folder that is not whole
_HASH_BYTES = 1 << 30  # that are compared at once
_GZIP_BYTES = 8 << 20  # of held-out text, to compare the model with


def make(folder, files, data, tokenizer, say, processes) -> None:
  """Writes all units, then names their folder: it is whole or absent."""
  cache = folder.parent
  with working(cache, files, data, tokenizer, say) as work:
    if (folder / 'corpus.json').exists():  # another process was first
      return
    for path in work.glob('*.new'):
      path.unlink()
    whole = units.of(files)
    job = units.Job(work, data, tokenizer, by_key=len(whole) > 1)
    workers.write(job, whole, processes, say)
    for line in _merge(job, len(whole)):
      say(line)
    os.rename(work, folder)
    for path in folder.glob('*.hashes'):
      path.unlink()


def make_cache(cache: pathlib.Path) -> None:
  """Makes the folder of all tokens, beside those of runs.

  Raises:
    ConfigError: it cannot be.
  """
  try:
    cache.mkdir(parents=True, exist_ok=True, mode=0o700)
  except OSError as error:
    raise ConfigError(
      f'{cache}: cannot be a folder of tokens ({error.strerror}); name another '
      '--workdir, beside which it lies'
    ) from None


@contextlib.contextmanager
def working(
  cache, files, data, tokenizer, say, is_shared: bool = False
) -> Iterator[pathlib.Path]:
  """Yields the folder of a text's units that are done, locked.

  Processes with shares of one text lock it together. It stays after a kill, and
  goes if no unit was done.
  """
  make_cache(cache)
  stamp = identity.stamp(files, data, tokenizer, of_content=True)
  work = cache / f'{_PART}{stamp}'
  handle = locked(work, is_shared, say)
  try:
    yield work
  finally:
    if not list(work.glob('*.json')):
      for path in work.glob('*.new'):
        path.unlink(missing_ok=True)
      with contextlib.suppress(OSError):
        work.rmdir()
    os.close(handle)


def locked(folder: pathlib.Path, is_shared: bool, say) -> int:
  """Makes a folder, and returns its handle, whose lock ends with its process.

  A file system without locks has none to give: two processes would do the same
  work, and write the same files. A line says so.
  """
  import fcntl  # Windows has none: `cli` says so

  kind = fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX
  while True:
    folder.mkdir(exist_ok=True, mode=0o700)
    with contextlib.suppress(FileNotFoundError):
      handle = os.open(folder, os.O_RDONLY)
      try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
      except BlockingIOError:
        say(f'Another process tokenises this text, in {folder}: waiting.')
        fcntl.flock(handle, kind)
      except OSError as error:
        say(
          f'ATTENTION: the file system of {folder} has no locks '
          f'({error.strerror}): two processes would write the same files; '
          'start one alone, or one a share.'
        )
        return handle
      if os.path.samestat(os.fstat(handle), os.stat(folder)):
        return handle
      os.close(handle)  # the other has finished, and renamed it


def _merge(job: units.Job, count: int) -> Iterator[str]:
  """Writes corpus.json; yields lines about the text that a person should know.

  Raises:
    ConfigError: no document.
  """
  facts = [
    corpus_folder.facts_of(job.folder, number) for number in range(count)
  ]
  total = lambda name: sum(one[name] for one in facts)
  if not total('documents'):
    raise ConfigError(f'data.source={job.data.source!r}: holds no text')
  first = lambda name: next((one[name] for one in facts if one[name]), '')
  if total('replaced'):
    yield (
      f'{total("replaced")} pieces of invalid UTF-8 were replaced by U+FFFD, '
      f'the first in {first("broken")}.'
    )
  rows: collections.Counter = collections.Counter()
  for one in facts:
    rows.update(one['rows'])
  for kind, many in rows.items():
    yield f'{many} {kind} were skipped.'
  lengths = {
    part: [one['lengths'][part] for one in facts] for part in shards.PARTS
  }
  values = dict(
    dtype=job.dtype,
    block=shards.BLOCK,
    lengths=lengths,
    largest=max(one['largest'] for one in facts),
    tokenizer=job.tokenizer.fingerprint,
    **{name: total(name) for name in ('documents', 'text_bytes', 'replaced')},
    **_duplicates(job.folder, count),
    prompt=first('prompt'),
  )
  heldout = corpus_folder.tokens_of(job.folder, 'heldout', values)
  values['gzip_bits_per_byte'] = _gzip_bits(heldout, job.tokenizer)
  values['check'] = corpus_folder.checksum(values)
  workdir.write(job.folder / 'corpus.json', json.dumps(values))
  yield _heldout_line(values, job.data)


def _duplicates(folder: pathlib.Path, count: int) -> dict[str, int]:
  """Returns the number of documents that are equal to one before.

  Units' hashes are compared in as many parts as memory needs. A unit that an
  earlier version wrote has none: then there is no number.
  """
  paths = [shards.file_of(folder, number, 'hashes') for number in range(count)]
  if not all(path.exists() for path in paths):
    return {}
  parts = 1 + sum(path.stat().st_size for path in paths) // _HASH_BYTES
  duplicates = 0
  for part in range(parts):
    read = (np.fromfile(path, np.uint64) for path in paths)
    mine = [h[h % np.uint64(parts) == part] for h in read]
    hashes = np.concatenate(mine)
    duplicates += len(hashes) - len(np.unique(hashes))
  return {'duplicates': duplicates}


def _heldout_line(values: dict, data: DataConfig) -> str:
  heldout = sum(values['lengths']['heldout'])
  part = heldout / (heldout + sum(values['lengths']['train']))
  line = (
    f'{values["documents"]:,} documents; {part:.1%} of the text is held out'
  )
  if data.heldout / 2 <= part <= 2 * data.heldout:
    return f'{line}.'
  return (
    f'ATTENTION: {line}, where data.heldout={data.heldout:g}: the text is '
    'short, or a document outweighs the others.'
  )


def _gzip_bits(heldout: Tokens, tokenizer: Tokenizer) -> float:
  """Returns bits per byte of the text of these tokens under gzip -9."""
  gzip, size, packed = zlib.compressobj(9, wbits=31), 0, 0
  rest = np.zeros(0, heldout.dtype)
  for piece in heldout.pieces():
    rest = np.concatenate([rest, piece])
    end = len(rest) - np.argmax(rest[::-1] == tokenizer.eos_id)
    if rest[end - 1] != tokenizer.eos_id:
      continue  # no document ends here
    text = tokenizer.decode(rest[:end]).encode('utf-8', 'replace')
    text, rest = text[: _GZIP_BYTES - size], rest[end:]
    packed += len(gzip.compress(text))
    size += len(text)
    if size == _GZIP_BYTES:
      break
  return 8 * (packed + len(gzip.flush())) / max(size, 1)
