"""The cache of decoding: MLA's latents, in pages that rows may share.

Each layer keeps C + R numbers of a token: its normed latent c [C], then the
rotated key k_rope [R] that all heads share (DeepSeek-V2, section 2.1). Keys and
values of N heads would be N (H + R + U) numbers.

Pages work as in virtual memory (Kwon et al. 2023). A layer has one pool of
pages for all rows of a batch. Token s of row b lies in page
`table[b, s // page_size]`, at offset `s % page_size`. Requests come and go
without moving memory, and rows with one prompt share its pages.

Each layer's pool is an array of its own: XLA's CPU backend copies an array that
stacks the layers at every write. A donated cache is written in place. A pool is
C + R wide on CPU and GPU. On TPU the width is a multiple of 128: at any other
width XLA chooses another layout for the argument and copies the whole cache at
every step. A quantised pool has one scale for each 128 numbers of a latent and
leaves the shared key in bfloat16, because rounding hurts positions first.

Under sparse attention (`decode.sparse_attention`) the indexer's key of a token
lies beside its latent, in the same slot. A quantised one has one scale.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from mla_moe import cost, sharding
from mla_moe.config import CacheConfig, ConfigError, ModelConfig
from mla_moe.model import sequence
from mla_moe.types import Array, Float, Int, PyTree

_TILE = 128


@struct.dataclass
class Pages:
  """The pool of one layer, [P, page_size, width].

  values: latent, shared key, and zeros up to the width. If they are quantised:
  the latent alone, with its scales [P, page_size, tiles] and the shared key in
  `rope` [P, page_size, R]. routes [P, K, page_size] int16: the experts of each
  token in a MoE layer; None where the cache notes none. index [P, page_size, I]
  and, if quantised, index_scales [P, page_size, 1]: the indexer's keys; None in
  a layer without one.
  """

  values: PyTree
  scales: PyTree = None
  rope: PyTree = None
  routes: PyTree = None
  index: PyTree = None
  index_scales: PyTree = None

  @property
  def page_size(self) -> int:
    """Tokens in a page."""
    return self.values.shape[1]


@struct.dataclass
class Cache:
  """The latents of a batch of rows.

  layers: one pool a layer, and the MTP module's last; table [B, n] int32: the
  pages of each row, in order; lengths [B] int32: tokens in each row; impl: the
  implementation that attends to it (`implementation`).
  """

  layers: tuple
  table: PyTree
  lengths: PyTree
  impl: str = struct.field(pytree_node=False, default='xla')

  @property
  def capacity(self) -> int:
    """Most tokens of a row."""
    return self.table.shape[1] * self.layers[0].page_size


class Slots(NamedTuple):
  """Page and offset of each new token, [B, T]; a page out of range is none."""

  page: Array
  offset: Array


def empty(
  model: ModelConfig,
  batch: int,
  length: int,
  cache_config: CacheConfig = CacheConfig(),
) -> Cache:
  """Returns a cache of `batch` rows for up to `length` tokens each.

  No two rows share a page.
  """
  row_pages = -(-length // cache_config.page)
  pages = jnp.arange(batch * row_pages, dtype=jnp.int32)
  return Cache(
    layers=pools(model, batch * row_pages, cache_config),
    table=pages.reshape(batch, row_pages),
    lengths=jnp.zeros(batch, jnp.int32),
    impl=implementation(cache_config),
  )


def repeated(cache: Cache, samples: int, length: int) -> Cache:
  """Returns a cache with each row `samples` times, for up to `length` tokens.

  `cache` is one whose rows are as `empty` made them, page after page. Rows get
  copies of its pages, so that each can go on by itself.
  """
  rows, before = cache.table.shape
  size = cache.layers[0].page_size
  after = -(-length // size)

  def pool(x):
    x = jnp.repeat(x.reshape(rows, before, *x.shape[1:]), samples, axis=0)
    x = jnp.pad(x, [(0, 0), (0, after - before)] + [(0, 0)] * (x.ndim - 2))
    return x.reshape(-1, *x.shape[2:])

  pages = jnp.arange(rows * samples * after, dtype=jnp.int32)
  return Cache(
    layers=jax.tree.map(pool, cache.layers),
    table=pages.reshape(rows * samples, after),
    lengths=jnp.repeat(cache.lengths, samples),
    impl=cache.impl,
  )


def taken(cache: Cache, rows: Int[Array, ' n']) -> Cache:
  """Returns a cache of some rows, whose pages lie as `empty` made them."""
  table = cache.table[: len(rows)]
  old = cache.table[rows].reshape(-1)
  layers = jax.tree.map(lambda x: x[old], cache.layers)
  return cache.replace(layers=layers, table=table, lengths=cache.lengths[rows])


def implementation(cache_config: CacheConfig) -> str:
  """Returns the implementation of absorbed attention: 'xla', 'tpu' or 'gpu'."""
  if cache_config.impl != 'auto':
    return cache_config.impl
  plain = cache_config.dtype in ('auto', 'float32', 'bfloat16')
  fits = plain and cache_config.page % 128 == 0
  return 'tpu' if sharding.target_platform() == 'tpu' and fits else 'xla'


def pools(
  model: ModelConfig, pages: int, cache_config: CacheConfig
) -> tuple[Pages, ...]:
  """Returns a pool of empty pages for each layer and the first MTP module."""
  rank, rope_dim = cost.cached(model)
  if model.attention == 'gqa' and cache_config.impl in ('tpu', 'gpu'):
    raise ConfigError(f"impl={cache_config.impl!r}: reads no gqa; use 'xla'")
  platform = sharding.target_platform()
  dtype = cache_config.dtype
  if dtype == 'auto':
    dtype = 'float32' if platform == 'cpu' else 'bfloat16'
  on_tpu = platform == 'tpu' or cache_config.impl == 'tpu'
  align = lambda n: -(-n // 128) * 128 if on_tpu else n
  lead = (pages, cache_config.page)

  def pool(layer):
    routes = None
    if cache_config.routes and model.dense_layers <= layer < model.layers:
      shape = pages, model.moe.top_k, cache_config.page
      routes = jnp.zeros(shape, jnp.int16)
    keys = model.dsa.dim if has_index(model, layer) else 0
    index = lambda kind: jnp.zeros((*lead, align(keys)), kind) if keys else None
    if dtype in ('float32', 'bfloat16'):
      values = jnp.zeros((*lead, align(rank + rope_dim)), dtype)
      return Pages(values, routes=routes, index=index(dtype))
    kind = {'int8': jnp.int8, 'float8': jnp.float8_e4m3fn}[dtype]
    return Pages(
      values=jnp.zeros((*lead, rank), kind),
      scales=jnp.ones((*lead, rank // _tile(rank)), jnp.float32),
      rope=jnp.zeros((*lead, align(rope_dim)), jnp.bfloat16),
      routes=routes,
      index=index(kind),
      index_scales=jnp.ones((*lead, 1), jnp.float32) if keys else None,
    )

  return tuple(map(pool, range(model.layers + min(model.mtp.depth, 1))))


def is_sparse(model: ModelConfig) -> bool:
  """Returns whether queries of the model attend to sets of keys."""
  return model.dsa.heads > 0 and model.dsa.attention == 'sparse'


def has_index(model: ModelConfig, layer: int) -> bool:
  """Returns whether a layer selects; the MTP module's follows the others."""
  kinds = model.dsa.types[layer : layer + 1]
  return is_sparse(model) and kinds in ((), ('full',))


def next_slots(
  cache: Cache, tokens: int, valid: Int[Array, ' B'] | None = None
) -> Slots:
  """Returns the slots of each row's next `tokens` tokens.

  Only the first `valid` tokens of a row have one, and only up to its capacity.
  """
  i = jnp.arange(tokens, dtype=jnp.int32)[None]
  position = cache.lengths[:, None] + i
  size, pages = cache.layers[0].page_size, cache.layers[0].values.shape[0]
  last = cache.table.shape[1] - 1
  page = jnp.take_along_axis(
    cache.table, jnp.minimum(position // size, last), axis=1
  )
  real = position < cache.capacity
  if valid is not None:
    real = real & (i < valid[:, None])
  return Slots(jnp.where(real, page, pages), position % size)


def write(
  pages: Pages,
  slots: Slots,
  latent: Float[Array, 'B T C'],
  k_rope: Float[Array, 'B T R'],
  index: Float[Array, 'B T I'] | None = None,
) -> Pages:
  """Returns the pool with new tokens in their slots."""
  put = lambda pool, x: pool.at[slots.page, slots.offset].set(
    sequence.pad(x, pool.shape[-1], -1).astype(pool.dtype), mode='drop'
  )
  if index is not None:
    if pages.scales is not None:
      index, scales = quantise(index, pages.index.dtype, index.shape[-1])
      scales = put(pages.index_scales, scales)
      pages = pages.replace(index_scales=scales)
    pages = pages.replace(index=put(pages.index, index))
  if pages.scales is None:
    both = jnp.concatenate([latent, k_rope], axis=-1)
    return pages.replace(values=put(pages.values, both))
  values, scales = quantise(latent, pages.values.dtype)
  return pages.replace(
    values=put(pages.values, values),
    scales=put(pages.scales, scales),
    rope=put(pages.rope, k_rope),
  )


def note_routes(
  pages: Pages,
  cache: Cache,
  chosen: Int[Array, 'B T K'],
  valid: Int[Array, ' B'] | None,
) -> Pages:
  """Returns the pool with experts of tokens after `cache`, if it notes them."""
  if pages.routes is None:
    return pages
  slots = next_slots(cache, chosen.shape[1], valid)
  slot = pages.routes.at[slots.page, :, slots.offset]
  return pages.replace(routes=slot.set(chosen.astype(jnp.int16), mode='drop'))


def routes(cache: Cache) -> Int[Array, 'B S L K'] | None:
  """Returns the experts of each token of the rows, int16; -1 beyond lengths.

  L are the layers that note them; without any the result is None.
  """
  pools = jax.tree.leaves([pages.routes for pages in cache.layers])
  if not pools:
    return None
  # [B, n, L, K, page_size]
  each = jnp.stack([pool[cache.table] for pool in pools], axis=2)
  each = jnp.moveaxis(each, -1, 2)
  each = each.reshape(len(cache.table), -1, *each.shape[3:])
  real = jnp.arange(each.shape[1])[None] < cache.lengths[:, None]
  return jnp.where(real[:, :, None, None], each, -1)


def read(
  pages: Pages, table: Int[Array, 'B n'], dtype: str, rope_dim: int
) -> Float[Array, 'B S W']:
  """Returns the tokens in some pages of each row: latent, shared key, zeros."""
  tokens = gather(pages, table, dtype, rope_dim)
  return tokens.reshape(len(tokens), -1, tokens.shape[-1])


def gather(
  pages: Pages, places: Array | tuple, dtype: str, rope_dim: int
) -> Float[Array, '*b W']:
  """Returns `read`'s numbers of tokens in pages, or in pages and offsets."""
  # A table holds ids of pages only, and reads without a check are faster.
  pick = lambda x: x.at[places].get(mode='promise_in_bounds')
  if pages.scales is None:
    return pick(pages.values).astype(dtype)
  latent = dequantise(pick(pages.values), pick(pages.scales))
  rope = pick(pages.rope)[..., :rope_dim]
  return jnp.concatenate([latent.astype(dtype), rope.astype(dtype)], -1)


def read_index(
  pages: Pages, table: Int[Array, 'B n'], dtype: str, dim: int
) -> Float[Array, 'B S I']:
  """Returns the indexer's keys in some pages of each row."""
  pick = lambda x: x.at[table].get(mode='promise_in_bounds')
  keys = pick(pages.index)
  if pages.index_scales is not None:
    keys = dequantise(keys, pick(pages.index_scales))
  keys = keys[..., :dim].astype(dtype)
  return keys.reshape(len(keys), -1, dim)


def width(pages: Pages, rope_dim: int) -> int:
  """Returns W, the numbers of a token as `read` returns it."""
  return pages.values.shape[-1] + (0 if pages.scales is None else rope_dim)


def quantise(
  x: Float[Array, '*b C'], kind, tile: int = 0
) -> tuple[Array, Array]:
  """Returns `x` as `kind` [*b, C], and the scale of each tile [*b, tiles].

  A tile has 128 numbers, or all where 128 does not divide them, or `tile`.
  """
  tile = tile or _tile(x.shape[-1])
  tiles = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, tile)
  whole = jnp.issubdtype(kind, jnp.integer)
  top = 127.0 if whole else float(jnp.finfo(kind).max)
  scales = jnp.maximum(jnp.abs(tiles).max(-1), 1e-12) / top
  tiles = jnp.clip(tiles / scales[..., None], -top, top)
  tiles = jnp.round(tiles) if whole else tiles
  return tiles.reshape(x.shape).astype(kind), scales


def dequantise(
  values: Array, scales: Float[Array, '*b tiles']
) -> Float[Array, '*b C']:
  """Returns the float32 numbers that `quantise` has rounded."""
  tiles = values.astype(jnp.float32).reshape(*scales.shape, -1)
  return (tiles * scales[..., None]).reshape(values.shape)


def _tile(rank: int) -> int:
  return _TILE if rank % _TILE == 0 else rank
