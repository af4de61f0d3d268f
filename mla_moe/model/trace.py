"""The inner choices of a model: each token's experts, each head's entropy.

`trace` runs a model's layers with `block.Functions` of its own. They call the
usual ones and note the results, which leave the scan over layers as arrays: so
it is a pure function, and the training step knows nothing of it.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mla_moe import sharding
from mla_moe.config import ConfigError, ModelConfig
from mla_moe.model import block, embedding, flash, layers, products, rope
from mla_moe.types import Array, Float, Int, PyTree


class Trace(NamedTuple):
  """The choices of all layers, of which L have experts."""

  logits: Array  # [B, T, V] float32, as `Transformer` has them
  entropy: Array  # [layers, B, T, N] float32, nats: of attention
  chosen: Array | None  # [L, B, T, K] int32: experts' ids; None if L = 0
  gates: Array | None  # [L, B, T, K] float32
  scores: Array | None  # [L, B, T, E] float32


def trace(
  config: ModelConfig,
  variables: PyTree,
  tokens: Int[Array, 'B T'],
  positions: Int[Array, 'B T'] | None = None,
  segments: Int[Array, 'B T'] | None = None,
  functions: block.Functions = block.Functions(),
) -> Trace:
  """Returns the Trace of whole sequences, without MTP; see `features`.

  Raises:
    ConfigError: there is a mesh, or the model has an indexer.
  """
  if sharding.auto_axes() or config.dsa.heads:
    raise ConfigError('trace: takes one device, and attention to all keys')
  params, biases = variables['params'], variables.get('router', {})
  if positions is None:
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    positions = jnp.broadcast_to(positions, tokens.shape)
  angles = rope.angles(positions, config.mla.rope_dim, config.mla.rope)
  x = embedding.lookup(params['embedding'], tokens, config.dtype)
  noted = {}
  for name in filter(params.get, ('dense', 'moe')):

    def layer(x, variables, routed=name == 'moe'):
      notes, noting = _noting(functions)
      network = block.Block(config, routed, noting)
      args = (x, None), angles, segments, None
      (x, _), _ = network.apply(variables, *args)
      return x, notes

    stacked = {'params': params[name], 'router': biases.get(name, {})}
    x, noted[name] = jax.lax.scan(layer, x, stacked)
  hidden = layers.normalize(x, params['final_norm']['scale'], config.norm_eps)
  head = params['embedding'].T if config.tie_embeddings else params['w_head']
  logits = products.dot('btd,dv->btv', hidden, head.astype(hidden.dtype))
  entropy = jnp.concatenate([notes['entropy'] for notes in noted.values()])
  names, routing = ('chosen', 'gates', 'scores'), noted.get('moe')
  by_row = lambda x: x.reshape(len(x), *tokens.shape, -1)
  routes = (by_row(routing[n]) if routing else None for n in names)
  return Trace(logits, entropy, *routes)


def _noting(functions: block.Functions) -> tuple[dict, block.Functions]:
  """Returns an empty dict, and functions that fill it when a layer runs."""
  notes = {}

  def attend(q, k, v, *, scale, segments, **rest):
    notes['entropy'] = entropy(q, k, scale, segments)
    return functions.attend(q, k, v, scale=scale, segments=segments, **rest)

  def route(*args):
    routing = functions.route(*args)
    notes.update(routing._asdict())
    return routing

  return notes, block.Functions(attend, route)


def entropy(
  q: Float[Array, 'B T N qk'],
  k: Float[Array, 'B T N qk'],
  scale: float,
  segments: tuple | None = None,
) -> Float[Array, 'B T N']:
  """Returns the entropy of each query's causal probabilities, in nats."""
  at = jnp.arange(q.shape[1])
  seen = flash.seen(at[None], at, *(segments or ()))

  def one_head(pair):
    logits = products.dot('bth,bsh->bts', *pair) * scale
    log_p = jax.nn.log_softmax(jnp.where(seen, logits, -jnp.inf))
    return -jnp.where(seen, jnp.exp(log_p) * log_p, 0).sum(-1)

  heads_first = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), (q, k))
  return jnp.moveaxis(jax.lax.map(one_head, heads_first), 0, 2)
