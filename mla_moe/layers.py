"""The small parts: parameters with named axes, RMSNorm, SwiGLU.

Parameters are float32 and named by their role, contraction dimension first
(`w_down [F, D]`). Products run in the activations' dtype; norms take their
statistics in float32 (Zhang and Sennrich 2019; Shazeer 2020 for SwiGLU).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from mla_moe.types import Array, Float


def param(
  module: nn.Module, name: str, shape: tuple, axes: tuple, std: float
) -> Array:
  """A float32 parameter, normal with `std` (0: ones), its axes named.

  The axes are the keys of `sharding.RULES`.
  """
  assert len(axes) == len(shape), (name, shape, axes)
  init = nn.initializers.normal(std) if std else nn.initializers.ones
  boxed = nn.with_logical_partitioning(init, axes)
  return module.param(name, boxed, shape, jnp.float32)


def dot(equation: str, a: Array, b: Array) -> Array:
  """Einsum that accumulates in float32 and returns float32.

  XLA's CPU backend has no bfloat16 product with a float32 result for some
  layouts and fails when it runs; there the operands are widened first, which
  is the same product. The choice is made when lowering, so that a program for
  another platform may be compiled on a CPU.
  """

  def accumulate(a, b):
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)

  if a.dtype == b.dtype == jnp.float32:
    return accumulate(a, b)
  widened = lambda a, b: accumulate(
    a.astype(jnp.float32), b.astype(jnp.float32)
  )
  return jax.lax.platform_dependent(a, b, cpu=widened, default=accumulate)


class RMSNorm(nn.Module):
  """x / rms(x) * scale over the last axis; statistics in float32."""

  eps: float

  @nn.compact
  def __call__(self, x: Float[Array, '*b D']) -> Float[Array, '*b D']:
    scale = param(self, 'scale', x.shape[-1:], ('norm',), 0.0)
    return normalize(x, scale, self.eps)


@functools.partial(jax.checkpoint, static_argnums=(2,), prevent_cse=False)
def normalize(
  x: Float[Array, '*b D'], scale: Float[Array, ' D'], eps: float
) -> Float[Array, '*b D']:
  """RMSNorm itself; it keeps only `x` for the backward pass."""
  wide = x.astype(jnp.float32)
  mean = jnp.mean(jnp.square(wide), -1, keepdims=True)
  scale = jnp.expand_dims(scale, tuple(range(x.ndim - 1)))
  return (wide * jax.lax.rsqrt(mean + eps) * scale).astype(x.dtype)


@functools.partial(jax.checkpoint, prevent_cse=False)
def gated(both: Float[Array, '*b two F']) -> Float[Array, '*b F']:
  """silu(gate) * up; it keeps only its argument for the backward pass."""
  return jax.nn.silu(both[..., 0, :]) * both[..., 1, :]


def swiglu(
  x: Float[Array, '*b D'],
  w_gate_up: Float[Array, 'D two F'],
  w_down: Float[Array, 'F D'],
) -> Float[Array, '*b D']:
  """down(silu(gate(x)) * up(x)); gate and up are one product."""
  both = jnp.einsum('...d,dgf->...gf', x, w_gate_up.astype(x.dtype))
  return jnp.einsum('...f,fd->...d', gated(both), w_down.astype(x.dtype))


class FeedForward(nn.Module):
  """A dense SwiGLU layer of `width`: the first layers' FFN, a shared expert."""

  width: int
  std: float

  @nn.compact
  def __call__(self, x: Float[Array, '*b D']) -> Float[Array, '*b D']:
    dim, width = x.shape[-1], self.width
    axes = ('embed', 'gate_up', 'mlp')
    w_gate_up = param(self, 'w_gate_up', (dim, 2, width), axes, self.std)
    w_down = param(self, 'w_down', (width, dim), ('mlp', 'embed'), self.std)
    return swiglu(x, w_gate_up, w_down)
