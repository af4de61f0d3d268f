"""A run's folder: private, claimed by one process, bound to one config."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import os
import pathlib
import re
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from mla_moe import files
from mla_moe.checked import is_number
from mla_moe.config import Config, ConfigError, ModelConfig, freeze

from . import run_tokenizer

# Fields that may change when a run resumes. A mesh or a kernel changes the last
# bits of a step's numbers, and no other field here changes any. A path stands
# for its content, which has a digest of its own in each checkpoint.
_HARMLESS = ('config.run.', 'config.mesh.', 'config.model.compute.')
_HARMLESS += ('config.model.release.',)
_HARMLESS += ('config.data.max_epochs', 'config.data.validation')
_PATHS = ('config.data.source:', 'config.data.tokenizer:')

_V3 = dataclasses.replace(Config(), model=ModelConfig(bos_id=0, eos_id=1))

# A digest with another beginning is of another version of `digest`.
_DIGEST = 'fields:'

# The file that names the bucket of a folder's checkpoints.
ORIGIN = 'bucket.json'

# Bytes of a file that are read at once.
_BLOCK = 2**20

# Rows are forced to the disk at least this often.
_SYNC_SECONDS = 60

# The errors of a disk that is full, read-only, failing or gone.
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
DISK |= {errno.ESTALE, errno.ENODEV}

# The answers of a file system without locks: gcsfuse, some NFS and 9p mounts.
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}

# The forms of services' keys. A config is saved, and may be shared.
_SECRETS = re.compile(
  r'hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}'
  r'|AKIA[A-Z0-9]{16}|AIza[A-Za-z0-9_-]{30,}'
  r'|(?<=://)[^/@\s]+:[^/@\s]+(?=@)'
)

# Whole words of the names of environment variables.
_KEY_WORDS = {'TOKEN', 'KEY', 'APIKEY', 'SECRET', 'PASSWORD', 'PASSWD'}
_PATH_WORDS = {'PATH', 'DIR', 'FILE'}


@contextlib.contextmanager
def claim(folder: os.PathLike | str, config: Config):
  """Yields the folder, made if need be, with its lock and its config.json.

  After a ConfigError in the block the config.json of before is back, unless
  there are new rows, which are of the new config.

  Raises:
    ConfigError: the folder is a file, cannot be written, is locked by another
      process or holds a run of another config (names the fields); or the
      config holds a string that looks like a key.
  """
  text = json.dumps(dataclasses.asdict(config), indent=1)
  if redacted(text) != text:
    line = next(x for x in redacted(text).splitlines() if '[redacted]' in x)
    raise ConfigError(
      f'config: {line.strip()} looks like a key or password, and configs are '
      'saved; give it to the service by its environment variable'
    )
  path = pathlib.Path(folder)
  if not os.fspath(folder):
    raise ConfigError("workdir='': name the run's folder, such as runs/mine")
  own, rows = path / 'config.json', path / 'metrics.jsonl'
  with lock(path):
    before = own.read_text(encoding='utf-8') if own.exists() else None
    last = next(backwards(rows), None)
    _bind(path, config, text)
    try:
      yield path
    except ConfigError:  # a refused start names no other text or base
      if before is not None and next(backwards(rows), None) == last:
        write(own, before)
      raise


@contextlib.contextmanager
def lock(
  path: pathlib.Path, begun: Callable[[pathlib.Path], bool] | None = None
):
  """Makes the folder, readable by this user only, and holds its lock.

  The lock is the kernel's: it ends with the process, even by SIGKILL. A program
  that is refused leaves nothing: after a ConfigError in the block, the entries
  that the block made are removed, unless the work there has `begun`; without
  that argument, a run begins with its first row or checkpoint.

  Raises:
    ConfigError: the folder is a file, cannot be written or locked, or is
      locked.
  """
  import fcntl  # Windows has none: `cli` says so

  absent = [x for x in (path / 'lock', path, *path.parents) if not x.exists()]
  if path.exists() and not path.is_dir():
    raise ConfigError(f'workdir={str(path)!r}: is a file; name a folder')
  try:
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    file = open(path / 'lock', 'a+', encoding='utf-8')
  except OSError as error:
    raise ConfigError(
      f'workdir={str(path)!r}: cannot be written ({error.strerror})'
    ) from None
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      if error.errno in _NO_LOCKS:
        raise ConfigError(
          f'workdir={str(path)!r}: its file system has no locks '
          f'({error.strerror}), so nothing would keep a second run out; name a '
          'folder of a disk, or gs://BUCKET/FOLDER'
        ) from None
      file.seek(0)
      raise ConfigError(
        f'workdir={str(path)!r}: process {file.read().strip() or "?"} is '
        'writing to it; wait, or name another folder'
      ) from None
    file.truncate(0)
    file.write(f'{os.getpid()} on {os.uname().nodename}')
    file.flush()
    before = {entry.name for entry in path.iterdir()}
    try:
      yield
    except ConfigError:
      if not (begun or _begun)(path):
        _clear(path, before, absent)
      raise


def _clear(
  path: pathlib.Path, before: set[str], absent: list[pathlib.Path]
) -> None:
  """Removes a folder's entries that were not there `before`.

  Of the `absent` paths, the lock and folders that are empty now go, too.
  """
  for entry in path.iterdir():
    if entry.name in before and entry not in absent:
      continue
    if entry.is_dir() and not entry.is_symlink():
      shutil.rmtree(entry, ignore_errors=True)
    else:
      entry.unlink(missing_ok=True)
  # The cache of compiled programs lies beside a run.
  for folder in (path.parent / '.jax_cache', *absent[1:]):
    with contextlib.suppress(OSError):
      folder.rmdir()


def redacted(text: str) -> str:
  """Returns the text without keys, of known forms or in the environment.

  A variable holds a key if its name has one of `_KEY_WORDS` and its value is no
  path here. JSON's spelling of the value is removed, too.
  """
  for name, value in os.environ.items():
    words = set(name.upper().split('_'))
    is_key = words & _KEY_WORDS and not words & _PATH_WORDS
    if len(value) >= 8 and is_key and not os.path.exists(value):
      for spelling in (value, json.dumps(value)[1:-1]):
        text = text.replace(spelling, '[redacted]')
  return _SECRETS.sub('[redacted]', text)


def digest(config: Config) -> str:
  """Returns a hash of the fields that make a run the run it is.

  Fields of `_HARMLESS` are left out. So are fields at V3's values: a field
  that a later version adds changes no digest.
  """
  return _digest(config, _spelled)


def _digest(config: Config, spell: Callable[[Any], str]) -> str:
  lines = differences(_without_paths(config), _V3, spell=spell)
  return _hash([x for x in lines if not _is_harmless(x)])


def _spelled(value: Any) -> str:
  """Returns a value's words; in tuples, which may mix them, 3 is 3.0."""

  def same(x: Any) -> Any:
    if isinstance(x, tuple):
      return tuple(map(same, x))
    return float(x) if type(x) is int and abs(x) < 2**53 else x

  return repr(same(value) if isinstance(value, tuple) else value)


def _without_paths(config: Config) -> Config:
  """Returns the config with one name for all questions, teachers and sources.

  Their contents have a digest in each checkpoint, as a text has.
  """
  task = 'FILE.jsonl' if '.jsonl' in config.rl.task else config.rl.task
  teachers = tuple(('DIR', *rest) for _, *rest in config.rl.teachers)
  rl = dataclasses.replace(config.rl, task=task, teachers=teachers)
  sources = tuple(('PATH', *rest) for _, *rest in config.data.sources)
  data = dataclasses.replace(config.data, sources=sources)
  return dataclasses.replace(config, data=data, rl=rl)


def _hash(lines: list[str]) -> str:
  text = '\n'.join(sorted(lines))
  return f'{_DIGEST}{hashlib.sha256(text.encode()).hexdigest()}'


def _older_digest(config: Config) -> str:
  """Returns the digest of a version for which a path was its words."""
  lines = differences(config, _V3)
  return _hash(
    [x for x in lines if x.startswith(_PATHS) or not _is_harmless(x)]
  )


def differences(
  ours: Any,
  theirs: Any,
  path: str = 'config',
  spell: Callable[[Any], str] = repr,
) -> list[str]:
  """Returns the fields that differ in two configs, as 'path: a != b'."""
  lines = []
  for field in dataclasses.fields(ours):
    a, b = getattr(ours, field.name), getattr(theirs, field.name)
    here = f'{path}.{field.name}'
    if dataclasses.is_dataclass(a):
      lines += differences(a, b, here, spell)
    elif a != b:
      lines.append(f'{here}: {spell(a)} != {spell(b)}')
  return lines


def of_another(config: Config, digest_of_run: str) -> bool:
  """Whether a checkpoint's digest belongs to a run of another config.

  A digest of an older version cannot be compared: the answer is no.
  """
  comparable = digest_of_run.startswith(_DIGEST)
  older = _older_digest(config), _digest(config, repr)
  return comparable and digest_of_run not in (digest(config), *older)


def _is_harmless(line: str) -> bool:
  """Whether a run may resume although this field of its config differs."""
  harmless = line.startswith(_HARMLESS + _PATHS)
  return harmless and not line.startswith('config.run.seed')


def trouble(path: os.PathLike | str, error: OSError) -> str:
  """Returns a disk's error as one line, with the free space."""
  try:
    free = f'{shutil.disk_usage(path).free / 2**20:,.0f} MiB are free'
  except OSError:
    free = 'the folder is gone'
  name = errno.errorcode.get(error.errno or 0, type(error).__name__)
  return f'{path}: {error.strerror or error} ({name}; {free})'


def read_config(path: pathlib.Path) -> Config:
  """Returns the config of the run in this folder, with its own tokenizer."""
  return run_tokenizer.resolved(path, with_paths(path))


def with_paths(path: pathlib.Path) -> Config:
  """Returns the config of the run in this folder with the paths as given."""
  return freeze(files.read_json(path / 'config.json'))


def write(path: pathlib.Path, text: str) -> None:
  """Replaces a file; a kill leaves the old text or the new one, whole."""
  scratch = path.with_name(f'{path.name}.new')
  with open(scratch, 'w', encoding='utf-8') as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  os.replace(scratch, path)


def _bind(path: pathlib.Path, config: Config, text: str):
  """Writes config.json, unless the folder holds a run of another config."""
  if (path / 'config.json').exists():
    before = read_config(path)
    lines = differences(_without_paths(config), _without_paths(before))
    wrong = [line for line in lines if not _is_harmless(line)]
    if wrong and _begun(path):
      raise ConfigError(
        f'workdir={str(path)!r}: holds a run of another config '
        f'({"; ".join(wrong)}); name another folder, and start anew from its '
        f'weights if you like: --init={path}'
      )
    compute = config.mesh, config.model.compute
    if compute != (before.mesh, before.model.compute) and not wrong:
      group = 'mesh' if config.mesh != before.mesh else 'config.model.compute'
      print(f'Another {group}: the same losses but for their last digits.')
  try:
    run_tokenizer.adopt(path, config.data.tokenizer, _begun(path))
    write(path / 'config.json', text)
  except OSError as error:
    raise ConfigError(trouble(path, error)) from None


def is_run(path: pathlib.Path) -> bool:
  """Whether a folder is a run's with checkpoints, or one that was."""
  return (path / ORIGIN).exists() or (path / 'checkpoints').is_dir()


def checkpoints(path: pathlib.Path) -> Any:
  """Returns the folder of a run's checkpoints: here, or in its bucket."""
  origin = path / ORIGIN
  if not origin.exists():
    return path / 'checkpoints'
  from .checkpointing import storage

  return storage.path(files.read_json(origin)['url'])


def _begun(path: pathlib.Path) -> bool:
  """Whether a step was logged or saved; before that the config may change."""
  folder = checkpoints(path)
  steps = folder.is_dir() and any(folder.iterdir())
  return steps or any(backwards(path / 'metrics.jsonl'))


def rows(
  path: pathlib.Path,
  most: int = 0,
  change: Callable[[dict], Any] = lambda row: row,
) -> list:
  """Returns the rows of a .jsonl file, without a last line that a kill tore.

  With `most`, it is at most that many, evenly spaced from the first: every
  row, every second, every fourth. Others are not parsed, and not in memory.
  Of a row, the list has `change(row)`, which may be much smaller.
  """
  rows, spacing = [], 1
  if path.exists():
    files.check_regular(path)
    with open(path, 'rb') as file:
      for number, line in enumerate(file):
        if number % spacing:
          continue
        row = _row(line)
        if row is None:
          break
        rows.append(change(row))
        if len(rows) > most > 0:
          rows, spacing = rows[::2], 2 * spacing
  return rows


def backwards(path: pathlib.Path) -> Iterator[tuple[int, dict]]:
  """Yields (the offset of its end, the row) from the last row to the first.

  The file may be larger than the memory.
  """
  if not path.exists():
    return
  files.check_regular(path)
  with open(path, 'rb') as file:
    rest, start = b'', file.seek(0, os.SEEK_END)
    end = start
    while start:
      size = min(start, _BLOCK)
      start -= size
      file.seek(start)
      lines = (file.read(size) + rest).splitlines(keepends=True)
      rest = lines.pop(0) if start else b''
      for line in reversed(lines):
        row = _row(line)
        if row is not None:
          yield end, row
        end -= len(line)


def _row(line: bytes) -> dict | None:
  """Returns the row of a line; None for a line that is none.

  A number that is not finite is null in the file (JSON has no NaN) and NaN
  here.
  """
  try:
    row = json.loads(line)
  except (ValueError, RecursionError):
    return None
  if not isinstance(row, dict):
    return None
  return _with_nan(row) if b'null' in line else row


def _line(row: dict) -> str:
  """Returns a row as one line of strict JSON."""
  try:
    text = json.dumps(row, allow_nan=False)
  except ValueError:
    text = json.dumps(_without_nan(row))
  return f'{text}\n'


def _without_nan(value: Any) -> Any:
  """Returns the value with None for every number that is not finite."""
  if isinstance(value, dict):
    return {name: _without_nan(item) for name, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_without_nan(item) for item in value]
  finite = not isinstance(value, float) or math.isfinite(value)
  return value if finite else None


def _with_nan(value: Any) -> Any:
  """Returns the value with NaN for every None: the inverse."""
  if isinstance(value, dict):
    return {name: _with_nan(item) for name, item in value.items()}
  if isinstance(value, list):
    return [_with_nan(item) for item in value]
  return math.nan if value is None else value


def rewind(path: pathlib.Path, step: int) -> None:
  """Drops the rows of a .jsonl file after `step`.

  It looks for them from the end: the file may be larger than the memory. Of
  the rows there, those without a step are dropped, too.
  """
  if not path.exists():
    return
  steps = ((end, row.get('step')) for end, row in backwards(path))
  earlier = (end for end, x in steps if is_number(x) and x <= step)
  end = next(earlier, 0)
  with open(path, 'r+b') as file:
    file.seek(max(end - 1, 0))
    torn = file.read(min(end, 1)) not in (b'', b'\n')
    file.truncate(end)
    file.write(b'\n' * torn)
    file.flush()
    os.fsync(file.fileno())


def _cut_torn(file: BinaryIO) -> None:
  """Cuts off the end of a file that follows its last newline."""
  end = file.seek(0, os.SEEK_END)
  start = end
  while start:
    start = max(0, start - 4096)
    file.seek(start)
    place = file.read(4096).rfind(b'\n')
    if place >= 0:
      start += place + 1
      break
  if start < end:
    file.truncate(start)


class Rows:
  """Appends rows to a .jsonl file: whole rows, and in order.

  If the disk is full, a row waits in memory and is tried again with each later
  row. `close` raises the OSError if rows are still waiting: no row is lost
  silently, and only a kill can tear one. A torn last row is cut off first:
  nothing after it could be read. Once a minute, and at the end, rows are forced
  to the disk: a machine that is taken away loses a minute of them.
  """

  def __init__(self, path: pathlib.Path):
    self._file = open(path, 'a+b', buffering=0)
    _cut_torn(self._file)
    self._path = path
    self._waiting: list[bytes] = []
    self._synced = time.monotonic()

  def append(self, row: dict) -> None:
    """Writes the row, now or with a later one."""
    self._waiting.append(_line(row).encode())
    try:
      self._flush()
      if time.monotonic() - self._synced >= _SYNC_SECONDS:
        self.sync()
    except OSError as error:
      if len(self._waiting) == 1:
        print(f'WARNING: {trouble(self._path, error)}; rows wait in memory.')

  def sync(self) -> None:
    """Waits until the rows are on the disk.

    Raises:
      OSError: the disk fails.
    """
    self._synced = time.monotonic()
    try:
      os.fsync(self._file.fileno())
    except OSError as error:
      if error.errno != errno.EINVAL:  # no disk
        raise

  def close(self) -> None:
    """Writes the rows that still wait, and closes the file.

    Raises:
      OSError: they cannot be written.
    """
    try:
      self._flush()
      self.sync()
    finally:
      self._file.close()

  def _flush(self):
    while self._waiting:
      line, end = self._waiting[0], os.fstat(self._file.fileno()).st_size
      try:
        size = self._file.write(line)
        if size != len(line):
          raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
      except OSError:
        with contextlib.suppress(OSError):  # the first error says more
          os.ftruncate(self._file.fileno(), end)
        raise
      self._waiting.pop(0)
