"""SIGTERM and SIGINT: stop at the next step; a second one ends at once.

Of several processes, any one may be signalled, and all must save the same step.
So every step each process tells the others whether it was: a maximum over all
devices, begun behind the step and read after the next, when it is long there.
"""

from __future__ import annotations

import functools
import signal


class Stop:
  """The signal that asked to stop (0: none), agreed among processes."""

  asked = 0

  def __enter__(self) -> Stop:
    self._before = {}
    for number in (signal.SIGTERM, signal.SIGINT):
      self._before[number] = signal.signal(number, self._ask)
    return self

  def __exit__(self, *_) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _ask(self, number, _):
    self.asked = number
    for either in self._before:
      signal.signal(either, signal.SIG_DFL)

  def share(self):
    """This process's answer; `agreed` makes one of all of them."""
    import jax
    import numpy as np

    if jax.process_count() == 1:
      return self.asked
    split, largest = _everyone()
    mine = np.full(jax.local_device_count(), self.asked, np.int32)
    return largest(jax.make_array_from_process_local_data(split, mine))


@functools.cache
def _everyone():
  """A number for each device of every process, and their maximum on all."""
  import jax
  import jax.numpy as jnp
  import numpy as np
  from jax.sharding import Mesh, NamedSharding, PartitionSpec

  mesh = Mesh(np.array(jax.devices()), 'device')
  whole = NamedSharding(mesh, PartitionSpec())
  split = NamedSharding(mesh, PartitionSpec('device'))
  return split, jax.jit(jnp.max, out_shardings=whole)


def agreed(shared) -> str:
  """The name of a signal that any process had got when it shared, or ''."""
  number = int(shared)
  return signal.Signals(number).name if number else ''
