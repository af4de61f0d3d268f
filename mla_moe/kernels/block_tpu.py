"""Block-scaled FP8 products on TPU v7, dense and by expert.

For each tile k of 128 along the sum, in float32 (V3 section 3.3.2):

  acc += (a[:, k] b[:, k]^T) * sa[:, k] * sb[:, k]^T

A TPU accumulates products in float32 already, so that tiles of 128 serve the
scales alone; and since its multipliers are 256 deep, such tiles fill half of
them (`fp8_channel` is the fast recipe). The oracle is beside the tests.

Operands are E4M3, their scales float32. Both have the sum along their rows,
and all lengths are multiples of 128. The kernels read the scales transposed,
[K / 128, 1, rows], so that a block of them lies along lanes; those of `a` are
turned inside the kernel, where they scale rows.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from mla_moe.types import Array, Float, Int

_TILE = 128


def result(
  shape: tuple[int, ...], dtype: DTypeLike, like: Array
) -> jax.ShapeDtypeStruct:
  """Returns a kernel's result type; it varies by device as `like` does."""
  varying = jax.typeof(like).manual_axis_type
  return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=varying)


def _fit(n: int) -> int:
  """Returns the rows or columns of the result that one program computes."""
  return next(size for size in (256, 128) if n % size == 0)


def _step(tiles: int) -> int:
  """Returns the tiles of the sum that one step of the grid adds."""
  return next(n for n in (8, 4, 2, 1) if tiles % n == 0)


def _add(a, sa, b, sb, acc, tiles: int):
  """Adds the scaled products of `tiles` tiles to the reference `acc`."""
  for i in range(tiles):
    k = slice(i * _TILE, (i + 1) * _TILE)
    part = jax.lax.dot_general(
      a[:, k],
      b[:, k],
      (((1,), (1,)), ((), ())),
      preferred_element_type=jnp.float32,
    )
    acc[...] += part * sa[i].T * sb[i]


def _scales(s, rows: int):
  """Returns scales [.., rows or rows / 128, tiles] as [.., tiles, 1, rows]."""
  block = rows // s.shape[-2]
  s = jnp.repeat(s, block, axis=-2) if block > 1 else s
  return s.swapaxes(-1, -2)[..., None, :]


def matmul(
  a: Float[Array, 'M K'],
  sa: Float[Array, 'M tiles'],
  b: Float[Array, 'N K'],
  sb: Float[Array, 'rows tiles'],
  *,
  dtype: DTypeLike = jnp.float32,
) -> Float[Array, 'M N']:
  """Returns a b^T in `dtype`; `sb` has one scale a row, or one per 128 rows."""
  return _product(a, sa, b[None], sb[None], _fit(len(a)), dtype)


def grouped(
  a: Float[Array, 'P K'],
  sa: Float[Array, 'P tiles'],
  b: Float[Array, 'E N K'],
  sb: Float[Array, 'E rows tiles'],
  expert: Int[Array, ' blocks'],
  live: Int[Array, ''],
  *,
  dtype: DTypeLike = jnp.float32,
) -> Float[Array, 'P N']:
  """Returns each block of 128 rows of `a` times its expert's matrix.

  The result is in `dtype`. `expert` has the expert of each block. Only the
  first `live` blocks are computed; the other rows are undefined.
  """
  return _product(a, sa, b, sb, _TILE, dtype, expert, live.reshape(1))


def _product(a, sa, b, sb, height, dtype, *blocks):
  """Returns each block of `height` rows of `a` times a matrix of `b`.

  `blocks` are those of `grouped`, and none where `b` has one matrix.
  """
  (m, k), n = a.shape, b.shape[1]
  step, width = _step(k // _TILE), _fit(n)
  last = k // _TILE // step - 1
  which = lambda i, blocks: blocks[0][i] if blocks else 0

  def kernel(*refs):
    *blocks, a, sa, b, sb, out, acc = refs
    k = pl.program_id(2)

    @pl.when(pl.program_id(0) < blocks[1][0] if blocks else True)
    def _():
      @pl.when(k == 0)
      def _():
        acc[...] = jnp.zeros_like(acc)

      _add(a, sa, b[0], sb[0], acc, step)

      @pl.when(k == last)
      def _():
        out[...] = acc[...].astype(out.dtype)

  in_specs = [
    pl.BlockSpec((height, step * _TILE), lambda i, j, k, *_: (i, k)),
    pl.BlockSpec((step, 1, height), lambda i, j, k, *_: (k, 0, i)),
    pl.BlockSpec(
      (1, width, step * _TILE), lambda i, j, k, *e: (which(i, e), j, k)
    ),
    pl.BlockSpec(
      (1, step, 1, width), lambda i, j, k, *e: (which(i, e), k, 0, j)
    ),
  ]
  out = pl.BlockSpec((height, width), lambda i, j, k, *_: (i, j))
  scratch = [pltpu.VMEM((height, width), jnp.float32)]
  grid, shape = (m // height, n // width, last + 1), result((m, n), dtype, a)
  run = _call(kernel, len(blocks), grid, in_specs, out, shape, scratch)
  return run(*blocks, a, _scales(sa, m), b, _scales(sb, n))


def _call(kernel, scalars, grid, in_specs, out, shape, scratch=()):
  """Returns `kernel` as a function of so many arrays of scalars, and others."""
  return pl.pallas_call(
    kernel,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=scalars,
      grid=grid,
      in_specs=in_specs,
      out_specs=out,
      scratch_shapes=scratch,
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'arbitrary')
    ),
    out_shape=shape,
  )


def grouped_weights(
  a: Float[Array, 'K P'],
  sa: Float[Array, 'K blocks'],
  b: Float[Array, 'N P'],
  sb: Float[Array, 'N blocks'],
  expert: Int[Array, ' blocks'],
  first: Int[Array, ' E'],
  count: Int[Array, ' E'],
) -> Float[Array, 'E K N']:
  """Returns a b^T over each expert's blocks of 128 columns, float32.

  Expert e's blocks are count[e] from first[e] on; without blocks its result is
  undefined. Blocks are the grid's innermost axis: those of one expert follow
  each other, and its result stays in memory meanwhile.
  """
  k, n, experts, blocks = len(a), len(b), len(first), len(expert)
  width, height = _fit(n), _fit(k)
  live = (first[-1] + count[-1]).reshape(1)

  def kernel(expert, live, a, sa, b, sb, out):
    p = pl.program_id(2)
    before = expert[jnp.maximum(p - 1, 0)]
    starts = (p == 0) | (expert[p] != before)

    @pl.when(p < live[0])
    def _():
      @pl.when(starts)
      def _():
        out[...] = jnp.zeros_like(out)

      _add(a, sa, b, sb, out.at[0], 1)

  # Blocks that are not live repeat the last expert: no result is visited twice.
  in_specs = [
    pl.BlockSpec((height, _TILE), lambda i, j, p, *_: (i, p)),
    pl.BlockSpec((1, 1, height), lambda i, j, p, *_: (p, 0, i)),
    pl.BlockSpec((width, _TILE), lambda i, j, p, *_: (j, p)),
    pl.BlockSpec((1, 1, width), lambda i, j, p, *_: (p, 0, j)),
  ]
  out = pl.BlockSpec((1, height, width), lambda i, j, p, e, _: (e[p], i, j))
  last = jnp.maximum(live[0] - 1, 0)
  expert = jnp.where(jnp.arange(blocks) < live[0], expert, expert[last])
  grid, shape = (k // height, n // width, blocks), (experts, k, n)
  shape = result(shape, jnp.float32, a)
  run = _call(kernel, 2, grid, in_specs, out, shape)
  return run(expert, live, a, _scales(sa, k), b, _scales(sb, n))
