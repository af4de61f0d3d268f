"""What decoding keeps of the past: MLA's latents, in pages.

A token costs C + R numbers a layer (the normed latent, then the rotated shared
key), whatever the number of heads (V2 section 2.1). They lie in pages of a pool
that the rows of a batch share: a row is a line of `table`, so that requests
come and go without moving memory, and rows with one prompt share its pages.
The pool of each layer is an array of its own, for XLA's CPU backend copies one
that stacks the layers; a donated cache is written in place.

The width is C + R on CPU and GPU, and a multiple of 128 on TPU, where XLA would
otherwise choose another layout for the argument and copy the whole cache every
step. A quantised cache has a scale for each 128 numbers of a latent and leaves
the shared key in bfloat16: positions are what rounding ruins first.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from mla_moe import sharding
from mla_moe.config import CacheConfig, ModelConfig
from mla_moe.types import Array, Float, Int, PyTree

_TILE = 128


@struct.dataclass
class Pages:
  """One layer's pool, [P, page, width].

  values: latent and shared key, then zeros up to the width; where they are
  quantised, only the latent, with scales [P, page, tiles] and rope apart.
  """

  values: PyTree
  scales: PyTree = None
  rope: PyTree = None

  @property
  def size(self) -> int:
    return self.values.shape[1]


@struct.dataclass
class Cache:
  """layers: a pool each, the MTP module's last; table [B, n] int32: the pages
  of each row, in order; lengths [B] int32: the tokens that a row holds. `impl`
  names what reads it (`kernel`)."""

  layers: tuple
  table: PyTree
  lengths: PyTree
  impl: str = struct.field(pytree_node=False, default='xla')

  @property
  def capacity(self) -> int:
    """Tokens that a row can hold."""
    return self.table.shape[1] * self.layers[0].size


class Places(NamedTuple):
  """Where new tokens go: page and offset, [B, T]; out of range is nowhere."""

  page: Array
  offset: Array


def empty(
  model: ModelConfig,
  batch: int,
  length: int,
  how: CacheConfig = CacheConfig(),
) -> Cache:
  """A cache for `batch` rows of up to `length` tokens, each with own pages."""
  each = -(-length // how.page)
  table = jnp.arange(batch * each, dtype=jnp.int32).reshape(batch, each)
  return Cache(
    layers=pools(model, batch * each, how),
    table=table,
    lengths=jnp.zeros(batch, jnp.int32),
    impl=kernel(how),
  )


def kernel(how: CacheConfig) -> str:
  """What reads a cache in absorbed form: `how.impl`, or the platform's."""
  if how.impl != 'auto':
    return how.impl
  plain = how.dtype in ('auto', 'float32', 'bfloat16')
  fits = plain and how.page % 128 == 0
  return 'tpu' if sharding.target_platform() == 'tpu' and fits else 'xla'


def pools(
  model: ModelConfig, pages: int, how: CacheConfig
) -> tuple[Pages, ...]:
  """Empty pools: the layers', and the first MTP module's if there is one."""
  rank, rope_dim = model.mla.kv_rank, model.mla.rope_dim
  platform = sharding.target_platform()
  dtype = how.dtype
  if dtype == 'auto':
    dtype = 'float32' if platform == 'cpu' else 'bfloat16'
  on_tpu = platform == 'tpu' or how.impl == 'tpu'
  align = lambda n: -(-n // 128) * 128 if on_tpu else n
  lead = (pages, how.page)

  def pool():
    if dtype in ('float32', 'bfloat16'):
      return Pages(jnp.zeros((*lead, align(rank + rope_dim)), dtype))
    kind = {'int8': jnp.int8, 'float8': jnp.float8_e4m3fn}[dtype]
    return Pages(
      values=jnp.zeros((*lead, rank), kind),
      scales=jnp.ones((*lead, rank // _tile(rank)), jnp.float32),
      rope=jnp.zeros((*lead, align(rope_dim)), jnp.bfloat16),
    )

  return tuple(pool() for _ in range(model.layers + min(model.mtp.depth, 1)))


def places(
  cache: Cache, tokens: int, valid: Int[Array, ' B'] | None = None
) -> Places:
  """Where the next `tokens` of each row go; those after `valid` nowhere."""
  at = jnp.arange(tokens, dtype=jnp.int32)[None]
  where = cache.lengths[:, None] + at
  size, pool = cache.layers[0].size, cache.layers[0].values.shape[0]
  last = cache.table.shape[1] - 1
  page = jnp.take_along_axis(
    cache.table, jnp.minimum(where // size, last), axis=1
  )
  kept = where < cache.capacity
  if valid is not None:
    kept = kept & (at < valid[:, None])
  return Places(jnp.where(kept, page, pool), where % size)


def write(
  pages: Pages,
  to: Places,
  latent: Float[Array, 'B T C'],
  k_rope: Float[Array, 'B T R'],
) -> Pages:
  """The pool with new tokens in it; places out of range are dropped."""
  put = lambda pool, new: pool.at[to.page, to.offset].set(
    _widen(new, pool.shape[-1]).astype(pool.dtype), mode='drop'
  )
  if pages.scales is None:
    both = jnp.concatenate([latent, k_rope], axis=-1)
    return Pages(put(pages.values, both))
  values, scales = quantise(latent, pages.values.dtype)
  return Pages(
    put(pages.values, values),
    put(pages.scales, scales),
    put(pages.rope, k_rope),
  )


def read(
  pages: Pages, table: Int[Array, 'B n'], dtype: str, rope_dim: int
) -> Float[Array, 'B S W']:
  """The tokens of some pages of each row: latent, shared key, zeros."""
  # Every id in a table is a page's: unchecked, they are read sooner.
  pick = lambda x: x.at[table].get(mode='promise_in_bounds')
  if pages.scales is None:
    found = pick(pages.values).astype(dtype)
  else:
    wide = dequantise(pick(pages.values), pick(pages.scales))
    rope = pick(pages.rope)[..., :rope_dim]
    found = jnp.concatenate([wide.astype(dtype), rope.astype(dtype)], -1)
  b, n, size, width = found.shape
  return found.reshape(b, n * size, width)


def width(pages: Pages, rope_dim: int) -> int:
  """How wide `read` makes a token."""
  more = 0 if pages.scales is None else rope_dim
  return pages.values.shape[-1] + more


def bytes_per_token(pages: Pages) -> int:
  """What one token of one layer takes, padding included."""
  return sum(x.dtype.itemsize * x.shape[-1] for x in jax.tree.leaves(pages))


def shardings(held: Cache, mesh: jax.sharding.Mesh) -> PyTree:
  """Rows, and the pages that `empty` gave them, on the devices of a batch."""
  rows = jax.NamedSharding(mesh, sharding.spec(('batch',)))
  return jax.tree.map(lambda _: rows, held)


def quantise(x: Array, kind) -> tuple[Array, Array]:
  """`x` in tiles along its last axis, and the tiles' scales."""
  tile = _tile(x.shape[-1])
  tiles = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, tile)
  whole = jnp.issubdtype(kind, jnp.integer)
  top = 127.0 if whole else float(jnp.finfo(kind).max)
  scales = jnp.maximum(jnp.abs(tiles).max(-1), 1e-12) / top
  tiles = jnp.clip(tiles / scales[..., None], -top, top)
  tiles = jnp.round(tiles) if whole else tiles
  return tiles.reshape(x.shape).astype(kind), scales


def dequantise(values: Array, scales: Array) -> Array:
  """float32 of what `quantise` made."""
  tiles = values.astype(jnp.float32).reshape(*scales.shape, -1)
  return (tiles * scales[..., None]).reshape(values.shape)


def _tile(rank: int) -> int:
  return _TILE if rank % _TILE == 0 else rank


def _widen(x: Array, width: int) -> Array:
  return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])])
