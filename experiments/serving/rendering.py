"""Asks the process that renders chat templates (`renderer`), and waits for it.

The process starts at the first chat and stays for the others: starting it takes
a hundred times as long as a chat does.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.util
import json
import os
import subprocess
import sys
import threading
from typing import NamedTuple

from mla_moe.config import ConfigError

from . import renderer


class Rendered(NamedTuple):
  """A chat's text; own: (start, end) of the characters of the template."""

  text: str
  own: list[tuple[int, int]]

  def has_own(self, start: int, end: int) -> bool:
    """Returns whether the template wrote all these characters."""
    return any(a <= start and end <= b for a, b in self.own)

  def is_own_free(self, start: int, end: int) -> bool:
    """Returns whether the template wrote none of these characters."""
    return all(end <= a or b <= start for a, b in self.own)


def run(template: str, values: dict | None, names: dict[str, str]) -> Rendered:
  """Returns the rendered template; without values it is only compiled.

  Raises:
    ConfigError: no jinja2, or a template that fails.
  """
  if importlib.util.find_spec('jinja2') is None:
    raise ConfigError('a chat template needs jinja2: pip install "mla_moe[hf]"')
  request = {'template': template, 'values': values, 'names': names}
  answer = _child().ask(request | {'seconds': renderer.SECONDS})
  if 'error' in answer:
    raise ConfigError(f'the chat template fails ({answer["error"]})')
  return Rendered(answer['text'], [tuple(span) for span in answer['own']])


class _Child:
  """The process that renders; it starts at the first request, and again after
  one that the kernel has ended."""

  def __init__(self):
    self._lock = threading.Lock()
    self._process = None
    atexit.register(self._end)

  def ask(self, request: dict) -> dict:
    """Returns the answer to a request: {'text', 'own'} or {'error'}."""
    with self._lock:
      if self._process is None or self._process.poll() is not None:
        self._end()
        self._process = subprocess.Popen(
          [sys.executable, '-P', renderer.__file__],
          stdin=subprocess.PIPE,
          stdout=subprocess.PIPE,
          stderr=subprocess.DEVNULL,
          start_new_session=True,  # Ctrl-C ends an answer, and not this
        )
      line = b''
      with contextlib.suppress(BrokenPipeError):
        self._process.stdin.write(json.dumps(request).encode() + b'\n')
        self._process.stdin.flush()
        line = self._process.stdout.readline()
      if line:
        return json.loads(line)
      self._end()
    limits = f'{renderer.SECONDS} s or {renderer.MEMORY >> 20} MiB'
    return {'error': f'it needs more than {limits}'}

  def _end(self) -> None:
    process, self._process = self._process, None
    if process is not None:
      process.kill()
      process.stdout.close()
      with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
      process.wait()


@functools.lru_cache(maxsize=1)
def _child_of(pid: int) -> _Child:
  return _Child()


def _child() -> _Child:
  """Returns the child of this process; a fork gets its own."""
  return _child_of(os.getpid())
