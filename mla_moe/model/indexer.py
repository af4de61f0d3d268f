"""The lightning indexer of DeepSeek Sparse Attention (V3.2, section 2.1).

A query attends to the K keys with the highest index scores,

  I[t, s] = sum_j w[t, j] * relu(q[t, j] . k[s])   over the heads j.

All heads of the index share one key a token, which has a LayerNorm with a
bias, and all heads of MLA share the set. The surprise is the rotation: rotated
features come first here, and last in MLA. `select` makes the scores of a block
of queries, so that those of all pairs never exist. Equal scores, such as the
zeros of the relu, go to the lowest index on every device. A full layer selects;
a shared one takes the last full layer's set (`Sets`).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from mla_moe import sharding
from mla_moe.config import DSAConfig, ModelConfig
from mla_moe.model import flash, products, rope, sequence, weights
from mla_moe.model.sequence import Part
from mla_moe.types import Array, Float, Int, PyTree

SET = 'index_set'  # the checkpoint name of a layer's sets
_QUERIES = 128  # whose scores are in one block
_KEYS = 2048  # of a tile of it
_NUMBERS = 1 << 25  # the most scores of a block


class Index(NamedTuple):
  """The index's queries and keys of some tokens."""

  q: Array  # [B, T, H_I, d_I]
  w: Array  # [B, T, H_I] float32, times H_I^-1/2 * d_I^-1/2
  k: Array  # [B, T, d_I]


class Sets(NamedTuple):
  """The last full layer's sets, on their way to the shared layers."""

  selected: Array  # [B, T, K] int32, see `select`
  layer: Array | None  # [] int32: the next layer; None: all are shared here


class Indexer(nn.Module):
  """The parameters of one layer's indexer, for `project`."""

  config: ModelConfig

  @nn.compact
  def __call__(self) -> dict[str, PyTree]:
    c, dsa, std = self.config, self.config.dsa, self.config.init_std
    w = lambda name, shape, *axes: weights.param(self, name, shape, axes, std)
    wide, source = c.dim, 'embed'
    if dsa.q_from == 'latent':
      wide, source = c.mla.query_rank, 'rank'
    query = (wide, dsa.heads, dsa.dim)
    return {
      'w_query': w('w_query', query, source, 'index_heads', 'head_dim'),
      'w_key': w('w_key', (c.dim, dsa.dim), 'embed', 'head_dim'),
      'w_heads': w('w_heads', (c.dim, dsa.heads), 'embed', 'index_heads'),
      'key_norm': _KeyNorm(name='key_norm')(dsa.dim),
    }


class _KeyNorm(nn.Module):
  @nn.compact
  def __call__(self, dim):
    zeros = nn.with_logical_partitioning(nn.initializers.zeros, ('norm',))
    bias = self.param('bias', zeros, (dim,), jnp.float32)
    scale = weights.param(self, 'scale', (dim,), ('norm',), 0.0)
    return {'scale': scale, 'bias': bias}


def of_layer(config: ModelConfig, x, q_latent, angles, sets) -> Index | None:
  """In MLA: returns the layer's Index, None without one."""
  if not config.dsa.heads or (sets is not None and sets.layer is None):
    return None
  return project(Indexer(config, name='indexer')(), x, q_latent, angles, config)


@jax.named_scope('index')
def project(params: dict, x, q_latent, angles, config: ModelConfig) -> Index:
  """Returns the Index of tokens; x and the latent get no gradient from it.

  `params` are `Indexer`'s, `x` [B, T, D] is MLA's input after its norm, and
  `q_latent` [B, T, Q] the normed latent of its queries (any with `q_from` 'x').
  """
  dsa, rotary = config.dsa, config.mla.rope_dim
  x, q_latent = jax.lax.stop_gradient((x, q_latent))
  source = q_latent if dsa.q_from == 'latent' else x
  q = products.einsum('btq,qhd->bthd', source, params['w_query'])
  k = products.einsum('btd,di->bti', x, params['w_key'])
  k = _layer_norm(k, **params['key_norm'], eps=dsa.k_norm_eps)
  # A small error reorders the keys: float32, also on devices that round it.
  wide = x.astype(jnp.float32)
  w = jnp.einsum('btd,dh->bth', wide, params['w_heads'], precision='highest')
  w = w * (dsa.heads * dsa.dim) ** -0.5

  def rotate(x):
    # Not x.at[].set(): XLA's CPU would overwrite what it has yet to read.
    i, end = (0, rotary) if dsa.rope_first else (1, dsa.dim - rotary)
    both = jnp.split(x, [end], axis=-1)
    both[i] = rope.rotate(both[i], angles)
    return jnp.concatenate(both, axis=-1)

  constrain = lambda x, *axes: sharding.constrain(x, 'batch', 'part', *axes)
  return Index(
    constrain(rotate(q), 'index_heads', 'head_dim'),
    constrain(w, 'index_heads'),
    constrain(rotate(k), 'head_dim'),
  )


def _layer_norm(x, scale, bias, eps):
  """Returns (x - mean) / sqrt(var + eps) * scale + bias; float32 inside."""
  wide = x.astype(jnp.float32)
  wide = wide - wide.mean(-1, keepdims=True)
  wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + eps)
  fit = lambda p: jnp.expand_dims(p, tuple(range(x.ndim - 1)))
  return (wide * fit(scale) + fit(bias)).astype(x.dtype)


def scores(
  q: Float[Array, 'B T heads d'],
  w: Float[Array, 'B T heads'],
  k: Float[Array, 'B S d'],
) -> Float[Array, 'B T S']:
  """Returns the index scores of all pairs, float32, and masks none."""
  # A CPU is faster with keys first for a query or two, and with keys last for
  # many. Without a barrier it computes dots inside the sum, ten times as long.
  few = q.shape[1] < 8
  dots = products.dot(f'bthd,bsd->{"bsth" if few else "bths"}', q, k)
  barrier = jax.lax.optimization_barrier
  dots = jax.lax.platform_dependent(dots, cpu=barrier, default=lambda x: x)
  dots = jax.nn.relu(dots)  # times w in float32: a TPU would round both
  if few:
    return jnp.einsum('bsth,bth->bts', dots, w, precision='highest')
  return jnp.sum(dots * w[..., None], axis=2)


def select(
  index: Index, topk: int, segments: tuple | None = None, part: Part = Part()
) -> Int[Array, 'B T K']:
  """Returns each query's set, K = min(topk, S) indices of keys, best first.

  An index of -1 is an empty slot: the query sees fewer than K keys. Equal
  scores are in the order of their keys. The queries are a `part` of the
  sequence, the keys the whole; `segments` are the numbers of documents of the
  queries [B, T] and of the keys [B, S].
  """
  index = jax.lax.stop_gradient(index)
  (b, t), s = index.w.shape[:2], index.k.shape[1]
  size, width = min(topk, s), min(s, _KEYS)
  keys = sequence.pad(index.k, -(-s // width) * width)
  if segments is not None:
    of_keys = sequence.pad(segments[1], keys.shape[1])

  def block(args):
    q, w, positions, of_queries = args

    def tile(j, whole):
      ids = j * width + jnp.arange(width, dtype=jnp.int32)
      take = lambda x: jax.lax.dynamic_slice_in_dim(x, j * width, width, 1)
      own = None if segments is None else take(of_keys)
      seen = flash.seen(positions, ids, of_queries, own)
      of_tile = jnp.where(seen, scores(q, w, take(keys)), -jnp.inf)
      return jax.lax.dynamic_update_slice_in_dim(whole, of_tile, j * width, 2)

    none = jnp.full((b, q.shape[1], keys.shape[1]), -jnp.inf)
    tiles = positions.max() // width + 1  # none above the diagonal
    of_block = jax.lax.fori_loop(0, tiles, tile, sharding.pvary(none))
    values, ids = jax.lax.top_k(of_block, size)  # the first of equal values
    return jnp.where(values > -jnp.inf, ids, -1)

  positions = jnp.asarray(part.positions(t), jnp.int32)[None]
  rows = index.q, index.w, positions, segments and segments[0]
  queries = max(1, min(_QUERIES, _NUMBERS // (b * s)))
  selected = join(jax.lax.map(block, cut(rows, queries)), t)
  return checkpoint_name(selected, SET)


def cut(rows: PyTree, size: int) -> PyTree:
  """Returns [B, T, ...] arrays as [blocks, B, size, ...], zeros appended."""

  def one(x):
    count = -(-x.shape[1] // size)
    x = sequence.pad(x, count * size)
    return x.reshape(x.shape[0], count, size, *x.shape[2:]).swapaxes(0, 1)

  return jax.tree.map(one, rows)


def join(blocks: PyTree, length: int) -> PyTree:
  """Returns the rows of `cut`, without those appended to this length."""

  def one(x):
    x = x.swapaxes(0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]

  return jax.tree.map(one, blocks)


def no_sets(tokens: Int[Array, 'B T'], dsa: DSAConfig) -> Sets | None:
  """Returns the Sets before the first layer, None where no layer is shared."""
  if 'shared' not in dsa.types:
    return None
  few = dsa.topk < tokens.shape[1] and dsa.attention == 'sparse'
  selected = jnp.zeros((*tokens.shape, dsa.topk * few), jnp.int32)
  return Sets(selected, jnp.zeros((), jnp.int32))


def enter(sets: Sets | None, first: int, dsa: DSAConfig) -> Sets | None:
  """Returns the Sets for the last stack, of layers from the `first` on."""
  if sets is None:
    return None
  is_mixed = 'full' in dsa.types[first:]
  return Sets(sets.selected, jnp.int32(first) if is_mixed else None)


def is_full(sets: Sets | None, dsa: DSAConfig) -> Array | None:
  """Returns whether the next layer is full; None where a stack has one kind."""
  if sets is None or sets.layer is None:
    return None
  return jnp.asarray([kind == 'full' for kind in dsa.types])[sets.layer]


def expanded(stack: type[nn.Module], types: tuple) -> type[nn.Module]:
  """Returns the stack with indexer's parameters for its full layers alone.

  Its scan needs an entry for each layer. So a shared layer gets a copy of the
  last full one's, which it does not read: its gradient is 0.
  """
  if 'full' not in types or 'shared' not in types:
    return stack
  full = [i for i, kind in enumerate(types) if kind == 'full']
  count = np.cumsum([kind == 'full' for kind in types])

  def take(rows):
    def one(path, leaf):
      of_indexer = any(getattr(p, 'key', '') == 'indexer' for p in path)
      return leaf[np.asarray(rows)] if of_indexer else leaf

    return lambda tree: jax.tree_util.tree_map_with_path(one, tree)

  copies = take(np.maximum(count - 1, 0))
  return nn.map_variables(stack, 'params', copies, take(full), init=True)
