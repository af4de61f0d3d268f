"""A watchdog ends a process whose step takes too long, and prints its stacks.

After a peer dies or a device is lost, a step waits for ever, silently and at
full price. Compilation takes long without any fault: arm the watchdog only for
a step that is compiled. Time in which the process itself stood still (SIGSTOP,
a sleeping laptop) does not count: the thread waits in slices, and however long
one takes it counts as one.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

_SLICES = 20
_BACKSTOP = 10  # times the seconds, for the thread of C


class Watchdog:
  """Counts `seconds` (0: for ever) from each `arm`, in a `with` block.

  `wait(condition, predicate, timeout)` is its clock, and `end(code)` ends the
  process.
  """

  def __init__(
    self,
    seconds: float,
    wait: Callable[..., bool] = threading.Condition.wait_for,
    end: Callable[[int], Any] = os._exit,
  ):
    self._seconds, self._wait, self._end = seconds, wait, end
    self._changed = threading.Condition()
    self._name, self._turn, self._over = '', 0, False
    self._thread = threading.Thread(target=self._watch, daemon=True)

  def __enter__(self) -> Watchdog:
    if self._seconds:
      self._thread.start()
    return self

  def __exit__(self, *_) -> None:
    self._set('', over=True)
    if self._seconds:
      self._thread.join()

  def arm(self, name: str) -> None:
    """Watches the step `name` from now on, in place of the one before."""
    self._set(name)

  def rest(self) -> None:
    """Watches nothing until the next `arm`."""
    self._set('')

  def _set(self, name, over=False):
    if not self._seconds:
      return
    with self._changed:
      self._name, self._over = name, over
      self._turn += 1
      self._changed.notify()
    # A thread of C, in case Python's own threads cannot run.
    if name:
      faulthandler.dump_traceback_later(
        self._seconds * _BACKSTOP, exit=True, file=sys.__stderr__
      )
    else:
      faulthandler.cancel_dump_traceback_later()

  def _watch(self):
    with self._changed:
      while not self._over:
        turn, name = self._turn, self._name
        moved = lambda turn=turn: self._turn != turn
        slices = 0
        while name and not moved() and slices < _SLICES:
          self._wait(self._changed, moved, self._seconds / _SLICES)
          slices += 1
        if name and not moved():
          self._end_process(name)
        if not name:
          self._wait(self._changed, moved, None)

  def _end_process(self, name):
    faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
    print(
      f'error: {name} took longer than config.run.step_timeout='
      f'{self._seconds:g} s; every stack is above. It may wait for a process '
      'or device that is gone; the same command resumes at the last checkpoint',
      file=sys.__stderr__,
      flush=True,
    )
    self._end(1)
