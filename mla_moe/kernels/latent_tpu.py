"""Absorbed attention over paged latents on TPU: each page is read once.

All heads of a row attend to one key of C + R numbers, of which the first C are
the value, too: a page is fetched once for both products and for all heads. The
softmax goes page by page with a running maximum (Milakov and Gimelshein 2018).
The row's line of the page table is prefetched into scalar memory, so that the
pipeline knows the pages ahead; beyond the row's end it names the last page
again, and a block that stays is not fetched again. The width W (C + R, padded)
is a multiple of 128, or XLA would copy the whole pool of pages into the layout
that a kernel reads. The oracle is among the checks of `bench card`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mla_moe.kernels import MASKED
from mla_moe.types import Array, Float, Int


def attend(
  q: Float[Array, 'B G W'],
  pages: Float[Array, 'P page W'],
  table: Int[Array, 'B n'],
  start: Int[Array, ' B'],
  *,
  heads: int,
  rank: int,
) -> Float[Array, 'B G C']:
  """Returns absorbed attention in the dtype of `q`.

  Args:
    q: the softmax's scale included. Row g of G is head g % heads of new token
      g // heads, which sees the keys up to start + g // heads.
    pages: the pool; a key's first `rank` numbers are its value. Page and W are
      multiples of 128.
    table: each row's pages in their order.
    start: the position of each row's first new token.
    heads: the query heads.
    rank: C, the width of the result.
  """
  (b, rows, width), size = q.shape, pages.shape[1]
  count = table.shape[1]
  more = -(-rows // heads) - 1  # new tokens after the first

  def page(i, j, start, table):
    last = jax.lax.div(start[i] + more, size)
    return table[i, jnp.minimum(j, jnp.minimum(last, count - 1))], 0, 0

  run = functools.partial(_kernel, size=size, heads=heads, more=more)
  row = lambda i, j, *_: (i, 0, 0)
  return pl.pallas_call(
    run,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(b, count),
      in_specs=[
        pl.BlockSpec((1, rows, width), row),
        pl.BlockSpec((1, size, width), page),
      ],
      out_specs=pl.BlockSpec((1, rows, rank), row),
      scratch_shapes=sums(rows, rank),
    ),
    out_shape=jax.ShapeDtypeStruct((b, rows, rank), q.dtype),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'arbitrary')
    ),
    name='latent_attention',
  )(start, table, q, pages)


def _kernel(start, table, q, page, out, *state, size, heads, more):
  row, i = pl.program_id(0), pl.program_id(1)

  @pl.when(i == 0)
  def _():
    clear(*state)

  @pl.when(i * size <= start[row] + more)
  def _():
    shape = q.shape[1], size
    key = i * size + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    line = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    last = start[row] + jax.lax.div(line, heads)
    add(q[0], page[0], key <= last, *state)

  @pl.when(i == pl.num_programs(1) - 1)
  def _():
    acc, _, total = state
    out[0] = (acc[...] / total[...][:, :1]).astype(out.dtype)


def sums(rows: int, rank: int) -> list:
  """Returns the scratch of `add`: rows' values, highest logits and weights."""
  lanes = pltpu.VMEM((rows, 128), jnp.float32)
  return [pltpu.VMEM((rows, rank), jnp.float32), lanes, lanes]


def clear(acc, peak, total) -> None:
  """Empties the `sums`."""
  acc[...] = jnp.zeros_like(acc)
  peak[...] = jnp.full_like(peak, MASKED)
  total[...] = jnp.zeros_like(total)


def add(q, keys, seen, acc, peak, total) -> None:
  """Adds a block of keys to the `sums` of queries, those that are `seen`."""
  logits = dot(q, keys, (((1,), (1,)), ((), ())))
  logits = jnp.where(seen, logits, MASKED)
  old = peak[...][:, :1]
  maximum = jnp.maximum(old, logits.max(-1, keepdims=True))
  probs = jnp.exp(logits - maximum)
  shrink = jnp.exp(old - maximum)
  summed = total[...][:, :1] * shrink + probs.sum(-1, keepdims=True)
  total[...] = jnp.broadcast_to(summed, total.shape)
  peak[...] = jnp.broadcast_to(maximum, peak.shape)
  values = keys[:, : acc.shape[1]]
  fresh = dot(probs.astype(keys.dtype), values, (((1,), (0,)), ((), ())))
  acc[...] = acc[...] * shrink + fresh


def dot(a, b, axes):
  """Returns the product of two blocks, accumulated in float32."""
  return jax.lax.dot_general(a, b, axes, preferred_element_type=jnp.float32)
