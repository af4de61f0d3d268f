"""The corpus: documents are tokenised once, into shards of token ids.

Units of the text become shards (`units`), in a folder whose name is a
fingerprint of all that the tokens depend on, so a changed text or option makes
another folder. To hash a text is to read it, and a start should read nothing.
Therefore the folder lists stamps of texts that it was compared with: names,
sizes and times of their files. The same stamp is the same text; another stamp
is hashed once, and compared. Damaged tokens are found when they are touched
(`shards`).

About `data.heldout` of the text is held out (`holdout`), of a single book its
end. A line says how much it is, and which files were left out.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import hashlib
import json
import os
import pathlib
import re
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from mla_moe.config import ConfigError, DataConfig
from mla_moe.files import read_json

from .. import commands, workdir
from . import documents, encodings, shards, sources, token_files, units, workers
from .shards import Tokens
from .tokenizer import Tokenizer

_FORMAT = 2
_OLDER = (*sources.TEXT, '.jsonl', '.parquet')  # the kinds of format 1
_OLDER_BLOCK = 1 << 20
_FACTS = ('documents', 'text_bytes', 'replaced')
_PART = '.part-'  # begins the name of a folder that is not whole
_GZIP_BYTES = 8 << 20  # of held-out text, to compare the model with
_LARGE_BYTES = 10**9  # of a text for which there is a hint
_STAMPS = 16  # that a folder remembers
_RECENT = 2 * 10**9  # ns: a file may change once more within a clock's tick


class Corpus(NamedTuple):
  """Two streams of token ids, and facts about the text.

  train, heldout: [tokens] uint16 or uint32, read and checked when touched.
  heldout_bytes: of the text in UTF-8. gzip_bits_per_byte: of its first 8 MiB
  under gzip -9, to compare the model's with. prompt: the beginning of a
  held-out document. fingerprint: of everything that the tokens depend on.
  facts: numbers of the documents, of bytes of text and of pieces of invalid
  UTF-8; none of tokens that an earlier version wrote.
  """

  train: Tokens
  heldout: Tokens
  heldout_bytes: int
  gzip_bits_per_byte: float
  prompt: str
  bos_id: int
  fingerprint: str
  facts: dict[str, int]


def prepare(
  data: DataConfig,
  tokenizer: Tokenizer,
  cache: os.PathLike | str,
  say: Callable[[str], None] = print,
  known: str = '',
  processes: int = 1,
) -> Corpus:
  """Returns the corpus of `data.source`; tokenises it if `cache` has it not.

  `known` is the fingerprint of a run that goes on. If its text is gone, the
  tokens in `cache` are taken; so are those that an earlier version wrote.

  Raises:
    ConfigError: no text, unreadable text, another text than the run's, a
      damaged cache, or one token that begins and ends documents, which packing
      'separate' cannot tell apart.
  """
  _check_ends(data, tokenizer)
  cache = pathlib.Path(cache)
  if paths := token_files.files(data.source):
    return _of_ids(paths, data, tokenizer, cache, say, known)
  if folder := _shards_of(data.source):
    return _of_shards(folder, data, tokenizer, known)
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
    return opened(cache / known, tokenizer)
  stamp = _stamp(files, data, tokenizer)
  for folder in [cache / known] if known else cache.glob('[!.]*'):
    if stamp in _stamps(folder):
      return opened(folder, tokenizer)
  fingerprint = _fingerprint(files, data, tokenizer)
  if known not in ('', fingerprint):
    if is_here and known == _older_fingerprint(files, data, tokenizer):
      _remember(cache / known, stamp, files)
      return opened(cache / known, tokenizer)
    raise ConfigError(
      f'data.source={data.source!r}: the text has changed since the run began; '
      'restore it, or start anew from its weights in another --workdir: '
      '--init=DIR, with the folder of this run'
    )
  folder = cache / fingerprint
  if not (folder / 'corpus.json').exists():
    _announce(files, left_out, data, say, processes)
    _make(folder, files, data, tokenizer, say, processes)
  _remember(folder, stamp, files)
  return opened(folder, tokenizer)


def _of_ids(
  paths: list[str],
  data: DataConfig,
  tokenizer: Tokenizer,
  cache: pathlib.Path,
  say: Callable[[str], None],
  known: str,
) -> Corpus:
  """Returns the corpus of files of ids; its text is not known.

  Raises:
    ConfigError: as `token_files.opened`, or other ids than the run's.
  """
  train, heldout, facts = token_files.opened(paths, data, tokenizer, cache, say)
  if known not in ('', facts['fingerprint']):
    raise ConfigError(
      f'data.source={data.source!r}: the ids have changed since the run began; '
      'restore them, or start anew in another --workdir'
    )
  names = ('heldout_bytes', 'gzip_bits_per_byte', 'prompt', 'fingerprint')
  rest = {name: facts[name] for name in names}
  return Corpus(train, heldout, bos_id=tokenizer.bos_id, facts={}, **rest)


def has_ids(source: str) -> bool:
  """Whether a source is ids already: files of them, or a folder of shards."""
  return bool(token_files.files(source) or _shards_of(source))


def _shards_of(source: str) -> pathlib.Path | None:
  """Returns the folder of shards that a source is, or None."""
  folder = pathlib.Path(os.path.expanduser(source))
  return folder if (folder / 'corpus.json').exists() else None


def _of_shards(
  folder: pathlib.Path, data: DataConfig, tokenizer: Tokenizer, known: str
) -> Corpus:
  """Returns the corpus in a folder of shards that `prepare` has made elsewhere.

  Raises:
    ConfigError: it is damaged, of another tokenizer, or of another text than
      the run's.
  """
  text = opened(folder, tokenizer)
  values = read_json(folder / 'corpus.json')
  ours = tokenizer.fingerprint
  largest = values.get('largest', 0)
  if values.get('tokenizer', ours) != ours or largest >= tokenizer.vocab:
    raise ConfigError(
      f'data.source={str(folder)!r}: its shards are of another tokenizer than '
      f'data.tokenizer={data.tokenizer!r}, which has {tokenizer.vocab} ids; '
      f'their largest is {largest}'
    )
  if not re.fullmatch('[0-9a-f]{24}', folder.name):  # it was renamed
    text = text._replace(fingerprint=_hash(values))
  if known not in ('', text.fingerprint):
    raise ConfigError(
      f'data.source={data.source!r}: its shards are of another text than the '
      "run's; restore them, or start anew in another --workdir"
    )
  return text


def prepare_share(
  data: DataConfig,
  tokenizer: Tokenizer,
  cache: os.PathLike | str,
  share: tuple[int, int],
  say: Callable[[str], None] = print,
  processes: int = 1,
) -> None:
  """Writes the units i, i + n, ... of a text, for a share (i, n).

  `prepare` makes a corpus of them when all are there.

  Raises:
    ConfigError: as `prepare`.
  """
  _check_ends(data, tokenizer)
  if has_ids(data.source):
    say(f'{data.source!r} has ids: there is nothing to tokenise.')
    return
  files, left_out = sources.listed(data.source, data.heldout)
  _announce(files, left_out, data, say, processes)
  place = pathlib.Path(cache), files, data, tokenizer, say
  with _working(*place, is_shared=True) as work:
    whole = units.of(files)
    job = units.Job(work, data, tokenizer, by_key=len(whole) > 1)
    workers.write(job, whole[share[0] :: share[1]], processes, say)
    done = sum(units.is_done(work, unit) for unit in whole)
    say(f'{done} of {len(whole)} units are done in {work}.')


def _announce(files, left_out: str, data: DataConfig, say, processes) -> None:
  many = f'{len(files)} files' if len(files) > 1 else 'the file'
  size = sum(file.size for file in files)
  say(f'Tokenising {many} of {data.source!r} (once; {size / 1e6:,.1f} MB) ...')
  if processes == 1 and size > _LARGE_BYTES:
    line = 'python -m experiments.prepare, with the same words, uses all cores.'
    say(commands.typed(line))
  if left_out:
    say(left_out)


def _check_ends(data: DataConfig, tokenizer: Tokenizer) -> None:
  bos = tokenizer.bos_id
  if data.packing == 'separate' and bos == tokenizer.eos_id:
    raise ConfigError(
      f"data.packing='separate': bos_id={bos} is eos_id, too, so ends would "
      "begin documents; use 'joined', or another token"
    )


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


def _options(data: DataConfig, tokenizer: Tokenizer) -> dict:
  """Returns all that the tokens depend on beside the files."""
  return dict(
    tokenizer=tokenizer.fingerprint,
    ids=(tokenizer.bos_id, tokenizer.eos_id, tokenizer.fim_ids),
    options=(data.fim_rate, data.heldout, data.seed),
  )


def _hash(facts: dict) -> str:
  return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]


def _fingerprint(
  files: Sequence[sources.File], data: DataConfig, tokenizer: Tokenizer
) -> str:
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
    identities = list(threads.map(_identity, files))
  facts = dict(format=_FORMAT, files=identities)
  return _hash(facts | _options(data, tokenizer))


def _stamp(files, data, tokenizer, of_content: bool = False) -> str:
  """Returns a hash of all names, sizes and times, and of the options.

  `of_content` leaves out the time of change, in which copies differ.
  """
  is_cut = lambda s: of_content and '=' not in s  # a bucket's has one part
  stamp = lambda s: s.partition(':')[0] if is_cut(s) else s
  rows = [(f.name, f.is_document, f.size, stamp(f.stamp)) for f in files]
  facts = dict(format=_FORMAT, stamps=rows)
  return _hash(facts | _options(data, tokenizer))


def _stamps(folder: pathlib.Path) -> list[str]:
  """Returns the stamps of texts whose tokens are in a folder."""
  try:
    stamps = json.loads((folder / 'stamps.json').read_text(encoding='utf-8'))
  except (OSError, ValueError):
    return []
  return stamps if isinstance(stamps, list) else []


def _remember(
  folder: pathlib.Path, stamp: str, files: Sequence[sources.File]
) -> None:
  """Adds a stamp to a folder's, unless a file has changed just now."""
  newest = max(sources.changed(file) for file in files)
  is_known = all(file.stamp for file in files)
  if not is_known or time.time_ns() - newest < _RECENT:
    return
  stamps = [*_stamps(folder), stamp][-_STAMPS:]
  with contextlib.suppress(OSError):  # the next start hashes again
    workdir.write(folder / 'stamps.json', json.dumps(stamps))


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


def _make(folder, files, data, tokenizer, say, processes) -> None:
  """Writes all units, then names their folder: it is whole or absent."""
  cache = folder.parent
  with _working(cache, files, data, tokenizer, say) as work:
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


@contextlib.contextmanager
def _working(
  cache, files, data, tokenizer, say, is_shared: bool = False
) -> Iterator[pathlib.Path]:
  """Yields the folder of a text's units that are done, locked.

  Processes with shares of one text lock it together. It stays after a kill, and
  goes if no unit was done.
  """
  cache.mkdir(parents=True, exist_ok=True, mode=0o700)
  stamp = _stamp(files, data, tokenizer, of_content=True)
  work = cache / f'{_PART}{stamp}'
  handle = _locked(work, is_shared, say)
  try:
    yield work
  finally:
    if not list(work.glob('*.json')):
      for path in work.glob('*.new'):
        path.unlink(missing_ok=True)
      with contextlib.suppress(OSError):
        work.rmdir()
    os.close(handle)


def _locked(folder: pathlib.Path, is_shared: bool, say) -> int:
  """Makes a folder, and returns its handle, whose lock ends with its process.

  A file system without locks has none to give: two processes would do the same
  work, and write the same files.
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
      except OSError:
        return handle
      if os.path.samestat(os.fstat(handle), os.stat(folder)):
        return handle
      os.close(handle)  # the other has finished, and renamed it


def _merge(job: units.Job, count: int) -> Iterator[str]:
  """Writes corpus.json; yields lines about the text that a person should know.

  Raises:
    ConfigError: no document.
  """
  facts = [_facts_of(job.folder, number) for number in range(count)]
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
    **{name: total(name) for name in _FACTS},
    heldout_bytes=total('heldout_bytes'),
    prompt=first('prompt'),
  )
  heldout = _tokens(job.folder, 'heldout', values)
  values['gzip_bits_per_byte'] = _gzip_bits(heldout, job.tokenizer)
  values['check'] = _check(values)
  workdir.write(job.folder / 'corpus.json', json.dumps(values))
  yield _heldout_line(values, job.data)


def _facts_of(folder: pathlib.Path, number: int) -> dict:
  path = shards.file_of(folder, number, 'json')
  try:
    return json.loads(path.read_text(encoding='utf-8'))
  except (OSError, ValueError) as error:
    raise _damaged(path, error) from None


def _checksums(folder: pathlib.Path, number: int, part: str) -> list[int]:
  """Returns the checksums of a shard's blocks, of facts that may be edited."""
  try:
    return list(_facts_of(folder, number)['checksums'][part])
  except (KeyError, TypeError) as error:
    path = shards.file_of(folder, number, 'json')
    raise _damaged(path, ValueError(f'no checksums: {error}')) from None


def _damaged(path: pathlib.Path, error: Exception) -> ConfigError:
  why = ' '.join(str(error).split())[:80]
  return ConfigError(
    f'{path}: is damaged ({why}); delete {path.parent} and start again'
  )


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


def _check(values: dict) -> int:
  """Returns a checksum of the facts in corpus.json."""
  rest = {name: value for name, value in values.items() if name != 'check'}
  return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def _tokens(folder: pathlib.Path, part: str, values: dict) -> Tokens:
  def shard(number: int, length: int) -> shards.Shard:
    return shards.Shard(
      shards.file_of(folder, number, part),
      values['dtype'],
      length,
      values['block'],
      lambda: _checksums(folder, number, part),
    )

  lengths = values['lengths'][part]
  numbered = [(i, length) for i, length in enumerate(lengths) if length]
  return Tokens([shard(*one) for one in numbered], values['dtype'])


def _older_tokens(folder: pathlib.Path, part: str, values: dict) -> Tokens:
  """Returns the tokens of one file, and checksums of MiB in corpus.json."""
  path, expected = folder / f'{part}.bin', values['checksums'][part]
  size = path.stat().st_size if path.is_file() else 0
  if -(-size // _OLDER_BLOCK) != len(expected):
    raise _damaged(path, ValueError(f'has {size} bytes'))
  length = size // np.dtype(values['dtype']).itemsize
  args = path, values['dtype'], length, _OLDER_BLOCK, lambda: expected
  return Tokens([shards.Shard(*args)] if length else [], values['dtype'])


def opened(folder: pathlib.Path, tokenizer: Tokenizer) -> Corpus:
  """Returns the corpus in `folder`, of which no token is read.

  Raises:
    ConfigError: it is damaged.
  """
  path = folder / 'corpus.json'
  try:
    values: dict[str, Any] = json.loads(path.read_text(encoding='utf-8'))
    if 'lengths' in values and values['check'] != _check(values):
      raise ValueError('its checksum differs')
    read = _tokens if 'lengths' in values else _older_tokens
    train, heldout = (read(folder, part, values) for part in shards.PARTS)
    return Corpus(
      train=train,
      heldout=heldout,
      heldout_bytes=values['heldout_bytes'],
      gzip_bits_per_byte=values['gzip_bits_per_byte'],
      prompt=values['prompt'],
      bos_id=tokenizer.bos_id,
      fingerprint=folder.name,
      facts={name: values[name] for name in _FACTS if name in values},
    )
  except ConfigError:
    raise
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise _damaged(path, error) from None


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
