"""FP8 products by expert: rows sorted by expert, one weight for each.

Each expert's rows are first moved to a whole number of blocks of 128, filled
up with zeros. Tiles along the tokens, which the weights' gradient sums over,
then never straddle two experts, and kernels meet whole tiles only. Rows after
the last group are left out, so that their numbers reach no amax. The layout is
static and as large as the worst routing needs, but only the blocks that hold
rows are computed.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from mla_moe.fp8 import gemm
from mla_moe.fp8 import quantize as q8
from mla_moe.fp8.quantize import TILE, Quantized
from mla_moe.types import Array, Bool, Float, Int


class Layout(NamedTuple):
  """The places of M sorted rows among P, in blocks of 128 of one expert."""

  place: Int[Array, ' M']  # a row's index in the layout; 0 if it is not valid
  valid: Bool[Array, ' M']  # false for the rows after the last group
  source: Int[Array, ' P']  # the row of M that lies here; 0 if not filled
  filled: Bool[Array, ' P']  # false for the zeros that fill up a block
  expert: Int[Array, ' blocks']  # each block's expert
  first: Int[Array, ' E']  # each expert's first block
  count: Int[Array, ' E']  # each expert's number of blocks
  live: Int[Array, '']  # how many blocks hold rows; they come first


def make_layout(group_sizes: Int[Array, ' E'], rows: int) -> Layout:
  """Returns the layout of `rows` sorted rows; P is the worst of any sizes."""
  experts = group_sizes.size
  sizes = group_sizes.astype(jnp.int32)
  row_ends = jnp.cumsum(sizes)
  row_starts = row_ends - sizes
  count = -(-sizes // TILE)
  block_ends = jnp.cumsum(count)
  first = block_ends - count
  blocks = max(-(-(rows + experts * (TILE - 1)) // TILE), 1)

  def expert_of(index, ends):
    e = jnp.searchsorted(ends, index, side='right', method='compare_all')
    return jnp.minimum(e, experts - 1).astype(jnp.int32)

  row = jnp.arange(rows, dtype=jnp.int32)
  e = expert_of(row, row_ends)
  valid = row < row_ends[-1]
  place = jnp.where(valid, first[e] * TILE + row - row_starts[e], 0)

  block = jnp.arange(blocks, dtype=jnp.int32)
  e = expert_of(block, block_ends)
  rank = (block - first[e])[:, None] * TILE
  rank = rank + jnp.arange(TILE, dtype=jnp.int32)[None]
  live = block_ends[-1]
  filled = (rank < sizes[e][:, None]) & (block < live)[:, None]
  source = jnp.where(filled, row_starts[e][:, None] + rank, 0)
  source, filled = source.reshape(-1), filled.reshape(-1)
  return Layout(place, valid, source, filled, e, first, count, live)


def to_layout(
  x: Float[Array, 'M ...'], layout: Layout
) -> Float[Array, 'P ...']:
  """Returns the rows in their places, zeros in the others."""
  filled = layout.filled.reshape(-1, *(1,) * (x.ndim - 1))
  return jnp.where(filled, x[layout.source], 0)


def from_layout(
  x: Float[Array, 'P ...'], layout: Layout
) -> Float[Array, 'M ...']:
  """Returns the rows in their old order; those of no group are zeros."""
  valid = layout.valid.reshape(-1, *(1,) * (x.ndim - 1))
  return jnp.where(valid, x[layout.place], 0)


def multiply_by_expert(
  a: Quantized,
  b: Quantized,
  summed: tuple[tuple[int, ...], tuple[int, ...]],
  layout: Layout,
  impl: str,
  dtype: DTypeLike = jnp.float32,
) -> Float[Array, 'P ...']:
  """Returns each row of `a` [P, ...] times its expert's `b` [E, ...].

  The sum goes over axes summed[0] of `a` and summed[1] of `b`. Rows of blocks
  that are not live are undefined.
  """
  impl = gemm.usable(impl)
  if impl in gemm.GROUPED_KERNELS:
    left, right = gemm.matrix(a, summed[0]), gemm.matrix(b, summed[1], lead=1)
    args = (*gemm.row_scales(left), *right, layout.expert, layout.live)
    y = gemm.run_kernel(impl, 'grouped', *args, dtype=dtype)
    return gemm.unpadded(y, 1, b, summed[1], lead=1)
  inner = tuple(d - 1 for d in summed[1])
  outputs = [b.shape[d] for d in gemm.other_axes(b, summed[1], 1)]

  def loop(a, b):
    def body(i, y):
      e = layout.expert[i]
      rows, w = _block(a, i), _expert(b, e)
      part = gemm.multiply(rows, w, (summed[0], inner), impl, dtype)
      return jax.lax.dynamic_update_slice_in_dim(y, part, i * TILE, 0)

    zeros = jnp.zeros((a.shape[0], *outputs), dtype)
    start = gemm.pvary_like(zeros, a, b, layout)
    return jax.lax.fori_loop(0, layout.live, body, start)

  if impl != 'dequant':
    return loop(a, b)

  def ragged(a, b):
    axes = (0, *summed[1], *gemm.other_axes(b, summed[1], 1))
    right = q8.exact(b).transpose(axes)
    right = right.reshape(b.shape[0], -1, math.prod(outputs))
    left = q8.exact(a).reshape(a.shape[0], -1)
    y = jax.lax.ragged_dot(
      left, right, layout.count * TILE, preferred_element_type=jnp.float32
    )
    return y.reshape(-1, *outputs).astype(dtype)

  # XLA has a fast product by expert on TPUs only.
  return jax.lax.platform_dependent(a, b, tpu=ragged, default=loop)


def weight_gradients(
  a: Quantized, b: Quantized, layout: Layout, impl: str
) -> Float[Array, 'E ...']:
  """Returns the sum over each expert's rows of a[p] times b[p], float32.

  These sums are the gradients of the experts' weights; `a` and `b` are
  [P, ...]. An expert without rows has zeros.
  """
  impl = gemm.usable(impl)
  if impl in gemm.GROUPED_KERNELS:
    left, right = gemm.matrix(a, (0,)), gemm.matrix(b, (0,))
    args = (*left, *right, layout.expert, layout.first, layout.count)
    y = gemm.run_kernel(impl, 'grouped_weights', *args)
    y = gemm.unpadded(gemm.unpadded(y, 1, a, (0,)), a.ndim, b, (0,))
    return jnp.where(layout.count.reshape(-1, *(1,) * (y.ndim - 1)) > 0, y, 0)
  shape = (layout.first.size, *a.shape[1:], *b.shape[1:])

  def loop(a, b):
    def body(i, sums):
      part = gemm.multiply(_block(a, i), _block(b, i), ((0,), (0,)), impl)
      return sums.at[layout.expert[i]].add(part)

    start = gemm.pvary_like(jnp.zeros(shape, jnp.float32), a, b, layout)
    return jax.lax.fori_loop(0, layout.live, body, start)

  if impl != 'dequant':
    return loop(a, b)

  def ragged(a, b):
    y = jax.lax.ragged_dot_general(
      q8.exact(a).reshape(a.shape[0], -1),
      q8.exact(b).reshape(b.shape[0], -1),
      layout.count * TILE,
      jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[],
      ),
      preferred_element_type=jnp.float32,
    )
    return y.reshape(shape)

  return jax.lax.platform_dependent(a, b, tpu=ragged, default=loop)


def _expert(q: Quantized, e: Int[Array, '']) -> Quantized:
  """Returns expert `e` of the first axis, which is dropped."""
  return jax.tree.map(
    lambda x: jax.lax.dynamic_index_in_dim(x, e, keepdims=False), q
  )


def _block(q: Quantized, i: Int[Array, '']) -> Quantized:
  """Returns block `i` of the first axis: 128 rows and their scales."""
  cut = jax.lax.dynamic_slice_in_dim
  tile = q.tile(0)
  scales = q.scales
  if scales.shape[0] > 1:
    scales = cut(scales, i * TILE // tile, TILE // tile, 0)
  tiles = (min(tile, TILE), *(q.tile(d) for d in range(1, q.ndim)))
  return Quantized(cut(q.values, i * TILE, TILE, 0), scales, tiles)
