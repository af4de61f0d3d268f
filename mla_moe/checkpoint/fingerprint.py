"""A number for every array, which a changed bit changes, computed in place.

Each element's bits are mixed with its position in the whole array and summed
modulo 2^32. A sum does not depend on its order, so the number is the same on
every mesh. Multiplying by an odd number and shifting right into itself are
both one to one: whatever happens to a single element always shows.

Every device sums only what it holds, into a table [devices along each axis of
the mesh, leaves]. Entries that should be replicas of each other are compared
on the host: that is how devices, or hosts, which have drifted apart are found.
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
  """Fingerprints that are being computed; `read` waits for them."""

  table: Array
  names: tuple[str, ...]
  split: tuple[tuple[bool, ...], ...]  # per leaf: is it split over the axis?


def of(tree: PyTree) -> Pending:
  """Starts the fingerprints of every leaf, each on the devices that hold it."""
  found = jax.tree_util.tree_flatten_with_path(tree)[0]
  names = tuple(name(path) for path, _ in found)
  leaves = tuple(leaf for _, leaf in found)
  places = [getattr(leaf, 'sharding', None) for leaf in leaves]
  meshes = {p.mesh for p in places if isinstance(p, NamedSharding)}
  if not meshes or next(iter(meshes)).size == 1:
    return Pending(_alone(leaves), names, ((),) * len(leaves))
  (mesh,) = meshes
  specs = tuple(
    p.spec if isinstance(p, NamedSharding) else PartitionSpec() for p in places
  )
  used = [{axis for part in _parts(spec) for axis in part} for spec in specs]
  split = tuple(tuple(a in axes for a in mesh.axis_names) for axes in used)
  return Pending(_spread(leaves, mesh=mesh, specs=specs), names, split)


def read(pending: Pending) -> tuple[dict[str, int], list[str]]:
  """({leaf: fingerprint}, leaves whose replicas differ, with the device)."""
  table = np.asarray(pending.table.addressable_data(0))
  values, apart = {}, []
  for i, (leaf, split) in enumerate(
    zip(pending.names, pending.split, strict=True)
  ):
    here = table[..., i]
    first = tuple(slice(None) if s else slice(0, 1) for s in split)
    wrong = np.argwhere(here != here[first])
    if len(wrong):
      apart.append(f'{leaf} on the device at {tuple(wrong[0].tolist())}')
    values[leaf] = int(here[first].sum(dtype=np.uint64) % 2**32)
  return values, apart


def name(path: tuple) -> str:
  """A leaf's place in its tree: keys, fields and indices joined by dots."""
  plain = lambda key: getattr(
    key, 'key', getattr(key, 'name', getattr(key, 'idx', key))
  )
  return '.'.join(str(plain(key)) for key in path)


def _parts(spec: PartitionSpec) -> list[tuple[str, ...]]:
  """The mesh axes of each dimension."""
  return [
    () if part is None else (part,) if isinstance(part, str) else tuple(part)
    for part in spec
  ]


@jax.jit
def _alone(leaves):
  sums = [_sum(x, x.shape, (0,) * x.ndim) for x in leaves]
  return jnp.stack(sums) if sums else jnp.zeros((0,), jnp.uint32)


@functools.partial(jax.jit, static_argnames=('mesh', 'specs'))
def _spread(leaves, *, mesh, specs):
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

  everywhere = PartitionSpec(*mesh.axis_names, None)
  table = jax.shard_map(
    local, mesh=mesh, in_specs=specs, out_specs=everywhere, check_vma=False
  )(*leaves)
  alike = NamedSharding(mesh, PartitionSpec())
  return jax.lax.with_sharding_constraint(table, alike)


def _sum(x: Array, shape: tuple, starts) -> Array:
  """The part of x, which begins at `starts`, of a whole of this shape."""
  place = jnp.zeros(x.shape, jnp.uint32)
  stride = 1
  for axis in reversed(range(x.ndim)):
    here = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    here += jnp.asarray(starts[axis]).astype(jnp.uint32)
    place += here * jnp.uint32(stride % 2**32)
    stride *= shape[axis]
  bits = _bits(x) * jnp.uint32(0x9E3779B1)
  bits ^= bits >> 15
  terms = bits * (2 * place + 1)
  if x.ndim > 1:  # by columns first, which vectorises
    terms = terms.sum(0, dtype=jnp.uint32)
  return terms.sum(dtype=jnp.uint32)


def _bits(x: Array) -> Array:
  if x.dtype == jnp.bool_:
    return x.astype(jnp.uint32)
  unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
  return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
