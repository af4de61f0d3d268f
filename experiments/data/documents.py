"""Documents: a file of a source has one document, or many.

A document is one of three things: a whole text file; a row of a .jsonl or
.parquet file; a piece of some KB of a text file, cut at a blank line, where the
file is large or the only one of the source (`sources`).

Each document has a key, a hash of 64 bits: of the file's name where the file is
one document, of the content otherwise. The key alone decides how a document is
cut for fill-in-the-middle, and on which side it is (`holdout`), unless the text
is small. So a document stays on its side of the split when others come or go,
and equal rows are never on both sides.

Bytes that are not UTF-8 become U+FFFD and are counted. A row without a text, a
null or '', is skipped and counted, in both kinds of files.
"""

from __future__ import annotations

import codecs
import collections
import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from mla_moe.config import ConfigError

from . import encodings, remote, sources
from .sources import File

_PIECE_BYTES = 8 << 10
_READ_BYTES = 1 << 20
_BLANK_LINE = re.compile(rb'\n[ \t\r]*\n')
EMPTY = 'rows without text'  # of the counts of `read`


class Document(NamedTuple):
  """A text and its key, uniform in [0, 2**64).

  replaced: number of U+FFFD in the text that stand for broken UTF-8. content:
  another hash of 64 bits, of the content, which is the key where that is.
  """

  key: int
  text: str
  replaced: int
  content: int


def read(
  file: File,
  counts: collections.Counter | None = None,
  start: int = 0,
  stop: int | None = None,
) -> Iterator[Document]:
  """Yields the file's documents in order, without the empty ones.

  Rows without a text are counted in `counts[EMPTY]`. `start` and `stop` are one
  of the file's `ranges`.

  Raises:
    ConfigError: the file cannot be opened, decoded or parsed (with its line or
      row).
  """
  counts = collections.Counter() if counts is None else counts
  kind = sources.kind(file.path)
  if kind == 'parquet':
    contents = _parquet(file.path, file.field, start, stop)
  elif kind == 'jsonl':
    contents = _jsonl(file.path, file.field, start, stop)
  else:
    yield from _text(file)
    return
  for content, replaced in contents:
    if content:
      document = _document(content, content)
      yield document._replace(replaced=document.replaced + replaced)
    else:
      counts[EMPTY] += 1


def ranges(file: File, size: int) -> list[tuple[int, int | None]]:
  """Returns the parts of a file of about `size` bytes that can be read apart.

  They are (start, stop) of bytes of a .jsonl, whose lines belong to the range
  in which they begin, or of row groups of a .parquet. Other files are whole.

  Raises:
    ConfigError: as `read`.
  """
  kind = sources.kind(file.path)
  _, compression = encodings.suffixes(file.path)
  if file.size > size and kind == 'parquet':
    with _opened_parquet(file.path) as opened:
      groups = opened.metadata.num_row_groups
    step = max(1, groups * size // file.size)
    return [(i, min(i + step, groups)) for i in range(0, groups, step)]
  is_cut = file.size > size and kind == 'jsonl' and not compression
  if is_cut and encodings.is_utf8(file.path):
    return [(i, min(i + size, file.size)) for i in range(0, file.size, size)]
  return [(0, None)]


def digest(file: File) -> str:
  """Returns the SHA-256 of the file's content, or a bucket's checksum of it.

  Raises:
    ConfigError: the file cannot be read.
  """
  if remote.is_checksum(file.stamp):
    return file.stamp
  try:
    is_remote = remote.is_remote(file.path)
    with (
      remote.opened(file.path) if is_remote else open(file.path, 'rb') as opened
    ):
      return hashlib.file_digest(opened, 'sha256').hexdigest()
  except OSError as error:
    raise ConfigError(
      f'{file.path}: cannot be read ({error.strerror})'
    ) from None


def _document(hashed: bytes, content: bytes) -> Document:
  key = _hash(hashed)
  own = key if hashed is content else _hash(content)
  try:
    return Document(key, content.decode('utf-8'), 0, own)
  except UnicodeDecodeError:
    text = content.decode('utf-8', 'replace')
    genuine = content.count('\ufffd'.encode())
    return Document(key, text, text.count('\ufffd') - genuine, own)


def _hash(content: bytes) -> int:
  digest = hashlib.blake2b(content, digest_size=8).digest()
  return int.from_bytes(digest, 'little')


def _text(file: File) -> Iterator[Document]:
  with encodings.opened(file.path) as opened:
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


def _jsonl(
  path: str, field: str, start: int, stop: int | None
) -> Iterator[tuple[bytes | None, int]]:
  """Yields (text, U+FFFD outside it that stand for broken UTF-8) of rows."""
  with encodings.opened(path) as file:
    if start:
      file.seek(start - 1)
      file.readline()  # it begins in the range before
    first = place = 0 if stop is None else file.tell()
    for number, line in enumerate(file, 1):
      if stop is not None and place >= stop:
        return
      place += len(line)
      if not line.strip():
        continue
      # Files that were joined have their marks in the middle.
      raw = _document(line, line.removeprefix(codecs.BOM_UTF8))
      try:
        row = json.loads(raw.text)
      except (ValueError, RecursionError) as error:
        why = getattr(error, 'msg', str(error))
        where = f'{path}:{number + (_lines(path, first) if start else 0)}'
        raise ConfigError(f'{where}: not JSON ({why})') from None
      text = row.get(field, 0) if isinstance(row, dict) else 0
      if not isinstance(text, str | None):
        where = f'{path}:{number + (_lines(path, first) if start else 0)}'
        names = ', '.join(row)[:80] if isinstance(row, dict) else ''
        has = f', and has {names}; data.field names it' if names else ''
        raise ConfigError(
          f'{where}: must be an object with a string "{field}"{has}'
        )
      # JSON may spell half a surrogate pair, which UTF-8 cannot write.
      yield (text or '').encode('utf-8', 'surrogatepass'), raw.replaced


def _lines(path: str, place: int) -> int:
  """Returns the number of lines before a place of a file."""
  count = 0
  with encodings.opened(path) as file:
    rest = place - file.tell()
    while rest > 0 and (block := file.read(min(rest, _READ_BYTES))):
      count, rest = count + block.count(b'\n'), rest - len(block)
  return count


def _parquet(
  path: str, field: str, start: int, stop: int | None
) -> Iterator[tuple[bytes | None, int]]:
  """Yields (text, 0) of rows of these row groups."""
  with _opened_parquet(path) as file:
    import pyarrow

    if field not in file.schema_arrow.names:
      names = ', '.join(file.schema_arrow.names)
      raise ConfigError(
        f'{path}: has no column "{field}", only {names}; data.field names it'
      )
    groups = range(file.metadata.num_row_groups)[start:stop]
    for batch in file.iter_batches(1024, list(groups), columns=[field]):
      # As bytes: a column of strings may contain invalid UTF-8.
      for content in batch.column(0).cast(pyarrow.binary()).to_pylist():
        yield content, 0


@contextlib.contextmanager
def _opened_parquet(path: str) -> Iterator[Any]:
  """Yields pyarrow's file; its errors inside the block are a line, too."""
  try:
    import pyarrow
    import pyarrow.parquet
  except ImportError:
    raise ConfigError(
      f'{path}: .parquet needs pyarrow: pip install "mla_moe[data]"'
    ) from None
  try:
    source = remote.opened(path) if remote.is_remote(path) else path
    with pyarrow.parquet.ParquetFile(source) as file:
      yield file
  except pyarrow.ArrowException as error:
    why = str(error).splitlines()[0]
    raise ConfigError(f'{path}: not a readable .parquet ({why})') from None
  except OSError as error:
    why = error.strerror or ' '.join(str(error).split())
    raise ConfigError(f'{path}: cannot be read ({why})') from None
