"""SIGTERM and SIGINT: the run saves at the next step; a second one kills it.

Of several processes any one may get the signal, and all must save the same
step. So before every step the processes share their signals, as a maximum over
all devices. It is read after the step is dispatched, so that nobody waits.
"""

from __future__ import annotations

import contextlib
import functools
import signal
from collections.abc import Iterator


class Stopped(BaseException):
  """A signal came where nothing is to be saved; the message is its name."""


class Stop:
  """The signal that this process got (0: none); use it in a `with` block."""

  def __init__(self):
    self.number = 0
    self._raises = False

  def __enter__(self) -> Stop:
    self._handlers = {}
    for number in (signal.SIGTERM, signal.SIGINT):
      self._handlers[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *_) -> None:
    for number, handler in self._handlers.items():
      signal.signal(number, handler)

  def _handle(self, number, _):
    self.number = number
    for either in self._handlers:
      signal.signal(either, signal.SIG_DFL)
    if self._raises:
      raise Stopped(signal.Signals(number).name)

  @contextlib.contextmanager
  def at_once(self) -> Iterator[None]:
    """Lets a signal in the block end it by `Stopped`: a text may take hours."""
    self._raises = True
    try:
      yield
    finally:
      self._raises = False

  def share(self):
    """Starts to share the signal among processes; `agreed` reads the result."""
    import jax
    import numpy as np

    if jax.process_count() == 1:
      return self.number
    split, largest = _maximum()
    mine = np.full(jax.local_device_count(), self.number, np.int32)
    return largest(jax.make_array_from_process_local_data(split, mine))


@functools.cache
def _maximum():
  """Returns the sharding of one number a device, and the jitted maximum."""
  import jax
  import jax.numpy as jnp
  import numpy as np
  from jax.sharding import Mesh, NamedSharding, PartitionSpec

  mesh = Mesh(np.array(jax.devices()), 'device')
  replicated = NamedSharding(mesh, PartitionSpec())
  split = NamedSharding(mesh, PartitionSpec('device'))
  return split, jax.jit(jnp.max, out_shardings=replicated)


def agreed(shared) -> str:
  """Returns the name of the signal that any process had got, or ''."""
  number = int(shared)
  return signal.Signals(number).name if number else ''
