"""The transformer over a latent cache: prefill, decode_step, draft.

Training scans over stacked layers; here each layer's weights are arrays of
their own (`unstack`), because a scan would copy them at every step. Products
run in the model's dtype, never in FP8. Rows may have different numbers of new
tokens: the first `valid` of a row's T tokens are real, the others are padding,
which writes nothing and is attended to by no token. Each function takes a cache
and returns the next one; donate it, and nothing is copied.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from mla_moe import fp8, sharding
from mla_moe.config import ModelConfig
from mla_moe.decode import latent_attention, latent_cache
from mla_moe.model import layers, moe, products, rope, router, transformer
from mla_moe.types import Array, Float, Int, PyTree

_FFN = ('w_gate_up', 'w_down')
_is_own = lambda w: isinstance(w, fp8.OwnWeight)
_FEW = 8  # most rows for which `few_rows` is faster (measured on x86)


def unstack(config: ModelConfig, variables: PyTree) -> PyTree:
  """Returns the weights in the layout of decoding, layer by layer.

  Matrices have the activations' dtype and, except for the routed experts', the
  layout of `products.matmul_transposed`; norms and router are float32. The
  stacked parameters are not needed any more, but for experts' `fp8.OwnWeight`.

  Args:
    config: of the model.
    variables: {'params', 'router'}, as `Transformer.init` makes them.
  """
  params, biases = variables['params'], variables.get('router', {})
  params = _whole_along_expert(config, params)
  weights = {
    'embedding': params['embedding'].astype(config.dtype),
    'final_norm': params['final_norm']['scale'],
    'layers': [],
  }
  head = params['embedding'] if config.tie_embeddings else params['w_head'].T
  weights['head'] = head.astype(config.dtype)
  counts = {'dense': config.dense_layers, 'moe': config.moe_layers}
  for name, count in counts.items():
    indexed = 0  # a stack has the indexers of its full layers alone
    for i in range(count):
      stacked = _without_index(params[name])
      layer = jax.tree.map(lambda x, i=i: x[i], stacked, is_leaf=_is_own)
      bias = jax.tree.map(lambda x, i=i: x[i], biases.get(name, {}))
      if latent_cache.has_index(config, len(weights['layers'])):
        stacked = params[name]['attention']['indexer']
        own = jax.tree.map(lambda x, i=indexed: x[i], stacked)
        layer['attention']['indexer'], indexed = own, indexed + 1
      weights['layers'].append(_layer(layer, bias, config.dtype))
  if config.mtp.depth:
    module = params['mtp_0']
    bias = biases.get('mtp_0', {}).get('block', {})
    norms = ('embed_norm', 'hidden_norm', 'final_norm')
    weights['mtp'] = {
      'w_join': module['w_join'].T.astype(config.dtype),
      'block': _layer(module['block'], bias, config.dtype),
      **{name: module[name]['scale'] for name in norms},
    }
  return weights


def layer_weights(config: ModelConfig, variables: PyTree) -> PyTree:
  """Returns `unstack`, compiled; its own result is returned as it is.

  Experts' `fp8.OwnWeight` are not copied: a compiled function copies an array
  that it only hands on, here the codes of all layers once for each layer.
  """
  if 'layers' in variables:
    return variables
  params, weights = variables['params'], _without_own(config, variables)
  routed = weights['layers'][config.dense_layers :]
  pairs = [(x, params['moe'], i) for i, x in enumerate(routed)]
  if config.mtp.depth:
    pairs.append((weights['mtp']['block'], params['mtp_0']['block'], None))
  for block, own, i in pairs:
    for name in _FFN:
      if block['ffn'][name] is None:
        w = own['ffn'][name]
        block['ffn'][name] = w if i is None else w[i]
  return weights


@functools.partial(jax.jit, static_argnums=0)
def _without_own(config, variables):
  drop = lambda w: None if _is_own(w) else w
  return jax.tree.map(drop, unstack(config, variables), is_leaf=_is_own)


def _whole_along_expert(config, params):
  """Returns parameters whose `dense` matrices are whole along `expert`."""
  # A token is too little work to gather them for each, as a training step does.
  if not sharding.auto_axes():
    return params
  tokens = jnp.zeros((1, config.mtp.depth + 2), jnp.int32)
  init = transformer.Transformer(config).init
  boxed = jax.eval_shape(init, jax.random.key(0), tokens)['params']

  def one(box, w):
    if 'dense' not in box.names or _is_own(w):
      return w
    names = sharding.over_fsdp(box.names)
    return sharding.constrain(w.astype(config.dtype), *names)

  is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
  return jax.tree.map(one, boxed, params, is_leaf=is_box)


def _without_index(params):
  attention = params['attention'].items()
  attention = {name: x for name, x in attention if name != 'indexer'}
  return {**params, 'attention': attention}


def _layer(params, bias, dtype):
  def transposed(ffn):
    transpose = lambda w: jnp.moveaxis(w, 0, -1)
    return {name: transpose(ffn[name].astype(dtype)) for name in _FFN}

  layer = {
    'attention_norm': params['attention_norm']['scale'],
    'ffn_norm': params['ffn_norm']['scale'],
    'attention': latent_attention.weights(params['attention'], dtype),
  }
  if 'w_router' not in params['ffn']:
    layer['ffn'] = transposed(params['ffn'])
  else:
    gate_up, down = (params['ffn'][name] for name in _FFN)
    if not _is_own(down):
      # A TPU would copy weights that end in [2, F] at each step. On a mesh,
      # each device joins its parts.
      apart = sharding.array_spec(moe.GATE_UP, gate_up)
      joined = sharding.array_spec(moe.PACKED, gate_up[:, :, 0])
      join = sharding.shard_map(moe.weights.packed, (apart,), joined)
      gate_up, down = join(gate_up.astype(dtype)), down.astype(dtype)
    layer['ffn'] = {'w_gate_up': gate_up, 'w_down': down}
    layer['w_router'] = params['ffn']['w_router']
    layer['bias'] = bias.get('ffn', {}).get('bias')
    if 'shared' in params['ffn']:
      layer['shared'] = transposed(params['ffn']['shared'])
  return layer


def hidden(
  weights: PyTree,
  cache: latent_cache.Cache,
  tokens: Int[Array, 'B T'],
  config: ModelConfig,
  *,
  valid: Int[Array, ' B'] | None = None,
  form: str = 'absorbed',
) -> tuple[Float[Array, 'B T D'], latent_cache.Cache]:
  """Returns the normed hidden states of new tokens, and the cache with them.

  Args:
    weights: as `unstack` returns them.
    cache: of the main model alone (`split`).
    tokens: ids below the vocabulary's size.
    config: of the model.
    valid: real tokens of each row; None: all T.
    form: of `latent_attention.attend`.
  """
  x = weights['embedding'][tokens]
  x = sharding.constrain(x, 'batch', None, 'stream')
  angles = _angles(cache, tokens, config)
  pools, selected = list(cache.layers), None
  context = cache, valid, config, form
  for i, w in enumerate(weights['layers']):
    x, pools[i], selected = _block(w, x, angles, pools[i], *context, selected)
  x = layers.normalize(x, weights['final_norm'], config.norm_eps)
  return x, _extended(cache, pools, tokens, valid)


def logits(weights: PyTree, x: Float[Array, '*b D']) -> Float[Array, '*b V']:
  """Returns the head's logits of normed hidden states, float32."""
  return products.matmul_transposed(x, weights['head'], products.dot)


def decode_step(
  weights: PyTree,
  cache: latent_cache.Cache,
  tokens: Int[Array, ' B'],
  config: ModelConfig,
  *,
  valid: Int[Array, ' B'] | None = None,
) -> tuple[Float[Array, 'B V'], latent_cache.Cache]:
  """Returns float32 logits after one more token of each row, and the cache."""
  x, cache = hidden(weights, cache, tokens[:, None], config, valid=valid)
  return logits(weights, x[:, 0]), cache


def prefill(
  weights: PyTree,
  cache: latent_cache.Cache,
  tokens: Int[Array, 'B T'],
  valid: Int[Array, ' B'],
  config: ModelConfig,
  *,
  chunk: int = 2048,
) -> tuple[Float[Array, 'B T D'], latent_cache.Cache]:
  """Returns `hidden` of whole prompts; the cache must be empty.

  A prompt goes through the model in chunks. The first attends to itself; each
  later one also to the cache, whose keys and values are computed again.
  """
  states, table, size = [], cache.table, cache.layers[0].page_size
  for start in range(0, tokens.shape[1], chunk):
    part = tokens[:, start : start + chunk]
    real = jnp.clip(valid - start, 0, part.shape[1])
    form = 'decompressed' if start else 'fresh'
    if latent_cache.is_sparse(config):  # scores of later keys take memory
      cache = cache.replace(table=table[:, : -(-(start + chunk) // size)])
    x, cache = hidden(weights, cache, part, config, valid=real, form=form)
    states.append(x)
  return jnp.concatenate(states, axis=1), cache.replace(table=table)


def last(
  x: Float[Array, 'B T D'], valid: Int[Array, ' B']
) -> Float[Array, 'B D']:
  """Returns the hidden state of each row's last valid token."""
  i = jnp.maximum(valid - 1, 0)[:, None, None]
  return jnp.take_along_axis(x, i, axis=1)[:, 0]


def draft(
  weights: PyTree,
  cache: latent_cache.Cache,
  states: Float[Array, 'B T D'],
  tokens: Int[Array, 'B T'],
  config: ModelConfig,
  *,
  valid: Int[Array, ' B'] | None = None,
  form: str = 'absorbed',
) -> tuple[Float[Array, 'B T D'], latent_cache.Cache]:
  """Returns the first MTP module's states for the head, and its cache.

  At position i the module joins the main model's hidden state with token i + 1
  and predicts token i + 2 (V3 section 2.2).

  Args but for those of `hidden`:
    cache: of the module alone (`split`), with lengths of its own.
    states: the main model's `hidden` at each position.
    tokens: the token after each position.
  """
  w, eps = weights['mtp'], config.norm_eps
  joined = [
    layers.normalize(weights['embedding'][tokens], w['embed_norm'], eps),
    layers.normalize(states, w['hidden_norm'], eps),
  ]
  x = products.matmul_transposed(jnp.concatenate(joined, axis=-1), w['w_join'])
  angles = _angles(cache, tokens, config)
  (pool,) = cache.layers
  x, pool, _ = _block(w['block'], x, angles, pool, cache, valid, config, form)
  x = layers.normalize(x, w['final_norm'], eps)
  return x, _extended(cache, [pool], tokens, valid)


def split(
  cache: latent_cache.Cache, config: ModelConfig
) -> tuple[latent_cache.Cache, latent_cache.Cache]:
  """Returns the main model's part of a cache, and the MTP module's."""
  main = dataclasses.replace(cache, layers=cache.layers[: config.layers])
  return main, dataclasses.replace(cache, layers=cache.layers[config.layers :])


def _angles(cache, tokens, config):
  positions = cache.lengths[:, None] + jnp.arange(tokens.shape[1])[None]
  return rope.angles(positions, config.mla.rope_dim, config.mla.rope)


def _extended(cache, pools, tokens, valid):
  more = tokens.shape[1] if valid is None else valid
  lengths = cache.lengths + more
  return dataclasses.replace(cache, layers=tuple(pools), lengths=lengths)


def _block(w, x, angles, pages, cache, valid, config, form, selected=None):
  """Returns the stream, the layer's pool, and its sets for shared layers."""
  h = layers.normalize(x, w['attention_norm'], config.norm_eps)
  with jax.named_scope('attention'):
    y, pages, selected = latent_attention.attend(
      w['attention'], h, angles, pages, cache, valid, config, form, selected
    )
  x = x + y
  h = layers.normalize(x, w['ffn_norm'], config.norm_eps)
  with jax.named_scope('ffn'):
    if 'w_router' not in w:
      return x + _dense(w['ffn'], h), pages, selected
    y, chosen = _experts(w, h, config)
  pages = latent_cache.note_routes(pages, cache, chosen, valid)
  return x + y, pages, selected


def _dense(w, x):
  """Returns `layers.swiglu`, of weights that are transposed."""
  gate_up = products.matmul_transposed(x, w['w_gate_up'])
  if x.ndim == 3:
    gate_up = sharding.constrain(gate_up, 'batch', 'part', 'gate_up', 'mlp')
  return products.matmul_transposed(layers.glu(gate_up, -2), w['w_down'])


def _experts(w, x, config):
  """Returns the layer's output, and the experts chosen [B, T, K]."""
  ws, shared = (w['ffn']['w_gate_up'], w['ffn']['w_down']), None
  if 'shared' in w:
    shared = _dense(w['shared'], x)
  flat = x.reshape(-1, x.shape[-1])
  one_device = not sharding.auto_axes()
  if one_device and len(flat) <= _FEW and sharding.target_platform() != 'tpu':
    routing = router.route(flat, w['w_router'], w['bias'], config.moe)
    out = few_rows(flat, routing, *ws).reshape(x.shape)
    chosen = routing.chosen.reshape(*x.shape[:2], -1)
  else:
    recipe = products.NO_FP8
    out, _, chosen = moe.routed(
      x, None, w['w_router'], w['bias'], ws, config, recipe, shared
    )
  return out if shared is None else out + shared, chosen


def few_rows(
  x: Float[Array, 'M D'],
  routing: router.Routing,
  w_gate_up: Float[Array, 'E D GF'] | fp8.OwnWeight,
  w_down: Float[Array, 'E F D'] | fp8.OwnWeight,
) -> Float[Array, 'M D']:
  """Returns the routed experts' output for a few rows (`experts.feed_forward`).

  All rows go through each expert that any row chose, with gate 0 where they did
  not choose it. Reading an expert's weights takes the time, and a product of
  eight rows reads them as fast as a product of one.

  Args:
    x: the rows.
    routing: their experts and gates.
    w_gate_up: of all experts, gate and up side by side.
    w_down: of all experts.
  """
  experts = w_down.shape[0]
  order = jnp.sort(routing.chosen.reshape(-1))
  repeated = jnp.append(False, order[1:] == order[:-1])
  distinct = order[jnp.argsort(repeated, stable=True)]
  picked = routing.chosen[:, :, None] == jnp.arange(experts)[None, None]
  gates = jnp.where(picked, routing.gates[:, :, None], 0.0).sum(1)  # [M, E]

  def add_expert(i, out):
    e = distinct[i]
    gate_up = w_gate_up[e]
    if not _is_own(gate_up):
      gate_up = gate_up.reshape(x.shape[1], 2, -1)
    return out + gates[:, e, None] * layers.swiglu(x, gate_up, w_down[e])

  start = jnp.zeros(x.shape, jnp.float32)
  count = distinct.size - repeated.sum()
  return jax.lax.fori_loop(0, count, add_expert, start).astype(x.dtype)
