"""RMSNorm and SwiGLU (Zhang and Sennrich 2019; Shazeer 2020).

Norms take their statistics in float32. For the backward pass, `normalize` and
`glu` save their argument alone and compute the rest again, which costs a few
elementwise operations.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from mla_moe import fp8, sharding
from mla_moe.model import products, weights
from mla_moe.types import Array, Float


class RMSNorm(nn.Module):
  """x / rms(x) * scale over the last axis; statistics in float32."""

  eps: float

  @nn.compact
  def __call__(self, x: Float[Array, '*b D']) -> Float[Array, '*b D']:
    scale = weights.param(self, 'scale', x.shape[-1:], ('norm',), 0.0)
    return normalize(x, scale, self.eps)


@functools.partial(jax.checkpoint, static_argnums=(2,), prevent_cse=False)
def normalize(
  x: Float[Array, '*b D'], scale: Float[Array, ' D'], eps: float
) -> Float[Array, '*b D']:
  """Returns x / sqrt(mean(x^2) + eps) * scale; the backward pass saves `x`."""
  wide = x.astype(jnp.float32)
  mean = jnp.mean(jnp.square(wide), -1, keepdims=True)
  scale = jnp.expand_dims(scale, tuple(range(x.ndim - 1)))
  return (wide * jax.lax.rsqrt(mean + eps) * scale).astype(x.dtype)


@functools.partial(jax.checkpoint, static_argnums=(1,), prevent_cse=False)
def glu(gate_up: Float[Array, ...], axis: int) -> Float[Array, '*b F']:
  """Returns silu(gate) * up of the halves of an axis; saves the argument."""
  # Split, not indexed: its gradient is one write and no sum of padded halves.
  shape, half = gate_up.shape, (gate_up.shape[axis] // 2,) * 2
  gate, up = jax.lax.split(gate_up, half, gate_up.ndim + axis)
  width = math.prod(shape[axis:]) // 2  # no -1: there may be no token
  return (jax.nn.silu(gate) * up).reshape(*shape[:axis], width)


def swiglu(
  x: Float[Array, '*b D'],
  w_gate_up: Float[Array, 'D two F'] | fp8.Weight | fp8.OwnWeight,
  w_down: Float[Array, 'F D'] | fp8.Weight | fp8.OwnWeight,
  recipe: fp8.Recipe = products.NO_FP8,
) -> Float[Array, '*b D']:
  """Returns down(silu(gate(x)) * up(x)); gate and up are one product."""

  def constrain(x, *last):  # rows without a length are no stream
    return sharding.constrain(x, 'batch', 'part', *last) if stream else x

  stream = x.ndim == 3
  x = constrain(x, 'stream')
  gate_up = products.einsum('...d,dgf->...gf', x, w_gate_up, recipe)
  hidden = constrain(glu(constrain(gate_up, 'gate_up', 'mlp'), -2), 'mlp')
  return products.einsum('...f,fd->...d', hidden, w_down, recipe)


class FeedForward(nn.Module):
  """SwiGLU of `width`: the FFN of a dense layer, or a shared expert."""

  width: int
  std: float
  recipe: fp8.Recipe = products.NO_FP8

  @nn.compact
  def __call__(self, x: Float[Array, '*b D']) -> Float[Array, '*b D']:
    weight = lambda name, shape, *axes: weights.weight(
      self, name, shape, axes, self.std, self.recipe, x.dtype
    )
    dim, width = x.shape[-1], self.width
    axes = 'dense', 'gate_up', 'mlp'
    w_gate_up = weight('w_gate_up', (dim, 2, width), *axes)
    w_down = weight('w_down', (width, dim), 'mlp', 'dense')
    return swiglu(x, w_gate_up, w_down, self.recipe)
