"""The files of a source of text: a folder, a glob, a file, or 'stdlib'.

No file is left out in silence. `listed` returns the files that can be read, and
a line that counts and names the others by their kind: a data set whose shards
have a suffix that nobody reads would otherwise be a data set of its README.

A small text file is one document, and a large one is cut into pieces
(`documents`). Large is above 1 MiB, or above the part of the whole text that is
held out: of a book and a note, one document each, either might be held out.
"""

from __future__ import annotations

import functools
import glob
import json
import os
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from mla_moe.config import ConfigError

from .. import cli
from . import encodings, remote

TEXT = ('.txt', '.md', '.rst', '.py')
ROWS = ('.jsonl', '.json', '.parquet')

# Python's own tests are left out: half of the distributions do not ship them,
# and they contain broken encodings on purpose.
_SKIPPED = frozenset(
  ('site-packages', 'dist-packages', '__pycache__')
  + ('test', 'tests', 'idle_test')
)
_DOCUMENT_BYTES = 1 << 20  # a text file above this is cut into pieces
_LEAST_BYTES = 16 << 10  # and one below this never
_LINE_BYTES = 1 << 24
_RUNS = 'folders of runs'
_NAMED = 3  # files of each kind that are named
# Of a source that is no text.
_IDS = '; or of ids, by name or glob: .bin, .npy, .parquet, .arrow'
_MAGIC = re.compile(r'[*?\[]')


class Absent(ConfigError):
  """Nothing lies at a source, or no file that can be read."""


class File(NamedTuple):
  """A file of the source.

  name: relative to the source, parts joined by '/'. path: to open it.
  is_document: all of it is one document. size: its bytes. stamp: changes with
  its content; the same content may have many. field: of rows, with their text.
  """

  name: str
  path: str
  is_document: bool
  size: int = 0
  stamp: str = ''
  field: str = 'text'


class Listing(NamedTuple):
  """The files of a source in order of name, and a line about the others.

  left_out: '' where there are no others.
  """

  files: list[File]
  left_out: str


def listed(source: str, heldout: float = 1.0, field: str = 'text') -> Listing:
  """Returns the files of a source.

  Args:
    source: 'stdlib' (the .py files of Python's own library), a folder, a glob
      or one file.
    heldout: the fraction of the text that will be held out.
    field: of rows and tables, that has their text.

  Raises:
    Absent: nothing there, or no file of a known kind.
    ConfigError: an empty file, a folder that cannot be opened.
  """
  if source == 'stdlib':
    root = sysconfig.get_path('stdlib')
    paths = [
      path
      for path, why in _walk(root, _SKIPPED, links=False)
      if not why and path[-3:] == '.py'
    ]
    if not paths:
      raise Absent(
        f"data.source='stdlib': no .py files in {root!r}; give a folder of text"
      )
    files = [_file(root, path, True, *_stat(path)) for path in paths]
    return Listing(sorted(files), '')
  if remote.is_remote(source):
    return _of_bucket(source, heldout, field)
  path = str(cli.path('data.source', source))
  kinds = ', '.join(TEXT + ROWS)
  if os.path.isfile(path):
    if not kind(path):
      raise ConfigError(
        f'data.source={source!r}: must end in one of {kinds}{_IDS}'
      )
    if not os.path.getsize(path):
      raise ConfigError(f'data.source={source!r}: the file is empty')
    if _is_other_json(path, field):
      raise ConfigError(
        f'data.source={source!r}: its lines are no {{"{field}": ..}}; '
        'data.field names the field of their text'
      )
    file = _file(os.path.dirname(path), path, False, *_stat(path), field)
    return Listing([file], '')
  if os.path.isdir(path):
    root = _snapshot(path)
    entries = _walk(root, frozenset(('__pycache__',)))
  elif _MAGIC.search(path):
    root = os.path.dirname(path[: _MAGIC.search(path).start()]) or '.'
    entries = [(p, _irregular(p)) for p in glob.glob(path, recursive=True)]
    if '**' in path:  # it goes into folders, and yields them, too
      entries = [(p, why) for p, why in entries if why != 'folders']
      is_run = functools.cache(_is_run)
      below = functools.partial(_below_run, root, is_run)
      entries = [(p, why or (_RUNS if below(p) else '')) for p, why in entries]
  else:
    raise Absent(f'data.source={source!r}: no such file or folder')
  return _listing(source, root, entries, heldout, field, _stat)


def _of_bucket(source: str, heldout: float, field: str) -> Listing:
  """Returns the files of a bucket, whose stamps are its own checksums."""
  root, objects = remote.listed(source)
  if not objects:
    raise Absent(f'data.source={source!r}: no such file or folder')
  facts = {path: (size, stamp) for path, size, stamp in objects}

  def why(path: str) -> str:
    return 'hidden' if '/.' in path.removeprefix(root) else ''

  entries = [(path, why(path)) for path in facts]
  return _listing(source, root, entries, heldout, field, facts.__getitem__)


def _snapshot(root: str) -> str:
  """Returns the folder of a data set's files in a cache of Hugging Face's hub.

  It has `blobs`, and a folder of links to them for each revision.
  """
  ref = os.path.join(root, 'refs', 'main')
  if not os.path.isfile(ref) or os.path.getsize(ref) > 99:
    return root
  with open(ref, encoding='utf-8') as file:
    folder = os.path.join(root, 'snapshots', file.read().strip())
  return folder if os.path.isdir(folder) else root


def _listing(
  source: str,
  root: str,
  entries: Iterable[tuple[str, str]],
  heldout: float,
  field: str,
  facts_of: Callable[[str], tuple[int, str]],
) -> Listing:
  """Returns the files of known kinds among (path, why it is left out or '')."""
  kinds = ', '.join(TEXT + ROWS)
  paths, others = [], []
  for path, why in entries:
    why = why or _unknown(path, field)
    (others if why else paths).append((why, path))
  left_out = _left_out(root, others)
  if not paths:
    only = f'; {left_out}' if left_out else ''
    only += _IDS
    raise Absent(f'data.source={source!r}: holds no file of {kinds}{only}')
  paths = [path for _, path in paths]
  facts = {path: facts_of(path) for path in paths}
  part = heldout * sum(size for size, _ in facts.values())
  most = min(_DOCUMENT_BYTES, max(part, _LEAST_BYTES))
  # A compressed text of some KB may have any size.
  is_document = lambda path: (
    len(paths) > 1
    and facts[path][0] <= most
    and not encodings.suffixes(path)[1]
  )
  line = f'{source!r}: {left_out}.' if left_out else ''
  files = [_file(root, p, is_document(p), *facts[p], field) for p in paths]
  return Listing(sorted(files), line)


def kind(path: str) -> str:
  """Returns 'text', 'jsonl' or 'parquet' by the suffix, or '' for others."""
  suffix, compression = encodings.suffixes(path)
  if suffix == '.parquet':
    return '' if compression else 'parquet'
  return 'text' if suffix in TEXT else 'jsonl' if suffix in ROWS else ''


def changed(file: File) -> int:
  """Returns when a file changed for the last time, in ns; 0 if unknown."""
  times = [int(part) for part in file.stamp.split(':') if part.isdigit()]
  return max(times, default=0)


def _walk(
  root: str, skipped: frozenset[str], links: bool = True
) -> Iterator[tuple[str, str]]:
  """Yields (path, why it is left out or '') of all that lies below `root`.

  `links` to folders are followed, but for those that lead to a place that is
  read already.
  """

  def fail(error):
    raise ConfigError(
      f'data.source: {error.filename!r} cannot be read ({error.strerror})'
    )

  own = os.path.realpath(root) + os.sep
  linked: list[str] = []
  for folder, folders, names in os.walk(root, onerror=fail, followlinks=links):
    below = []
    for name in sorted(folders):
      path = os.path.join(folder, name)
      real = os.path.realpath(path) + os.sep
      is_link = os.path.islink(path)
      if name[0] == '.':
        yield path, 'hidden'
      elif is_link and (not links or real.startswith((own, *linked))):
        yield path, 'links to folders that are read'
      elif is_link and any(x.startswith(real) for x in (own, *linked)):
        yield path, 'links to folders around one that is read'
      elif _is_run(path):
        yield path, _RUNS
      elif name not in skipped:
        below.append(name)
        linked += [real] * is_link
    folders[:] = below
    for name in names:
      path = os.path.join(folder, name)
      yield path, 'hidden' if name[0] == '.' else _irregular(path)


def _is_run(folder: str) -> bool:
  """Whether a folder is one of runs: their records are no text of the source.

  A run below its own source would change the text of its next start.
  """
  names = ('config.json', 'lock')
  return all(os.path.isfile(os.path.join(folder, name)) for name in names)


def _below_run(root: str, is_run: Callable, path: str) -> bool:
  folder = os.path.dirname(path)
  while len(folder) > len(root):
    if is_run(folder):
      return True
    folder = os.path.dirname(folder)
  return False


def _irregular(path: str) -> str:
  if os.path.isfile(path):
    return ''
  if os.path.isdir(path):
    return 'folders'
  return 'links to nothing' if os.path.islink(path) else 'no regular files'


def _unknown(path: str, field: str) -> str:
  """Returns the kind of a file that is not read, or ''."""
  if not kind(path):
    suffix = ''.join(encodings.suffixes(path))
    return f'of {suffix}' if suffix else 'without a suffix'
  other = f'of .json without lines {{"{field}": ...}}'
  return other if _is_other_json(path, field) else ''


def _is_other_json(path: str, field: str) -> bool:
  """Whether a .json file's first line is no row with a text.

  The suffix stands for rows in some data sets, for settings elsewhere.
  """
  if encodings.suffixes(path)[0] != '.json':
    return False
  try:
    with encodings.opened(path) as file:
      row = json.loads(file.readline(_LINE_BYTES))
  except (ConfigError, ValueError, RecursionError):
    return True
  return not isinstance(row, dict) or field not in row


def _left_out(root: str, others: Iterable[tuple[str, str]]) -> str:
  """Returns a clause that counts and names files by their kind."""
  kinds: dict[str, list[str]] = {}
  for why, path in others:
    kinds.setdefault(why, []).append(_relative(root, path))
  parts = []
  for why, names in sorted(kinds.items()):
    more = ', ...' if len(names) > _NAMED else ''
    named = ', '.join(sorted(names)[:_NAMED])
    parts.append(f'{len(names)} {why} ({named}{more})')
  return f'left out are {", ".join(parts)}' if parts else ''


def _relative(root: str, path: str) -> str:
  """Returns a name that can be printed; bytes that are not UTF-8 as escapes."""
  name = os.path.relpath(path, root or '.').replace(os.sep, '/')
  return os.fsencode(name).decode('utf-8', 'backslashreplace')


def _file(root: str, path: str, *facts: Any) -> File:
  return File(_relative(root, path), path, *facts)


def _stat(path: str) -> tuple[int, str]:
  """Returns the size and the stamp of a file.

  The time of change is beside that of modification, which copies may bring
  along, and some archives set to one date.
  """
  facts = os.stat(path)
  return facts.st_size, f'{facts.st_mtime_ns}:{facts.st_ctime_ns}'
