"""Linear layers whose three products take FP8 operands (V3 section 3.3).

y = x w, dx = g w^T and dw = x^T g each quantise their operands by the current
values: no history, no state, so that scan, remat, micro-batches and
checkpoints know nothing of it. A tensor is tiled along the axis that is summed
over, so x and g are quantised twice, along features and along tokens; a
weight's square blocks serve both ways.

The backward pass keeps x in FP8, under the name SAVED that `jax.checkpoint`
policies know. That halves a layer's memory wherever nothing else needs x before
quantisation; and since scales are powers of two, tiling it again loses nothing.

A weight may be quantised once for many calls: a `Weight` is the master beside
its FP8 copies. Products read the copies, and the gradient is the master's.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from mla_moe.fp8 import gemm, grouped
from mla_moe.fp8.quantize import Quantized
from mla_moe.fp8.recipe import Recipe
from mla_moe.types import Array, Float, Int

SAVED = 'fp8_input'


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weight:
  """A float32 weight and its FP8 copies, for products that only read these.

  Make the copies outside a loop, by `Recipe.weights`. To differentiate: build
  `Weight(master, copies)` inside the differentiated function; the copies have
  no gradient.

  The fields are typed Any because the same class also holds their shapes, their
  PartitionSpecs, or a gradient, whose copies are None.
  """

  master: Any
  copies: Any

  @property
  def shape(self) -> tuple[int, ...]:
    return self.master.shape

  @property
  def ndim(self) -> int:
    return self.master.ndim


class OwnWeight:
  """A weight that multiplies itself, in the place of a parameter's array.

  A subclass is a pytree, and has the methods of the one in
  `experiments/adapters/frozen.py`: codes of eight or four bits, with adapters.
  """


def dot(
  x: Float[Array, '... K'],
  w: Float[Array, 'K ...'] | Weight,
  precision: str = 'fp8_block',
  *,
  impl: str = 'auto',
  name: str = SAVED,
) -> Float[Array, ' ...']:
  """Returns x w in the dtype of `x`; the gradient of `w` has `w`'s dtype.

  Args:
    x: [..., K].
    w: [K, N], or [K, G, N]: G products side by side, whose blocks do not cross
      (gate and up). Give the float32 master: its gradient stays float32.
    precision: 'bf16' is a plain dot in the dtype of `x`, and so is any
      precision without rows or features, where nothing can be quantised.
    impl: see `gemm`; 'auto' is the hardware's.
    name: the name of the quantised `x`, for policies of `jax.checkpoint`.

  Raises:
    ConfigError: an unknown precision, or an `impl` that does not compute it.
    ValueError: shapes that have no product.
  """
  return dots(x, (w,), precision, impl=impl, name=name)[0]


def dots(
  x: Float[Array, '... K'],
  ws: tuple[Float[Array, 'K ...'] | Weight, ...],
  precision: str = 'fp8_block',
  *,
  impl: str = 'auto',
  name: str = SAVED,
) -> tuple[Float[Array, ' ...'], ...]:
  """Returns `dot` with each weight of `ws`; `x` is quantised and saved once."""
  recipe = Recipe(precision, impl)
  for w in ws:
    if w.ndim < 2 or x.ndim < 1 or x.shape[-1] != w.shape[0]:
      raise ValueError(f'x {x.shape} and w {w.shape} have no product')
  if precision == 'bf16' or not x.size or any(0 in w.shape for w in ws):
    dims = (((x.ndim - 1,), (0,)), ((), ()))
    wide = lambda w: _parts(w)[0].astype(x.dtype)
    return tuple(jax.lax.dot_general(x, wide(w), dims) for w in ws)
  if x.ndim == 1:  # the sum over tokens needs an axis of them
    ys = dots(x[None], ws, precision, impl=impl, name=name)
    return tuple(y[0] for y in ys)
  masters, copies = zip(*map(_parts, ws), strict=True)
  return _dots(x, masters, copies, recipe.resolved(), name)


def _parts(w) -> tuple:
  """Returns a weight's master and its copies; None if it has no copies."""
  return (w.master, w.copies) if isinstance(w, Weight) else (w, None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _dots(x, ws, copies, recipe, name):
  return _dots_forward(x, ws, copies, recipe, name)[0]


def _dots_forward(x, ws, copies, recipe, name):
  q = _named(recipe.rows(x), name)
  summed = ((x.ndim - 1,), (0,))
  pairs = zip(ws, copies, strict=True)
  right = [(c or recipe.weights(w))[0] for w, c in pairs]
  ys = tuple(gemm.multiply(q, w, summed, recipe.impl, x.dtype) for w in right)
  return ys, (q, tuple(map(_residual, ws, copies)), copies)


def _dots_backward(recipe, _, residuals, gs):
  q, ws, copies = residuals
  x = recipe.columns(q)
  tokens = tuple(range(x.ndim - 1))
  dx, dws = 0.0, []
  for g, w, c in zip(gs, ws, copies, strict=True):
    features = g.ndim - len(tokens)
    right = (c or recipe.weights(w))[-1]
    summed = (tuple(range(len(tokens), g.ndim)), tuple(range(1, right.ndim)))
    dx = dx + gemm.multiply(
      recipe.rows(g, features), right, summed, recipe.impl
    )
    columns = recipe.columns(g, features)
    dw = gemm.multiply(x, columns, (tokens, tokens), recipe.impl)
    dws.append(dw.astype(w.dtype))
  return dx.astype(gs[0].dtype), tuple(dws), None


_dots.defvjp(_dots_forward, _dots_backward)


def _named(q: Quantized, name: str) -> Quantized:
  """Returns `q` under a name that policies know; the values pass it as bits.

  A policy that saves a float rounds it to its dtype's widths first, and in jax
  4 exponent bits end at 240: larger E4M3 numbers would become NaN.
  """
  bits = jax.lax.bitcast_convert_type(q.values, jnp.uint8)
  values = jax.lax.bitcast_convert_type(
    checkpoint_name(bits, name), q.values.dtype
  )
  scales = checkpoint_name(q.scales, name)
  return dataclasses.replace(q, values=values, scales=scales)


def _residual(w, copies):
  """Returns the master, or an empty array of its dtype if there are copies."""
  return jnp.zeros((0,), w.dtype) if copies else w


def ragged_dot(
  x: Float[Array, 'M K'],
  w: Float[Array, 'E K ...'] | Weight,
  group_sizes: Int[Array, ' E'],
  precision: str = 'fp8_block',
  *,
  impl: str = 'auto',
  name: str = SAVED,
) -> Float[Array, 'M ...']:
  """Returns each row of `x` times its expert's weight, in the dtype of `x`.

  Rows are sorted by expert: the first group_sizes[0] are expert 0's. Rows
  after the last group give zeros, even if they are NaN. `w` is [E, K, N] or
  [E, K, G, N]; the other arguments and the errors are those of `dot`.
  """
  recipe = Recipe(precision, impl)
  if x.ndim != 2 or w.ndim < 3 or x.shape[1] != w.shape[1]:
    raise ValueError(f'x {x.shape} and w {w.shape} have no product by expert')
  master, copies = _parts(w)
  if not x.size or 0 in w.shape:  # no row, nothing to sum, or no expert
    y = jnp.zeros((x.shape[0], *w.shape[2:]), x.dtype)
    return gemm.pvary_like(y, x, master)
  if precision == 'bf16':
    flat = master.astype(x.dtype).reshape(*w.shape[:2], -1)
    y = jax.lax.ragged_dot(x, flat, group_sizes)
    return y.reshape(x.shape[0], *w.shape[2:])
  return _ragged(x, master, copies, group_sizes, recipe.resolved(), name)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _ragged(x, w, copies, sizes, recipe, name):
  return _ragged_forward(x, w, copies, sizes, recipe, name)[0]


def _ragged_forward(x, w, copies, sizes, recipe, name):
  layout = grouped.make_layout(sizes, x.shape[0])
  q = _named(recipe.rows(grouped.to_layout(x, layout)), name)
  right = (copies or recipe.weights(w, 1))[0]
  y = grouped.multiply_by_expert(
    q, right, ((1,), (1,)), layout, recipe.impl, x.dtype
  )
  residuals = q, _residual(w, copies), copies, sizes
  return grouped.from_layout(y, layout), residuals


def _ragged_backward(recipe, _, residuals, g):
  q, w, copies, sizes = residuals
  layout = grouped.make_layout(sizes, g.shape[0])
  rows = grouped.to_layout(g, layout)
  features = g.ndim - 1
  right = (copies or recipe.weights(w, 1))[-1]
  summed = (tuple(range(1, g.ndim)), tuple(range(2, right.ndim)))
  dx = grouped.multiply_by_expert(
    recipe.rows(rows, features), right, summed, layout, recipe.impl, g.dtype
  )
  dw = grouped.weight_gradients(
    recipe.columns(q), recipe.columns(rows, features), layout, recipe.impl
  )
  return grouped.from_layout(dx, layout), dw.astype(w.dtype), None, None


_ragged.defvjp(_ragged_forward, _ragged_backward)


@dataclasses.dataclass(frozen=True)
class DotGeneral:
  """`lax.dot_general` in FP8, for `nn.Dense(dot_general=...)`.

  The right operand is the weight. Flax casts it to the layer's dtype first, so
  that its gradient is rounded to that dtype; `dot` takes the float32 master.
  """

  precision: str = 'fp8_block'
  impl: str = 'auto'

  def __post_init__(self):
    Recipe(self.precision, self.impl)  # refuses an unknown name

  def __call__(
    self,
    lhs: Float[Array, '*left'],
    rhs: Float[Array, '*right'],
    dimension_numbers: tuple,
    preferred_element_type: DTypeLike | None = None,
    **_,
  ) -> Float[Array, '*product']:
    """Returns the product as lax.dot_general has it.

    Raises:
      ValueError: there are batch axes.
    """
    (left, right), batch = dimension_numbers
    if any(batch):
      raise ValueError(
        f'an FP8 dot_general has no batch axes, not {batch}; see ragged_dot'
      )
    n = len(left)
    x = jnp.moveaxis(lhs, left, range(-n, 0))
    w = jnp.moveaxis(rhs, right, range(n))
    x = x.reshape(*x.shape[:-n], math.prod(x.shape[-n:]))
    flat = w.reshape(x.shape[-1], math.prod(w.shape[n:]))
    y = dot(x, flat, self.precision, impl=self.impl)
    y = y.reshape(*x.shape[:-1], *w.shape[n:])
    return y.astype(preferred_element_type or y.dtype)
