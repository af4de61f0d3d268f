"""Products of activations and weights, in the activations' dtype or in FP8.

`einsum` multiplies in the dtype of the activations, or with FP8 operands where
the recipe says so. `dot` accumulates in float32 also on CPUs, and
`matmul_transposed` reads weights line by line; the numbers are the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mla_moe import fp8, sharding
from mla_moe.config import ModelConfig
from mla_moe.types import Array, Float

NO_FP8 = fp8.Recipe('bf16')  # products in the activations' dtype
FP8_OUTPUT = 'fp8_product'  # the checkpoint name of an FP8 product's result
_FEW_ROWS = 16  # where `matmul_transposed` gains from w x^T (measured on x86)


def recipe(config: ModelConfig) -> fp8.Recipe:
  """Returns how this model multiplies by the parameters of FP8_WEIGHTS."""
  return fp8.Recipe(config.precision, config.compute.fp8)


def einsum(
  equation: str,
  x: Array,
  w: Array | fp8.Weight | fp8.OwnWeight,
  recipe: fp8.Recipe = NO_FP8,
  name: str = fp8.SAVED,
) -> Array:
  """Returns the einsum of activations and one weight; see `einsums`."""
  return einsums((equation,), x, (w,), recipe, name)[0]


def einsums(
  equations: tuple[str, ...],
  x: Array,
  ws: tuple,
  recipe: fp8.Recipe = NO_FP8,
  name: str = fp8.SAVED,
) -> tuple[Array, ...]:
  """Returns the einsum of `x` with each of `ws`, in the dtype of `x`.

  Every equation sums the last axes of `x` with the first axes of the weight.
  In FP8, `x` is quantised once, and the backward pass reads that copy, which
  has the checkpoint name `name`.
  """
  left, right = equations[0].split('->')
  summed = len([c for c in left.split(',')[0] if c not in right])
  if isinstance(ws[0], fp8.OwnWeight):
    return tuple(w.product(x, summed) for w in ws)
  if recipe.precision == 'bf16':
    ws = tuple(w.astype(x.dtype) for w in ws)
    if sharding.target_platform() == 'cpu' and not sharding.auto_axes():
      return _one_matmul(x, ws, summed)
    pairs = zip(equations, ws, strict=True)
    return tuple(jnp.einsum(e, x, w) for e, w in pairs)
  lead = x.shape[: x.ndim - summed]
  flat = [fp8.Weight(w.master.reshape(w.copies[0].shape), w.copies) for w in ws]
  ys = fp8.dots(
    x.reshape(*lead, flat[0].shape[0]),
    tuple(flat),
    recipe.precision,
    impl=recipe.impl,
    name=name,
  )
  # Named, because a remat policy cannot recognise these products: they may be
  # kernels, or a choice by platform.
  ys = [checkpoint_name(y, FP8_OUTPUT) for y in ys]
  ends = [w.shape[summed:] for w in ws]
  return tuple(y.reshape(*lead, *e) for y, e in zip(ys, ends, strict=True))


def _one_matmul(x: Array, ws: tuple, summed: int) -> tuple[Array, ...]:
  """Returns the products with all `ws`, as one product of two matrices.

  For a CPU without a mesh, whose backend would transpose gradients with two
  leading axes. An accelerator would pay more for copying the weights.
  """
  lead, rows = x.shape[: x.ndim - summed], math.prod(x.shape[-summed:])
  flat = [w.reshape(rows, -1) for w in ws]
  y = x.reshape(-1, rows) @ jnp.concatenate(flat, axis=1)
  ys = jax.lax.split(y, [w.shape[1] for w in flat], axis=1)
  ends = [w.shape[summed:] for w in ws]
  return tuple(y.reshape(*lead, *e) for y, e in zip(ys, ends, strict=True))


def checkpoint_input(x: Array, name: str, recipe: fp8.Recipe) -> Array:
  """Returns `x`, the input of a product, under a checkpoint name for remat.

  In FP8 the product that reads `x` saves it itself, in eight bits.
  """
  return checkpoint_name(x, name) if recipe.precision == 'bf16' else x


def dot(equation: str, a: Array, b: Array) -> Array:
  """Returns the einsum of `a` and `b`, accumulated in float32, as float32.

  XLA's CPU backend has no bfloat16 product with a float32 result for some
  layouts and fails when it runs. There the operands are cast to float32 first,
  which is the same product. The choice is made when lowering, so that a
  program for another platform may be compiled on a CPU.
  """

  def accumulate(a, b):
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)

  if a.dtype == b.dtype == jnp.float32:
    return accumulate(a, b)
  wide = lambda x: x.astype(jnp.float32)
  widened = lambda a, b: accumulate(wide(a), wide(b))
  return jax.lax.platform_dependent(a, b, cpu=widened, default=accumulate)


def matmul_transposed(
  x: Float[Array, '*b D'],
  w: Float[Array, '*out D'],
  multiply: Callable = jnp.einsum,
) -> Float[Array, ...]:
  """Returns x w^T, `[*b, *out]`, for decoding's weights `[*out, D]`.

  On a CPU a few rows take half as long as w x^T, which reads the weights line
  by line. The barrier keeps XLA from turning that back into x w^T.
  """
  out = 'xyz'[: w.ndim - 1]
  rows = x.reshape(-1, x.shape[-1])
  if len(rows) > _FEW_ROWS or sharding.target_platform() != 'cpu':
    return multiply(f'...d,{out}d->...{out}', x, w)
  y = jax.lax.optimization_barrier(multiply('...d,md->...m', w, rows))
  return jnp.moveaxis(y, -1, 0).reshape(*x.shape[:-1], *w.shape[:-1])
