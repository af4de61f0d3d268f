"""How well FP8 holds a model's numbers: what a run looks at now and then.

`measure` runs the layers once more, forward and backward, on a few tokens, and
takes three arrays of every layer as its products do: the input (normed) of its
attention, the weight that compresses it to the latent, and the gradient at its
output. Of each: the share of values that sit at E4M3's largest, the share that
became zero, and the range of the worst tile in powers of two (E4M3 holds about
18: what lies further below its tile's largest is flushed). And two products
are compared with float32 ones: that input by that weight, and that gradient by
the last weight of the layer. They are the hardware's own, so that a product
that is wrong there shows, too. With two operands in E4M3 about 0.04 is right.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mla_moe import fp8
from mla_moe.config import Config
from mla_moe.data import batches
from mla_moe.model import block, layers, products, rope, sequence
from mla_moe.train import losses
from mla_moe.types import Array, Float, PyTree

_TOKENS = 256


def measure(
  params: PyTree, biases: PyTree, batch: batches.Batch, config: Config
) -> dict[str, Array]:
  """Of the main layers, by name [L] float32: errors, shares and ranges.

  `{x,w,g}_{saturated,flushed,range}`, `y_error` and `dx_error`, from the first
  tokens of the batch's first sequence. `config.model.precision` is not 'bf16'.
  """
  model = config.model
  cut = lambda x: sequence.arrange(x[0, :1, :_TOKENS])
  tokens, targets = cut(batch.tokens), cut(batch.targets)
  positions = cut(batch.positions)
  segments = None if config.data.packing == 'joined' else cut(batch.segments)
  angles = rope.angles(positions, model.mla.rope_dim, model.mla.rope)
  stacks = {
    name: count
    for name, count in (
      ('dense', model.dense_layers),
      ('moe', model.moe_layers),
    )
    if count
  }

  def loss(noise):
    """The mean loss when `noise` is added to the outputs, and the inputs."""
    x = params['embedding'].astype(model.dtype)[tokens]
    inputs = {}
    for name, count in stacks.items():
      network = block.remat_block(model, count)(model, name == 'moe')

      def layer(x, one, network=network):
        variables, more = one
        y, _ = network.apply(variables, x, *angles, segments, None)
        return y + more, x

      own = {'params': params[name]}
      if name in biases:
        own['router'] = biases[name]
      x, inputs[name] = jax.lax.scan(layer, x, (own, noise[name]))
    scale = params['final_norm']['scale']
    hidden = layers.normalize(x, scale, model.norm_eps)
    head = params['embedding'].T if model.tie_embeddings else params['w_head']
    nll, _ = losses.token_nll(hidden[0], head, targets[0])
    return nll.sum() / jnp.maximum((targets >= 0).sum(), 1), inputs

  shape = (*tokens.shape, model.dim)
  noise = {n: jnp.zeros((k, *shape), model.dtype) for n, k in stacks.items()}
  gradients, inputs = jax.grad(loss, has_aux=True)(noise)
  recipe = products.recipe(model).resolved()
  found = []
  for name in stacks:
    ffn = params[name]['ffn']
    last = ffn.get('shared', ffn)['w_down']
    last = last[:, 0] if last.ndim == 4 else last  # an expert's
    each = (
      inputs[name][:, 0],
      gradients[name][:, 0],
      params[name]['attention_norm']['scale'],
      params[name]['attention']['w_kv_down'],
      last,
    )
    found.append(
      jax.lax.map(lambda one: _layer(*one, recipe, model.norm_eps), each)
    )
  return jax.tree.map(lambda *x: jnp.concatenate(x), *found)


def _layer(x, g, scale, w, last, recipe, eps) -> dict[str, Array]:
  x = layers.normalize(x, scale, eps)
  found = {}
  for name, array, q in (
    ('x', x, recipe.rows(x, 1)),
    ('w', w, recipe.weights(w)[0]),
    ('g', g, recipe.rows(g, 1)),
  ):
    stats = tiles(array, q)
    found |= {f'{name}_{what}': value for what, value in stats.items()}
  dot = lambda x, w: fp8.dot(x, w, recipe.precision, impl=recipe.impl)
  before = jnp.zeros((x.shape[0], last.shape[0]), x.dtype)
  (dx,) = jax.vjp(lambda h: dot(h, last), before)[1](g)
  found['y_error'] = _error(dot(x, w), x, w)
  found['dx_error'] = _error(dx, g, last.T)
  return found


def _error(y, x, w) -> Float[Array, '']:
  """|y - x w| / |x w|, in float32."""
  highest = jax.lax.Precision.HIGHEST
  exact = jnp.matmul(x.astype(jnp.float32), w, precision=highest)
  error = jnp.linalg.norm(y.astype(jnp.float32) - exact)
  return error / jnp.maximum(jnp.linalg.norm(exact), 1e-30)


def tiles(x: Float[Array, ' ...'], q: fp8.Quantized) -> dict[str, Array]:
  """Shares of saturated and of flushed values of `x`, and the worst range.

  The range of a tile is log2 of its largest magnitude over its smallest that
  is not zero.
  """
  wide = jnp.abs(x.astype(jnp.float32))
  small = jnp.abs(q.values.astype(jnp.float32))
  split, inside = fp8.quantize.split(wide, q.tiles)
  high = split.max(inside)
  low = jnp.where(split > 0, split, jnp.inf).min(inside)
  return {
    'saturated': (small == fp8.quantize.LARGEST).mean(),
    'flushed': ((small == 0) & (wide > 0)).mean(),
    'range': jnp.where(high > 0, jnp.log2(high / low), 0).max(),
  }
