"""Files of text as UTF-8, whatever their compression and their encoding.

A suffix .gz, .bz2, .xz or .zst says that a file is compressed. A byte order
mark at its beginning says that a text is UTF-8, UTF-16 or UTF-32; the mark is
no part of the text. Without a mark a text is UTF-8, unless it is full of NULs:
then it is UTF-16 or UTF-32 without the mark, or no text, and is refused.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

from mla_moe.config import ConfigError

from . import remote

COMPRESSED = ('.gz', '.bz2', '.xz', '.zst')
# UTF-32's mark of little bytes begins with UTF-16's, and so comes before it.
_MARKS = (
  (codecs.BOM_UTF32_LE, 'utf-32-le'),
  (codecs.BOM_UTF32_BE, 'utf-32-be'),
  (codecs.BOM_UTF8, 'utf-8'),
  (codecs.BOM_UTF16_LE, 'utf-16-le'),
  (codecs.BOM_UTF16_BE, 'utf-16-be'),
)
_HEAD_BYTES = 4096
_BUFFER_BYTES = 1 << 20


def suffixes(path: str) -> tuple[str, str]:
  """Returns the suffix of a file and that of its compression, or ''."""
  stem, last = os.path.splitext(path.lower())
  if last in COMPRESSED:
    return os.path.splitext(stem)[1], last
  return last, ''


@contextlib.contextmanager
def opened(path: str) -> Iterator[BinaryIO]:
  """Yields a file of text, decompressed, as UTF-8 without a mark.

  Bytes that are not UTF-8 in a file that should be stay as they are.

  Raises (inside the block, too):
    ConfigError: the file cannot be opened, is damaged or cut off, or is not in
      the encoding of its mark.
  """
  with _errors(path):
    encoding, mark = _encoding(path)
    with _decompressed(path) as file:
      file.read(mark)
      if encoding == 'utf-8':
        yield file
      else:
        yield io.BufferedReader(_Recoded(file, encoding), _BUFFER_BYTES)


@contextlib.contextmanager
def _errors(path: str) -> Iterator[None]:
  """Makes lines of the errors of a file that is read."""
  try:
    yield
  except UnicodeDecodeError as error:
    raise ConfigError(
      f'{path}: is {error.encoding.upper()} by its mark, but {error.reason}; '
      'write it as UTF-8 (iconv)'
    ) from None
  except OSError as error:
    if error.errno is None:  # of a decompressor
      raise _damaged(path, error) from None
    raise ConfigError(f'{path}: cannot be read ({error.strerror})') from None
  except (EOFError, zlib.error, lzma.LZMAError) as error:
    raise _damaged(path, error) from None
  except Exception:  # of a bucket's library
    if not remote.is_remote(path):
      raise
    with remote.errors(path):
      raise


def is_utf8(path: str) -> bool:
  """Whether a file is UTF-8, so that its bytes are those that are read.

  Raises:
    ConfigError: as `opened`.
  """
  with _errors(path):
    return _encoding(path)[0] == 'utf-8'


def _damaged(path: str, error: Exception) -> ConfigError:
  why = (str(error).splitlines() or [type(error).__name__])[0]
  return ConfigError(f'{path}: is damaged or cut off ({why})')


def _encoding(path: str) -> tuple[str, int]:
  """Returns the encoding of a file and the length of its mark."""
  with _decompressed(path) as file:
    head = file.read(_HEAD_BYTES)
  for mark, encoding in _MARKS:
    if head.startswith(mark):
      return encoding, len(mark)
  if 8 * head.count(0) > len(head):
    raise ConfigError(
      f'{path}: is full of NULs: UTF-16 or UTF-32 without a byte order mark, '
      'or no text; write it as UTF-8 (iconv)'
    )
  return 'utf-8', 0


@contextlib.contextmanager
def _decompressed(path: str) -> Iterator[Any]:
  _, compression = suffixes(path)
  is_remote = remote.is_remote(path)
  with remote.opened(path) if is_remote else open(path, 'rb') as source:
    if not compression:
      yield source
      return
    with _DECOMPRESSORS[compression](source) as file:
      yield file


def _zstd(source: BinaryIO) -> BinaryIO:
  try:
    import pyarrow
  except ImportError:
    name = getattr(source, 'name', 'a file')
    raise ConfigError(
      f'{name}: .zst needs pyarrow: pip install "mla_moe[data]"'
    ) from None
  stream = pyarrow.input_stream(source, compression='zstd')
  return io.BufferedReader(stream, _BUFFER_BYTES)


_DECOMPRESSORS = {
  '.gz': gzip.open,
  '.bz2': bz2.open,
  '.xz': lzma.open,
  '.zst': _zstd,
}


class _Recoded(io.RawIOBase):
  """A stream of another encoding as bytes of UTF-8."""

  def __init__(self, file: BinaryIO, encoding: str):
    self._text = io.TextIOWrapper(file, encoding, newline='')
    self._rest = b''

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: Any) -> int:
    if not self._rest:
      self._rest = self._text.read(len(buffer)).encode()
    part = self._rest[: len(buffer)]
    buffer[: len(part)] = part
    self._rest = self._rest[len(part) :]
    return len(part)
