"""Files of buckets: listed once, and read as streams, through fsspec.

A bucket knows a checksum of each object. It stands for the content, so a text
of terabytes is compared by one listing, and read only where it is tokenised.
"""

from __future__ import annotations

import contextlib
import io
import re
import threading
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from mla_moe.config import ConfigError

# Schemes, and the extras of their libraries; memory:// is fsspec's own.
SCHEMES = {'gs': 'gcs', 's3': 's3', 'hf': 'hf', 'memory': 'data'}
# Checksums of an object, by their names in GCS, S3 and Hugging Face's hub.
_CHECKSUMS = ('md5Hash', 'crc32c', 'ETag', 'blob_id')
_TIMES = ('generation', 'mtime', 'LastModified', 'updated', 'created')
_SCHEME = re.compile(rf'({"|".join(SCHEMES)})://')
_BUFFER_BYTES = 1 << 20
_PATIENCE = 20.0  # seconds until a service that does not answer is given up
_answered: set[tuple[type, str]] = set()  # services and buckets, of the process


class Unread(ConfigError):
  """A part of an object could not be read, and may be later."""


class Object(NamedTuple):
  """A file of a bucket. stamp: changes with its content; '' if unknown."""

  path: str
  size: int
  stamp: str


def is_remote(path: str) -> bool:
  """Whether a path is a URL that can be a source of text."""
  return bool(_SCHEME.match(path))


def is_checksum(stamp: str) -> bool:
  """Whether a stamp follows from the content of an object alone."""
  return stamp.partition('=')[0] in _CHECKSUMS


def listed(url: str) -> tuple[str, list[Object]]:
  """Returns a root and all objects below a URL, which may be a glob or a file.

  Raises:
    ConfigError: no library for the scheme, no access, or no answer.
  """
  with errors(url):
    system, path = _system(url)
    _await(system, path)
    if '*' in path:
      objects = system.glob(path, detail=True)
      root = path[: path.index('*')].rpartition('/')[0]
    elif system.isfile(path):
      objects, root = {path: system.info(path)}, path.rpartition('/')[0]
    else:
      objects, root = system.find(path, detail=True), path
    is_file = lambda path: objects[path]['type'] == 'file'
    return system.unstrip_protocol(root), [
      Object(
        system.unstrip_protocol(path), int(facts['size'] or 0), _stamp(facts)
      )
      for path, facts in sorted(objects.items())
      if is_file(path)
    ]


def opened(path: str) -> BinaryIO:
  """Returns an object as a stream, which can seek.

  Raises:
    ConfigError: as `listed`.
  """
  with errors(path):
    system, place = _system(path)
    return io.BufferedReader(system.open(place, 'rb'), _BUFFER_BYTES)


def lookup(path: str) -> Object | None:
  """Returns an object, or None if there is none.

  Raises:
    ConfigError: as `listed`.
  """
  with errors(path):
    system, place = _system(path)
    _await(system, place)
    try:
      facts = system.info(place)
    except FileNotFoundError:
      return None
    is_file = facts['type'] == 'file'
    return Object(path, int(facts['size']), _stamp(facts)) if is_file else None


def part(path: str, start: int, stop: int) -> bytes:
  """Returns these bytes of an object.

  Raises:
    ConfigError: the object is shorter.
    Unread: no access, after the library's own attempts.
  """
  with errors(path, Unread):
    system, place = _system(path)
    content = system.cat_file(place, start=start, end=stop)
    if len(content) != stop - start:
      raise ConfigError(f'{path}: ends before byte {stop}: it has changed')
    return content


@contextlib.contextmanager
def errors(path: str, kind: type[ConfigError] = ConfigError) -> Iterator[None]:
  """Makes lines of the errors of a bucket: each library has its own."""
  try:
    yield
  except ConfigError:
    raise
  except ImportError:
    scheme = path.partition('://')[0]
    raise ConfigError(
      f'{path}: {scheme}:// needs its library: '
      f'pip install "mla_moe[{SCHEMES[scheme]}]"'
    ) from None
  except FileNotFoundError:
    raise kind(f'{path}: no such bucket or object') from None
  except Exception as error:
    why = ' '.join(str(error).split())[:120] or type(error).__name__
    raise kind(f'{path}: cannot be read ({why})') from None


def _system(url: str) -> tuple[Any, str]:
  """Returns fsspec's file system of a URL, and the path there."""
  import fsspec

  return fsspec.core.url_to_fs(url)


def _await(system: Any, path: str) -> None:
  """Asks for one name: the libraries repeat a question for minutes.

  A bucket that has answered is not asked again.

  Raises:
    ConfigError: no answer, not even a refusal.
  """
  place = type(system), path.lstrip('/').partition('/')[0]
  if place in _answered:
    return
  answered = threading.Event()

  def ask():
    with contextlib.suppress(Exception):
      system.info(path.partition('*')[0].rstrip('/'))
      _answered.add(place)
    answered.set()

  threading.Thread(target=ask, daemon=True).start()
  if not answered.wait(_PATIENCE):
    raise ConfigError(
      f'{system.unstrip_protocol(path)}: the service gave no answer for '
      f'{_PATIENCE:.0f} s'
    )


def _stamp(facts: dict) -> str:
  for name in (*_CHECKSUMS, *_TIMES):
    if facts.get(name):
      return f'{name}={facts[name]}'
  return ''
