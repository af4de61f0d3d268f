"""The order of tokens when a sequence is split over devices.

Under a causal mask the work of a query grows with its position, so a split
into even stretches would leave the first device idle. Instead a sequence is
cut into 2 * P pieces for P devices (the mesh's `context` axis), and device p
holds pieces p and 2P - 1 - p, an early one and its mirror image. `arrange`
brings whole sequences into that order once, while they are still integers.
Positions, segments and targets are arranged with them, so that nothing between
the embedding and the loss depends on the order. Only attention does: it
gathers the small latents of all tokens in natural order (`gather`).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mla_moe import sharding
from mla_moe.types import Array


class Part(NamedTuple):
  """Part `index` of `count` of a sequence; `index` may be traced."""

  index: Array | int = 0
  count: int = 1

  def pieces(self) -> tuple:
    """Returns the numbers of the part's pieces, in order."""
    if self.count == 1:
      return (0,)
    return self.index, 2 * self.count - 1 - self.index

  def positions(self, length: int) -> Array:
    """Returns the places in the sequence of the part's `length` tokens."""
    each = jnp.arange(length // len(self.pieces()), dtype=jnp.int32)
    return jnp.concatenate([p * len(each) + each for p in self.pieces()])


def parts(length: int) -> int:
  """Returns the number of parts of a sequence of this length here."""
  return sharding.axis_size(sharding.mesh_axes(('part',), (length,))[0])


def arrange(x: Array) -> Array:
  """Returns [B, T, ...] in the order of the devices, from the natural one."""
  count = parts(x.shape[1])
  return x if count == 1 else _take(x, _order(count))


def restore(x: Array) -> Array:
  """Returns [B, T, ...] in natural order, from that of the devices."""
  count = parts(x.shape[1])
  return x if count == 1 else _take(x, np.argsort(_order(count)))


def this_part(count: int) -> Part:
  """In a region: returns the part of a sequence that this device holds."""
  return Part() if count == 1 else Part(jax.lax.axis_index('context'), count)


def gather(x: Array, count: int) -> Array:
  """In a region: returns the `count` parts of [B, T, ...] in natural order."""
  if count == 1:
    return x
  x = jax.lax.all_gather(x, 'context', axis=1)  # [B, parts, T, ...]
  early, late = jnp.split(x, 2, axis=2)
  x = jnp.concatenate([early, late[:, ::-1]], axis=1)
  return x.reshape(x.shape[0], -1, *x.shape[3:])


def _order(count: int) -> list[int]:
  return [piece for i in range(count) for piece in Part(i, count).pieces()]


def _take(x, order):
  pieces = x.reshape(x.shape[0], len(order), -1, *x.shape[2:])
  return pieces[:, np.asarray(order)].reshape(x.shape)


def pad(x: Array, length: int, axis: int = 1) -> Array:
  """Returns `x`, zeros appended to this length of the axis."""
  ends = np.zeros((x.ndim, 2), int)
  ends[axis, 1] = length - x.shape[axis]
  return jnp.pad(x, ends)
