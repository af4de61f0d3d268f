"""A run in a bucket: gs://BUCKET/RUN, its records, and its copy on a machine.

Checkpoints go to the bucket by themselves (`saving`). The small files of a run,
its records, are appended to, which an object cannot be: they are in a folder of
this machine and are copied to the bucket before each seal, and at the end. So
the rows of a sealed step are there before the step counts. A start copies them
back first, maybe on another machine.

A program that only reads a run copies its records, too, into a folder that
knows its bucket (`workdir.checkpoints`): the checkpoints stay there and are
read there. So `here` is all that such a program needs.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator

from mla_moe.config import Config, ConfigError

from .. import cli, workdir
from . import lease, storage

_ORIGIN = workdir.ORIGIN
_OWN = {lease.NAME, lease.PROBE, _ORIGIN, 'checkpoints', 'profile'}  # no copy
_WEIGHTS = '.safetensors', '.bin', '.gguf', '.pt'
# A service that does not answer is given up after their sum: 20 seconds.
_PATIENCE, _TIMEOUT = 10.0, (4.0, 6.0)


def local(url: str, purpose: str = 'gs') -> pathlib.Path:
  """Returns this machine's folder for the records of the run `url`."""
  name = url.removeprefix(storage.SCHEME).strip('/')
  if not name or '..' in name.split('/'):
    raise ConfigError(f'workdir={url!r}: must be gs://BUCKET/FOLDER')
  return pathlib.Path.home() / '.cache' / 'mla_moe' / purpose / name


def home(folder: os.PathLike | str) -> pathlib.Path:
  """Returns the folder beside which a run's text has its tokens: here."""
  if storage.is_bucket(folder):
    return local(os.fspath(folder))
  return pathlib.Path(folder)


def reach(url: str) -> None:
  """Asks the service for one object: its refusal, or silence, is known early.

  Later requests are repeated for minutes, as a run outlives a short pause.

  Raises:
    ConfigError: no library, credentials, access, bucket, or answer.
  """
  client = storage.client()
  from google.api_core import exceptions
  from google.cloud.storage.retry import DEFAULT_RETRY

  name, _, prefix = url.removeprefix(storage.SCHEME).partition('/')
  options = dict(timeout=_TIMEOUT, retry=DEFAULT_RETRY.with_timeout(_PATIENCE))
  with one_line(url):
    try:
      list(client.list_blobs(name, prefix=prefix, max_results=1, **options))
    except exceptions.RetryError as error:
      text = ' '.join(str(error.cause or error).split())[:120]
      raise ConfigError(
        f'{url}: the service gave no answer for {_PATIENCE:.0f} s ({text})'
      ) from None


class Records:
  """Copies of a run's small files, between `folder` and the bucket."""

  def __init__(self, url: str, folder: pathlib.Path):
    name, _, prefix = url.removeprefix(storage.SCHEME).partition('/')
    self._bucket = storage.client().bucket(name)
    self._prefix, self._folder = f'{prefix.strip("/")}/', folder
    self._url = url.rstrip('/')
    self._sent: dict[str, tuple] = {}

  def fetch(self) -> None:
    """Copies the bucket's files here; the bucket's are the right ones.

    Those that only this machine has are of a run that the bucket has lost, or
    of one that ended before its first copy: they go. A program that reads a
    copy meanwhile sees whole files.

    Raises:
      ConfigError: the folder has a release's weights.
    """
    names = _records(storage.objects(self._url), '/checkpoints/')
    for name in names:
      if '/' not in name and name.endswith(_WEIGHTS):
        raise ConfigError(
          f'{self._url}: holds {name}, and so no run; a release is read from '
          f'a disk: gcloud storage cp -r {self._url} .'
        )
    for name in self._here():
      if name not in names:
        (self._folder / name).unlink(missing_ok=True)
    for name in names:
      path = self._folder / name
      path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
      scratch = path.with_name(f'{path.name}.{os.getpid()}.new')
      self._bucket.blob(self._prefix + name).download_to_filename(scratch)
      os.replace(scratch, path)
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


def here(name: str, value: os.PathLike | str) -> pathlib.Path:
  """Returns a folder of this machine by which a run can be read.

  It is the folder that the flag `name` gives, or the copy of a run in a bucket.

  Raises:
    ConfigError: as `cli.run_folder` and `reach`; or no run is there.
  """
  place = cli.run_folder(name, value)
  if not storage.is_bucket(place):
    return place
  folder = _fetched(place, local(place, 'read'))
  if not (folder / 'config.json').exists():
    raise ConfigError(
      f'{name}={place!r}: holds no run, which has a config.json'
    )
  print(
    f'{place}: its records are copied to {folder}, its checkpoints are read '
    'there.',
    file=sys.stderr,
  )
  return folder


def runs(name: str, values: Iterable[str]) -> list[pathlib.Path]:
  """Returns `here` of each value; of a bucket's folder of runs, of each run.

  Raises:
    ConfigError: as `here`.
  """
  folders = []
  for value in values:
    place = cli.run_folder(name, value)
    if not storage.is_bucket(place):
      folders.append(place)
      continue
    reach(place)
    with one_line(place):
      names = [x.rpartition('/') for x in storage.objects(place)]
    inside = [x for x, _, file in names if x and file == 'config.json']
    if any(not x and file == 'config.json' for x, _, file in names):
      inside = ['']
    places = [f'{place.rstrip("/")}/{x}' for x in inside] or [place]
    folders += [here(name, each) for each in places]
  return folders


def fetched(url: str, process: int = 0) -> pathlib.Path:
  """Returns a folder here with a run's records, for one process of the run."""
  folder = local(url)
  # Process 0 may be of this machine, and write to the folder itself.
  return _fetched(url, folder.with_name(f'{folder.name}@{process}'))


def _fetched(url: str, folder: pathlib.Path) -> pathlib.Path:
  reach(url)
  with one_line(url):
    opened(url, folder)
  return folder


def opened(url: str, folder: pathlib.Path) -> Records:
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
    raise ConfigError(f'{url}: {text}') from None


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
  reach(url)
  folder = local(url)
  with contextlib.ExitStack() as stack:
    with one_line(url):
      lock = stack.enter_context(lease.Lock(url))
      records = opened(url, folder)

    def send() -> None:
      lock.hold()  # first: the records of another holder are newer
      records.send()
      lock.hold()

    try:
      with workdir.claim(folder, config):
        with one_line(url):
          send()
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
