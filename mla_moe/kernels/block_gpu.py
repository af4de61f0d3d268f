"""Block-scaled FP8 products on Hopper, dense and by expert.

Hopper's tensor cores keep about 14 bits of an FP8 sum. So each tile of 128
along the sum starts a new accumulator, and the partial result moves to float32
registers, where it is multiplied by both operands' scales and added (V3 section
3.3.2). For tile k:

  acc += (a[:, k] b[:, k]^T) * sa[:, k] * sb[:, k]^T

One program computes 128 x 128 of the result. One warpgroup copies tiles into
shared memory; two multiply 64 rows each, and one scales while the other
multiplies. The hardware wants both operands with the sum along their rows, and
all lengths are multiples of 128. `_product` is the body of all three functions:
an expert's product differs in the place of its matrix and in the number of its
tiles. The oracle is beside the tests.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from mla_moe.kernels.block_tpu import result
from mla_moe.types import Array, Float, Int

_TILE = 128
_GROUPS = 2  # warpgroups that multiply
_ROWS = _TILE // _GROUPS


def matmul(
  a: Float[Array, 'M K'],
  sa: Float[Array, 'M tiles'],
  b: Float[Array, 'N K'],
  sb: Float[Array, 'rows tiles'],
  *,
  dtype: DTypeLike = jnp.float32,
) -> Float[Array, 'M N']:
  """Returns `block_tpu.matmul`."""
  (m, k), n = a.shape, b.shape[0]

  def kernel(a, sa, b, sb, out):
    i, j = jax.lax.axis_index('i'), jax.lax.axis_index('j')
    _product(a, sa, i, b, sb, j, out, i, (0, k // _TILE))

  return _call(kernel, ('i', 'j'), (m // _TILE, n // _TILE), (m, n), dtype, a)(
    a, sa.T, b, sb.T
  )


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
  """Returns `block_tpu.grouped`."""
  (p, k), n = a.shape, b.shape[1]

  def kernel(expert, live, a, sa, b, sb, out):
    i, j = jax.lax.axis_index('i'), jax.lax.axis_index('j')

    @pl.when(i < live[0])
    def _():
      e = expert[i]
      steps = (0, k // _TILE)
      _product(a, sa, i, b.at[e], sb.at[e], j, out, i, steps)

  return _call(kernel, ('i', 'j'), (p // _TILE, n // _TILE), (p, n), dtype, a)(
    expert, live.reshape(1), a, sa.T, b, sb.swapaxes(1, 2)
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
  """Returns `block_tpu.grouped_weights`."""
  (k, p), n, experts = a.shape, b.shape[0], first.shape[0]
  del expert  # the TPU's kernel needs it
  # A pipeline takes a step at least; the tile that it then reads must exist.
  first = jnp.minimum(first, p // _TILE - 1)
  count = jnp.maximum(count, 1)

  def kernel(first, count, a, sa, b, sb, out):
    e, i, j = (jax.lax.axis_index(name) for name in 'eij')
    _product(a, sa, i, b, sb, j, out.at[e], i, (first[e], count[e]))

  shape = (experts, k // _TILE, n // _TILE)
  return _call(kernel, ('e', 'i', 'j'), shape, (experts, k, n), jnp.float32, a)(
    first, count, a, sa.T, b, sb.T
  )


def _call(kernel, names, grid, shape, dtype, like):
  """Returns `kernel` as a function of arrays, with a program for each place."""
  return plgpu.kernel(
    kernel,
    out_type=result(shape, dtype, like),
    grid=grid,
    grid_names=names,
    num_threads=_GROUPS + 1,
    thread_name='group',
    compiler_params=plgpu.CompilerParams(
      lowering_semantics=plgpu.LoweringSemantics.Warpgroup
    ),
  )


def _layout(dtype):
  """Returns a tile's layout in shared memory: rows of 128 bytes, swizzled."""
  width = 128 // jnp.dtype(dtype).itemsize
  return plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(128)


def _load(ref, index, layout):
  """Returns ref[index] in registers; before jax 0.11 the index stood apart."""
  joined = jax.__version_info__ >= (0, 11)
  place = (ref.at[index],) if joined else (ref, index)
  return plgpu.load(*place, layout=layout, optimized=False)


def _product(a, sa, i, b, sb, j, out, row, steps):
  """Writes block (row, j) of `out`, from block rows i of `a` and j of `b`.

  `steps` are the first tile of the sum and the number of tiles. Scales are
  [tiles, rows]; those of `b` are [tiles, rows / 128] if it is in blocks.
  """
  first, count = steps
  group = jax.lax.axis_index('group')
  blocks = sb.shape[1] < b.shape[0]
  shape = (_ROWS, _TILE)
  wgmma = plgpu.Layout.WGMMA

  @functools.partial(
    pl.run_scoped,
    collective_axes='group',
    shared=plgpu.SMEM(
      (_GROUPS, *shape), out.dtype, transforms=_layout(out.dtype)
    ),
  )
  def _(shared):
    rows = pl.ds(i * _TILE + group * _ROWS, _ROWS)
    columns = pl.ds(j * _TILE, _TILE)

    def compute(pipeline):
      zero = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), wgmma)
      shared[group] = pipeline(zero).astype(out.dtype)
      plgpu.commit_smem()
      out_rows = pl.ds(row * _TILE + group * _ROWS, _ROWS)
      plgpu.copy_smem_to_gmem(shared.at[group], out.at[out_rows, columns])
      plgpu.wait_smem_to_gmem(0)

    def step(index, a_tile, b_tile, acc):
      k = first + index[0]

      def multiply(part):
        group_rows = a_tile.at[pl.ds(group * _ROWS, _ROWS)]
        plgpu.wgmma(part, group_rows, b_tile.T)
        left = _load(sa, (k, rows), wgmma.reduce(1))
        if blocks:
          left = left * sb[k, j]
          return part[...] * jax.lax.broadcast_in_dim(left, shape, (0,))
        right = _load(sb, (k, columns), wgmma.reduce(0))
        scale = jax.lax.broadcast_in_dim(left, shape, (0,))
        scale = scale * jax.lax.broadcast_in_dim(right, shape, (1,))
        return part[...] * scale

      return acc + pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))

    tile = functools.partial(
      plgpu.BlockSpec, (_TILE, _TILE), transforms=_layout(a.dtype)
    )
    static = isinstance(count, int)
    plgpu.emit_pipeline_warp_specialized(
      step,
      grid=(count,),
      memory_registers=40,
      wg_axis='group',
      num_compute_wgs=_GROUPS,
      max_concurrent_steps=min(4, count) if static else 4,
      compute_context=compute,
      in_specs=[tile(lambda k: (i, first + k)), tile(lambda k: (j, first + k))],
    )(a, b)
