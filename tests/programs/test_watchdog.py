"""The watchdog ends a process that hangs, and no other."""

import subprocess
import sys
import threading

import pytest

from experiments.training import watchdog

_PROGRAM = """
import time
from experiments.training import watchdog
with watchdog.Watchdog(1.0) as guard:
  guard.arm('step 7'); time.sleep(60)
"""


def test_a_hanging_step_ends_the_process_with_its_stack():
  ran = subprocess.run(
    [sys.executable, '-c', _PROGRAM], capture_output=True, text=True
  )
  assert ran.returncode == 1
  last = ran.stderr.splitlines()[-1]
  assert last.startswith('error: step 7 took longer than')
  assert 'File "<string>", line 5 in <module>' in ran.stderr


class Ended(Exception):
  """In the place of the process's end."""


def test_only_a_step_that_takes_all_its_slices_ends_the_process(capfd):
  """Slices are counted, however long one takes: the process may stand still."""
  waited = []

  def wait(condition, moved, timeout):
    waited.append(timeout)
    for action in actions.get(len(waited), ()):
      action()
    return moved()

  def end(code):
    raise Ended(code)

  guard = watchdog.Watchdog(20.0, wait, end)
  arm = lambda name: lambda: guard.arm(name)
  actions = {
    1: [arm('step 1')],  # it rests until then
    20: [arm('step 2')],  # after 19 slices of step 1
    39: [guard.rest],
    40: [arm('step 3'), arm('step 4')],
  }
  with pytest.raises(Ended, match='1'):
    guard._watch()
  guard.rest()
  assert waited == [None] + 38 * [1.0] + [None] + 20 * [1.0]
  error = capfd.readouterr().err
  assert error.count('took longer') == 1 and 'error: step 4 took' in error


def test_zero_seconds_watch_nothing():
  before = threading.active_count()
  with watchdog.Watchdog(0.0) as guard:
    guard.arm('step 1')
    assert threading.active_count() == before
