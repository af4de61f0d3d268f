"""The transformer over a latent cache: prefill, extend, one token a row.

The same parameters as training's, laid out once for decoding (`unstack`): each
layer apart, for a scan would copy a layer's weights at every step. Products
run in the model's dtype, not in FP8. A row's new tokens may be fewer than its
neighbours' (`valid`): what is padded writes nothing and is attended by nobody.
Every function takes the cache and returns it; donate it and nothing is copied.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from mla_moe import sharding
from mla_moe.config import ModelConfig
from mla_moe.decode import latent_attention, latent_cache
from mla_moe.model import layers, moe, products, rope, router
from mla_moe.types import Array, Float, Int, PyTree

_FFN = ('w_gate_up', 'w_down')
_FEW = 8  # rows that share every expert's weights (measured on x86)


def unstack(config: ModelConfig, variables: PyTree) -> PyTree:
  """{'params', 'router'} as decoding reads them: a layer at a time.

  Matrices in the activations' dtype, as `products.matmul_transposed` reads
  them except for the routed experts'; norms and router in float32. Needs the
  stacked parameters no longer.
  """
  params, biases = variables['params'], variables.get('router', {})
  found = {
    'embedding': params['embedding'].astype(config.dtype),
    'final_norm': params['final_norm']['scale'],
    'layers': [],
  }
  head = params['embedding'] if config.tie_embeddings else params['w_head'].T
  found['head'] = head.astype(config.dtype)
  counts = {'dense': config.dense_layers, 'moe': config.moe_layers}
  for name, count in counts.items():
    for i in range(count):
      one = jax.tree.map(lambda x, i=i: x[i], params[name])
      bias = jax.tree.map(lambda x, i=i: x[i], biases.get(name, {}))
      found['layers'].append(_layer(one, bias, config.dtype))
  if config.mtp.depth:
    module = params['mtp_0']
    bias = biases.get('mtp_0', {}).get('block', {})
    names = ('embed_norm', 'hidden_norm', 'final_norm')
    found['mtp'] = {
      'w_join': module['w_join'].T.astype(config.dtype),
      'block': _layer(module['block'], bias, config.dtype),
      **{name: module[name]['scale'] for name in names},
    }
  return found


def _layer(params, bias, dtype):
  def turned(part):
    turn = lambda w: jnp.moveaxis(w, 0, -1)
    return {name: turn(part[name]).astype(dtype) for name in _FFN}

  found = {
    'attention_norm': params['attention_norm']['scale'],
    'ffn_norm': params['ffn_norm']['scale'],
    'attention': latent_attention.weights(params['attention'], dtype),
  }
  if 'w_router' not in params['ffn']:
    found['ffn'] = turned(params['ffn'])
  else:
    gate_up, down = (params['ffn'][name].astype(dtype) for name in _FFN)
    found['ffn'] = {'w_gate_up': moe.packed(gate_up), 'w_down': down}
    found['w_router'] = params['ffn']['w_router']
    found['bias'] = bias.get('ffn', {}).get('bias')
    if 'shared' in params['ffn']:
      found['shared'] = turned(params['ffn']['shared'])
  return found


def hidden(
  weights: PyTree,
  held: latent_cache.Cache,
  tokens: Int[Array, 'B T'],
  config: ModelConfig,
  *,
  valid: Int[Array, ' B'] | None = None,
  form: str = 'absorbed',
) -> tuple[Float[Array, 'B T D'], latent_cache.Cache]:
  """The normed hidden states of new tokens, and the cache with them in it.

  Args:
    weights: of `unstack`.
    tokens: ids below the vocabulary.
    valid: how many of the T a row really has; None is all.
    form: see `absorbed.attend`.
  """
  x = weights['embedding'][tokens]
  x = sharding.constrain(x, 'batch', None, 'stream')
  turn = _turn(held, tokens, config)
  pools = list(held.layers)
  for i, one in enumerate(weights['layers']):
    x, pools[i] = _block(one, x, turn, pools[i], held, valid, config, form)
  x = layers.normalize(x, weights['final_norm'], config.norm_eps)
  return x, _longer(held, pools, tokens, valid)


def logits(weights: PyTree, x: Float[Array, '*b D']) -> Float[Array, '*b V']:
  """The head's, float32."""
  return products.matmul_transposed(x, weights['head'], products.dot)


def decode_step(
  weights: PyTree,
  held: latent_cache.Cache,
  tokens: Int[Array, ' B'],
  config: ModelConfig,
  *,
  valid: Int[Array, ' B'] | None = None,
) -> tuple[Float[Array, 'B V'], latent_cache.Cache]:
  """Logits after one more token of each row, float32, and the cache."""
  x, held = hidden(weights, held, tokens[:, None], config, valid=valid)
  return logits(weights, x[:, 0]), held


def extend(
  weights: PyTree,
  held: latent_cache.Cache,
  tokens: Int[Array, 'B T'],
  config: ModelConfig,
  *,
  valid: Int[Array, ' B'] | None = None,
) -> tuple[Float[Array, 'B T D'], latent_cache.Cache]:
  """`hidden` in the form that is cheaper for so many new tokens."""
  how = form(tokens.shape[1])
  return hidden(weights, held, tokens, config, valid=valid, form=how)


def form(tokens: int) -> str:
  """Of `absorbed.attend`, for so many new tokens of a row that holds some."""
  return 'absorbed' if tokens <= latent_attention.ABSORBED else 'decompressed'


def prefill(
  weights: PyTree,
  held: latent_cache.Cache,
  tokens: Int[Array, 'B T'],
  valid: Int[Array, ' B'],
  config: ModelConfig,
  *,
  chunk: int = 2048,
) -> tuple[Float[Array, 'B T D'], latent_cache.Cache]:
  """`hidden` of whole prompts, `valid` tokens of each row, in an empty cache.

  The first chunk attends within itself; later ones expand the prefix.
  """
  found = []
  for start in range(0, tokens.shape[1], chunk):
    part = tokens[:, start : start + chunk]
    here = jnp.clip(valid - start, 0, part.shape[1])
    form = 'decompressed' if start else 'fresh'
    x, held = hidden(weights, held, part, config, valid=here, form=form)
    found.append(x)
  return jnp.concatenate(found, axis=1), held


def last(x: Float[Array, 'B T D'], valid: Int[Array, ' B']) -> Array:
  """[B, D]: each row's last valid position."""
  at = jnp.maximum(valid - 1, 0)[:, None, None]
  return jnp.take_along_axis(x, at, axis=1)[:, 0]


def draft(
  weights: PyTree,
  held: latent_cache.Cache,
  before: Float[Array, 'B T D'],
  tokens: Int[Array, 'B T'],
  config: ModelConfig,
  *,
  valid: Int[Array, ' B'] | None = None,
  form: str = 'absorbed',
) -> tuple[Float[Array, 'B T D'], latent_cache.Cache]:
  """What the first MTP module hands to the head, over a cache of its own.

  Position i joins the main model's hidden state `before` there with the token
  after it, `tokens`, and speaks of the one after that. `held` has the module's
  pool alone (`split`), and lengths of its own.
  """
  w, eps = weights['mtp'], config.norm_eps
  both = [
    layers.normalize(weights['embedding'][tokens], w['embed_norm'], eps),
    layers.normalize(before, w['hidden_norm'], eps),
  ]
  x = products.matmul_transposed(jnp.concatenate(both, axis=-1), w['w_join'])
  turn = _turn(held, tokens, config)
  x, pool = _block(
    w['block'], x, turn, held.layers[0], held, valid, config, form
  )
  x = layers.normalize(x, w['final_norm'], eps)
  return x, _longer(held, [pool], tokens, valid)


def split(
  held: latent_cache.Cache, config: ModelConfig
) -> tuple[latent_cache.Cache, latent_cache.Cache]:
  """The main model's part of a cache, and the MTP module's."""
  main = dataclasses.replace(held, layers=held.layers[: config.layers])
  return main, dataclasses.replace(held, layers=held.layers[config.layers :])


def _turn(held, tokens, config):
  at = held.lengths[:, None] + jnp.arange(tokens.shape[1])[None]
  return rope.angles(at, config.mla.rope_dim, config.mla.rope)


def _longer(held, pools, tokens, valid):
  more = tokens.shape[1] if valid is None else valid
  lengths = held.lengths + more
  return dataclasses.replace(held, layers=tuple(pools), lengths=lengths)


def _block(w, x, turn, pages, held, valid, config, form):
  h = layers.normalize(x, w['attention_norm'], config.norm_eps)
  with jax.named_scope('attention'):
    y, pages = latent_attention.attend(
      w['attention'], h, turn, pages, held, valid, config.mla, form
    )
  x = x + y
  h = layers.normalize(x, w['ffn_norm'], config.norm_eps)
  with jax.named_scope('ffn'):
    y = _experts(w, h, config) if 'w_router' in w else _dense(w['ffn'], h)
  return x + y, pages


def _dense(w, x):
  """`layers.swiglu` of weights that lie the other way."""
  both = products.matmul_transposed(x, w['w_gate_up'])
  if x.ndim == 3:
    both = sharding.constrain(both, 'batch', 'part', 'gate_up', 'mlp')
  return products.matmul_transposed(layers.glu(both), w['w_down'])


def _experts(w, x, config):
  ws, shared = (w['ffn']['w_gate_up'], w['ffn']['w_down']), None
  if 'shared' in w:
    shared = _dense(w['shared'], x)
  alone = not sharding.auto_axes()
  flat = x.reshape(-1, x.shape[-1])
  if alone and len(flat) <= _FEW and sharding.target_platform() != 'tpu':
    routing = router.route(flat, w['w_router'], w['bias'], config.moe)
    out = few_rows(flat, routing, *ws).reshape(x.shape)
  else:
    how = config, products.NO_FP8, shared
    out, _ = moe.routed(x, None, w['w_router'], w['bias'], ws, *how)
  return out if shared is None else out + shared


def few_rows(
  x: Float[Array, 'M D'],
  routing: router.Routing,
  w_gate_up: Float[Array, 'E D GF'],
  w_down: Float[Array, 'E F D'],
) -> Float[Array, 'M D']:
  """`experts.feed_forward` of a few rows, each through all that any row chose.

  It is the experts' weights that take the time, and a product of eight rows
  reads them no longer than a product of one. Gate and up are `moe.packed`.
  """
  experts = w_down.shape[0]
  order = jnp.sort(routing.chosen.reshape(-1))
  again = jnp.append(False, order[1:] == order[:-1])
  each = order[jnp.argsort(again, stable=True)]
  picked = routing.chosen[:, :, None] == jnp.arange(experts)[None, None]
  share = jnp.where(picked, routing.gates[:, :, None], 0.0).sum(1)

  def one(i, out):
    e = each[i]
    gate_up = w_gate_up[e].reshape(x.shape[1], 2, -1)
    return out + share[:, e, None] * layers.swiglu(x, gate_up, w_down[e])

  start = jnp.zeros(x.shape, jnp.float32)
  live = each.size - again.sum()
  return jax.lax.fori_loop(0, live, one, start).astype(x.dtype)
