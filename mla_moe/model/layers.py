"""The small parts: parameters with named axes, products, RMSNorm, SwiGLU.

Parameters are float32 and named by their role, contraction dimension first
(`w_down [F, D]`). Products run in the activations' dtype, or in FP8: those of
PRODUCTS do, and embedding, head, router, norms, the attention core and the
MTP projection never (V3 section 3.3.1). Norms take their statistics in float32
(Zhang and Sennrich 2019; Shazeer 2020 for SwiGLU).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from mla_moe import fp8, sharding
from mla_moe.config import ModelConfig
from mla_moe.types import Array, Float

PRODUCTS = (
  'w_q',
  'w_q_down',
  'w_q_up',
  'w_kv_down',
  'w_k_rope',
  'w_k_up',
  'w_v_up',
  'w_out',
  'w_gate_up',
  'w_down',
)
HIGH = fp8.Recipe('bf16')
_NARROW = 16  # rows of which `turned` makes columns (measured on x86)
PRODUCT = 'fp8_product'  # the name of an FP8 product's result


def param(
  module: nn.Module, name: str, shape: tuple, axes: tuple, std: float
) -> Array | fp8.Weight:
  """A float32 parameter, normal with `std` (0: ones), its axes named.

  The axes are the keys of `sharding.RULES`. A parameter that came with FP8
  copies (`model.with_copies`) keeps them.
  """
  assert len(axes) == len(shape), (name, shape, axes)
  init = nn.initializers.normal(std) if std else nn.initializers.ones
  boxed = nn.with_logical_partitioning(init, axes)
  return module.param(name, boxed, shape, jnp.float32)


def recipe(config: ModelConfig) -> fp8.Recipe:
  """How this model computes the products of PRODUCTS."""
  return fp8.Recipe(config.precision, config.compute.fp8)


def weight(
  module: nn.Module,
  name: str,
  shape: tuple,
  axes: tuple,
  std: float,
  recipe: fp8.Recipe,
) -> Array | fp8.Weight:
  """A parameter of PRODUCTS, with its FP8 copies if the recipe is FP8's.

  The parameter may come with copies (`quantised`, made once for many
  micro-batches). They leave their shards here: what FSDP gathers is FP8.
  """
  assert name in PRODUCTS, name
  w = param(module, name, shape, axes, std)
  if recipe.precision == 'bf16':
    return w
  if not isinstance(w, fp8.Weight):
    w = quantised(w, axes, recipe)
  names = _flat(axes, axes)
  whole = _whole(names)

  def gather(q):
    bits = sharding.constrain(sharding.constrain(q.values, *names), *whole)
    return dataclasses.replace(
      q,
      values=jax.lax.bitcast_convert_type(bits, fp8.quantize.E4M3),
      scales=sharding.constrain(q.scales, *(None,) * q.ndim),
    )

  return fp8.Weight(w.master, tuple(map(gather, w.copies)))


def quantised(w: Array, axes: tuple, recipe: fp8.Recipe) -> fp8.Weight:
  """A weight and its FP8 copies, laid out as the weight is.

  The copies' values are bits (uint8) until `weight` hands them to a product:
  not every backend holds or moves eight-bit floats as they are.

  Heads and their dimensions are one axis to a product, as they are in
  checkpoints; layers and experts come before it.
  """
  lead = sum(a in ('layers', 'routed_layers', 'experts') for a in axes)
  flat = w.reshape(_flat(axes, w.shape))
  copies = fp8.prepare(flat, recipe.precision, lead=lead).copies
  names = _flat(axes, axes)

  def lay(q):
    bits = jax.lax.bitcast_convert_type(q.values, jnp.uint8)
    return dataclasses.replace(q, values=sharding.constrain(bits, *names))

  return fp8.Weight(w, tuple(map(lay, copies)))


def partition(w: Array | fp8.Weight, axes: tuple) -> PartitionSpec | fp8.Weight:
  """Its layout in a region by its logical axes, and that of its copies.

  Copies have been gathered from their shards (`weight`), masters not.
  """
  if not isinstance(w, fp8.Weight):
    return sharding.array_spec(axes, w)
  flat = _whole(_flat(axes, axes))
  lay = lambda leaf: sharding.array_spec(flat, leaf)
  master = sharding.array_spec(axes, w.master)
  return fp8.Weight(master, jax.tree.map(lay, w.copies))


def _whole(axes: tuple) -> tuple:
  return tuple(None if a in sharding.FSDP else a for a in axes)


class Shards(NamedTuple):
  """How FSDP splits a weight: along which of its axes, over which of a mesh."""

  at: int
  over: tuple[str, ...]


def shards(w: Array | fp8.Weight, axes: tuple) -> Shards:
  """Outside a region: where a weight with these logical axes is split."""
  (at,) = (i for i, a in enumerate(axes) if a in sharding.FSDP)
  return Shards(at, sharding.mesh_axes(axes, w.shape)[at])


def gathered(
  w: Array | fp8.Weight, shards: Shards, dtype: jnp.dtype
) -> Array | fp8.Weight:
  """In a region: a weight whole, in the activations' dtype, as it travels.

  The gradient is summed in float32 and scattered as it is summed: no device
  holds all of it. In FP8 nobody reads the master's values, so that nothing but
  its gradient moves.
  """
  if isinstance(w, fp8.Weight):
    return fp8.Weight(gathered(w.master, shards, w.master.dtype), w.copies)
  w = sharding.pvary(w)  # before it is narrow: its gradient is summed here
  return _gather(w, shards, dtype) if shards.over else w.astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(w, shards, dtype):
  return jax.lax.all_gather(
    w.astype(dtype), shards.over, axis=shards.at, tiled=True
  )


def _scatter(shards, dtype, _, g):
  g = g.astype(jnp.float32)
  return (
    jax.lax.psum_scatter(
      g, shards.over, scatter_dimension=shards.at, tiled=True
    ),
  )


_gather.defvjp(lambda w, *how: (_gather(w, *how), None), _scatter)


def _flat(axes: tuple, values: tuple) -> tuple:
  """Names or lengths of axes, where a head's dimension joins its heads."""
  flat = []
  for i, (axis, value) in enumerate(zip(axes, values, strict=True)):
    if axis == 'head_dim' and axes[i - 1] == 'heads':
      if not isinstance(value, str):
        flat[-1] *= value
    else:
      flat.append(value)
  return tuple(flat)


def products(
  equations: tuple[str, ...],
  x: Array,
  ws: tuple,
  recipe: fp8.Recipe = HIGH,
  name: str = fp8.SAVED,
) -> tuple[Array, ...]:
  """Einsums of `x` with each of `ws`, in its dtype: last axes by first axes.

  In FP8, `x` is quantised once and kept for the backward pass under `name`.
  """
  left, right = equations[0].split('->')
  summed = [c for c in left.split(',')[0] if c not in right]
  if recipe.precision == 'bf16':
    ws = tuple(w.astype(x.dtype) for w in ws)
    if sharding.target_platform() == 'cpu' and not sharding.auto_axes():
      return _together(x, ws, len(summed))
    each = zip(equations, ws, strict=True)
    return tuple(jnp.einsum(e, x, w) for e, w in each)
  lead = x.shape[: x.ndim - len(summed)]
  flat = [fp8.Weight(w.master.reshape(w.copies[0].shape), w.copies) for w in ws]
  ys = fp8.dots(
    x.reshape(*lead, -1),
    tuple(flat),
    recipe.precision,
    impl=recipe.impl,
    name=name,
  )
  # Policies cannot know a product that is a kernel, or chosen by platform.
  ys = [checkpoint_name(y, PRODUCT) for y in ys]
  ends = [w.shape[len(summed) :] for w in ws]
  return tuple(y.reshape(*lead, *e) for y, e in zip(ys, ends, strict=True))


def _together(x: Array, ws: tuple, summed: int) -> tuple[Array, ...]:
  """`products` as one of matrices, on a CPU, for weights that lie here alone.

  Of matrices, because XLA's CPU backend turns gradients with two leading axes
  around before it multiplies them; one, because wide ones are faster there: an
  accelerator would pay more for the weights' copy. Axes that a mesh splits
  could be neither joined nor laid side by side.
  """
  lead, rows = x.shape[: x.ndim - summed], math.prod(x.shape[-summed:])
  flat = [w.reshape(rows, -1) for w in ws]
  y = x.reshape(-1, rows) @ jnp.concatenate(flat, axis=1)
  ys = jax.lax.split(y, [w.shape[1] for w in flat], axis=1)
  ends = [w.shape[summed:] for w in ws]
  return tuple(y.reshape(*lead, *e) for y, e in zip(ys, ends, strict=True))


def product(
  equation: str,
  x: Array,
  w: Array | fp8.Weight,
  recipe: fp8.Recipe = HIGH,
  name: str = fp8.SAVED,
) -> Array:
  """`products` of one weight."""
  return products((equation,), x, (w,), recipe, name)[0]


def named(x: Array, name: str, recipe: fp8.Recipe) -> Array:
  """`x` under a name for remat, unless an FP8 product keeps it under that."""
  return checkpoint_name(x, name) if recipe.precision == 'bf16' else x


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


def turned(
  x: Float[Array, '*b D'],
  w: Float[Array, '*out D'],
  multiply: Callable = jnp.einsum,
) -> Float[Array, ...]:
  """x w^T, `[*b, *out]`, for weights that lie the other way, as decoding's do.

  A few rows are the narrow operand: on a CPU, w x^T reads the weights line by
  line and takes half as long. XLA would turn it back, but for the barrier.
  """
  out = 'xyz'[: w.ndim - 1]
  rows = x.reshape(-1, x.shape[-1])
  if len(rows) > _NARROW or sharding.target_platform() != 'cpu':
    return multiply(f'...d,{out}d->...{out}', x, w)
  y = jax.lax.optimization_barrier(multiply('...d,md->...m', w, rows))
  return jnp.moveaxis(y, -1, 0).reshape(*x.shape[:-1], *w.shape[:-1])


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
  # Split, not indexed: its gradient is one write and no sum of padded halves.
  gate, up = jax.lax.split(both, (1, 1), both.ndim - 2)
  return (jax.nn.silu(gate) * up).squeeze(-2)


def swiglu(
  x: Float[Array, '*b D'],
  w_gate_up: Float[Array, 'D two F'] | fp8.Weight,
  w_down: Float[Array, 'F D'] | fp8.Weight,
  recipe: fp8.Recipe = HIGH,
) -> Float[Array, '*b D']:
  """down(silu(gate(x)) * up(x)); gate and up are one product."""
  lay = lambda x, *last: (
    sharding.constrain(x, 'batch', 'part', *last) if rows else x
  )
  rows = x.ndim == 3
  x = lay(x, 'stream')
  both = lay(product('...d,dgf->...gf', x, w_gate_up, recipe), 'gate_up', 'mlp')
  hidden = lay(gated(both), 'mlp')
  return product('...f,fd->...d', hidden, w_down, recipe)


class FeedForward(nn.Module):
  """A dense SwiGLU layer of `width`: the first layers' FFN, a shared expert."""

  width: int
  std: float
  recipe: fp8.Recipe = HIGH

  @nn.compact
  def __call__(self, x: Float[Array, '*b D']) -> Float[Array, '*b D']:
    dim, width, how = x.shape[-1], self.width, (self.std, self.recipe)
    axes = ('embed', 'gate_up', 'mlp')
    w_gate_up = weight(self, 'w_gate_up', (dim, 2, width), axes, *how)
    w_down = weight(self, 'w_down', (width, dim), ('mlp', 'embed'), *how)
    return swiglu(x, w_gate_up, w_down, self.recipe)
