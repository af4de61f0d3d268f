"""Asks the process that renders chat templates (`renderer`), and waits for it.

The process starts at the first chat and stays for the others: starting it takes
a hundred times as long as a chat does.
"""

from __future__ import annotations

import atexit
import functools
import importlib.util
import os
import threading
from typing import NamedTuple

from mla_moe.config import ConfigError

from .. import child
from . import renderer

_START = 30  # seconds, in which the process starts and imports jinja2
_SLOWER = 20  # a busy machine's seconds for one of a processor


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
  answer = _renderer().ask(request)
  if 'error' in answer:
    raise ConfigError(f'the chat template fails ({answer["error"]})')
  return Rendered(answer['text'], [tuple(span) for span in answer['own']])


class _Renderer:
  """The process that renders, of one thread at a time."""

  def __init__(self):
    self._lock = threading.Lock()
    self.child = child.Child(renderer.__file__)
    atexit.register(self.child.close)

  def ask(self, request: dict) -> dict:
    """Returns the answer to a request: {'text', 'own'} or {'error'}."""
    request |= {'seconds': renderer.SECONDS}
    with self._lock:
      try:
        return self.child.ask(request, _START + _SLOWER * renderer.SECONDS)
      except child.ChildError:
        limits = f'{renderer.SECONDS} s or {renderer.MEMORY >> 20} MiB'
        return {'error': f'it needs more than {limits}'}


@functools.lru_cache(maxsize=1)
def _renderer_of(pid: int) -> _Renderer:
  return _Renderer()


def _renderer() -> _Renderer:
  """Returns the renderer of this process; a fork gets its own."""
  return _renderer_of(os.getpid())
