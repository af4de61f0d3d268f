"""Absorbed attention over paged latents on NVIDIA GPUs, in Triton.

A program takes some heads of a row and a share of its pages (flash decoding:
few rows must still fill every multiprocessor); the shares are put together
afterwards by their logsumexp. Latent and shared key are loaded apart, because
Triton's blocks are powers of two and 576 is none. jax 0.12 still has this
backend of Pallas, and says that it will go. For the oracle see
`latent_tpu.reference`.
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

_KEYS = 32  # that are in flight together


def fits(rank: int, rope_dim: int, page: int) -> bool:
  """Whether these widths can be blocks."""
  power = lambda n: n >= 16 and n & (n - 1) == 0
  return power(rank) and power(rope_dim) and power(page)


def attend(
  q: Float[Array, 'B G W'],
  pages: Float[Array, 'P page W'],
  table: Int[Array, 'B n'],
  start: Int[Array, ' B'],
  *,
  heads: int,
  rank: int,
  shares: int = 8,
  interpret: bool = False,
) -> Float[Array, 'B G C']:
  """`latent_tpu.reference`, in q's dtype; W is rank and rope, unpadded."""
  b, rows, width = q.shape
  size, count, rope_dim = pages.shape[1], table.shape[1], width - rank
  assert fits(rank, rope_dim, size), (rank, rope_dim, size)
  height = 16 if rows <= 16 else 32 if rows <= 32 else 64
  padded = -(-rows // height) * height
  q = jnp.pad(q, [(0, 0), (0, padded - rows), (0, 0)])
  shares = min(shares, count)
  run = functools.partial(
    _kernel, size=size, rank=rank, heads=heads, height=height,
    each=-(-count // shares), more=-(-rows // heads) - 1,
  )  # fmt: skip
  whole = lambda x: pl.BlockSpec(x.shape, lambda *_: (0,) * x.ndim)
  part = lambda n: pl.BlockSpec((1, height, n), lambda i, h, s: (i, h, 0))
  out, lse = pl.pallas_call(
    run,
    grid=(b, padded // height, shares),
    in_specs=[whole(start), whole(table), part(rank), part(rope_dim)]
    + [whole(pages)],
    out_specs=[
      pl.BlockSpec((1, 1, height, rank), lambda i, h, s: (s, i, h, 0)),
      pl.BlockSpec((1, 1, height), lambda i, h, s: (s, i, h)),
    ],
    out_shape=[
      jax.ShapeDtypeStruct((shares, b, padded, rank), jnp.float32),
      jax.ShapeDtypeStruct((shares, b, padded), jnp.float32),
    ],
    compiler_params=triton.CompilerParams(num_warps=8, num_stages=2),
    interpret=interpret,
    name='latent_attention',
  )(start, table, q[..., :rank], q[..., rank:], pages)
  weight = jax.nn.softmax(lse, axis=0)
  return (out * weight[..., None]).sum(0)[:, :rows].astype(q.dtype)


def _kernel(
  start, table, q_latent, q_rope, pages, out, lse, *, size, rank, heads,
  height, each, more,
):  # fmt: skip
  row, block, share = (pl.program_id(i) for i in range(3))
  begin, latent, rope = start[row], q_latent[0], q_rope[0]
  line = block * height + jnp.arange(height)
  # Rows of padding see what the last new token sees.
  last = begin + jnp.minimum(jax.lax.div(line, heads), more)
  keys = min(_KEYS, size)
  ends = jax.lax.div(begin + more, size) + 1
  stop = jnp.minimum(jnp.minimum((share + 1) * each, ends), table.shape[1])

  def turn(i, carry):
    acc, peak, total = carry
    page = table[row, share * each + jax.lax.div(i, size // keys)]
    first = jax.lax.rem(i, size // keys) * keys
    at = lambda low, n: pages.at[page, pl.ds(first, keys), pl.ds(low, n)]
    c = triton.load(at(0, rank))
    r = triton.load(at(rank, rope.shape[1]))
    logits = _dot(latent, c.T) + _dot(rope, r.T)
    key = share * each * size + i * keys + jnp.arange(keys)
    logits = jnp.where(key[None] <= last[:, None], logits, MASKED)
    new = jnp.maximum(peak, logits.max(-1))
    probs = jnp.exp2((logits - new[:, None]) * math.log2(math.e))
    shrink = jnp.exp2((peak - new) * math.log2(math.e))
    acc = acc * shrink[:, None] + _dot(probs.astype(c.dtype), c)
    return acc, new, total * shrink + probs.sum(-1)

  zero = jnp.zeros((height,), jnp.float32)
  carry = jnp.zeros((height, rank), jnp.float32), zero + MASKED, zero
  live = jnp.maximum(stop - share * each, 0) * (size // keys)
  acc, peak, total = jax.lax.fori_loop(0, live, turn, carry)
  # A share without pages has peak MASKED, and so no weight.
  total = jnp.where(total == 0, 1.0, total)
  out[0, 0] = acc / total[:, None]
  lse[0, 0] = peak + jnp.log(total)


def _dot(a, b):
  return jnp.dot(a, b, preferred_element_type=jnp.float32)
