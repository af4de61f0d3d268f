"""Faults on purpose: named points of the program, where tests break it.

The environment variable MLA_MOE_FAULT holds rules `ACTION@POINT[:STEP[-STEP]]`,
joined by commas, each of which strikes a step once in a process: a run that
goes back over a step finds it healthy. Without the variable a point costs one
look into the environment, on the host.
No compiled program contains anything of this: faults of numbers are made of
inputs, faults of memory between two steps.

  kill       SIGKILL, as the kernel's out-of-memory killer sends it
  term       SIGTERM, as a scheduler sends it
  full       the disk is full: OSError(ENOSPC)
  slow hang  a second's, and an hour's sleep
  nan spike  a rate that makes the step's loss NaN, or huge
  flip       one bit of one parameter, on one device

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

struck: set[tuple[str, int]] = set()


def disturb(step: int, rates: Any, state: Any) -> tuple[Any, Any]:
  """The step's (rates, state) as its faults leave them: mostly as they were."""
  found = reach('step', step)
  if 'nan' in found:
    rates = rates._replace(mtp_loss=float('nan'))
  if 'spike' in found:
    rates = rates._replace(mtp_loss=1e4)
  if 'flip' in found:
    state = state.replace(params=_flipped(state.params))
  return rates, state


def reach(point: str, step: int) -> set[str]:
  """Suffers the faults of this point and step; returns those left to do.

  Raises:
    OSError: 'full'.
    ValueError: a rule that names no action or point.
  """
  found = set()
  for rule in os.environ.get(VARIABLE, '').split(','):
    if not rule:
      continue
    action, _, where = rule.partition('@')
    place, _, steps = where.partition(':')
    if action not in ACTIONS or place not in POINTS:
      raise ValueError(f'{VARIABLE}: {rule!r} is no ACTION@POINT[:STEP]')
    first, _, last = steps.partition('-')
    inside = not steps or int(first) <= step <= int(last or first)
    if place == point and inside and (rule, step) not in struck:
      struck.add((rule, step))
      found.add(action)
  if 'kill' in found:
    os.kill(os.getpid(), signal.SIGKILL)
  if 'term' in found:
    os.kill(os.getpid(), signal.SIGTERM)
  if 'slow' in found or 'hang' in found:
    time.sleep(3600 if 'hang' in found else 1)
  if 'full' in found:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
  return found & {'nan', 'spike', 'flip'}


def _flipped(params):
  """The tree with one bit of its first leaf changed, on the last device."""
  import jax
  import numpy as np

  leaves, tree = jax.tree.flatten(params)
  parts = [shard.data for shard in leaves[0].addressable_shards]
  host = np.array(parts[-1])
  host.reshape(-1).view(np.uint8)[2] ^= 1
  (place,) = parts[-1].devices()
  parts[-1] = jax.device_put(host, place)
  leaves[0] = jax.make_array_from_single_device_arrays(
    leaves[0].shape, leaves[0].sharding, parts
  )
  return jax.tree.unflatten(tree, leaves)
