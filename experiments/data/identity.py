"""Identities of a text: a fingerprint of its content, stamps of its files.

The fingerprint is a hash of all that the tokens depend on, and names their
folder, so a changed text or option makes another folder. To hash a text is to
read it, and a start should read nothing. Therefore the folder lists stamps of
texts that it was compared with: names, sizes and times of their files. The same
stamp is the same text; another stamp is hashed once, and compared.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Sequence

from mla_moe.config import DataConfig

from .. import workdir
from . import documents, encodings, sources
from .tokenizer import Tokenizer

_FORMAT = 2
_OLDER = (*sources.TEXT, '.jsonl', '.parquet')  # the kinds of format 1
_STAMPS = 16  # that a folder remembers
_RECENT = 2 * 10**9  # ns: a file may change once more within a clock's tick


def fingerprint(
  files: Sequence[sources.File], data: DataConfig, tokenizer: Tokenizer
) -> str:
  """Returns a hash of all that the tokens depend on; reads the files."""
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
    identities = list(threads.map(_of_file, files))
  facts = dict(format=_FORMAT, files=identities)
  return hash_of(facts | _options(data, tokenizer))


def _of_file(file: sources.File) -> tuple[str, ...]:
  """Returns all of a file that its tokens depend on.

  Its name is the key of a document, and is of no use elsewhere.
  """
  _, compression = encodings.suffixes(file.path)
  name = file.name if file.is_document else ''
  return name, sources.kind(file.path), compression, documents.digest(file)


def stamp(files, data, tokenizer, of_content: bool = False) -> str:
  """Returns a hash of all names, sizes and times, and of the options.

  `of_content` leaves out the time of change, in which copies differ.
  """
  is_cut = lambda s: of_content and '=' not in s  # a bucket's has one part
  stamp = lambda s: s.partition(':')[0] if is_cut(s) else s
  rows = [(f.name, f.is_document, f.size, stamp(f.stamp)) for f in files]
  facts = dict(format=_FORMAT, stamps=rows)
  return hash_of(facts | _options(data, tokenizer))


def stamps(folder: pathlib.Path) -> list[str]:
  """Returns the stamps of texts whose tokens are in a folder."""
  try:
    known = json.loads((folder / 'stamps.json').read_text(encoding='utf-8'))
  except (OSError, ValueError):
    return []
  return known if isinstance(known, list) else []


def remember(
  folder: pathlib.Path, stamp: str, files: Sequence[sources.File]
) -> None:
  """Adds a stamp to a folder's, unless a file has changed just now."""
  newest = max(sources.changed(file) for file in files)
  is_known = all(file.stamp for file in files)
  if not is_known or time.time_ns() - newest < _RECENT:
    return
  known = [*stamps(folder), stamp][-_STAMPS:]
  with contextlib.suppress(OSError):  # the next start hashes again
    workdir.write(folder / 'stamps.json', json.dumps(known))


def older_fingerprint(files, data, tokenizer) -> str:
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


def _options(data: DataConfig, tokenizer: Tokenizer) -> dict:
  """Returns all that the tokens depend on beside the files."""
  # Tokens of versions without the field are those of its default.
  field = {} if data.field == 'text' else dict(field=data.field)
  return dict(
    tokenizer=tokenizer.fingerprint,
    ids=(tokenizer.bos_id, tokenizer.eos_id, tokenizer.fim_ids),
    options=(data.fim_rate, data.heldout, data.seed),
    **field,
  )


def hash_of(facts: dict) -> str:
  """Returns the name of a folder with these facts: 24 letters."""
  return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]
