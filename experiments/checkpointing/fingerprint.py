"""Fingerprints: one number per array, changed by any bit, computed in place.

With b_i the bits of element i and i its position in the global array,

    fingerprint = sum_i mix(b_i) (2 i + 1)  mod 2^32,
    mix(b) = c xor (c >> 15),  c = 0x9E3779B1 b.

A sum does not depend on its order, so the number is the same on every mesh.
Multiplying by an odd number and `c xor (c >> 15)` are both one to one: a change
of a single element always changes the number.

Each device sums only its own shard, into a table [devices along each axis of
the mesh, leaves]. The host compares entries that must be replicas of each
other; devices or hosts that have drifted apart are found in this way.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from mla_moe.types import Array, PyTree


class Pending(NamedTuple):
  """Fingerprints on the devices, maybe not computed yet; `read` waits.

  table: uint32 [size of each mesh axis, leaves]. names: one per leaf. split:
  for each leaf and mesh axis, whether the leaf is split over the axis.
  """

  table: Array
  names: tuple[str, ...]
  split: tuple[tuple[bool, ...], ...]


def of(tree: PyTree) -> Pending:
  """Starts the fingerprints of every leaf, each on the leaf's own devices.

  All leaves must lie on one mesh, or on one device.
  """
  items = jax.tree_util.tree_flatten_with_path(tree)[0]
  names = tuple(name(path) for path, _ in items)
  leaves = tuple(leaf for _, leaf in items)
  shardings = [getattr(leaf, 'sharding', None) for leaf in leaves]
  meshes = {s.mesh for s in shardings if isinstance(s, NamedSharding)}
  if not meshes or next(iter(meshes)).size == 1:
    return Pending(_on_one_device(leaves), names, ((),) * len(leaves))
  (mesh,) = meshes
  specs = tuple(
    s.spec if isinstance(s, NamedSharding) else PartitionSpec()
    for s in shardings
  )
  used = [{axis for part in _parts(spec) for axis in part} for spec in specs]
  split = tuple(tuple(a in axes for a in mesh.axis_names) for axes in used)
  return Pending(_on_mesh(leaves, mesh=mesh, specs=specs), names, split)


def read(pending: Pending) -> tuple[dict[str, int], list[str]]:
  """Returns ({leaf: fingerprint}, a line per leaf whose replicas differ)."""
  table = np.asarray(pending.table.addressable_data(0))
  values, differing = {}, []
  for i, (leaf, split) in enumerate(
    zip(pending.names, pending.split, strict=True)
  ):
    sums = table[..., i]  # of each device
    # One replica of each shard; the others must be equal to it.
    first = tuple(slice(None) if s else slice(0, 1) for s in split)
    wrong = np.argwhere(sums != sums[first])
    if len(wrong):
      differing.append(f'{leaf} on the device at {tuple(wrong[0].tolist())}')
    values[leaf] = int(sums[first].sum(dtype=np.uint64) % 2**32)
  return values, differing


def name(path: tuple) -> str:
  """Returns a leaf's name: keys, fields and indices joined by dots."""
  plain = lambda key: getattr(
    key, 'key', getattr(key, 'name', getattr(key, 'idx', key))
  )
  return '.'.join(str(plain(key)) for key in path)


def _parts(spec: PartitionSpec) -> list[tuple[str, ...]]:
  """Returns the mesh axes of each dimension."""
  return [
    () if part is None else (part,) if isinstance(part, str) else tuple(part)
    for part in spec
  ]


@jax.jit
def _on_one_device(leaves):
  sums = [_sum(x, x.shape, (0,) * x.ndim) for x in leaves]
  return jnp.stack(sums) if sums else jnp.zeros((0,), jnp.uint32)


@functools.partial(jax.jit, static_argnames=('mesh', 'specs'))
def _on_mesh(leaves, *, mesh, specs):
  """Returns the table of all devices' sums, replicated on every device."""
  shapes = [x.shape for x in leaves]

  def local(*leaves):
    sums = []
    for x, shape, spec in zip(leaves, shapes, specs, strict=True):
      parts = _parts(spec) + [()] * (x.ndim - len(spec))
      starts = [
        jax.lax.axis_index(part) * size if part else 0
        for part, size in zip(parts, x.shape, strict=True)
      ]
      sums.append(_sum(x, shape, starts))
    return jnp.stack(sums).reshape(*(1 for _ in mesh.axis_names), -1)

  one_per_device = PartitionSpec(*mesh.axis_names, None)
  table = jax.shard_map(
    local, mesh=mesh, in_specs=specs, out_specs=one_per_device, check_vma=False
  )(*leaves)
  replicated = NamedSharding(mesh, PartitionSpec())
  return jax.lax.with_sharding_constraint(table, replicated)


def _sum(x: Array, shape: tuple, starts) -> Array:
  """Returns the sum over a shard x that begins at `starts` in `shape`."""
  position = jnp.zeros(x.shape, jnp.uint32)  # in the global array, row-major
  stride = 1
  for axis in reversed(range(x.ndim)):
    index = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    index += jnp.asarray(starts[axis]).astype(jnp.uint32)
    position += index * jnp.uint32(stride % 2**32)
    stride *= shape[axis]
  bits = _bits(x) * jnp.uint32(0x9E3779B1)
  bits ^= bits >> 15
  terms = bits * (2 * position + 1)
  if x.ndim > 1:  # by columns first, which vectorises
    terms = terms.sum(0, dtype=jnp.uint32)
  return terms.sum(dtype=jnp.uint32)


def _bits(x: Array) -> Array:
  """Returns the elements' bit patterns, uint32."""
  if x.dtype == jnp.bool_:
    return x.astype(jnp.uint32)
  unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
  return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
