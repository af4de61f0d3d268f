"""The corpus: documents are tokenised once, into shards of token ids.

Units of the text become shards (`units`), in a folder that `making` makes and
`corpus_folder` opens. Its name is a fingerprint of all that the tokens depend
on, and it remembers texts that it was compared with (`identity`), so a later
start reads nothing. A source of ids already (`token_files`), or of shards, is
opened where it lies.

About `data.heldout` of the text is held out (`holdout`), of a single book its
end. A line says how much it is, and which files were left out.
"""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Callable

from mla_moe.config import ConfigError, DataConfig
from mla_moe.files import read_json

from .. import cli, commands
from . import (
  bucket_shards,
  corpus_folder,
  identity,
  making,
  remote,
  sources,
  token_files,
  units,
  workers,
)
from .corpus_folder import Corpus
from .tokenizer import Tokenizer

_LARGE_BYTES = 10**9  # of a text for which there is a hint
_REMEDY = 'bring it again from the folder of which it is a copy'  # a user's


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
  cache = pathlib.Path(cache)
  if files := token_files.files(data.source, data.field):
    making.make_cache(cache)
    return _of_ids(files, data, tokenizer, cache, say, known)
  _check_ends(data, tokenizer)
  if _has_shards(data.source):
    return _of_shards(data, tokenizer, cache, known)
  is_here = bool(known) and (cache / known / 'corpus.json').exists()
  try:
    files, left_out = sources.listed(data.source, data.heldout, data.field)
  except sources.Absent as error:
    if known and not is_here:
      raise ConfigError(
        f'{error}, and {cache} has not the tokens of this run; name its text, '
        f'or bring {cache.name}/{known} from where the run began'
      ) from None
    if not is_here:
      raise
    say(f'{error}. The run goes on with its tokens in {cache / known}.')
    return corpus_folder.opened(cache / known, tokenizer)
  stamp = identity.stamp(files, data, tokenizer)
  for folder in [cache / known] if known else cache.glob('[!.]*'):
    if stamp in identity.stamps(folder):
      return corpus_folder.opened(folder, tokenizer)
  fingerprint = identity.fingerprint(files, data, tokenizer)
  if known not in ('', fingerprint):
    if is_here and known == identity.older_fingerprint(files, data, tokenizer):
      identity.remember(cache / known, stamp, files)
      return corpus_folder.opened(cache / known, tokenizer)
    raise ConfigError(
      f'data.source={data.source!r}: the text has changed since the run began; '
      'restore it, or start anew from its weights in another --workdir: '
      '--init=DIR, with the folder of this run'
    )
  folder = cache / fingerprint
  if not (folder / 'corpus.json').exists():
    _announce(files, left_out, data, say, processes)
    making.make(folder, files, data, tokenizer, say, processes)
  identity.remember(folder, stamp, files)
  return corpus_folder.opened(folder, tokenizer)


def _of_ids(
  files: list[remote.Object],
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
  train, heldout, facts = token_files.opened(files, data, tokenizer, cache, say)
  if known not in ('', facts['fingerprint']):
    raise ConfigError(
      f'data.source={data.source!r}: the ids have changed since the run began; '
      'restore them, or start anew in another --workdir'
    )
  names = ('gzip_bits_per_byte', 'prompt', 'fingerprint')
  rest = {name: facts[name] for name in names}
  return Corpus(train, heldout, bos_id=tokenizer.bos_id, facts={}, **rest)


def has_ids(source: str, field: str = 'text') -> bool:
  """Whether a source is ids already: files of them, or a folder of shards."""
  return bool(token_files.files(source, field)) or _has_shards(source)


def _has_shards(source: str) -> bool:
  """Whether a source is a folder of shards, on a disk or in a bucket."""
  if remote.is_remote(source):
    path = f'{source.rstrip("/")}/corpus.json'
    return '*' not in path and bool(remote.lookup(path))
  return (cli.path('data.source', source) / 'corpus.json').exists()


def _of_shards(
  data: DataConfig, tokenizer: Tokenizer, cache: pathlib.Path, known: str
) -> Corpus:
  """Returns the corpus in a folder of shards that `prepare` has made elsewhere.

  Raises:
    ConfigError: it is damaged, of another tokenizer, or of another text than
      the run's.
  """
  if remote.is_remote(data.source):
    text, values = bucket_shards.opened(data.source, tokenizer, cache)
  else:
    folder = cli.path('data.source', data.source)
    text = corpus_folder.opened(folder, tokenizer, _REMEDY)
    values = read_json(folder / 'corpus.json')
  ours = tokenizer.fingerprint
  largest = values.get('largest', 0)
  if values.get('tokenizer', ours) != ours or largest >= tokenizer.vocab:
    raise ConfigError(
      f'data.source={data.source!r}: its shards are of another tokenizer than '
      f'data.tokenizer={data.tokenizer!r}, which has {tokenizer.vocab} ids; '
      f'their largest is {largest}'
    )
  if not re.fullmatch('[0-9a-f]{24}', text.fingerprint):  # it was renamed
    text = text._replace(fingerprint=identity.hash_of(values))
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
  if has_ids(data.source, data.field):
    say(f'{data.source!r} has ids: there is nothing to tokenise.')
    return
  _check_ends(data, tokenizer)
  files, left_out = sources.listed(data.source, data.heldout, data.field)
  _announce(files, left_out, data, say, processes)
  place = pathlib.Path(cache), files, data, tokenizer, say
  with making.working(*place, is_shared=True) as work:
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
