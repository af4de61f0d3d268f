"""Documents: a source lists files, and each file has one document or many.

A document is one of three things: a whole text file; a row of a .jsonl or
.parquet file; a piece of some KB of a text file, cut at a blank line, where the
file is larger than 1 MiB or the only one of the source.

Each document has a key, a hash of 64 bits: of the file's name where the file is
one document, of the content otherwise. The key alone decides whether the
document is held out, and how it is cut for fill-in-the-middle. So a document
stays on its side of the split when others come or go, and equal rows are never
on both sides.

Files are read as bytes and decoded here. Bytes that are not UTF-8 become U+FFFD
and are counted; text in UTF-16 is refused, as every second byte would be 0.
"""

from __future__ import annotations

import codecs
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
# and they contain broken encodings on purpose.
_SKIPPED = frozenset(
  ('site-packages', 'dist-packages', '__pycache__')
  + ('test', 'tests', 'idle_test')
)
_DOCUMENT_BYTES = 1 << 20  # a text file above this is cut into pieces
_PIECE_BYTES = 8 << 10
_READ_BYTES = 1 << 20
_BLANK_LINE = re.compile(rb'\n[ \t\r]*\n')
_MAGIC = re.compile(r'[*?\[]')


class File(NamedTuple):
  """A file of the source.

  name: relative to the source, parts joined by '/'. path: to open it.
  is_document: all of it is one document.
  """

  name: str
  path: str
  is_document: bool


class Document(NamedTuple):
  """A text and its key, uniform in [0, 2**64).

  replaced: number of U+FFFD in the text that stand for broken UTF-8.
  """

  key: int
  text: str
  replaced: int


def files(source: str) -> list[File]:
  """Returns the source's files in order of name.

  Args:
    source: 'stdlib' (the .py files of Python's own library), a folder, a glob
      or one file.

  Raises:
    ConfigError: nothing there, no file of a known kind, an empty file, a folder
      that cannot be opened.
  """
  if source == 'stdlib':
    root = sysconfig.get_path('stdlib')
    paths = [path for path in _walk(root, _SKIPPED) if path.endswith('.py')]
    if not paths:
      raise ConfigError(
        f"data.source='stdlib': no .py files in {root!r}; give a folder of text"
      )
    return _files(root, paths, lambda path: True)
  path = os.path.expanduser(source)
  kinds = ', '.join(TEXT + ROWS)
  if os.path.isfile(path):
    if not _is_known(path):
      raise ConfigError(f'data.source={source!r}: must end in one of {kinds}')
    if not os.path.getsize(path):
      raise ConfigError(f'data.source={source!r}: the file is empty')
    return [File(os.path.basename(path), path, False)]
  if os.path.isdir(path):
    root, paths = path, _walk(path, frozenset(('__pycache__',)))
  elif _MAGIC.search(path):
    root = os.path.dirname(path[: _MAGIC.search(path).start()]) or '.'
    paths = [p for p in glob.glob(path, recursive=True) if os.path.isfile(p)]
  else:
    raise ConfigError(f'data.source={source!r}: no such file or folder')
  paths = [path for path in paths if _is_known(path)]
  if not paths:
    raise ConfigError(f'data.source={source!r}: holds no file of {kinds}')
  only_one = len(paths) == 1
  is_small = lambda path: os.path.getsize(path) <= _DOCUMENT_BYTES
  return _files(root, paths, lambda path: not only_one and is_small(path))


def read(file: File) -> Iterator[Document]:
  """Yields the file's documents in order, without the empty ones.

  Raises:
    ConfigError: the file cannot be opened or parsed (with its line or row), or
      is UTF-16.
  """
  try:
    if file.path.lower().endswith('.parquet'):
      yield from _parquet(file.path)
    elif file.path.lower().endswith('.jsonl'):
      yield from _jsonl(file.path)
    else:
      yield from _text(file)
  except OSError as error:
    raise _unreadable(file, error) from None


def digest(file: File) -> str:
  """Returns the SHA-256 of the file's content.

  Raises:
    ConfigError: the file cannot be read.
  """
  try:
    with open(file.path, 'rb') as opened:
      return hashlib.file_digest(opened, 'sha256').hexdigest()
  except OSError as error:
    raise _unreadable(file, error) from None


def _unreadable(file: File, error: OSError) -> ConfigError:
  return ConfigError(f'{file.path}: cannot be read ({error.strerror})')


def _walk(root: str, skipped: frozenset[str]) -> list[str]:
  """Returns the paths of all files below `root` that are not hidden."""

  def fail(error):
    raise ConfigError(
      f'data.source: {error.filename!r} cannot be read ({error.strerror})'
    )

  paths = []
  for folder, folders, names in os.walk(root, onerror=fail):
    folders[:] = [x for x in folders if x not in skipped and x[0] != '.']
    paths += [os.path.join(folder, name) for name in names if name[0] != '.']
  return [path for path in paths if os.path.isfile(path)]


def _files(root: str, paths: list[str], is_document) -> list[File]:
  relative = lambda path: os.path.relpath(path, root).replace(os.sep, '/')
  return sorted(File(relative(path), path, is_document(path)) for path in paths)


def _is_known(path: str) -> bool:
  return path.lower().endswith(TEXT + ROWS)


def _document(hashed: bytes, content: bytes) -> Document:
  key = int.from_bytes(
    hashlib.blake2b(hashed, digest_size=8).digest(), 'little'
  )
  try:
    return Document(key, content.decode('utf-8'), 0)
  except UnicodeDecodeError:
    text = content.decode('utf-8', 'replace')
    genuine = content.count('\ufffd'.encode())
    return Document(key, text, text.count('\ufffd') - genuine)


def _text(file: File) -> Iterator[Document]:
  with open(file.path, 'rb') as opened:
    if opened.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
      raise ConfigError(f'{file.path}: is UTF-16; write it as UTF-8 (iconv)')
    opened.seek(0)
    if file.is_document:
      content = opened.read()
      if content:
        yield _document(file.name.encode(), content)
    else:
      for piece in _pieces(opened):
        if piece:
          yield _document(piece, piece)


def _pieces(file: BinaryIO) -> Iterator[bytes]:
  """Yields the file in pieces of 8 to 16 KiB.

  Each is cut after a blank line if there is one in reach, else after a line,
  else after a character.
  """
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
        # As bytes: a column of strings may contain invalid UTF-8.
        for content in batch.column(0).cast(pyarrow.binary()).to_pylist():
          if content:
            yield _document(content, content)
  except pyarrow.ArrowException as error:
    why = str(error).splitlines()[0]
    raise ConfigError(f'{path}: not a readable .parquet ({why})') from None
