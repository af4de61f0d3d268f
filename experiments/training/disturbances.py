"""Faults of numbers, on purpose: a NaN, a spike, a flipped bit in a step.

`experiments.faults` says when each strikes. The compiled step contains
none: numbers are broken by its inputs, memory between two steps.
"""

from __future__ import annotations

from typing import Any

from .. import faults


def disturb(step: int, rates: Any, state: Any) -> tuple[Any, Any]:
  """Returns the step's (rates, state), changed by the faults of the step.

  A NaN comes by `rates.mtp_loss`, the weight of a term of the loss that is an
  input of the compiled step.
  """
  actions = faults.reach('step', step)
  if 'nan' in actions:
    rates = rates._replace(mtp_loss=float('nan'))
  if 'spike' in actions:
    window = dict(state.loss_window)
    window['losses'] = window['losses'] - 1e4
    state = state.replace(loss_window=window)
  if 'flip' in actions:
    state = state.replace(params=_flipped(state.params))
  return rates, state


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
