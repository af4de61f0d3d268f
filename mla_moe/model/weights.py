"""Parameters with logical axes, their FP8 copies, and their FSDP gather.

Parameters are float32 and named by their role, contraction dimension first
(`w_down [F, D]`). Those of FP8_WEIGHTS may be multiplied in FP8, the others
never are (V3 section 3.3.1). FSDP splits one axis of each matrix over devices.
In a region that axis is gathered by hand before the product (`gather`), in the
activations' dtype. The surprise: with FP8 copies only these are gathered, a
byte a number. The float32 master stays, and its gradient is scattered to it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from mla_moe import fp8, sharding
from mla_moe.types import Array, PyTree

FP8_WEIGHTS = (
  *('w_q', 'w_q_down', 'w_q_up', 'w_kv_down', 'w_k_rope', 'w_k_up', 'w_v_up'),
  *('w_k', 'w_v', 'w_out', 'w_gate_up', 'w_down'),
)


def param(
  module: nn.Module, name: str, shape: tuple, axes: tuple, std: float
) -> Array | fp8.Weight:
  """Returns a float32 parameter, normal with `std` (0: ones).

  `axes` are its logical axes, keys of `sharding.RULES`. A parameter that was
  passed in with FP8 copies (`transformer.with_copies`) keeps them.
  """
  assert len(axes) == len(shape), (name, shape, axes)
  init = nn.initializers.normal(std) if std else nn.initializers.ones
  boxed = nn.with_logical_partitioning(init, axes)
  return module.param(name, boxed, shape, jnp.float32)


def weight(
  module: nn.Module,
  name: str,
  shape: tuple,
  axes: tuple,
  std: float,
  recipe: fp8.Recipe,
  dtype: jnp.dtype,
) -> Array | fp8.Weight | fp8.OwnWeight:
  """Returns a parameter of FP8_WEIGHTS, with FP8 copies if the recipe is FP8.

  Copies that came with the parameter, made once for many micro-batches, are
  used as they are. They leave their shards here: FSDP gathers FP8. `dtype` is
  that of a gather over `expert`.
  """
  assert name in FP8_WEIGHTS, name
  own = module.has_variable('params', name)
  own = own and module.get_variable('params', name)
  if isinstance(own, fp8.OwnWeight):
    return own.gathered(_unsharded(flat(axes, axes)))
  w = param(module, name, shape, axes, std)
  if recipe.precision == 'bf16':
    return sharding.gather_dense(w, axes, dtype)
  if not isinstance(w, fp8.Weight):
    w = quantize(w, axes, recipe)
  names = flat(axes, axes)
  half, whole = sharding.over_fsdp(names), _unsharded(names)
  master = sharding.gather_over_expert(w.master, axes, w.master.dtype)

  def unshard(q):
    bits = sharding.gather_over_expert(q.values, names, q.values.dtype)
    bits = sharding.constrain(sharding.constrain(bits, *half), *whole)
    return dataclasses.replace(
      q,
      values=jax.lax.bitcast_convert_type(bits, fp8.quantize.E4M3),
      scales=sharding.constrain(q.scales, *(None,) * q.ndim),
    )

  return fp8.Weight(master, tuple(map(unshard, w.copies)))


def quantize(w: Array, axes: tuple, recipe: fp8.Recipe) -> fp8.Weight:
  """Returns a weight with its FP8 copies, sharded as the weight is.

  The copies' values are bits (uint8) until `weight` turns them back: not every
  backend moves eight-bit floats. Heads and their dimensions are one axis of a
  copy, as they are in released checkpoints; layers and experts stay in front.
  """
  lead = sum(a in ('layers', 'routed_layers', 'experts') for a in axes)
  one = w.reshape(flat(axes, w.shape))
  names = flat(axes, axes)
  shards = tuple(map(sharding.axis_size, sharding.mesh_axes(names, one.shape)))
  copies = recipe.weights(one, lead, shards)

  def shard(q):
    bits = jax.lax.bitcast_convert_type(q.values, jnp.uint8)
    return dataclasses.replace(q, values=sharding.constrain(bits, *names))

  return fp8.Weight(w, tuple(map(shard, copies)))


def specs(w: Array | fp8.Weight | fp8.OwnWeight, axes: tuple) -> PyTree:
  """Returns a region's in_specs for a weight with these logical axes.

  The master is still split by FSDP, its copies are whole (see `weight`).
  """
  if isinstance(w, fp8.OwnWeight):
    return w.specs(_unsharded(flat(axes, axes)))
  if not isinstance(w, fp8.Weight):
    return sharding.array_spec(axes, w)
  whole = _unsharded(flat(axes, axes))
  copy_spec = lambda leaf: sharding.array_spec(whole, leaf)
  master = sharding.array_spec(axes, w.master)
  return fp8.Weight(master, jax.tree.map(copy_spec, w.copies))


class FSDPSplit(NamedTuple):
  """The axis of a weight that FSDP splits, and the mesh axes it is over."""

  axis: int
  mesh_axes: tuple[str, ...]


def fsdp_split(w: Array | fp8.Weight | fp8.OwnWeight, axes: tuple) -> FSDPSplit:
  """Returns where FSDP splits a weight; to be called outside the region."""
  if isinstance(w, fp8.OwnWeight):  # `weight` has gathered it
    return FSDPSplit(0, ())
  (axis,) = (i for i, a in enumerate(axes) if a in sharding.FSDP)
  return FSDPSplit(axis, sharding.mesh_axes(axes, w.shape)[axis])


def packed(w: Array | fp8.Weight | fp8.OwnWeight) -> PyTree:
  """Returns gate and up side by side, [E, D, 2 F], if no FP8 tile crosses.

  A device packs its shard: a TPU would copy a whole weight and its gradient.
  """
  if isinstance(w, fp8.Weight):
    copies = tuple(map(fp8.quantize.joined, w.copies))
    return fp8.Weight(packed(w.master), copies) if all(copies) else w
  return w.reshape(*w.shape[:2], -1) if isinstance(w, jax.Array) else w


def gather(
  w: Array | fp8.Weight | fp8.OwnWeight, split: FSDPSplit, dtype: jnp.dtype
) -> Array | fp8.Weight | fp8.OwnWeight:
  """In a region: returns the whole weight in the activations' `dtype`.

  Its gradient is a reduce-scatter in float32, so that no device ever holds the
  whole gradient. (GSPMD sums a weight outside regions in `dtype`, but for FP8.)
  A weight with FP8 copies moves only that gradient: products do not read the
  values of its master, and XLA drops their gather.
  """
  if isinstance(w, fp8.OwnWeight):
    return w
  if isinstance(w, fp8.Weight):
    return fp8.Weight(gather(w.master, split, w.master.dtype), w.copies)
  w = sharding.pvary(w)  # before the cast: the psum is then in float32
  return _gather(w, split, dtype) if split.mesh_axes else w.astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(w, split, dtype):
  axis, mesh_axes = split
  return jax.lax.all_gather(w.astype(dtype), mesh_axes, axis=axis, tiled=True)


def _gather_forward(w, split, dtype):
  return _gather(w, split, dtype), None


def _gather_backward(split, dtype, _, g):
  axis, mesh_axes = split
  g = g.astype(jnp.float32)
  return (
    jax.lax.psum_scatter(g, mesh_axes, scatter_dimension=axis, tiled=True),
  )


_gather.defvjp(_gather_forward, _gather_backward)


def _unsharded(axes: tuple) -> tuple:
  """Returns the logical axes without those that FSDP splits."""
  return tuple(None if a in sharding.FSDP else a for a in axes)


def flat(axes: tuple, values: tuple) -> tuple:
  """Returns names or lengths of axes, `head_dim` merged into `heads`."""
  merged = []
  for i, (axis, value) in enumerate(zip(axes, values, strict=True)):
    if axis == 'head_dim' and axes[i - 1] == 'heads':
      if not isinstance(value, str):
        merged[-1] *= value
    else:
      merged.append(value)
  return tuple(merged)
