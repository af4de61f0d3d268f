"""The watchdog ends a process that hangs, and no other."""

import signal
import subprocess
import sys
import threading
import time

from experiments.training import watchdog

_PROGRAM = """
import os, signal, sys, time
from experiments.training import watchdog
with watchdog.Watchdog(1.0) as guard:
  guard.rest(); time.sleep(1.5)
  for step in range(5):
    guard.arm(f'step {step}'); time.sleep(0.4)
  print('alive', flush=True)
  guard.arm('step 7'); time.sleep(float(sys.argv[1]))
print('over')
"""


def test_a_hanging_step_ends_the_process_with_its_stack():
  ran = subprocess.run(
    [sys.executable, '-c', _PROGRAM, '60'], capture_output=True, text=True
  )
  assert ran.returncode == 1 and ran.stdout == 'alive\n'
  last = ran.stderr.splitlines()[-1]
  assert last.startswith('error: step 7 took longer than')
  assert 'File "<string>", line 9 in <module>' in ran.stderr


def test_the_time_in_which_the_process_stood_still_does_not_count():
  child = subprocess.Popen(
    [sys.executable, '-c', _PROGRAM, '0.5'], stdout=subprocess.PIPE, text=True
  )
  assert child.stdout.readline() == 'alive\n'
  child.send_signal(signal.SIGSTOP)
  time.sleep(2)
  child.send_signal(signal.SIGCONT)
  assert child.communicate()[0] == 'over\n' and child.returncode == 0


def test_zero_seconds_watch_nothing():
  before = threading.active_count()
  with watchdog.Watchdog(0.0) as guard:
    guard.arm('step 1')
    assert threading.active_count() == before
