"""Sparse attention over the latent cache: a query reads its set alone (V3.2).

A layer's indexer scores the cached keys of a row, d_I numbers a token, and the
K best are the set (`model.indexer`). Scores exist for a block of queries at a
time, [queries, S]; of all T there would be T * S. Absorbed attention
(`decode.latent_attention`) then gathers K latents from the pages, wherever they
lie. Its work and its memory are those of K keys, however long the row is; the
index scores alone grow with it.

Up to K keys the set is all of them, and attention is dense: the same numbers
for less work. Many new tokens over a short row are cheaper in decompressed form
under a mask (`model.sparse.choose_form`), which `select` makes from the same
scores: a key is in the set if its score is above the K-th best, or equal to it
and not after the last key that had a place. So both forms have one set.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mla_moe import kernels
from mla_moe.config import MLAConfig, ModelConfig
from mla_moe.decode import latent_cache
from mla_moe.model import indexer, products, sequence, sparse
from mla_moe.types import Array, Float, Int

_TILE = 2048  # keys that are scored at once
_NUMBERS = 1 << 24  # of the scores, or latents, of a block of queries
# On-chip memory of a TPU has room for so many queries of the index, and scores.
_KERNEL_ROWS = 256
_KERNEL_SCORES = 1 << 19


def form_of(form: str, capacity: int, config: ModelConfig) -> str:
  """Returns 'gathered' or 'masked', or the dense `form` where it is as good.

  Args:
    form: of `latent_attention.attend`, if every key were seen.
    capacity: most keys of a row.
    config: of the model.
  """
  if not latent_cache.is_sparse(config) or capacity <= config.dsa.topk:
    return form
  few = form == 'absorbed'
  return 'gathered' if few else sparse.choose_form(capacity, config)


def select(
  index: indexer.Index,
  cache: latent_cache.Cache,
  longest: Int[Array, ''],
  topk: int,
  form: str,
) -> Array:
  """Returns the sets of new tokens whose keys are in the cache.

  Args:
    index: queries of the new tokens.
    cache: of this layer; its lengths do not count the new tokens.
    longest: keys of the longest row.
    topk: the most keys of a set, fewer than the capacity.
    form: 'gathered': the keys' positions [B, T, K] int32, -1 in an empty slot.
      'masked': whether the set has a key, [B, T, S] bool.
  """
  rows, t, heads = index.w.shape
  fits = t * heads <= _KERNEL_ROWS and t * cache.capacity <= _KERNEL_SCORES
  if cache.impl == 'tpu' and form == 'gathered' and fits:
    return _select_by_kernel(index, cache, topk)
  positions = cache.lengths[:, None] + jnp.arange(t, dtype=jnp.int32)[None]

  def block(args):
    of_keys = _scores(*args, cache, longest)
    # A CPU's fast top_k wants two axes.
    flat = of_keys.reshape(-1, of_keys.shape[-1])
    values, keys = jax.lax.top_k(flat, topk)
    if form == 'gathered':
      keys = jnp.where(values > -jnp.inf, keys, -1)
      return keys.reshape(*of_keys.shape[:2], topk)
    worst = values[:, -1:]
    last = jnp.where(values == worst, keys, -1).max(-1, keepdims=True)
    tied = (flat == worst) & (jnp.arange(flat.shape[-1])[None] <= last)
    chosen = ((flat > worst) | tied) & (flat > -jnp.inf)
    return chosen.reshape(of_keys.shape)

  queries = index.q, index.w, positions
  numbers = max(cache.capacity, heads * _TILE)
  few = max(_NUMBERS // (rows * numbers), 1)
  if t <= few:
    return block(queries)
  return indexer.join(jax.lax.map(block, indexer.cut(queries, few)), t)


def _select_by_kernel(index, cache, topk):
  from mla_moe.kernels import sparse_tpu as kernel

  (pages,), (b, t, heads, _) = cache.layers, index.q.shape
  width = pages.index.shape[-1]
  q = sequence.pad(index.q, width, 3).reshape(b, t * heads, width)
  queries = q.astype(pages.index.dtype), index.w.reshape(b, t * heads)
  args = *queries, pages.index, cache.table, cache.lengths
  return kernel.positions(kernel.select(*args, heads=heads, topk=topk), topk)


def _scores(q, w, positions, cache, longest):
  """Returns the index scores [B, T, S], -inf for keys that are not seen.

  S is the capacity, rounded up to whole tiles.
  """
  (pages,), table = cache.layers, cache.table
  size, columns = pages.page_size, table.shape[1]
  count = min(max(_TILE // size, 1), columns)  # pages of a tile
  last = jnp.minimum(positions, cache.capacity - 1)[..., None]

  def tile(j, of_keys):
    column = jnp.minimum(j * count + jnp.arange(count), columns - 1)
    keys = latent_cache.read_index(
      pages, table[:, column], q.dtype.name, q.shape[-1]
    )
    start = j * count * size
    seen = start + jnp.arange(count * size)[None, None] <= last
    part = jnp.where(seen, indexer.scores(q, w, keys), -jnp.inf)
    return jax.lax.dynamic_update_slice_in_dim(of_keys, part, start, 2)

  width = -(-columns // count) * count * size
  of_keys = jnp.full((*w.shape[:2], width), -jnp.inf)
  tiles = -(-longest // (count * size))
  return jax.lax.fori_loop(0, tiles, tile, of_keys)


def attend(
  q: Float[Array, 'B N T W'],
  selected: Int[Array, 'B T K'],
  cache: latent_cache.Cache,
  mla: MLAConfig,
) -> Float[Array, 'B N T width']:
  """Returns the heads' sums of the latents of each query's set.

  Args:
    q: folded queries, the softmax's scale included.
    selected: positions of keys, -1 in an empty slot.
    cache: of this layer.
    mla: the sizes; the result's first `mla.kv_rank` numbers are the sums.
  """
  (pages,) = cache.layers
  b, heads, t, width = q.shape
  count, selected = selected.shape[-1], selected.reshape(b * t, -1)
  queries = q.swapaxes(1, 2).reshape(b * t, heads, width)
  if cache.impl != 'xla':
    out = _attend_by_kernel(queries, selected, cache, mla.kv_rank)
    return out.reshape(b, t, heads, -1).swapaxes(1, 2)
  slots = _slots(selected, cache)

  def one(args):
    q, slots, selected = args
    tokens = latent_cache.gather(
      pages, tuple(slots), q.dtype.name, mla.rope_dim
    )
    logits = products.dot('kw,nw->kn', tokens, q)
    logits = jnp.where(selected[:, None] >= 0, logits, kernels.MASKED)
    probs = jax.nn.softmax(logits, axis=0).astype(q.dtype)
    return products.dot('kn,kw->nw', probs, tokens)

  queries = queries, slots, selected
  few = max(_NUMBERS // (count * (width + heads)), 1)
  out = jax.lax.map(one, queries, batch_size=min(few, b * t))
  return out.reshape(b, t, heads, width).swapaxes(1, 2)


def _attend_by_kernel(queries, selected, cache, rank):
  """Returns the sums [B * T, N, C] for queries, in the dtype of the pool."""
  (pages,) = cache.layers
  queries = queries.astype(pages.values.dtype)
  counts = (selected >= 0).sum(-1)  # empty slots are the last of a set
  whole = sequence.pad(selected + 1, -(-selected.shape[1] // 128) * 128) - 1
  page, offset = _slots(whole, cache)
  slots = page * pages.page_size + offset
  if cache.impl == 'tpu':
    from mla_moe.kernels import sparse_tpu

    return sparse_tpu.attend(queries, pages.values, slots, counts, rank=rank)
  from mla_moe.kernels import latent_gpu

  # Each token is a page, and a query is the last token of its row.
  tokens = pages.values.reshape(-1, 1, pages.values.shape[-1])
  sizes = dict(heads=queries.shape[1], rank=rank)
  return latent_gpu.attend(queries, tokens, slots, counts - 1, **sizes)


def _slots(selected, cache):
  """Returns where keys lie, [B * T, K]; an empty slot's is the row's first."""
  rows, size = len(cache.table), cache.layers[0].page_size
  keys = jnp.maximum(selected, 0).reshape(rows, -1)
  page = jnp.take_along_axis(cache.table, keys // size, axis=1)
  flat = lambda x: x.reshape(selected.shape)
  return latent_cache.Slots(flat(page), flat(keys % size))
