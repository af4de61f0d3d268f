"""Files of other people are read with a bound; ours are forced to the disk.

A name in a downloaded folder may be a link to a device that never ends, or a
pipe that never begins. `read_bytes` takes regular files of a bounded size.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pathlib
import stat
from typing import Any

from mla_moe.checked import ConfigError

LIMIT = 2**26  # bytes; a tokenizer.json has 10 MB, the index of Kimi K2 20 MB


def check_regular(path: pathlib.Path) -> None:
  """Refuses a path that is no regular file, before it is opened.

  Raises:
    ConfigError: it cannot be read, or is a folder, a device or a pipe.
  """
  try:
    mode = path.stat().st_mode
  except OSError as error:
    raise ConfigError(f'{path}: cannot be read ({error.strerror})') from None
  if not stat.S_ISREG(mode):
    raise ConfigError(f'{path}: cannot be read (it is no regular file)')


def read_bytes(path: pathlib.Path, limit: int = LIMIT) -> bytes:
  """Returns the content of a regular file of at most `limit` bytes.

  Raises:
    ConfigError: it cannot be read, is no regular file, or is larger.
  """
  check_regular(path)
  try:
    with open(path, 'rb') as file:
      size = os.fstat(file.fileno()).st_size  # read() allocates its argument
      content = file.read(min(size, limit) + 1)
  except OSError as error:
    raise ConfigError(f'{path}: cannot be read ({error.strerror})') from None
  if len(content) > limit:
    raise ConfigError(f'{path}: cannot be read (it exceeds {limit} bytes)')
  return content


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Returns the object in a JSON file.

  Raises:
    ConfigError: the file cannot be read, or contains no JSON object.
  """
  content = read_bytes(path)
  try:
    values = json.loads(content.decode('utf-8'))
  except (ValueError, RecursionError) as error:
    raise ConfigError(f'{path}: is not JSON ({error})') from None
  if not isinstance(values, dict):
    raise ConfigError(f'{path}: is not an object')
  return values


def sync(path: pathlib.Path) -> None:
  """Waits until a file, or a folder's list of names, is on the disk.

  A file system without that service answers EINVAL, which is no error here.
  """
  handle = os.open(path, os.O_RDONLY)
  try:
    os.fsync(handle)
  except OSError as error:
    if error.errno != errno.EINVAL:
      raise
  finally:
    with contextlib.suppress(OSError):
      os.close(handle)
