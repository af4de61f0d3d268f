"""Faults on purpose: named points of the program where tests can break it.

The environment variable MLA_MOE_FAULT contains rules, joined by commas:
`ACTION@POINT[:STEP[-STEP]]`. A rule strikes each step once per process, so a
run that goes back over a step finds it healthy. Without the variable a point
costs one look into the environment, on the host. Compiled programs contain no
faults: numbers are broken by a step's inputs, memory between two steps.

  kill   SIGKILL, as the kernel's out-of-memory killer sends it
  term   SIGTERM, as a scheduler sends it
  full   the disk is full: OSError(ENOSPC)
  slow   a sleep of one second
  hang   a sleep of one hour
  nan    the step's loss is NaN
  spike  the step's loss is huge beside the losses of the window, which fall
         by 10,000 and stay so until the run goes back
  flip   one bit of one parameter is flipped, on one device

Points: `step` (before a step of the loop), `before_write`, `during_write`,
`before_seal` and `after_seal` of a checkpoint.
"""

from __future__ import annotations

import errno
import os
import signal
import time

VARIABLE = 'MLA_MOE_FAULT'
ACTIONS = ('kill', 'term', 'full', 'slow', 'hang', 'nan', 'spike', 'flip')
POINTS = ('step', 'before_write', 'during_write', 'before_seal', 'after_seal')

struck: set[tuple[str, int]] = set()  # (rule, step)


def reach(point: str, step: int) -> set[str]:
  """Strikes the point and step: signals, sleeps or raises.

  Returns:
    The actions among nan, spike and flip, which the caller must carry out.

  Raises:
    OSError: the action `full`.
    ValueError: a rule that names no action or point.
  """
  actions = set()
  for rule in os.environ.get(VARIABLE, '').split(','):
    if not rule:
      continue
    action, _, target = rule.partition('@')
    target, _, steps = target.partition(':')
    if action not in ACTIONS or target not in POINTS:
      raise ValueError(f'{VARIABLE}: {rule!r} is no ACTION@POINT[:STEP]')
    first, _, last = steps.partition('-')
    inside = not steps or int(first) <= step <= int(last or first)
    if target == point and inside and (rule, step) not in struck:
      struck.add((rule, step))
      actions.add(action)
  if 'kill' in actions:
    os.kill(os.getpid(), signal.SIGKILL)
  if 'term' in actions:
    os.kill(os.getpid(), signal.SIGTERM)
  if 'slow' in actions or 'hang' in actions:
    time.sleep(3600 if 'hang' in actions else 1)
  if 'full' in actions:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
  return actions & {'nan', 'spike', 'flip'}
