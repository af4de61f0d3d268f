"""Sparse attention on TPU: the K best scores without sorting; their latents.

`select` reads each page of the indexer's keys once, and the scores stay in
on-chip memory, as integers in the order of the floats. A TPU sorts slowly. So
the K-th largest is built bit by bit, in 32 counts of the scores that are as
large, and among equal ones the last key that has a place, bit by bit of its
position. The result is a mask. `positions` makes it a list, without a scatter,
which a TPU would make one key at a time.

`attend` gathers on the way: while one block of a set is multiplied, the next
one, or the first of the next query, comes from the pool into on-chip memory, a
copy for each token. So no set is an array, which XLA would write and attention
read again. A TPU moves words of 32 bits, of two neighbouring tokens if they are
bfloat16: a copy has both, and the kernel keeps one half of each word, as the
upper half of a float32. The oracles are beside the tests.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mla_moe.kernels import latent_tpu
from mla_moe.types import Array, Bool, Float, Int

_LANES = 128
_KEYS = 256  # of a block of a set, where it has whole ones
_PAGES = 8  # that a turn reads: a page of index keys is small
_LOWEST = np.iinfo(np.int32).min  # below every float: a key that is not seen


def select(
  q: Float[Array, 'B G I'],
  w: Float[Array, 'B G'],
  pages: Float[Array, 'P page I'],
  table: Int[Array, 'B n'],
  start: Int[Array, ' B'],
  *,
  heads: int,
  topk: int,
) -> Bool[Array, 'B T S']:
  """Returns whether a key is one of the `topk` best of a new token.

  Row g of the queries is head g % heads of new token g // heads, which sees the
  keys up to start + g // heads. `w` are their weights, float32, and `pages` the
  pool of the indexer's keys; the page and I are multiples of 128.
  """
  (b, rows, dim), size, count = q.shape, pages.shape[1], table.shape[1]
  tokens, group = rows // heads, min(_PAGES, count)
  turns = -(-count // group)

  def page(i, j, start, table, *, which):
    last = jnp.minimum(jax.lax.div(start[i] + tokens - 1, size), count - 1)
    return table[i, jnp.minimum(j * group + which, last)], 0, 0

  row = lambda i, j, *_: (i, 0, 0)
  lines = turns * group * size // _LANES
  out = pl.pallas_call(
    functools.partial(_select, size=size, heads=heads, topk=topk),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(b, turns),
      in_specs=[
        pl.BlockSpec((1, rows, dim), row),
        pl.BlockSpec((1, rows, 1), row),
        *(
          pl.BlockSpec((1, size, dim), functools.partial(page, which=which))
          for which in range(group)
        ),
      ],
      out_specs=pl.BlockSpec(
        (1, tokens, lines, _LANES), lambda i, j, *_: (i, 0, 0, 0)
      ),
    ),
    out_shape=jax.ShapeDtypeStruct((b, tokens, lines, _LANES), jnp.int32),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'arbitrary')
    ),
    name='index_select',
  )(start, table, q, w[..., None], *[pages] * group)
  return out.reshape(b, tokens, -1)[..., : count * size] > 0


def _select(start, table, q, w, *refs, size, heads, topk):
  *pages, out = refs
  row, turn = pl.program_id(0), pl.program_id(1)
  tokens = out.shape[1]

  @pl.when(turn == 0)
  def _():
    out[...] = jnp.full_like(out, _LOWEST)

  for which, page in enumerate(pages):
    first = (turn * len(pages) + which) * size

    @pl.when(first <= start[row] + tokens - 1)
    def _(page=page, first=first):
      dots = latent_tpu.dot(q[0], page[0], (((1,), (1,)), ((), ())))
      scores = jnp.maximum(dots, 0.0) * w[0]
      scores = scores.reshape(tokens, heads, size).sum(1)
      key = first + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
      last = start[row] + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
      # Both zeros are one; and integers in the order of floats.
      scores = jnp.where(scores == 0, 0.0, scores)
      bits = jax.lax.bitcast_convert_type(scores, jnp.int32)
      ordered = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
      ordered = jnp.where(key <= last, ordered, _LOWEST)
      for line, token in np.ndindex(size // _LANES, tokens):
        lanes = slice(line * _LANES, (line + 1) * _LANES)
        place = jax.lax.div(first, _LANES) + line
        out[0, token, pl.ds(place, 1), :] = ordered[token : token + 1, lanes]

  @pl.when(turn == pl.num_programs(1) - 1)
  def _():
    for token in range(tokens):
      out[0, token] = _best(out[0, token], topk).astype(jnp.int32)


def _best(x, topk):
  """Returns a mask of the `topk` largest of x [lines, 128], the first of ties.

  Numbers that are _LOWEST are never among them.
  """
  count = lambda mask: jnp.sum(jnp.where(mask, 1.0, 0.0))  # exact below 2^24

  def by_value(i, worst):  # the highest that `topk` numbers reach
    # Bits of x + 2^31, which has the order of x without a sign.
    more = worst ^ (jnp.int32(1) << (31 - i))
    return jnp.where(count(x >= more) >= topk, more, worst)

  worst = jax.lax.fori_loop(0, 32, by_value, jnp.int32(_LOWEST))
  tied = x == worst
  places = topk - count(x > worst)
  line = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
  key = line * _LANES + jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)

  def by_key(i, last):  # the highest that has fewer ties before it
    more = last | (jnp.int32(1) << (30 - i))
    return jnp.where(count(tied & (key < more)) < places, more, last)

  last = jax.lax.fori_loop(0, 31, by_key, jnp.int32(0))
  return ((x > worst) | (tied & (key <= last))) & (x > _LOWEST)


def positions(mask: Bool[Array, 'B T S'], topk: int) -> Int[Array, 'B T K']:
  """Returns the places of a mask's at most `topk` marks in order, then -1.

  S is a multiple of 128. For slot j: the line of 128 keys is the number of
  lines that end before mark j, and the key likewise within its line.
  """
  lines = mask.reshape(*mask.shape[:2], -1, _LANES)
  ends = jnp.cumsum(lines.sum(-1), -1)  # marks up to each line's end
  slot = jnp.arange(topk)[None, None]
  before = ends[..., None, :] <= slot[..., None]
  line = before.sum(-1)
  ahead = jnp.where(before, lines.sum(-1)[..., None, :], 0).sum(-1)
  real = slot < ends[..., -1:]
  line = jnp.minimum(line, lines.shape[2] - 1)
  own = jnp.take_along_axis(lines, line[..., None], axis=2)
  upper = jnp.triu(jnp.ones((_LANES, _LANES), jnp.float32))  # exact sums
  marks = jnp.einsum('btkl,lm->btkm', own.astype(jnp.float32), upper)
  key = (marks <= (slot - ahead)[..., None]).sum(-1)
  return jnp.where(real, line * _LANES + key, -1)


def attend(
  q: Float[Array, 'R N W'],
  pages: Float[Array, 'P page W'],
  slots: Int[Array, 'R K'],
  counts: Int[Array, ' R'],
  *,
  rank: int,
) -> Float[Array, 'R N C']:
  """Returns the heads' sums of the first `rank` numbers of each row's set.

  Args:
    q: in the dtype of the pool, the softmax's scale included.
    pages: the pool, float32 or bfloat16; page and W are multiples of 128.
    slots: page * size + offset of each key; K is a multiple of 128.
    counts: keys of a row, at least one; the slots after them are not seen.
    rank: C, the width of the result.
  """
  (rows, heads, width), keys = q.shape, slots.shape[1]
  size = _LANES if keys % _KEYS else _KEYS
  blocks, packing = keys // size, 4 // pages.dtype.itemsize
  slots = slots.reshape(-1, 1, size)

  def block(i, j, *_, ahead=0):
    return jnp.minimum(i * blocks + j + ahead, rows * blocks - 1), 0, 0

  row = lambda i, j, *_: (i, 0, 0)
  line = functools.partial(pl.BlockSpec, (1, 1, size))
  after = functools.partial(block, ahead=1)
  return pl.pallas_call(
    functools.partial(_attend, packing=packing),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(rows, blocks),
      in_specs=[
        pl.BlockSpec((1, heads, width), row),
        pl.BlockSpec(memory_space=pl.ANY),
        line(block, memory_space=pltpu.SMEM),
        line(after, memory_space=pltpu.SMEM),
        line(block),
      ],
      out_specs=pl.BlockSpec((1, heads, rank), row),
      scratch_shapes=[
        pltpu.VMEM((2, size * packing, width), pages.dtype),
        pltpu.SemaphoreType.DMA((2,)),
        *latent_tpu.sums(heads, rank),
      ],
    ),
    out_shape=jax.ShapeDtypeStruct((rows, heads, rank), q.dtype),
    name='gathered_attention',
  )(counts, q, pages.reshape(-1, width), slots, slots, slots)


def _attend(
  counts, q, pool, own, after, places, out, tokens, copied, *state, packing
):
  row, j, blocks = pl.program_id(0), pl.program_id(1), pl.num_programs(1)
  step, size = row * blocks + j, own.shape[2]
  turn = jax.lax.rem(step, 2)

  def fetch(slots, turn):
    def one(i, _):
      place = lambda i: pl.ds(pl.multiple_of(i * packing, packing), packing)
      source = pool.at[place(jax.lax.div(slots[0, 0, i], packing))]
      target = tokens.at[turn, place(i)]
      pltpu.make_async_copy(source, target, copied.at[turn]).start()

    jax.lax.fori_loop(0, size, one, None, unroll=8)

  last = pl.num_programs(0) * blocks - 1
  pl.when(step == 0)(lambda: fetch(own, turn))
  pl.when(step < last)(lambda: fetch(after, 1 - turn))
  pl.when(j == 0)(lambda: latent_tpu.clear(*state))
  # Waits for as many bytes as all copies of this turn have.
  whole = tokens.at[turn]
  pltpu.make_async_copy(whole, whole, copied.at[turn]).wait()
  keys = tokens[turn]
  if packing == 2:
    words = pltpu.bitcast(keys, jnp.uint32)
    odd = jnp.broadcast_to(jax.lax.rem(places[0], 2), (_LANES, size)).T[:, :1]
    words = jnp.where(odd == 1, words & jnp.uint32(0xFFFF0000), words << 16)
    keys = jax.lax.bitcast_convert_type(words, jnp.float32).astype(keys.dtype)
  key = jax.lax.broadcasted_iota(jnp.int32, (q.shape[1], size), 1)
  latent_tpu.add(q[0], keys, j * size + key < counts[row], *state)

  @pl.when(j == blocks - 1)
  def _():
    acc, _, total = state
    out[0] = (acc[...] / total[...][:, :1]).astype(out.dtype)
