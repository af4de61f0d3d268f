"""A run in a bucket: gs://BUCKET/RUN, claimed by one process, with its records.

Checkpoints go to the bucket by themselves (`saving`). The small files of a run,
its records, are appended to, which an object cannot be: they are in a folder of
this machine and are copied to the bucket before each seal, and at the end. So
the rows of a sealed step are there before the step counts. A start copies them
back first, maybe on another machine.

The lock is an object with the holder's name, written with its generation as a
condition: of two writers the service lets one win. The holder rewrites it twice
a minute and before each seal. One that stays unchanged for two minutes, by the
service's clock, was left by a kill; on the same machine a dead process gives it
up at once. A holder that has lost the lock ends the process: it saves nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import secrets
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from mla_moe.config import Config, ConfigError

from .. import cli, workdir
from . import storage

LOCK = 'lock'
_PROBE = 'lock.probe'
_ORIGIN = workdir.ORIGIN
_BEAT = 30.0  # seconds
_STALE = 120.0
_OWN = {LOCK, _PROBE, _ORIGIN, 'checkpoints', 'profile'}  # not copied


def local(url: str) -> pathlib.Path:
  """Returns this machine's folder for the records of the run `url`."""
  name = url.removeprefix(storage.SCHEME).strip('/')
  if not name or '..' in name.split('/'):
    raise ConfigError(f'workdir={url!r}: must be gs://BUCKET/FOLDER')
  return pathlib.Path.home() / '.cache' / 'mla_moe' / 'gs' / name


def client() -> Any:
  """Returns the client of Google's library.

  Raises:
    ConfigError: the extra is not installed, or nothing says who asks.
  """
  try:
    import gcsfs  # noqa: F401, of Orbax
    from google.auth.exceptions import DefaultCredentialsError

    return storage.client()
  except ImportError:
    raise ConfigError(
      'gs://: needs Google\'s libraries; pip install "mla_moe[gcs]"'
    ) from None
  except (DefaultCredentialsError, OSError) as error:
    text = ' '.join(str(error).split())[:200]
    raise ConfigError(f'gs://: no credentials ({text})') from None


class Records:
  """Copies of a run's small files, between `folder` and the bucket."""

  def __init__(self, url: str, folder: pathlib.Path):
    name, _, prefix = url.removeprefix(storage.SCHEME).partition('/')
    self._bucket = client().bucket(name)
    self._prefix, self._folder = f'{prefix.strip("/")}/', folder
    self._sent: dict[str, tuple] = {}

  def fetch(self) -> None:
    """Copies the bucket's files here; the bucket's are the right ones.

    Those that only this machine has are of a run that the bucket has lost, or
    of one that ended before its first copy: they go.
    """
    url = f'{storage.SCHEME}{self._bucket.name}/{self._prefix}'
    names = _records(storage.objects(url), '/checkpoints/')
    for name in self._here():
      if name not in names:
        (self._folder / name).unlink()
    for name in names:
      path = self._folder / name
      path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
      self._bucket.blob(self._prefix + name).download_to_filename(path)
      self._sent[name] = _stamp(path)

  def send(self) -> None:
    """Copies the files that have changed to the bucket."""
    for name in self._here():
      path = self._folder / name
      stamp = _stamp(path)
      if self._sent.get(name) == stamp:
        continue
      self._bucket.blob(self._prefix + name).upload_from_string(
        path.read_bytes()
      )
      self._sent[name] = stamp

  def _here(self) -> list[str]:
    """Returns the names of this machine's copies."""
    paths = (p for p in sorted(self._folder.rglob('*')) if p.is_file())
    names = [path.relative_to(self._folder).as_posix() for path in paths]
    return _records(names, f'/{_ORIGIN}')


def _records(names: Iterable[str], mark: str) -> list[str]:
  """Returns the names of records; `mark` is in every other run below."""
  names = list(names)
  others = [f'{x.partition(mark)[0]}/' for x in names if mark in x]
  return [
    name
    for name in names
    if name.split('/')[0] not in _OWN
    and not name.endswith('.new')
    and not name.startswith(tuple(others))
  ]


def _stamp(path: pathlib.Path) -> tuple[int, int]:
  status = path.stat()
  return status.st_size, status.st_mtime_ns


class Lost(Exception):
  """Another process has the lock."""


class Lock:
  """The object `lock` of a run in a bucket; use it in a `with` block."""

  def __init__(self, url: str, beat: float = _BEAT, stale: float = _STALE):
    name, _, prefix = url.removeprefix(storage.SCHEME).partition('/')
    self._bucket = client().bucket(name)
    self._prefix, self._url = f'{prefix.strip("/")}/', url
    self._beat, self._stale = beat, stale
    self._one = threading.Lock()
    self._ended = threading.Event()
    self._generation = 0
    self._text = json.dumps(_me() | {'nonce': secrets.token_hex(8)}).encode()

  def __enter__(self) -> Lock:
    before = self._bucket.get_blob(self._prefix + LOCK)
    if before is not None:
      text = before.download_as_bytes().decode(errors='replace')
      age = self._age(before)
      if age < self._stale and not _is_dead(text):
        raise ConfigError(
          f'workdir={self._url!r}: {_holder(text)} is writing to it, or was '
          f'{age:.0f} s ago; its lock ends {self._stale:.0f} s after its '
          'last sign of life: wait, or name another folder'
        )
      self._generation = before.generation
    try:
      self.renew()
    except Lost:
      raise ConfigError(
        f'workdir={self._url!r}: another process has just begun to write to '
        'it; name another folder'
      ) from None
    self._thread = threading.Thread(target=self._keep, daemon=True)
    self._thread.start()
    return self

  def __exit__(self, *_) -> None:
    self._ended.set()
    self._thread.join()
    blob = self._bucket.blob(self._prefix + LOCK)
    with contextlib.suppress(Exception):  # a lock that stays grows stale
      blob.delete(if_generation_match=self._generation)

  def renew(self) -> None:
    """Writes the lock again.

    Google's library repeats a write whose answer was lost, and the service then
    refuses the second: the lock's content says whose it is.

    Raises:
      Lost: it is no longer ours.
    """
    from google.api_core import exceptions

    with self._one:
      blob = self._bucket.blob(self._prefix + LOCK)
      try:
        blob.upload_from_string(
          self._text, if_generation_match=self._generation
        )
      except exceptions.PreconditionFailed:
        blob = self._bucket.get_blob(self._prefix + LOCK)
        if blob is None or blob.download_as_bytes() != self._text:
          raise Lost from None
      self._generation = blob.generation

  def hold(self) -> None:
    """Writes the lock again; ends the process if it is another's."""
    try:
      self.renew()
    except Lost:
      print(
        f'error: {self._url}: another process has taken this run over; '
        'nothing more is saved here',
        file=sys.stderr,
        flush=True,
      )
      os._exit(1)

  def _keep(self):
    """Renews the lock; a service that does not answer is asked again."""
    while not self._ended.wait(self._beat):
      with contextlib.suppress(Exception):  # of the service or of credentials
        self.hold()

  def _age(self, blob) -> float:
    """Returns the seconds since a write, by the service's clock alone."""
    probe = self._bucket.blob(self._prefix + _PROBE)
    probe.upload_from_string(b'')
    probe.reload()
    return (probe.updated - blob.updated).total_seconds()


def _me() -> dict[str, Any]:
  """Returns this process's name: its machine since its start, and its id."""
  boot = pathlib.Path('/proc/sys/kernel/random/boot_id')
  space = pathlib.Path('/proc/self/ns/pid')
  return {
    'pid': os.getpid(),
    'host': os.uname().nodename,
    'boot': boot.read_text(encoding='utf-8').strip() if boot.exists() else '',
    'space': space.stat().st_ino if space.exists() else 0,
  }


def _is_dead(text: str) -> bool:
  """Whether a lock's holder was a process of this machine that has ended."""
  me, pid = _me(), None
  with contextlib.suppress(ValueError, AttributeError, TypeError):
    holder = json.loads(text)
    same = all(holder.get(name) == me[name] for name in ('boot', 'space'))
    pid = int(holder['pid']) if same and me['boot'] else None
  if not pid or pid < 0:
    return False
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return True
  except OSError:
    pass
  return False


def _holder(text: str) -> str:
  try:
    holder = json.loads(text)
    return f'process {int(holder["pid"])} on {str(holder["host"])!r}'
  except (ValueError, KeyError, TypeError):
    return 'another process'


def fetched(url: str, process: int = 0) -> pathlib.Path:
  """Returns a folder here with the records of a run, to be read alone."""
  client()
  folder = local(url)
  # A run of this machine may be writing to the folder itself.
  folder = folder.with_name(f'{folder.name}@{process}')
  with one_line(url):
    _opened(url, folder)
  return folder


def _opened(url: str, folder: pathlib.Path) -> Records:
  """Returns the records, fetched into a folder that knows its bucket."""
  folder.mkdir(parents=True, exist_ok=True, mode=0o700)
  records = Records(url, folder)
  records.fetch()
  origin = {'url': f'{url.rstrip("/")}/checkpoints'}
  workdir.write(folder / _ORIGIN, json.dumps(origin))
  return records


@contextlib.contextmanager
def one_line(url: str) -> Iterator[None]:
  """Makes one line of the service's refusals in the block."""
  try:
    yield
  except refusals() as error:
    text = ' '.join(str(error).split())[:200]
    raise ConfigError(f'workdir={url!r}: {text}') from None


def refusals() -> tuple[type[Exception], ...]:
  """Returns the types of the service's errors, in each of its libraries."""
  from gcsfs.retry import HttpError
  from google.api_core import exceptions
  from google.auth.exceptions import GoogleAuthError

  return exceptions.GoogleAPIError, GoogleAuthError, HttpError, OSError


@contextlib.contextmanager
def claim(url: str, config: Config) -> Iterator[tuple[pathlib.Path, Callable]]:
  """Yields the folder of a run's records here, and the call that sends them.

  `send` is for the moment before a seal: it renews the lock, too.

  Raises:
    ConfigError: the bucket denies, or another process has the run.
    cli.Stopped: the bucket failed later.
  """
  client()
  folder = local(url)
  with contextlib.ExitStack() as stack:
    with one_line(url):
      lock = stack.enter_context(Lock(url))
      records = _opened(url, folder)
    stack.enter_context(workdir.claim(folder, config))

    def send() -> None:
      lock.hold()  # first: the records of another holder are newer
      records.send()
      lock.hold()

    with one_line(url):
      send()
    try:
      yield folder, send
    except BaseException as error:  # says more than a copy that fails, too
      with contextlib.suppress(Exception):
        send()
      is_local = isinstance(error, OSError) and error.errno is not None
      if is_local or not isinstance(error, refusals()):
        raise
      text = ' '.join(str(error).split())[:200]
      raise cli.Stopped(f'{url}: {text}') from error
    try:
      with one_line(url):
        send()
    except ConfigError as error:
      raise cli.Stopped(
        f'{error}; the last rows are in {folder}, but not in the bucket'
      ) from None
