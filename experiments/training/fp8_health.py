"""How much FP8 rounds off in each layer of a model; a run logs it now and then.

`measure` runs the layers once more, forward and backward, on a few tokens. Of
each layer it takes the operands of two products:

  y  = x w    x is the attention's normed input, w the weight `w_kv_down`, which
              compresses it to the latent (under GQA `w_k`, of the keys)
  dx = g v^T  g is the gradient at the layer's output, v the layer's last weight

For x, w and g it gives the share of values that sit at E4M3's largest number
(saturated), the share that became zero (flushed), and the range of the worst
tile in powers of two: E4M3 holds about 18, and a value that lies further below
its tile's largest is flushed. For y and dx it gives the relative error against
a float32 product. The FP8 product is the hardware's own, so that a wrong kernel
shows, too. About 0.04 is right: a number rounded to three bits errs by 0.027
(root mean square), and two operands by sqrt(2) times that.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from mla_moe import fp8
from mla_moe.config import Config, DSAConfig, ModelConfig
from mla_moe.model import block, layers, products, rope, sequence
from mla_moe.train import losses
from mla_moe.types import Array, Float, PyTree

from ..data import batches

_TOKENS = 256


def measure(
  params: PyTree, biases: PyTree, batch: batches.Batch, config: Config
) -> dict[str, Float[Array, ' L']]:
  """Returns statistics of every main layer by name, float32, without MTP's.

  The names are `{x,w,g}_{saturated,flushed,range}`, `y_error` and `dx_error`.
  The tokens are the first of the batch's first sequence. The model's precision
  must be one of FP8. A token sees all before it, with or without an indexer.
  """
  model = dataclasses.replace(config.model, dsa=DSAConfig())
  cut = lambda x: sequence.arrange(x[0, :1, :_TOKENS])
  tokens, targets = cut(batch.tokens), cut(batch.targets)
  positions = cut(batch.positions)
  segments = None if config.data.packing == 'joined' else cut(batch.segments)
  angles = rope.angles(positions, model.mla.rope_dim, model.mla.rope)
  loss = functools.partial(
    _loss, params, biases, tokens, targets, (angles, segments, None), model
  )
  shape = (*tokens.shape, model.dim)
  noise = {
    name: jnp.zeros((count, *shape), model.dtype)
    for name, count in _stacks(model).items()
  }
  gradients, inputs = jax.grad(loss, has_aux=True)(noise)
  recipe = products.recipe(model).resolved()
  stats, weight = [], 'w_kv_down' if model.attention == 'mla' else 'w_k'
  for name in noise:
    ffn = params[name]['ffn']
    last = ffn.get('shared', ffn)['w_down']
    last = last[:, 0] if last.ndim == 4 else last  # an expert's
    w = params[name]['attention'][weight]
    operands = (
      inputs[name][:, 0],
      gradients[name][:, 0],
      params[name]['attention_norm']['scale'],
      w.reshape(*w.shape[:2], -1),
      last,
    )
    layer = lambda operands: _layer(*operands, recipe, model.norm_eps)
    stats.append(jax.lax.map(layer, operands))
  return jax.tree.map(lambda *x: jnp.concatenate(x), *stats)


def _stacks(model: ModelConfig) -> dict[str, int]:
  """Returns the number of layers of each stack that the model has."""
  counts = {'dense': model.dense_layers, 'moe': model.moe_layers}
  return {name: count for name, count in counts.items() if count}


def _loss(params, biases, tokens, targets, shared, model, noise):
  """Returns the mean loss, with `noise` added to the outputs, and the inputs.

  Outputs and inputs are the layers'. `noise` is zero: the gradient by it is the
  gradient at the layers' outputs. It is {stack: [L, B, T, D]}; `shared` are the
  arguments that all layers get.
  """
  x = params['embedding'].astype(model.dtype)[tokens]
  inputs = {}
  for name, count in _stacks(model).items():
    network = block.remat_block(model, count)(model, name == 'moe')

    def layer(x, variables_and_noise, network=network):
      variables, noise = variables_and_noise
      (y, _), _ = network.apply(variables, (x, None), *shared)
      return y + noise, x

    attention = dict(params[name]['attention'])
    attention.pop('indexer', None)  # of a layer, or of one before it
    variables = {'params': {**params[name], 'attention': attention}}
    if name in biases:
      variables['router'] = biases[name]
    x, inputs[name] = jax.lax.scan(layer, x, (variables, noise[name]))
  scale = params['final_norm']['scale']
  hidden = layers.normalize(x, scale, model.norm_eps)
  head = params['embedding'].T if model.tie_embeddings else params['w_head']
  nll, _ = losses.token_nll(hidden[0], head, targets[0])
  return nll.sum() / jnp.maximum((targets >= 0).sum(), 1), inputs


def _layer(x, g, scale, w, last, recipe, eps) -> dict[str, Array]:
  """Returns the statistics of one layer; x and g are [T, D]."""
  x = layers.normalize(x, scale, eps)
  stats = {}
  for name, array, q in (
    ('x', x, recipe.rows(x)),
    ('w', w, recipe.weights(w)[0]),
    ('g', g, recipe.rows(g)),
  ):
    of_tiles = tile_stats(array, q)
    stats |= {f'{name}_{stat}': value for stat, value in of_tiles.items()}
  dot = lambda x, w: fp8.dot(x, w, recipe.precision, impl=recipe.impl)
  before = jnp.zeros((x.shape[0], last.shape[0]), x.dtype)
  (dx,) = jax.vjp(lambda h: dot(h, last), before)[1](g)
  stats['y_error'] = _error(dot(x, w), x, w)
  stats['dx_error'] = _error(dx, g, last.T)
  return stats


def _error(y, x, w) -> Float[Array, '']:
  """Returns |y - x w| / |x w|, in float32."""
  highest = jax.lax.Precision.HIGHEST
  exact = jnp.matmul(x.astype(jnp.float32), w, precision=highest)
  error = jnp.linalg.norm(y.astype(jnp.float32) - exact)
  return error / jnp.maximum(jnp.linalg.norm(exact), 1e-30)


def tile_stats(
  x: Float[Array, '*axes'], q: fp8.Quantized
) -> dict[str, Float[Array, '']]:
  """Returns the shares of saturated and flushed values, and the worst range.

  `q` is `x` after quantisation. The range of a tile is log2 of its largest
  magnitude over its smallest that is not zero.
  """
  wide = jnp.abs(x.astype(jnp.float32))
  small = jnp.abs(q.values.astype(jnp.float32))
  tiles, inside = fp8.quantize.tiled(wide, q.tiles)
  high = tiles.max(inside)
  low = jnp.where(tiles > 0, tiles, jnp.inf).min(inside)
  return {
    'saturated': (small == fp8.quantize.LARGEST).mean(),
    'flushed': ((small == 0) & (wide > 0)).mean(),
    'range': jnp.where(high > 0, jnp.log2(high / low), 0).max(),
  }
