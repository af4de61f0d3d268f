"""Multi-head Latent Attention, decompressed (V3 section 2.1.1).

Keys and values of all heads come from one latent of C numbers a token, plus
one rotated key of R numbers that the heads share. Queries come from a latent
of Q numbers, or straight from the stream when Q = 0. Training expands the
latents to heads, as here; decoding (`decode.latent_attention`) folds the two
up-projections into the query and the output instead, from the same parameters.
Both latents have a norm of their own, the shared key has none.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from mla_moe import fp8, sharding
from mla_moe.config import ModelConfig
from mla_moe.model import (
  attention,
  flash,
  indexer,
  layers,
  products,
  rope,
  sequence,
  sparse,
  weights,
)
from mla_moe.types import Array, Float, Int

# Checkpoint names that `compute.remat='latents'` saves for the backward pass.
SAVED = ('q_latent', 'kv_latent', 'k_rope', indexer.SET, *flash.SAVED)

_UP = ('rank', 'heads', 'head_dim')  # an up-projection's logical axes
_HEADS = ('batch', 'part', 'heads', 'head_dim')


class Attention(nn.Module):
  """MLA of one layer: the stream in; its change out, and `sparse`'s reports."""

  config: ModelConfig
  attend: Callable = attention.attend

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'B T D'],
    angles: rope.Angles,
    segments: Int[Array, 'B T'] | None,
    sets: indexer.Sets | None = None,
  ) -> tuple:
    mla, std = self.config.mla, self.config.init_std
    recipe = products.recipe(self.config)
    weight = lambda name, shape, *axes: weights.weight(
      self, name, shape, axes, std, recipe, x.dtype
    )
    norm = lambda name: layers.RMSNorm(mla.norm_eps, name=name)
    dim, heads, rank = x.shape[-1], mla.heads, mla.kv_rank
    query = (heads, mla.nope_dim + mla.rope_dim)

    with jax.named_scope('down'):
      if mla.query_rank:
        w_q = weight('w_q_down', (dim, mla.query_rank), 'dense', 'latent')
        w_q_up = weight('w_q_up', (mla.query_rank, *query), 'dense', *_UP[1:])
      else:
        w_q = weight('w_q', (dim, *query), 'dense', 'heads', 'head_dim')
      w_kv_down = weight('w_kv_down', (dim, rank), 'dense', 'latent')
      w_k_rope = weight('w_k_rope', (dim, mla.rope_dim), 'dense', 'head_dim')
      to_q = 'btd,dq->btq' if mla.query_rank else 'btd,dnh->btnh'
      equations = to_q, 'btd,dc->btc', 'btd,dr->btr'
      ws = w_q, w_kv_down, w_k_rope
      q, latent, k_rope = products.einsums(equations, x, ws, recipe)
      # Under tensor parallelism a device needs the whole length. It is gathered
      # here, where a token has few numbers, and not as the stream.
      narrow = lambda x: sharding.constrain(x, 'batch', 'part', 'latent')
      q = narrow(q) if mla.query_rank else q
      latent, k_rope = narrow(latent), narrow(k_rope)

    with jax.named_scope('query'):
      if mla.query_rank:
        q = products.checkpoint_input(norm('q_norm')(q), 'q_latent', recipe)
      index = indexer.of_layer(self.config, x, q, angles, sets)
      if mla.query_rank:
        q = products.einsum('btq,qnh->btnh', q, w_q_up, recipe, 'q_latent')
      q = jnp.concatenate(rope.queries(q, mla.nope_dim, angles), axis=-1)
      q = sharding.constrain(q, *_HEADS)

    w_k_up = weight('w_k_up', (rank, heads, mla.nope_dim), *_UP)
    w_v_up = weight('w_v_up', (rank, heads, mla.value_dim), *_UP)
    latent = norm('kv_norm')(latent)
    k_rope = checkpoint_name(rope.rotate(k_rope, angles), 'k_rope')
    args = q, latent, k_rope, (w_k_up, w_v_up), segments, self.config, recipe
    if self.config.dsa.heads:
      y, report, sets = sparse.attend_latents(*args, index, sets)
    else:
      y, report = attend_latents(*args, self.attend), None
    shape = (heads, mla.value_dim, dim)
    w_out = weight('w_out', shape, 'heads', 'head_dim', 'dense')
    return products.einsum('btnu,nud->btd', y, w_out, recipe), report, sets


def attend_latents(
  q: Float[Array, 'B T N qk'],
  latent: Float[Array, 'B T *C'],
  k_rope: Float[Array, 'B T *R'],
  ws: tuple,
  segments: Int[Array, 'B T'] | None,
  config: ModelConfig,
  recipe: fp8.Recipe,
  attend: Callable = attention.attend,
  expand: Callable = attention.expand,
) -> Float[Array, 'B T N U']:
  """Returns attention over latents that `ws` expand to keys and values.

  On a mesh, each device has its heads and its part of the sequence. It gathers
  the latents of all parts, C + R numbers a token, where the keys and values of
  all heads would be N * (H + R + U).

  Args:
    q: queries, their last R numbers rotated.
    latent: the normed latent of keys and values.
    k_rope: the rotated key that all heads share.
    ws: w_k_up [C, N, H] and w_v_up [C, N, U].
    segments: numbers of documents; None is one document.
    config: the model's.
    recipe: of the products with `ws`.
    attend: `attention.attend`, or another with its arguments.
    expand: likewise; GQA's takes keys and values of its heads, and no `ws`.
  """
  parts = sequence.parts(q.shape[1])
  core = attention.choose_core(config.compute.attention, q, segments, parts)
  # Remat saves this device's part of the latent, as 'kv_latent'. In FP8 the
  # expansion saves its input under that name, in eight bits. A latent gathered
  # from several parts gets a name that no policy saves.
  name = 'kv_latent' if parts == 1 else fp8.SAVED
  if recipe.precision == 'bf16' or parts > 1:
    latent = checkpoint_name(latent, 'kv_latent')

  def region(q, latent, k_rope, ws, segments):
    pairs = zip(ws, splits, strict=True)
    ws = tuple(weights.gather(w, split, q.dtype) for w, split in pairs)
    q, latent, k_rope, ws = sharding.pvary((q, latent, k_rope, ws))
    latent = sequence.gather(latent, parts)
    k_rope = sequence.gather(k_rope, parts)
    if segments is not None:
      segments = segments, sequence.gather(segments, parts)
    k, v = expand(latent, k_rope, ws, recipe, name)
    part, scale = sequence.this_part(parts), rope.softmax_scale(config.mla)
    with jax.named_scope('attend'):
      y = attend(q, k, v, scale=scale, segments=segments, part=part, impl=core)
    return sharding.pmean(y, equal)

  spec, latents = sharding.array_spec, ('batch', 'part', 'latent')
  rows = lambda x: spec(latents if x.ndim == 3 else _HEADS, x)
  split = sum(sharding.mesh_axes(_HEADS, q.shape), ())
  equal = tuple(a for a in sharding.auto_axes() if a not in split)
  splits = tuple(weights.fsdp_split(w, _UP) for w in ws)
  in_specs = (
    spec(_HEADS, q),
    rows(latent),
    rows(k_rope),
    tuple(weights.specs(w, _UP) for w in ws),
    spec(('batch', 'part'), segments),
  )
  # A library's kernel does not say over which axes its result varies.
  check_vma = core in ('xla', 'reference')
  run = sharding.shard_map(region, in_specs, in_specs[0], check_vma=check_vma)
  return run(q, latent, k_rope, ws, segments)
