"""Multi-head Latent Attention, decompressed (V3 section 2.1.1).

Keys and values of all heads come from one latent of C numbers a token, plus
one rotated key of R numbers that the heads share; queries from a latent of Q
numbers (or straight from the stream when Q = 0). Training expands the latents
to heads; both latents have a norm of their own, the shared key has none. The
up-projections of keys and values are two parameters, so that decoding may
fold them into the query and the output from this same tree.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from mla_moe import attention, layers, rope
from mla_moe import config as config_lib
from mla_moe.types import Array, Float, Int

# What `remat='latents'` keeps for the backward pass; all else is made again.
SAVED = ('q_latent', 'kv_latent', 'k_rope', *attention.SAVED)


class Attention(nn.Module):
  """MLA of one layer."""

  config: config_lib.ModelConfig

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'B T D'],
    cos: Float[Array, 'B T half'],
    sin: Float[Array, 'B T half'],
    segments: Int[Array, 'B T'] | None,
  ) -> Float[Array, 'B T D']:
    mla, dtype = self.config.mla, x.dtype
    w = lambda *args: layers.param(self, *args, self.config.init_std)
    norm = lambda name: layers.RMSNorm(mla.norm_eps, name=name)
    dim, heads, rank = x.shape[-1], mla.heads, mla.kv_rank
    query_dim = mla.nope_dim + mla.rope_dim

    with jax.named_scope('query'):
      q = x
      if mla.query_rank:
        w_q_down = w('w_q_down', (dim, mla.query_rank), ('embed', 'latent'))
        q = norm('q_norm')(jnp.einsum('btd,dq->btq', x, w_q_down.astype(dtype)))
        q = checkpoint_name(q, 'q_latent')
      name, axes = ('w_q_up', 'latent') if mla.query_rank else ('w_q', 'embed')
      shape = (q.shape[-1], heads, query_dim)
      w_q = w(name, shape, (axes, 'heads', 'head_dim'))
      q = jnp.einsum('btq,qnh->btnh', q, w_q.astype(dtype))
      q_nope, q_rope = jnp.split(q, [mla.nope_dim], axis=-1)
      q = jnp.concatenate([q_nope, rope.rotate(q_rope, cos, sin)], axis=-1)

    with jax.named_scope('latent'):
      w_kv_down = w('w_kv_down', (dim, rank), ('embed', 'latent'))
      w_k_rope = w('w_k_rope', (dim, mla.rope_dim), ('embed', 'head_dim'))
      latent = jnp.einsum('btd,dc->btc', x, w_kv_down.astype(dtype))
      latent = checkpoint_name(norm('kv_norm')(latent), 'kv_latent')
      k_rope = jnp.einsum('btd,dr->btr', x, w_k_rope.astype(dtype))
      k_rope = checkpoint_name(rope.rotate(k_rope, cos, sin), 'k_rope')

    with jax.named_scope('expand'):
      up = ('latent', 'heads', 'head_dim')
      w_k_up = w('w_k_up', (rank, heads, mla.nope_dim), up)
      w_v_up = w('w_v_up', (rank, heads, mla.value_dim), up)
      k_nope = jnp.einsum('btc,cnh->btnh', latent, w_k_up.astype(dtype))
      shared = jnp.broadcast_to(
        k_rope[:, :, None], (*k_nope.shape[:3], mla.rope_dim)
      )
      k = jnp.concatenate([k_nope, shared], axis=-1)
      v = jnp.einsum('btc,cnu->btnu', latent, w_v_up.astype(dtype))

    with jax.named_scope('attend'):
      scale = rope.softmax_scale(mla)
      out = attention.attend(
        q, k, v, scale=scale, segments=segments, impl=mla.impl
      )

    shape = (heads, mla.value_dim, dim)
    w_out = w('w_out', shape, ('heads', 'head_dim', 'embed'))
    return jnp.einsum('btnu,nud->btd', out, w_out.astype(dtype))
