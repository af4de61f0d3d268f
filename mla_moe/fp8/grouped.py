"""FP8 products by expert: rows sorted by expert, one weight for each.

Each expert's rows are first moved to a whole number of blocks of 128, filled
up with zeros. Tiles along the tokens, which the weights' gradient sums over,
then never straddle two experts, and kernels meet whole tiles only; rows after
the last group go nowhere, so that whatever they hold reaches no amax. The
layout is static and as large as the worst routing needs; the work follows the
blocks that hold rows.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mla_moe.fp8 import gemm
from mla_moe.fp8 import quantize as q8
from mla_moe.fp8.quantize import TILE, Quantized
from mla_moe.types import Array


class Layout(NamedTuple):
  """Rows sorted by expert, each expert's moved to a whole number of blocks.

  A block is 128 rows of one expert, P rows in all; the first `live` blocks
  hold rows, zeros fill them up. `place` [M] says where each row goes (0 for
  those after the last group, which `held` [M] leaves out), `source` [P] and
  `filled` [P] the way back; `expert` [P / 128]; `first`, `count` [E] blocks.
  """

  place: Array
  held: Array
  source: Array
  filled: Array
  expert: Array
  first: Array
  count: Array
  live: Array


def layout(group_sizes: Array, rows: int) -> Layout:
  """Where `rows` sorted rows go; P is the worst case of any sizes."""
  experts = group_sizes.size
  sizes = group_sizes.astype(jnp.int32)
  ends = jnp.cumsum(sizes)
  count = -(-sizes // TILE)
  last = jnp.cumsum(count)
  n = max(-(-(rows + experts * (TILE - 1)) // TILE), 1)

  def find(ends, length):
    index = jnp.arange(length, dtype=jnp.int32)
    found = jnp.searchsorted(ends, index, side='right', method='compare_all')
    return index, jnp.minimum(found, experts - 1).astype(jnp.int32)

  row, own = find(ends, rows)
  held = row < ends[-1]
  place = (last - count)[own] * TILE + row - (ends - sizes)[own]
  block, expert = find(last, n)
  rank = (block - (last - count)[expert])[:, None] * TILE
  rank = rank + jnp.arange(TILE, dtype=jnp.int32)[None]
  filled = (rank < sizes[expert][:, None]) & (block < last[-1])[:, None]
  source = jnp.where(filled, (ends - sizes)[expert][:, None] + rank, 0)
  return Layout(
    jnp.where(held, place, 0),
    held,
    source.reshape(-1),
    filled.reshape(-1),
    expert,
    last - count,
    count,
    last[-1],
  )


def spread_rows(x: Array, at: Layout) -> Array:
  """[M, ...] rows in the layout [P, ...], zeros where there is none."""
  filled = at.filled.reshape(-1, *(1,) * (x.ndim - 1))
  return jnp.where(filled, x[at.source], 0)


def gather_rows(x: Array, at: Layout) -> Array:
  """[P, ...] back to [M, ...]; rows after the last group are zeros."""
  held = at.held.reshape(-1, *(1,) * (x.ndim - 1))
  return jnp.where(held, x[at.place], 0)


def grouped(
  a: Quantized,
  b: Quantized,
  over: tuple[tuple[int, ...], tuple[int, ...]],
  at: Layout,
  impl: str,
  dtype=jnp.float32,
) -> Array:
  """[P, ...] times its row's expert of [E, ...], summed over axes `over`.

  Rows of blocks that are not live hold anything.
  """
  impl = _fitting(impl)
  if impl in gemm.BY_EXPERT:
    left, right = gemm.matrix(a, over[0]), gemm.matrix(b, over[1], lead=1)
    args = (*gemm.per_row(left), *right, at.expert, at.live)
    y = gemm.run_kernel(impl, 'grouped', *args, dtype=dtype)
    return gemm.unpadded(y, 1, b, over[1], lead=1)
  inner = tuple(d - 1 for d in over[1])
  kept = [b.shape[d] for d in gemm.kept(b, over[1], 1)]

  def loop(a, b):
    def body(i, y):
      e = at.expert[i]
      part = gemm.multiply(
        _block(a, i), _pick(b, e), (over[0], inner), impl, dtype
      )
      return jax.lax.dynamic_update_slice_in_dim(y, part, i * TILE, 0)

    start = gemm.marked(jnp.zeros((a.shape[0], *kept), dtype), a, b, at)
    return jax.lax.fori_loop(0, at.live, body, start)

  if impl != 'dequant':
    return loop(a, b)

  def ragged(a, b):
    """A TPU multiplies by expert by itself."""
    axes = (0, *over[1], *gemm.kept(b, over[1], 1))
    right = _wide(b).transpose(axes).reshape(b.shape[0], -1, math.prod(kept))
    left = _wide(a).reshape(a.shape[0], -1)
    y = jax.lax.ragged_dot(
      left, right, at.count * TILE, preferred_element_type=jnp.float32
    )
    return y.reshape(-1, *kept).astype(dtype)

  return jax.lax.platform_dependent(a, b, tpu=ragged, default=loop)


def grouped_weights(a: Quantized, b: Quantized, at: Layout, impl: str) -> Array:
  """The sum over each expert's rows of [P, ...] by [P, ...]: [E, ...] float32.

  Zero for an expert without rows.
  """
  impl = _fitting(impl)
  if impl in gemm.BY_EXPERT:
    left, right = gemm.matrix(a, (0,)), gemm.matrix(b, (0,))
    args = (*left, *right, at.expert, at.first, at.count)
    y = gemm.run_kernel(impl, 'grouped_weights', *args)
    y = gemm.unpadded(gemm.unpadded(y, 1, a, (0,)), a.ndim, b, (0,))
    return jnp.where(at.count.reshape(-1, *(1,) * (y.ndim - 1)) > 0, y, 0)
  shape = (at.first.size, *a.shape[1:], *b.shape[1:])

  def loop(a, b):
    def body(i, sums):
      part = gemm.multiply(_block(a, i), _block(b, i), ((0,), (0,)), impl)
      return sums.at[at.expert[i]].add(part)

    start = gemm.marked(jnp.zeros(shape, jnp.float32), a, b, at)
    return jax.lax.fori_loop(0, at.live, body, start)

  if impl != 'dequant':
    return loop(a, b)

  def ragged(a, b):
    y = jax.lax.ragged_dot_general(
      _wide(a).reshape(a.shape[0], -1),
      _wide(b).reshape(b.shape[0], -1),
      at.count * TILE,
      jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[],
      ),
      preferred_element_type=jnp.float32,
    )
    return y.reshape(shape)

  return jax.lax.platform_dependent(a, b, tpu=ragged, default=loop)


def _fitting(impl: str) -> str:
  """`impl`, or dequant where its kernel cannot be had."""
  return 'dequant' if impl in gemm.BLOCKED and gemm.falls_back(impl) else impl


def _wide(q: Quantized) -> Array:
  """Dequantised into the narrowest dtype that is exact."""
  return q8.dequantize(q, jnp.bfloat16 if q.kind == 'pow2' else jnp.float32)


def _pick(q: Quantized, e) -> Quantized:
  return jax.tree.map(
    lambda x: jax.lax.dynamic_index_in_dim(x, e, keepdims=False), q
  )


def _block(q: Quantized, i) -> Quantized:
  """Block i of the first axis."""
  cut = jax.lax.dynamic_slice_in_dim
  tile = q.tile(0)
  scales = q.scales
  if scales.shape[0] > 1:
    scales = cut(scales, i * TILE // tile, TILE // tile, 0)
  tiles = (min(tile, TILE), *(q.tile(d) for d in range(1, q.ndim)))
  return Quantized(cut(q.values, i * TILE, TILE, 0), scales, tiles, q.kind)
