"""Grouped-query attention, the baseline beside MLA (Ainslie et al. 2023).

N heads of queries share K heads of keys and values, N / K neighbours each:
K = N is multi-head attention, K = 1 multi-query attention. The sizes of a head
are those of `config.mla`: of H + R features the last R are rotated, and H = 0
is Llama's attention. Keys and values stand in the place of MLA's latents and
shared keys: in `mla.attend_latents`, under remat's names, and in the cache of
decoding, whose row has the rotated keys and the values, [K, H + R + U]. So
pages, prefixes and eight-bit rows are MLA's, too. On a mesh a device has all
heads' rows, and reads those of its own queries.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from mla_moe.config import ModelConfig
from mla_moe.model import attention, mla, products, rope, weights
from mla_moe.types import Array, Float, Int, PyTree


class Attention(nn.Module):
  """GQA of one layer, with the arguments and the results of `mla.Attention`."""

  config: ModelConfig
  attend: Callable = attention.attend

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'B T D'],
    angles: rope.Angles,
    segments: Int[Array, 'B T'] | None,
    sets: None = None,
  ) -> tuple:
    c, recipe = self.config, products.recipe(self.config)
    a, dim, times = c.mla, x.shape[-1], c.mla.heads // c.kv_heads
    weight = lambda name, shape, *axes: weights.weight(
      self, name, shape, axes, c.init_std, recipe, x.dtype
    )
    to_heads = lambda name, heads, size: weight(
      name, (dim, heads, size), 'dense', 'heads', 'head_dim'
    )
    ws = (
      to_heads('w_q', a.heads, a.nope_dim + a.rope_dim),
      to_heads('w_k', c.kv_heads, a.nope_dim + a.rope_dim),
      to_heads('w_v', c.kv_heads, a.value_dim),
    )
    q, k, v = products.einsums(('btd,dnh->btnh',) * 3, x, ws, recipe)
    q, k = rotated(q, k, a.nope_dim, angles)
    expand = lambda k, v, *_: (jnp.repeat(x, times, axis=2) for x in (k, v))
    args = k, checkpoint_name(v, 'k_rope'), (), segments, c, recipe
    y = mla.attend_latents(q, *args, self.attend, expand)
    shape = (a.heads, a.value_dim, dim)
    w_out = weight('w_out', shape, 'heads', 'head_dim', 'dense')
    return products.einsum('btnu,nud->btd', y, w_out, recipe), None, sets


def rotated(q: Array, k: Array, nope_dim: int, angles: rope.Angles) -> tuple:
  """Returns queries, grown, and keys, all but `nope_dim` features rotated."""
  of_keys = angles._replace(growth=None)
  q = jnp.concatenate(rope.queries(q, nope_dim, angles), axis=-1)
  return q, jnp.concatenate(rope.queries(k, nope_dim, of_keys), axis=-1)


def decoding_weights(params: PyTree, dtype: str) -> PyTree:
  """Returns decoding's layout: a head's key and value side by side."""
  q, k, v, out = (
    params[f'w_{n}'].astype(dtype) for n in ('q', 'k', 'v', 'out')
  )
  transposed = lambda w: w.reshape(w.shape[0], -1).T
  kv = transposed(jnp.concatenate([k, v], axis=-1))
  out = out.reshape(-1, out.shape[-1]).T
  return {'w_q': transposed(q), 'w_kv': kv, 'w_out': out}


def project(
  w: PyTree, x: Float[Array, 'B T D'], angles: rope.Angles, config: ModelConfig
) -> tuple:
  """Returns queries [B, T, N, H + R], rows [B, T, W], and each query's head.

  Queries and rows are pairs, as those of MLA, whose second is empty.
  """
  (b, t, _), a, heads = x.shape, config.mla, config.kv_heads
  q = products.matmul_transposed(x, w['w_q']).reshape(b, t, a.heads, -1)
  kv = products.matmul_transposed(x, w['w_kv']).reshape(b, t, heads, -1)
  k, v = jnp.split(kv, [a.nope_dim + a.rope_dim], axis=-1)
  q, k = rotated(q, k, a.nope_dim, angles)
  rows = jnp.concatenate([k, v], axis=-1).reshape(b, t, -1)
  own = jnp.arange(a.heads) * heads // a.heads
  return (q, q[..., :0]), (rows, rows[..., :0]), own


def attend_rows(over_cache, form, config, q, kv, own, cache, valid, scale):
  """Returns attention [B, T, N, U], as `decode.latent_attention`'s cores do.

  Of 'fresh' rows as in training. The other forms are one, `over_cache`: the
  queries that share a head are rows of one product.
  """
  a, q = config.mla, q[0]
  (b, t, heads, key), times = q.shape, a.heads // config.kv_heads
  heads, size = heads // times, key + a.value_dim  # of this device

  def split(rows):
    width = heads * size
    if heads < config.kv_heads:
      rows = jax.lax.dynamic_slice_in_dim(rows, own[0] * size, width, axis=2)
    kv = rows[..., :width].reshape(*rows.shape[:2], heads, size)
    return jnp.split(kv, [key], axis=-1)

  if form == 'fresh':
    k, v = (jnp.repeat(x, times, axis=2) for x in split(kv[0]))
    return attention.attend(q, k, v, scale=scale)
  q = (q * scale).reshape(b, t, heads, times, key).transpose(0, 3, 1, 2, 4)
  q = q.reshape(b, times * t, heads, key)
  out = over_cache(split, q, 0, cache, valid, a.value_dim, times)
  out = out.reshape(b, times, t, heads, -1).transpose(0, 2, 3, 1, 4)
  return out.reshape(b, t, heads * times, -1)
