"""Where text comes from: a source lists files, a file is a run of documents.

A document is a file of a folder, a row of .jsonl or .parquet, or, of a text
file that is alone or large, a piece of a few KB cut at blank lines. Each has a
key, a hash: of its name for a whole file, of its content otherwise. The key
alone decides whether the document is held out and how it is cut for FIM, so
that neither changes when other documents come or go, and equal rows never land
on both sides of the split.

Files are read as bytes and decoded here; what is not UTF-8 becomes U+FFFD and
is counted.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import sysconfig
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from mla_moe.config import ConfigError

TEXT = ('.txt', '.md', '.rst', '.py')
ROWS = ('.jsonl', '.parquet')

# Python's own tests are left out: half of the distributions do not ship them,
# and they hold broken encodings on purpose.
_SKIPPED = frozenset(
  ('site-packages', 'dist-packages', '__pycache__')
  + ('test', 'tests', 'idle_test')
)
_WHOLE_BYTES = 1 << 20  # a text file above this is cut into pieces
_PIECE_BYTES = 8 << 10
_READ_BYTES = 1 << 20
_BLANK_LINE = re.compile(rb'\n[ \t\r]*\n')
_MAGIC = re.compile(r'[*?\[]')


class File(NamedTuple):
  """A file of the source; `whole` if it is one document."""

  name: str  # relative to the source, parts joined by '/'
  path: str
  whole: bool


class Document(NamedTuple):
  """One text; `replaced` counts the U+FFFD that stand for broken UTF-8."""

  key: int  # uniform in [0, 2**64)
  text: str
  replaced: int


def files(source: str) -> list[File]:
  """The files of 'stdlib', a folder, a glob, or one path, in order of name.

  Raises:
    ConfigError: nothing there, nothing of a kind that can be read, a file or
      folder that cannot be opened.
  """
  if source == 'stdlib':
    root = sysconfig.get_path('stdlib')
    found = [path for path in _walk(root, _SKIPPED) if path.endswith('.py')]
    if not found:
      raise ConfigError(
        f"data.source='stdlib': no .py files in {root!r}; give a folder of text"
      )
    return _named(root, found, lambda path: True)
  path = os.path.expanduser(source)
  kinds = ', '.join(TEXT + ROWS)
  if os.path.isfile(path):
    if not _known(path):
      raise ConfigError(f'data.source={source!r}: must end in one of {kinds}')
    if not os.path.getsize(path):
      raise ConfigError(f'data.source={source!r}: the file is empty')
    return [File(os.path.basename(path), path, False)]
  if os.path.isdir(path):
    root, found = path, _walk(path, frozenset(('__pycache__',)))
  elif _MAGIC.search(path):
    root = os.path.dirname(path[: _MAGIC.search(path).start()]) or '.'
    found = [p for p in glob.glob(path, recursive=True) if os.path.isfile(p)]
  else:
    raise ConfigError(f'data.source={source!r}: no such file or folder')
  found = [path for path in found if _known(path)]
  if not found:
    raise ConfigError(f'data.source={source!r}: holds no file of {kinds}')
  alone = len(found) == 1
  small = lambda path: os.path.getsize(path) <= _WHOLE_BYTES
  return _named(root, found, lambda path: not alone and small(path))


def read(file: File) -> Iterator[Document]:
  """The file's documents in order, empty ones left out.

  Raises:
    ConfigError: a file that cannot be opened or parsed (with its line or row).
  """
  try:
    if file.path.lower().endswith('.parquet'):
      yield from _parquet(file.path)
    elif file.path.lower().endswith('.jsonl'):
      yield from _jsonl(file.path)
    else:
      with open(file.path, 'rb') as opened:
        if file.whole:
          pieces = [opened.read()]
        else:
          pieces = _pieces(opened)
        for piece in pieces:
          key = file.name.encode() if file.whole else piece
          if piece:
            yield _document(key, piece)
  except OSError as error:
    raise ConfigError(
      f'{file.path}: cannot be read ({error.strerror})'
    ) from None


def digest(file: File) -> str:
  """SHA-256 of the file's content."""
  try:
    with open(file.path, 'rb') as opened:
      return hashlib.file_digest(opened, 'sha256').hexdigest()
  except OSError as error:
    raise ConfigError(
      f'{file.path}: cannot be read ({error.strerror})'
    ) from None


def _walk(root: str, skipped: frozenset[str]) -> list[str]:
  def fail(error):
    raise ConfigError(
      f'data.source: {error.filename!r} cannot be read ({error.strerror})'
    )

  found = []
  for folder, folders, names in os.walk(root, onerror=fail):
    folders[:] = [x for x in folders if x not in skipped and x[0] != '.']
    found += [os.path.join(folder, name) for name in names if name[0] != '.']
  return [path for path in found if os.path.isfile(path)]


def _named(root: str, paths: list[str], whole) -> list[File]:
  relative = lambda path: os.path.relpath(path, root).replace(os.sep, '/')
  return sorted(File(relative(path), path, whole(path)) for path in paths)


def _known(path: str) -> bool:
  return path.lower().endswith(TEXT + ROWS)


def _document(key: bytes, content: bytes) -> Document:
  number = int.from_bytes(
    hashlib.blake2b(key, digest_size=8).digest(), 'little'
  )
  try:
    return Document(number, content.decode('utf-8'), 0)
  except UnicodeDecodeError:
    text = content.decode('utf-8', 'replace')
    genuine = content.count('\ufffd'.encode())
    return Document(number, text, text.count('\ufffd') - genuine)


def _pieces(file: BinaryIO) -> Iterator[bytes]:
  """The file cut after a blank line, a line, or a character, in that order."""
  least, most = _PIECE_BYTES, 2 * _PIECE_BYTES
  rest = b''
  while block := file.read(_READ_BYTES):
    rest, start = rest + block, 0
    while len(rest) - start > most:
      blank = _BLANK_LINE.search(rest, start + least, start + most)
      end = blank.end() if blank else rest.rfind(b'\n', start, start + most) + 1
      if not end:
        end = start + most
        while rest[end] & 0xC0 == 0x80 and end > start + most - 4:
          end -= 1  # inside a character
      yield rest[start:end]
      start = end
    rest = rest[start:]
  yield rest


def _jsonl(path: str) -> Iterator[Document]:
  with open(path, 'rb') as file:
    for number, line in enumerate(file, 1):
      if not line.strip():
        continue
      raw = _document(line, line.removeprefix(b'\xef\xbb\xbf'))
      try:
        row = json.loads(raw.text)
      except (ValueError, RecursionError) as error:
        why = getattr(error, 'msg', str(error))
        raise ConfigError(f'{path}:{number}: not JSON ({why})') from None
      if not isinstance(row, dict) or not isinstance(row.get('text'), str):
        raise ConfigError(
          f'{path}:{number}: must be an object with a string "text"'
        )
      if row['text']:
        # JSON may spell half a surrogate pair, which UTF-8 cannot write.
        content = row['text'].encode('utf-8', 'surrogatepass')
        document = _document(content, content)
        replaced = document.replaced + raw.replaced
        yield document._replace(replaced=replaced)


def _parquet(path: str) -> Iterator[Document]:
  try:
    import pyarrow
    import pyarrow.parquet
  except ImportError:
    raise ConfigError(
      f'{path}: .parquet needs pyarrow: pip install "mla_moe[data]"'
    ) from None
  try:
    with pyarrow.parquet.ParquetFile(path) as file:
      if 'text' not in file.schema_arrow.names:
        names = ', '.join(file.schema_arrow.names)
        raise ConfigError(f'{path}: has no column "text", only {names}')
      for batch in file.iter_batches(1024, columns=['text']):
        # As bytes: a column of strings may hold what is not UTF-8.
        for content in batch.column(0).cast(pyarrow.binary()).to_pylist():
          if content:
            yield _document(content, content)
  except pyarrow.ArrowException as error:
    why = str(error).splitlines()[0]
    raise ConfigError(f'{path}: not a readable .parquet ({why})') from None
