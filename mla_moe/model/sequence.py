"""The order of tokens when a sequence is split over devices.

Under a causal mask the work grows with the position, so `context` devices do
not take a sequence in stretches: it is cut into 2 * context pieces, and each
device holds one early piece and its mirror image at the end. `arrange` brings
whole sequences into that order, once, when they are still integers; positions,
segments and targets are arranged with them, so that nothing between the
embedding and the loss has to know. Only attention does: it gathers the small
latents of all tokens (`whole`) and sees them in their natural order.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mla_moe import sharding
from mla_moe.types import Array


class Part(NamedTuple):
  """Which of `count` parts of a sequence; `index` may be a traced value."""

  index: Array | int = 0
  count: int = 1

  def pieces(self) -> tuple:
    """The numbers of its pieces, in order."""
    if self.count == 1:
      return (0,)
    return self.index, 2 * self.count - 1 - self.index


def count(length: int) -> int:
  """Parts in which sequences of this length are held here."""
  return sharding.axis_size(sharding.mesh_axes(('part',), (length,))[0])


def arrange(x: Array) -> Array:
  """[B, T, ...] from natural order to that of the devices."""
  parts = count(x.shape[1])
  if parts == 1:
    return x
  order = [p for i in range(parts) for p in Part(i, parts).pieces()]
  return _take(x, order)


def restore(x: Array) -> Array:
  """[B, T, ...] from the order of the devices to the natural one."""
  parts = count(x.shape[1])
  if parts == 1:
    return x
  order = [p for i in range(parts) for p in Part(i, parts).pieces()]
  return _take(x, np.argsort(order))


def whole(x: Array, parts: int) -> Array:
  """In a region: all devices' parts of [B, T, ...], in natural order."""
  if parts == 1:
    return x
  every = jax.lax.all_gather(x, 'context', axis=1)  # [B, parts, T, ...]
  early, late = jnp.split(every, 2, axis=2)
  both = jnp.concatenate([early, late[:, ::-1]], axis=1)
  return both.reshape(x.shape[0], -1, *x.shape[2:])


def _take(x, order):
  pieces = x.reshape(x.shape[0], len(order), -1, *x.shape[2:])
  return pieces[:, np.asarray(order)].reshape(x.shape)
