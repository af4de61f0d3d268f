"""Frozen weights in eight or four bits, with low-rank adapters beside them.

A frozen weight W has codes, and a scale for each group of g numbers along the
axis that its product sums over. Adapters (LoRA, Hu et al. 2021) add to it:

    y = x W + (x A) B,    W[k, n] = code[k, n] scale[k / g, n]

The group is a part of a column, not a block: so rows of a released matrix may
be split, joined or permuted into our leaves, and its bytes stay as they are. A
block's scale of 128 x 128 is repeated for its 128 columns, 4 bytes in each 128.
Codes are dequantised where they are multiplied, a layer or an expert at a time.
The backward pass reads the codes again; A and B alone have gradients.

  fp8   E4M3's bits, g = 128        int8  integers, g = 128
  int4  two in a byte around 8, the even row low, g = 32
  float the numbers themselves, without scales

Scales are float32; int4's are the bits of bfloat16, as uint16. (A CPU cannot
slice bfloat16: it would widen the scales of all layers, once for each layer.)
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from mla_moe import sharding
from mla_moe.fp8 import OwnWeight
from mla_moe.hf import names
from mla_moe.types import Array, Float, Int, PyTree

GROUPS = {'fp8': 128, 'int8': 128, 'int4': 32}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Frozen(OwnWeight):
  """A weight [*lead, K, *N] that has no gradient, and its adapters.

  codes: [*lead, K, *N], of int4 [*lead, K / 2, *N]. scales: [*lead, K / g, *N].
  a: [*lead, K, r] and b: [*lead, r, *N], or None. Heads and their dimensions
  are one axis; `ends` are the lengths N of a product's result, with heads
  apart, and `columns` counts the codes' axes N (gate and up: 2). `place` is an
  index of leading axes that is not taken yet: decoding reads a layer's expert
  from the stack of all layers, and copies no layer.
  """

  codes: Any
  scales: Any
  a: Any
  b: Any
  kind: str = dataclasses.field(metadata={'static': True})
  ends: tuple[int, ...] = dataclasses.field(metadata={'static': True})
  columns: int = dataclasses.field(default=1, metadata={'static': True})
  place: tuple[int, ...] = dataclasses.field(
    default=(), metadata={'static': True}
  )

  @property
  def shape(self) -> tuple[int, ...]:
    """The codes' shape, without the axes of `place`."""
    return self.codes.shape[len(self.place) :]

  @property
  def ndim(self) -> int:
    return len(self.shape)

  @property
  def axis(self) -> int:
    """The axis K of what `shape` describes."""
    return self.ndim - 1 - self.columns

  def __getitem__(self, index: int | Array) -> Frozen:
    """Returns the weight at a number of the first axis.

    Nothing is read for an int, but on a mesh: there a region would get all
    layers, gathered. With a traced number, one slice is read; the adapter of
    one expert is that of all.
    """
    if isinstance(index, int) and not sharding.auto_axes():
      return dataclasses.replace(self, place=(*self.place, index))
    take = functools.partial(_take, place=self.place, index=index)
    leaves = map(take, (self.codes, self.scales, self.a, self.b))
    return Frozen(*leaves, self.kind, self.ends, self.columns)

  @property
  def bare(self) -> Frozen:
    """The weight without its adapters."""
    return dataclasses.replace(self, a=None, b=None)

  @property
  def trained(self) -> PyTree:
    """The part that has a gradient."""
    return self.a, self.b

  def with_trained(self, pair: PyTree, frozen: bool = True) -> Frozen:
    """Returns the weight with other adapters.

    Without `frozen`, as a gradient, it has no codes.
    """
    rest = (self.codes, self.scales) if frozen else (None, None)
    rest = dict(zip(('codes', 'scales'), rest, strict=True))
    return dataclasses.replace(self, **rest, a=pair[0], b=pair[1])

  def floats(self, dtype: DTypeLike) -> Float[Array, '*lead K *N']:
    """Returns the dequantised weight, without its adapters."""
    codes, scales = (_take(x, self.place) for x in (self.codes, self.scales))
    if self.kind == 'float':
      return codes.astype(dtype)
    if self.kind == 'fp8':
      # A prefix of float32's bits, but for the exponent's bias and subnormals.
      # XLA's own conversion is slower on a CPU.
      size, sign = codes & 0x7F, (codes >> 7).astype(jnp.uint32) << 31
      bits = sign | ((size.astype(jnp.uint32) << 20) + (120 << 23))
      small = size.astype(jnp.float32) * jnp.where(
        sign > 0, -(2.0**-9), 2.0**-9
      )
      normal = jax.lax.bitcast_convert_type(bits, jnp.float32)
      codes = jnp.where(size < 8, small, normal)
    elif self.kind == 'int4':
      pair = (
        jnp.stack([codes & 15, codes >> 4], self.axis + 1).astype(jnp.int8) - 8
      )
      shape = list(codes.shape)
      shape[self.axis] *= 2
      codes = pair.reshape(shape)
    if scales.dtype == jnp.uint16:
      scales = jax.lax.bitcast_convert_type(scales, jnp.bfloat16)
    scales = jnp.repeat(
      scales.astype(jnp.float32), GROUPS[self.kind], self.axis
    )
    scales = jax.lax.slice_in_dim(
      scales, 0, codes.shape[self.axis], axis=self.axis
    )
    return (codes.astype(jnp.float32) * scales).astype(dtype)

  def astype(self, dtype: DTypeLike) -> Float[Array, '*lead K *ends']:
    """Returns the floats with their adapters in them, heads of N apart."""
    wide, axis = self.floats(jnp.float32), self.axis
    if self.a is not None:
      a, b = (_take(x, self.place).astype(jnp.float32) for x in self.trained)
      delta = a @ b.reshape(*b.shape[: axis + 1], -1)
      wide += delta.reshape(*a.shape[:-1], *wide.shape[axis + 1 :])
    return self._apart(wide.astype(dtype), wide.shape[: axis + 1])

  def product(self, x: Array, summed: int = 1) -> Float[Array, '*b *ends']:
    """Returns x W + (x A) B in the dtype of `x`, of one matrix.

    The last `summed` axes of `x` are K.
    """
    x = x.reshape(*x.shape[: x.ndim - summed], -1)
    y = _base(x, self.bare)
    if self.a is not None:
      a, b = (_take(w, self.place).astype(x.dtype) for w in self.trained)
      y += jnp.tensordot(x @ a, b, 1)
    return self._apart(y, x.shape[:-1])

  def _apart(self, y: Array, lead: tuple) -> Array:
    """Returns a result with heads and their dimensions as two axes.

    In a region a device has some of the heads, and all of their dimensions.
    """
    heads = len(self.ends) > self.columns
    return y.reshape(*lead, -1, *self.ends[1:]) if heads else y

  def feed_forward(
    self,
    x: Float[Array, 'M D'],
    gates: Float[Array, 'M K'],
    chosen: Int[Array, 'M K'],
    w_gate_up: Frozen,
    impl: str,
    expected: int,
  ) -> Float[Array, 'M D']:
    """Returns `model.experts.feed_forward`, with this weight as `w_down`."""
    from . import loop

    args = x, gates, chosen, w_gate_up, self, impl, expected
    return loop.feed_forward(*args)

  def axes(self, axes: tuple) -> Frozen:
    """Returns the logical axes of each array, of those of a flat weight."""
    axes = (None,) * len(self.place) + axes
    n = len(axes) - self.columns
    of_a = None if self.a is None else (*axes[:n], None)
    of_b = None if self.b is None else (*axes[: n - 1], None, *axes[n:])
    # One expert of adapters is on all devices.
    if (
      self.a is not None and self.a.shape[: n - 1] != self.codes.shape[: n - 1]
    ):
      of_a, of_b = (
        (*x[: n - 2], None, *x[n - 1 :]) if x else None for x in (of_a, of_b)
      )
    scales = None if self.scales is None else axes
    return dataclasses.replace(self, codes=axes, scales=scales, a=of_a, b=of_b)

  def gathered(self, axes: tuple) -> Frozen:
    """Returns the weight laid out by the axes of a flat one, without FSDP's."""
    constrain = lambda x, a: sharding.constrain(x, *a)
    return jax.tree.map(constrain, self, self.axes(axes))

  def specs(self, axes: tuple) -> Frozen:
    """Returns the in_specs of a region for the arrays of `gathered`."""
    spec = lambda x, a: sharding.array_spec(a, x)
    return jax.tree.map(spec, self, self.axes(axes))


class Merged:
  """A frozen leaf on its way to a release's file, which asks for blocks."""

  dtype = np.dtype(np.float32)

  def __init__(self, w: Frozen, shape: tuple[int, ...]):
    self._w, self.shape = w, shape

  def block(self, row: names.Row, index: dict[str, int]) -> np.ndarray:
    """Returns a matrix's block (`hf.outgoing`), with the adapters in it."""
    w, lead = self._w, [i for i, a in enumerate(row.ours) if a in ('l', 'e')]
    for i in lead:
      w = w[index[row.ours[i]]]
    block = np.asarray(w.astype(jnp.float32))
    block = block.reshape([n for i, n in enumerate(row.shape) if i not in lead])
    block = np.expand_dims(block, lead)
    if 'g' in row.loop_axes:
      block = block.take([index['g']], row.ours.index('g'))
    return block


def _take(x, place, index=None):
  """Returns x[*place, index], read by one slice."""
  if x is None or not (place or index is not None):
    return x
  if index is not None:
    place = *place, jnp.minimum(index, x.shape[len(place)] - 1)
  rest = x.shape[len(place) :]
  start, sizes = (*place, *(0,) * len(rest)), (*(1,) * len(place), *rest)
  return jax.lax.dynamic_slice(x, start, sizes).reshape(rest)


@jax.custom_vjp
def _base(x, w):
  """Returns x W; for the gradient of `x` the codes are read again."""
  return jnp.tensordot(x, w.floats(x.dtype), 1)


def _base_backward(w, g):
  wide = w.floats(g.dtype)
  dims = tuple(range(-wide.ndim + 1, 0)), tuple(range(1, wide.ndim))
  return jnp.tensordot(g, wide, dims), None


_base.defvjp(lambda x, w: (_base(x, w), w), _base_backward)
