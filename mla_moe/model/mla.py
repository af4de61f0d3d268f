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

from mla_moe import fp8, sharding
from mla_moe.config import ModelConfig
from mla_moe.model import attention, layers, products, rope, sequence, weights
from mla_moe.types import Array, Float, Int

# Kept for the backward pass by `compute.remat='latents'`.
SAVED = ('q_latent', 'kv_latent', 'k_rope', *attention.SAVED)


class Attention(nn.Module):
  """MLA of one layer."""

  config: ModelConfig

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'B T D'],
    cos: Float[Array, 'B T half'],
    sin: Float[Array, 'B T half'],
    segments: Int[Array, 'B T'] | None,
  ) -> Float[Array, 'B T D']:
    mla, std = self.config.mla, self.config.init_std
    recipe = products.recipe(self.config)
    w = lambda *args: weights.weight(self, *args, std, recipe)
    norm = lambda name: layers.RMSNorm(mla.norm_eps, name=name)
    dim, heads, rank = x.shape[-1], mla.heads, mla.kv_rank
    query_dim = mla.nope_dim + mla.rope_dim

    with jax.named_scope('down'):
      if mla.query_rank:
        axes = ('embed', 'latent')
        w_q = w('w_q_down', (dim, mla.query_rank), axes)
        shape = (mla.query_rank, heads, query_dim)
        w_q_up = w('w_q_up', shape, ('rank', 'heads', 'head_dim'))
      else:
        axes = ('embed', 'heads', 'head_dim')
        w_q = w('w_q', (dim, heads, query_dim), axes)
      w_kv_down = w('w_kv_down', (dim, rank), ('embed', 'latent'))
      w_k_rope = w('w_k_rope', (dim, mla.rope_dim), ('embed', 'head_dim'))
      to_q = 'btd,dq->btq' if mla.query_rank else 'btd,dnh->btnh'
      q, latent, k_rope = products.einsums(
        (to_q, 'btd,dc->btc', 'btd,dr->btr'),
        x,
        (w_q, w_kv_down, w_k_rope),
        recipe,
      )
      # Gathered where they are small, not the stream before them.
      narrow = lambda x: sharding.constrain(x, 'batch', 'part', 'latent')
      q = narrow(q) if mla.query_rank else q
      latent, k_rope = narrow(latent), narrow(k_rope)

    with jax.named_scope('query'):
      if mla.query_rank:
        q = products.checkpoint_input(norm('q_norm')(q), 'q_latent', recipe)
        q = products.einsum('btq,qnh->btnh', q, w_q_up, recipe, 'q_latent')
      q_nope, q_rope = jnp.split(q, [mla.nope_dim], axis=-1)
      q = jnp.concatenate([q_nope, rope.rotate(q_rope, cos, sin)], axis=-1)
      q = sharding.constrain(q, 'batch', 'part', 'heads', 'head_dim')

    up = ('rank', 'heads', 'head_dim')
    ws = (
      w('w_k_up', (rank, heads, mla.nope_dim), up),
      w('w_v_up', (rank, heads, mla.value_dim), up),
    )
    latent = norm('kv_norm')(latent)
    k_rope = checkpoint_name(rope.rotate(k_rope, cos, sin), 'k_rope')
    out = attend_latents(q, latent, k_rope, ws, segments, self.config, recipe)
    shape = (heads, mla.value_dim, dim)
    w_out = w('w_out', shape, ('heads', 'head_dim', 'embed'))
    return products.einsum('btnu,nud->btd', out, w_out, recipe)


def attend_latents(
  q: Float[Array, 'B T N qk'],
  latent: Float[Array, 'B T C'],
  k_rope: Float[Array, 'B T R'],
  ws: tuple,
  segments: Int[Array, 'B T'] | None,
  config: ModelConfig,
  recipe: fp8.Recipe,
) -> Float[Array, 'B T N U']:
  """Attention over latents, expanded by `ws` to each head's keys and values.

  On a mesh, each device has its heads and its part of the sequence, for whose
  queries it gathers all latents: C + R numbers a token, where the keys and
  values of all heads would be N * (H + R + U).
  """
  parts = sequence.count(q.shape[1])
  mla = config.mla
  core = attention.chosen(config.compute.attention, q, segments, parts)
  # What is kept for the backward pass is this device's part alone.
  name = 'kv_latent' if parts == 1 else fp8.SAVED
  if recipe.precision == 'bf16' or parts > 1:
    latent = checkpoint_name(latent, 'kv_latent')

  def local(q, latent, k_rope, ws, segments):
    pairs = zip(ws, shards, strict=True)
    ws = tuple(weights.gather(w, s, q.dtype) for w, s in pairs)
    q, latent, k_rope, ws = sharding.pvary((q, latent, k_rope, ws))
    keys = segments
    if parts > 1:
      latent = sequence.whole(latent, parts)
      k_rope = sequence.whole(k_rope, parts)
      if segments is not None:
        keys = sequence.whole(segments, parts)
    with jax.named_scope('expand'):
      k_nope, v = products.einsums(
        ('btc,cnh->btnh', 'btc,cnu->btnu'), latent, ws, recipe, name
      )
      shape = (*k_nope.shape[:3], mla.rope_dim)
      shared = jnp.broadcast_to(k_rope[:, :, None], shape)
      k = jnp.concatenate([k_nope, shared], axis=-1)
    part = sequence.Part()
    if parts > 1:
      part = sequence.Part(jax.lax.axis_index('context'), parts)
    with jax.named_scope('attend'):
      out = attention.attend(
        q,
        k,
        v,
        scale=rope.softmax_scale(mla),
        segments=None if segments is None else (segments, keys),
        part=part,
        impl=core,
      )
    return jax.lax.pmean(out, same) if same else out

  lay = sharding.array_spec
  heads = ('batch', 'part', 'heads', 'head_dim')
  laid = sum(sharding.mesh_axes(heads, q.shape), ())
  same = tuple(a for a in sharding.auto_axes() if a not in laid)
  up = ('rank', 'heads', 'head_dim')
  shards = tuple(weights.fsdp_split(w, up) for w in ws)
  specs = (
    lay(heads, q),
    lay(('batch', 'part', 'latent'), latent),
    lay(('batch', 'part', 'head_dim'), k_rope),
    tuple(weights.specs(w, up) for w in ws),
    lay(('batch', 'part'), segments),
  )
  # A library's kernel does not say over which axes its result varies.
  check_vma = core in ('xla', 'reference')
  run = sharding.shard_map(local, specs, specs[0], check_vma=check_vma)
  return run(q, latent, k_rope, ws, segments)
