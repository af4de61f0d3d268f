"""Absorbed attention over paged latents on NVIDIA GPUs, in Triton.

A program takes some heads of a row and one split of its pages (flash decoding:
few rows must still fill all multiprocessors); the splits' results are averaged
afterwards, weighted by the softmax of their logsumexp. Latent and shared key
are loaded apart, because Triton's blocks are powers of two and 576 is not one.
jax 0.12 still has this backend of Pallas, and warns that it will be removed.
The oracle is that of `latent_tpu`.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from mla_moe.kernels import MASKED
from mla_moe.types import Array, Float, Int

# Measured on an H200, 64 rows of 8,192 keys (docs/benchmarks.md): 64 keys in a
# turn of the loop are 1.4 times as fast as 32 with 128 heads, and 4 warps are
# better than 8 with 16. About 256 programs, two for each multiprocessor,
# are best, so that few rows need more splits.
_KEYS = 64
_PROGRAMS = 256
# A split's result is written and read again in float32. For 64 heads that moves
# as much as reading about 256 keys, so a split has no fewer.
_SPLIT_KEYS = 256


def attend(
  q: Float[Array, 'B G W'],
  pages: Float[Array, 'P page W'],
  table: Int[Array, 'B n'],
  start: Int[Array, ' B'],
  *,
  heads: int,
  rank: int,
  splits: int | None = None,
  interpret: bool = False,
) -> Float[Array, 'B G C']:
  """Returns `latent_tpu.attend`, with W = rank + rope_dim.

  A row's pages are cut into at most `splits` splits, by default into as many
  as fill the multiprocessors. A page may be a token: then the table is a set's
  slots, n a multiple of 64, and their latents are gathered as they are read.
  """
  b, rows, width = q.shape
  size, count, rope_dim = pages.shape[1], table.shape[1], width - rank
  for n in (rank, rope_dim, size)[: 2 + (size > 1)]:
    assert n >= 16 and n & (n - 1) == 0, f'{n}: no length of a Triton block'
  # Shared memory has room for 64 rows and keys of two bytes a number, or 32.
  long = pages.dtype.itemsize // 2
  height = 16 if rows <= 16 else 32 if rows <= 32 or long > 1 else 64
  padded = -(-rows // height) * height
  q = jnp.pad(q, [(0, 0), (0, padded - rows), (0, 0)])
  if splits is None:
    most = max(count * size // _SPLIT_KEYS, 1)
    splits = min(max(_PROGRAMS // (b * padded // height), 1), most)
  splits, keys = min(splits, count), _KEYS // long
  keys = keys if size == 1 else min(keys, size)
  step = -(-keys // size)  # pages of a turn
  run = functools.partial(
    _kernel, size=size, rank=rank, heads=heads, height=height, keys=keys,
    split_pages=-(-count // (splits * step)) * step,
    last_token=-(-rows // heads) - 1,
  )  # fmt: skip
  whole = lambda x: pl.BlockSpec(x.shape, lambda *_: (0,) * x.ndim)
  part = lambda n: pl.BlockSpec((1, height, n), lambda i, h, s: (i, h, 0))
  out, lse = pl.pallas_call(
    run,
    grid=(b, padded // height, splits),
    in_specs=[whole(start), whole(table), part(rank), part(rope_dim)]
    + [whole(pages)],
    out_specs=[
      pl.BlockSpec((1, 1, height, rank), lambda i, h, s: (s, i, h, 0)),
      pl.BlockSpec((1, 1, height), lambda i, h, s: (s, i, h)),
    ],
    out_shape=[
      jax.ShapeDtypeStruct((splits, b, padded, rank), jnp.float32),
      jax.ShapeDtypeStruct((splits, b, padded), jnp.float32),
    ],
    compiler_params=triton.CompilerParams(
      num_warps=4 if height == 16 else 8, num_stages=2
    ),
    interpret=interpret,
    name='latent_attention',
  )(start, table, q[..., :rank], q[..., rank:], pages)
  weight = jax.nn.softmax(lse, axis=0)
  return (out * weight[..., None]).sum(0)[:, :rows].astype(q.dtype)


def _kernel(
  start, table, q_latent, q_rope, pages, out, lse, *, size, rank, heads,
  height, keys, split_pages, last_token,
):  # fmt: skip
  """Writes the attention of some heads over one split, and its logsumexp."""
  row, block, split = (pl.program_id(i) for i in range(3))
  begin, latent, rope = start[row], q_latent[0], q_rope[0]
  line = block * height + jnp.arange(height)
  # Rows of padding see the keys of the last new token.
  last = begin + jnp.minimum(jax.lax.div(line, heads), last_token)
  ends = jax.lax.div(begin + last_token, size) + 1
  stop = jnp.minimum((split + 1) * split_pages, ends)
  stop = jnp.minimum(stop, table.shape[1])

  def turn(i, carry):
    acc, peak, total = carry
    first = split * split_pages * size + i * keys
    if size == 1:
      slots = table[row, pl.ds(first, keys)][:, None]
      columns = lambda low, n: pages.at[slots, 0, low + jnp.arange(n)[None]]
    else:
      page = table[row, jax.lax.div(first, size)]
      place = page, pl.ds(jax.lax.rem(first, size), keys)
      columns = lambda low, n: pages.at[*place, pl.ds(low, n)]
    c = triton.load(columns(0, rank))
    r = triton.load(columns(rank, rope.shape[1]))
    logits = _dot(latent, c.T) + _dot(rope, r.T)
    key = first + jnp.arange(keys)
    logits = jnp.where(key[None] <= last[:, None], logits, MASKED)
    maximum = jnp.maximum(peak, logits.max(-1))
    probs = jnp.exp2((logits - maximum[:, None]) * math.log2(math.e))
    shrink = jnp.exp2((peak - maximum) * math.log2(math.e))
    acc = acc * shrink[:, None] + _dot(probs.astype(c.dtype), c)
    return acc, maximum, total * shrink + probs.sum(-1)

  zero = jnp.zeros((height,), jnp.float32)
  carry = jnp.zeros((height, rank), jnp.float32), zero + MASKED, zero
  live = jnp.maximum(stop - split * split_pages, 0) * size
  live = jax.lax.div(live + keys - 1, keys)
  acc, peak, total = jax.lax.fori_loop(0, live, turn, carry)
  # A split without pages has peak MASKED, and so no weight.
  total = jnp.where(total == 0, 1.0, total)
  out[0, 0] = acc / total[:, None]
  lse[0, 0] = peak + jnp.log(total)


def _dot(a, b):
  return jnp.dot(a, b, preferred_element_type=jnp.float32)
