"""Ends a process whose step takes too long, and says where it hangs.

A dead peer or a lost device leaves a step waiting for ever, silently, at full
price. Compilation is no step: arm it only around what has been compiled. Time
in which this process itself stood still (SIGSTOP, a sleeping laptop) does not
count: the seconds are counted in slices, and a slice is never longer than that.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading

_SLICES = 20
_BACKSTOP = 10


class Watchdog:
  """Counts `seconds` (0: for ever) from each `arm`; for a `with` block."""

  def __init__(self, seconds: float):
    self._seconds = seconds
    self._changed = threading.Condition()
    self._what, self._turn, self._over = '', 0, False
    self._thread = threading.Thread(target=self._watch, daemon=True)

  def __enter__(self) -> Watchdog:
    if self._seconds:
      self._thread.start()
    return self

  def __exit__(self, *_) -> None:
    self._set('', over=True)
    if self._seconds:
      self._thread.join()

  def arm(self, what: str) -> None:
    """`what` begins now; what was watched before has ended."""
    self._set(what)

  def rest(self) -> None:
    """Nothing is watched until the next `arm`."""
    self._set('')

  def _set(self, what, over=False):
    if not self._seconds:
      return
    with self._changed:
      self._what, self._over = what, over
      self._turn += 1
      self._changed.notify()
    # A thread of C, for when Python's own cannot run.
    if what:
      faulthandler.dump_traceback_later(
        self._seconds * _BACKSTOP, exit=True, file=sys.__stderr__
      )
    else:
      faulthandler.cancel_dump_traceback_later()

  def _watch(self):
    with self._changed:
      while not self._over:
        turn, what = self._turn, self._what
        moved = lambda turn=turn: self._turn != turn
        slices = 0
        while what and not moved() and slices < _SLICES:
          self._changed.wait_for(moved, self._seconds / _SLICES)
          slices += 1
        if what and not moved():
          self._bark(what)
        if not what:
          self._changed.wait_for(moved)

  def _bark(self, what):
    faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
    print(
      f'error: {what} took longer than config.run.step_timeout='
      f'{self._seconds:g} s; every stack is above. It may wait for a process '
      'or device that is gone; the same command resumes at the last checkpoint',
      file=sys.__stderr__,
      flush=True,
    )
    os._exit(1)
