"""Flash attention in plain XLA operations, with its gradient (Dao et al. 2022).

Logits are made in tiles, a block of queries times a block of keys, and never
whole: memory is O(T). Going forward, each query block keeps the running maximum
and sum of its softmax. Going backward, a tile's probabilities are made again
from the logsumexp. The gradient is written by hand because autodiff would save
every tile. The loop runs over a table of tiles, without those above the
diagonal: they cost nothing in either direction.

Two things are for XLA's CPU backend. It is slow at products that contract the
leading axes of both operands, so tiles are [queries, keys] going forward and
[keys, queries] going backward. And it runs a batched product of small matrices
on one core, so rows and heads are cut into chunks, whose products in one tile
are independent and run on a core each.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from mla_moe import kernels, sharding
from mla_moe.model import products
from mla_moe.model.sequence import Part
from mla_moe.types import Array, Float

# Checkpoint names. A remat policy that saves both spares the backward pass a
# second forward pass.
OUT, LSE = SAVED = ('attention_out', 'attention_lse')


def flash_attention(
  q: Float[Array, 'B T N qk'],
  k: Float[Array, 'B S N qk'],
  v: Float[Array, 'B S N U'],
  segments: tuple | None,
  part: Part,
  scale: float,
) -> Float[Array, 'B T N U']:
  """Returns softmax(scale * q k^T) v; see `attention.attend`."""
  if not q.size:
    return jnp.zeros((*q.shape[:3], v.shape[3]), q.dtype)
  return _flash(q, k, v, segments, part.index, scale, part.count)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _flash(q, k, v, segments, index, scale, count):
  return _forward(q, k, v, segments, index, scale, count)[0]


def _forward(q, k, v, segments, index, scale, count):
  """Returns the output and the residuals; lists have one item a chunk."""
  block = _block_size(q, segments, count)
  chunks = _chunks(q, block)
  cut = functools.partial(_cut, block=block, chunks=chunks)
  ids = _cut_segments(segments, q.shape[2], block, chunks)
  inputs = list(zip(cut(q), cut(k), cut(v), ids, strict=True))

  def tile(chunk, carry, i, j, diagonal):
    queries, keys, values, ids = chunk
    out, peak, total = carry  # of the softmax so far, for each query
    logits = products.dot('...th,...sh->...ts', queries[i], keys[j]) * scale
    logits = _mask(logits, ids, i, j, diagonal)
    higher = jnp.maximum(peak[i], logits.max(-1))
    probs = jnp.exp(logits - higher[..., None])
    shrink = jnp.exp(peak[i] - higher)
    y = products.dot('...ts,...su->...tu', probs.astype(v.dtype), values[j])
    out = out.at[i].set(out[i] * shrink[..., None] + y)
    total = total.at[i].set(total[i] * shrink + probs.sum(-1))
    return out, peak.at[i].set(higher), total

  def start(queries, keys, values, ids):
    zero = jnp.zeros(queries.shape[:-1], jnp.float32)
    wide = (*queries.shape[:-1], values.shape[-1])
    return jnp.zeros(wide, jnp.float32), zero + kernels.MASKED, zero

  tiles = _tiles(len(inputs[0][0]), index, count, segments, block)
  sums = _run_tiles(tile, inputs, (start(*c) for c in inputs), tiles)
  out = [out / total[..., None] for out, _, total in sums]
  out = _join(out, *q.shape[1:3])
  # Named here, inside the custom_vjp: the names are those of its residuals.
  out = checkpoint_name(out.astype(v.dtype), OUT)
  lse = [checkpoint_name(p + jnp.log(t), LSE) for _, p, t in sums]
  return out, (inputs, lse, out, segments, index)


def _backward(scale, count, residuals, g):
  """Returns the gradients of q, k and v; none of segments and index."""
  inputs, lse, out, segments, index = residuals
  (queries, *_), *_ = inputs
  block, dtype, chunks = queries.shape[-2], queries.dtype, len(lse)
  cut = functools.partial(_cut, block=block, chunks=chunks)
  # d logits = p * (dp - delta), delta = <g, out> (Dao et al. 2022, section 3)
  delta = jnp.sum(g.astype(jnp.float32) * out.astype(jnp.float32), -1)
  keys_t = [keys.swapaxes(-1, -2) for _, keys, *_ in inputs]
  more = zip(keys_t, cut(g), cut(delta[..., None]), lse, strict=True)
  inputs = [(*a, *b) for a, b in zip(inputs, more, strict=True)]

  def tile(chunk, carry, i, j, diagonal):
    queries, keys, values, ids, keys_t, grads, delta, lse = chunk
    dq, dk, dv = carry
    logits = products.dot('...sh,...th->...st', keys[j], queries[i]) * scale
    logits = _mask(logits, ids, i, j, diagonal, transposed=True)
    probs = jnp.exp(logits - lse[i][..., None, :])
    dp = products.dot('...su,...tu->...st', values[j], grads[i])
    ds = (probs * (dp - delta[i].swapaxes(-1, -2))).astype(dtype)
    probs = probs.astype(g.dtype)
    dv = dv.at[j].add(products.dot('...st,...tu->...su', probs, grads[i]))
    dk = dk.at[j].add(products.dot('...st,...th->...sh', ds, queries[i]))
    dq = dq.at[i].add(products.dot('...hs,...st->...ht', keys_t[j], ds))
    return dq, dk, dv

  def start(queries, keys, values, *_):
    like = (queries.swapaxes(-1, -2), keys, values)
    return tuple(jnp.zeros(x.shape, jnp.float32) for x in like)

  tiles = _tiles(len(inputs[0][0]), index, count, segments, block)
  sums = _run_tiles(tile, inputs, (start(*c) for c in inputs), tiles)
  dq, dk, dv = zip(*sums, strict=True)
  dq = [x.swapaxes(-1, -2) * scale for x in dq]
  dk = [x * scale for x in dk]
  t, heads = out.shape[1:3]
  pairs = ((dq, t), (dk, t * count), (dv, t * count))
  grads = (_join(x, length, heads).astype(dtype) for x, length in pairs)
  return *grads, None, None


_flash.defvjp(_forward, _backward)


def visible(queries, keys):
  """Returns where a query sees a key, by segments that broadcast.

  A segment is a document, below 2**20, or answer << 20 | prompt, from answer 1
  on: an answer sees itself and the prompt that it shares with others.
  """
  return (queries == keys) | (queries & (1 << 20) - 1 == keys)


def seen(positions, keys, of_queries=None, of_keys=None):
  """Returns the mask [B, T, S] of the keys [S] that queries [B, T] see.

  A query sees the keys up to its position; those of its own document if there
  are numbers of documents (`visible`).
  """
  mask = keys[None, None] <= positions[..., None]
  if of_keys is None:
    return mask
  return mask & visible(of_queries[..., None], of_keys[:, None])


# ------------------------------------------------------------------- tiles


def _block_size(q, segments, count) -> int:
  """Returns the side of a tile, whose logits should fit a core's cache.

  Measured on x86: of a short row, small tiles leave more above the diagonal,
  and between its segments. Each of the 2 * `count` pieces of a sequence that is
  split over devices is a whole number of blocks.
  """
  b, t, heads = q.shape[:3]
  most = 256 if b * heads < 32 else 64 if t <= 192 else 128
  most = 64 if segments is not None and t <= 1152 else most
  if count == 1:
    return min(most, t)
  piece = t // 2
  return next(n for n in range(min(most, piece), 0, -1) if piece % n == 0)


def _tiles(blocks, index, count, segments, block):
  """Returns (query block, key block, is on the diagonal), and how many count.

  Query blocks are counted in this device's part of the sequence, key blocks in
  all of it. All parts have equally many tiles, so that one program serves. The
  first ones count: those in which a query may see a key, in any row.
  """
  table = []
  for part in range(count):
    pieces = Part(part, count).pieces()
    each = blocks // len(pieces)
    places = [p * each + i for p in pieces for i in range(each)]
    tiles = [(i, j, p == j) for i, p in enumerate(places) for j in range(p + 1)]
    table.append(np.array(tiles, np.int32))
  mine = jnp.asarray(np.stack(table))[index if count > 1 else 0].T
  if segments is None:
    return mine, mine.shape[1]
  queries, keys, diagonal = mine
  meet = _meeting(*segments, block).any(0)[queries, keys] | (diagonal > 0)
  return mine[:, jnp.argsort(~meet, stable=True)], meet.sum()


def _meeting(of_queries, of_keys, block):
  """Returns whether a query of a block may see a key of another, [B, n, m].

  It compares the spans of the blocks' documents or prompts, and those of their
  answers (`visible`). Spans may meet where no two segments do.
  """

  def span(ids, real):
    wide = jnp.pad(real, ((0, 0), (0, -ids.shape[1] % block)))
    ids = jnp.pad(ids, ((0, 0), (0, -ids.shape[1] % block)))
    cut = lambda x: x.reshape(len(x), -1, block)
    low = cut(jnp.where(wide, ids, 2**31 - 1)).min(-1)
    return low, cut(jnp.where(wide, ids, -1)).max(-1)

  def meet(queries, keys):
    (low, high), (first, last) = queries, keys
    over = low[:, :, None] <= last[:, None, :]
    return over & (high[:, :, None] >= first[:, None, :])

  answer = lambda ids: (ids >> 20, ids >> 20 > 0)
  outer = span(of_queries & (1 << 20) - 1, of_queries >= 0)
  prompts = span(of_keys, of_keys >> 20 == 0)
  answers = (span(*answer(ids)) for ids in (of_queries, of_keys))
  return meet(outer, prompts) | meet(*answers)


def _run_tiles(tile, inputs, start, tiles):
  """Folds tiles: `tile(chunk, carry, i, j, diagonal)` returns the carry.

  `inputs` and `start` have an item for each chunk, and so has the result. Of a
  scan, the layers' gradient would keep the masks of all tiles, [T^2 / 2].
  """
  table, count = tiles

  def step(state):
    n, carries = state
    pairs = zip(inputs, carries, strict=True)
    sums = (tile(chunk, carry, *table[:, n]) for chunk, carry in pairs)
    return n + 1, tuple(sums)

  start = 0, sharding.pvary(tuple(start))
  return jax.lax.while_loop(lambda state: state[0] < count, step, start)[1]


def _mask(logits, ids, i, j, diagonal, transposed=False):
  """Returns the tile of query block i and key block j, masked.

  It is [.., t, s], or [.., s, t] if `transposed`. Causality is a constant bias,
  zero off the diagonal: adding it is cheaper than comparing positions in every
  tile. It also hides the padding, which follows every real position.
  """
  at = np.arange(logits.shape[-1])
  hidden = np.where(at[:, None] < at[None, :], kernels.MASKED, 0.0)
  hidden = hidden.T if transposed else hidden
  bias = jnp.asarray(np.stack([np.zeros_like(hidden), hidden]), jnp.float32)
  logits = logits + jnp.expand_dims(
    bias[diagonal], tuple(range(logits.ndim - 2))
  )
  if ids is None:
    return logits
  queries, keys = ids[0][i][..., :, None], ids[1][j][..., None, :]
  if transposed:
    queries, keys = queries.swapaxes(-1, -2), keys.swapaxes(-1, -2)
  return jnp.where(visible(queries, keys), logits, kernels.MASKED)


# ------------------------------------------------------------------ chunks


def _chunks(q, block) -> int:
  """Returns the number of chunks that rows and heads are cut into."""
  b, _, heads = q.shape[:3]
  wide = b * heads % 4 == 0 and b * heads * block**2 >= 1 << 18
  on_cpu = _without_mesh() and jax.default_backend() == 'cpu'
  return 4 if wide and on_cpu else 1


def _without_mesh() -> bool:
  """Returns whether rows and heads may be one axis: no mesh splits them."""
  return jax.sharding.get_abstract_mesh().empty


def _cut(x, block, chunks):
  """Cuts [B, T, N, d] into chunks of [blocks, B, N, block, d], padded.

  Without a mesh B and N are one axis, for which XLA's CPU backend has faster
  products.
  """
  b, t, heads, d = x.shape
  n = -(-t // block)
  x = jnp.pad(x, [(0, 0), (0, n * block - t), (0, 0), (0, 0)])
  x = x.reshape(b, n, block, heads, d).transpose(1, 0, 3, 2, 4)
  lead = (b * heads,) if _without_mesh() else (b, heads)
  return jnp.split(x.reshape(n, *lead, block, d), chunks, axis=-3)


def _join(chunks, length, heads):
  """Joins what `_cut` has cut to [B, length, N, d], without the padding."""
  x = jnp.concatenate(chunks, axis=-3)
  n, *_, block, d = x.shape
  x = x.reshape(n, -1, heads, block, d).transpose(1, 0, 3, 2, 4)
  return x.reshape(x.shape[0], n * block, heads, d)[:, :length]


def _cut_segments(segments, heads, block, chunks):
  """Returns each chunk's (queries', keys') segments, cut alike; or Nones."""
  if segments is None:
    return [None] * chunks
  wide = lambda x: jnp.broadcast_to(x[:, :, None, None], (*x.shape, heads, 1))
  of_queries, of_keys = (_cut(wide(x), block, chunks) for x in segments)
  pairs = zip(of_queries, of_keys, strict=True)
  # Else XLA would repeat the heads' broadcast at each logit of each tile.
  barrier = jax.lax.optimization_barrier
  return barrier([(a[..., 0], b[..., 0]) for a, b in pairs])
