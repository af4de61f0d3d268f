"""The lock of a run in a bucket, an object with its holder's name: a lease.

It is written with its generation as a condition: of two writers the service
lets one win. The holder rewrites it twice a minute and before each seal. One
that stays unchanged for two minutes, by the service's clock, was left by a
kill; on the same machine a dead process gives it up at once. A holder that has
lost the lock ends the process: it saves nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import secrets
import sys
import threading
from typing import Any

from mla_moe.config import ConfigError

from . import storage

NAME, PROBE = 'lock', 'lock.probe'
_BEAT = 30.0  # seconds
_STALE = 120.0


class Lost(Exception):
  """Another process has the lock."""


class Lock:
  """The object `lock` of a run in a bucket; use it in a `with` block.

  beat: seconds between two signs of life. stale: seconds without one that free
  it. It is in the object: others go by its holder's number, or by their own if
  that is less.
  """

  def __init__(self, url: str, beat: float = _BEAT, stale: float = _STALE):
    name, _, prefix = url.removeprefix(storage.SCHEME).partition('/')
    self._bucket = storage.client().bucket(name)
    self._prefix, self._url = f'{prefix.strip("/")}/', url
    self._beat, self._stale = beat, stale
    self._one = threading.Lock()
    self._ended = threading.Event()
    self._generation = 0
    mine = me() | {'stale': stale, 'nonce': secrets.token_hex(8)}
    self._text = json.dumps(mine).encode()

  def __enter__(self) -> Lock:
    before = self._bucket.get_blob(self._prefix + NAME)
    if before is not None:
      text = before.download_as_bytes().decode(errors='replace')
      age, stale = self._age(before), min(self._stale, _stale(text))
      if age < stale and not _is_dead(text):
        raise ConfigError(
          f'workdir={self._url!r}: {_holder(text)} is writing to it, or was '
          f'{age:.0f} s ago; its lock ends {stale:.0f} s after its '
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
    blob = self._bucket.blob(self._prefix + NAME)
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
      blob = self._bucket.blob(self._prefix + NAME)
      try:
        blob.upload_from_string(
          self._text, if_generation_match=self._generation
        )
      except exceptions.PreconditionFailed:
        blob = self._bucket.get_blob(self._prefix + NAME)
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
    probe = self._bucket.blob(self._prefix + PROBE)
    probe.upload_from_string(b'')
    probe.reload()
    return (probe.updated - blob.updated).total_seconds()


def me() -> dict[str, Any]:
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
  mine, pid = me(), None
  with contextlib.suppress(ValueError, AttributeError, TypeError):
    holder = json.loads(text)
    same = all(holder.get(name) == mine[name] for name in ('boot', 'space'))
    pid = int(holder['pid']) if same and mine['boot'] else None
  if not pid or pid < 0:
    return False
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return True
  except OSError:
    pass
  return False


def _stale(text: str) -> float:
  """Returns the seconds that the lock's holder has given itself."""
  try:
    return float(json.loads(text)['stale'])
  except (ValueError, KeyError, TypeError):
    return _STALE


def _holder(text: str) -> str:
  try:
    holder = json.loads(text)
    return f'process {int(holder["pid"])} on {str(holder["host"])!r}'
  except (ValueError, KeyError, TypeError):
    return 'another process'
