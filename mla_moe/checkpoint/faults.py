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
from typing import Any

VARIABLE = 'MLA_MOE_FAULT'
ACTIONS = ('kill', 'term', 'full', 'slow', 'hang', 'nan', 'spike', 'flip')
POINTS = ('step', 'before_write', 'during_write', 'before_seal', 'after_seal')

struck: set[tuple[str, int]] = set()  # (rule, step)


def disturb(step: int, rates: Any, state: Any) -> tuple[Any, Any]:
  """Returns the step's (rates, state), changed by the faults of the step.

  A NaN comes by `rates.mtp_loss`, the weight of a term of the loss that is an
  input of the compiled step.
  """
  actions = reach('step', step)
  if 'nan' in actions:
    rates = rates._replace(mtp_loss=float('nan'))
  if 'spike' in actions:
    window = dict(state.loss_window)
    window['losses'] = window['losses'] - 1e4
    state = state.replace(loss_window=window)
  if 'flip' in actions:
    state = state.replace(params=_flipped(state.params))
  return rates, state


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


def _flipped(params):
  """Returns the tree with one bit flipped: first leaf, last device."""
  import jax
  import numpy as np

  leaves, tree = jax.tree.flatten(params)
  shards = [shard.data for shard in leaves[0].addressable_shards]
  host = np.array(shards[-1])
  host.reshape(-1).view(np.uint8)[2] ^= 1
  (device,) = shards[-1].devices()
  shards[-1] = jax.device_put(host, device)
  leaves[0] = jax.make_array_from_single_device_arrays(
    leaves[0].shape, leaves[0].sharding, shards
  )
  return jax.tree.unflatten(tree, leaves)
