"""Where arrays live: one mesh, one table from logical axes to mesh axes.

Modules name the axes of their parameters and activations (`heads`, `experts`):
these are the logical axes, and RULES maps each to axes of the mesh. GSPMD
derives the collectives from it. Four places know better than GSPMD and run in a
region, the body of a `shard_map` that writes its collectives out: embedding,
attention, experts and loss.

Outside the experts the expert axis is one more data axis, and outside the
pipeline so is the stage axis: a batch is split over `data`, `fsdp`, `expert`
and `stage`. The stream between the layers is split along its length over
`context` and `tensor` (sequence parallelism, Korthikanti et al. 2022). ZeRO-1
is a second table, for the optimizer's state alone. The mesh's axes are `Auto`:
with jax's default, `Explicit`, every constraint would be an assertion.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mla_moe.config import ConfigError, MeshConfig
from mla_moe.types import Array, PyTree

# Slowest links first: collectives over the last axes are the most frequent.
AXES = ('data', 'stage', 'fsdp', 'expert', 'context', 'tensor')

RULES = (
  # activations
  ('batch', ('data', 'fsdp', 'expert', 'stage')),
  ('length', ('context', 'tensor')),  # between the layers
  ('part', 'context'),  # inside them, where heads or widths take `tensor`
  ('stream', None),
  # parameters
  ('vocab', 'tensor'),
  ('embed', ('fsdp',)),
  ('rank', ('fsdp',)),  # the latent's axis of an up-projection
  ('dense', ('fsdp', 'expert')),  # either, of a matrix that GSPMD gathers
  ('heads', 'tensor'),
  ('index_heads', None),  # a set is of all heads: each device scores it
  ('experts', 'expert'),
  ('mlp', 'tensor'),
  ('latent', None),
  ('head_dim', None),
  ('gate_up', None),
  ('norm', None),
  ('layers', None),
  ('routed_layers', 'stage'),
)

# The axes that FSDP splits, and gathers before use: one of each matrix.
FSDP = tuple(name for name, axes in RULES if axes and axes[0] == 'fsdp')

# The optimizer's state under `config.mesh.states = 'zero1'` (Rajbhandari et
# al. 2020): parameters are whole on every `data` replica, moments are not.
ZERO1 = tuple(
  (name, (*axes, 'data') if name in FSDP else axes) for name, axes in RULES
)

# libtpu gathers shards of other lengths by a sum, which brings twice the bytes.
_TILE = 128


def make_mesh(
  mesh: MeshConfig, devices: list | None = None
) -> jax.sharding.Mesh:
  """Returns a mesh with the sizes of `mesh` over `devices` (None: all).

  On several TPU slices, which a slow network connects, `slice_axis` goes
  across them and every other axis stays within a slice.

  Raises:
    ConfigError: the sizes do not multiply to the number of devices, or no axis
      can go across the slices.
  """
  devices = jax.devices() if devices is None else devices
  if mesh.devices != len(devices):
    raise ConfigError(
      f'config.mesh={_shown(mesh)} is of {mesh.devices} devices, but '
      f'{len(devices)} are here; {_proposal(mesh, len(devices))} fits'
    )
  sizes = [getattr(mesh, axis) for axis in AXES]
  kinds = (AxisType.Auto,) * len(AXES)
  slices = len({getattr(d, 'slice_index', 0) for d in devices})
  from jax.experimental import mesh_utils

  # jax.make_mesh refuses (except on v5e) an axis that is not a product of the
  # torus's own axes, such as 16 of 4x8x8.
  split = {'allow_split_physical_axes': True}
  if slices == 1:
    grid = mesh_utils.create_device_mesh(sizes, devices, **split)
  else:
    across = slice_axis(mesh, slices)
    outer = [slices if a == across else 1 for a in AXES]
    inner = [n // o for n, o in zip(sizes, outer, strict=True)]
    grid = mesh_utils.create_hybrid_device_mesh(inner, outer, devices, **split)
  return jax.sharding.Mesh(grid, AXES, axis_types=kinds)


def slice_axis(mesh: MeshConfig, slices: int) -> str:
  """Returns the axis across slices: of data, stage and fsdp the first fit.

  Raises:
    ConfigError: none of them is.
  """
  for axis in AXES[:3]:
    if getattr(mesh, axis) % slices == 0:
      return axis
  raise ConfigError(
    f'config.mesh={_shown(mesh)}: {slices} slices are connected by the slow '
    f'network; make data, stage or fsdp a multiple of {slices}'
  )


def _shown(mesh: MeshConfig) -> str:
  sizes = {axis: getattr(mesh, axis) for axis in AXES}
  some = [f'{axis}:{n}' for axis, n in sizes.items() if n > 1]
  return ','.join(some) or 'data:1'


def _proposal(mesh: MeshConfig, devices: int) -> str:
  """Returns a mesh like `mesh` for `devices`; `data` takes the rest."""
  sizes = {}
  rest = devices
  for axis in ('tensor', 'context', 'expert', 'stage', 'fsdp'):
    sizes[axis] = math.gcd(getattr(mesh, axis), rest)
    rest //= sizes[axis]
  return _shown(MeshConfig(data=rest, **sizes))


# ---------------------------------------------------------- logical axes


def mesh_axes(
  axes: tuple, shape: tuple, table: tuple = RULES
) -> tuple[tuple[str, ...], ...]:
  """Returns, for each logical axis, the mesh axes that split it here.

  These are the axes in the table up to the first that does not divide the
  length: a batch of one row is whole on every device. Axes of size one and
  axes that are manual in the enclosing region are left out.
  """
  mesh = jax.sharding.get_abstract_mesh()
  rules = dict(table)
  split = []
  for name, length in zip(axes, shape, strict=True):
    candidates = rules[name] if name is not None else None
    if isinstance(candidates, str):
      candidates = (candidates,)
    fitting = []
    for axis in candidates or ():
      size = mesh.shape.get(axis, 1)
      if axis in mesh.manual_axes or size == 1:
        continue
      # A part of a sequence is two pieces (`sequence`).
      if length % (2 * size if axis == 'context' else size):
        break
      length //= size
      fitting.append(axis)
    split.append(tuple(fitting))
  return tuple(split)


def over_fsdp(axes: tuple) -> tuple:
  """Returns logical axes for a matrix that `expert` does not split."""
  return tuple('embed' if a == 'dense' else a for a in axes)


def fitted(
  axes: tuple, shape: tuple, sizes: Mapping[str, int], table: tuple = RULES
) -> tuple:
  """Returns `over_fsdp` where the sizes of a mesh do not divide a matrix."""
  parts = math.prod(sizes[a] for a in dict(table)['dense'])
  pairs = zip(axes, shape, strict=False)
  fits = all(a != 'dense' or n % parts == 0 for a, n in pairs)
  return axes if fits else over_fsdp(axes)


def gather_over_expert(w: Array, axes: tuple, dtype: jnp.dtype) -> Array:
  """Returns a dense matrix in `dtype`, left for a gather over fsdp.

  Shards of whole tiles come back as they are, in their own dtype: libtpu
  gathers such over both axes at once, and multiplies meanwhile.
  """
  if not auto_axes():
    return w
  # The barriers keep GSPMD from one gather, and one sum, over both axes.
  hold = jax.lax.optimization_barrier
  pairs = zip(w.shape, axes, mesh_axes(axes, w.shape), strict=True)
  for length, name, over in pairs:
    is_split = name == 'dense' and 'expert' in over
    if is_split and length // axis_size(over) % _TILE:
      w = hold(constrain(w.astype(dtype), *axes))
      return hold(constrain(w, *over_fsdp(axes)))
  return w


def gather_dense(w: Array, axes: tuple, dtype: jnp.dtype) -> Array:
  """Returns a matrix after `gather_over_expert`, gathered over fsdp if it was.

  A layer's recomputed forward and its backward pass then share one gather. The
  split axis is first meanwhile: libtpu scatters a gradient along no other.
  """
  i = axes.index('dense') if 'dense' in axes else 0
  names = (axes[i], *axes[:i], *axes[i + 1 :])
  first, half = jnp.moveaxis(w, i, 0), over_fsdp(names)
  split = gather_over_expert(first, names, dtype)

  @jax.custom_gradient
  def whole(w):
    w = jax.lax.optimization_barrier(constrain(w, None, *names[1:]))
    return w, lambda g: constrain(g, *half)

  return w if split is first else jnp.moveaxis(whole(split), 0, i)


def array_spec(axes: tuple, x: PyTree | None) -> PartitionSpec:
  """Returns the spec of one array here, by the `mesh_axes` that divide it.

  For None, an absent optional argument, it is the spec that splits nothing.
  """
  shape = (0,) * len(axes) if x is None else x.shape
  return PartitionSpec(*(a or None for a in mesh_axes(axes, shape)))


def constrain(x: Array, *axes: str | None) -> Array:
  """Returns `x`, laid out by its logical axes where there is a mesh."""
  assert len(axes) == x.ndim, (axes, x.shape)
  if not auto_axes():
    return x
  return jax.lax.with_sharding_constraint(x, array_spec(axes, x))


def spec(axes: tuple, table: tuple = RULES) -> PartitionSpec:
  """Returns the spec of logical `axes` by the table alone, for any shape.

  Raises:
    KeyError: a name without a rule.
  """
  rules = dict(table)
  return PartitionSpec(*(None if a is None else rules[a] for a in axes))


def shardings(
  boxed: PyTree, mesh: jax.sharding.Mesh, table: tuple = RULES
) -> PyTree:
  """Returns the NamedSharding of every leaf, by the axes that it is boxed in.

  `boxed` is a tree of flax's LogicallyPartitioned; other leaves are whole on
  every device.
  """

  def one(leaf):
    names = ()
    if isinstance(leaf, nn.LogicallyPartitioned):
      names = fitted(leaf.names, leaf.value.shape, mesh.shape, table)
    return NamedSharding(mesh, spec(names, table))

  is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
  return jax.tree.map(one, boxed, is_leaf=is_box)


# ---------------------------------------------------------------- regions


def auto_axes() -> tuple[str, ...]:
  """Returns the mesh axes that are GSPMD's here; none without a mesh.

  Raises:
    ConfigError: a mesh with other axes than `make_mesh` gives it.
  """
  mesh = jax.sharding.get_abstract_mesh()
  own = zip(mesh.axis_names, mesh.axis_types or (), strict=True)
  fits = {*AXES} == {n for n, t in own if t != AxisType.Explicit}
  if mesh.axis_names and not fits:
    raise ConfigError(
      f'the mesh has the axes {", ".join(mesh.axis_names)}: they must be '
      f'{", ".join(AXES)}, of type Auto; sharding.make_mesh makes such a mesh'
    )
  return tuple(a for a in mesh.axis_names if a not in mesh.manual_axes)


def shard_map(
  f: Callable, in_specs: tuple, out_specs: PyTree, *, check_vma: bool = True
) -> Callable:
  """jax.shard_map over all axes of the mesh; `f` itself where there is none.

  Axes of size one are manual, too. `check_vma` proves that a result which
  `out_specs` calls equal on several devices is equal. A library's kernel that
  does not say over which axes its result varies (splash) needs it off.
  """
  axes = auto_axes()
  if not axes:
    return f
  # In a pipeline, jax (0.10 to 0.12) marks residuals of a checked region as
  # varying over the pipeline's axis, which the region does not have, and then
  # refuses them.
  nested = bool(jax.sharding.get_abstract_mesh().manual_axes)
  return jax.shard_map(
    f,
    in_specs=in_specs,
    out_specs=out_specs,
    axis_names=set(axes),
    check_vma=check_vma and not nested,
  )


def pvary(tree: PyTree) -> PyTree:
  """Returns the arrays, cast to vary over every axis of the region.

  In a region, arrays that are equal on several devices (a weight, zeros) must
  be cast before a loop or a custom_vjp mixes them with arrays that differ. The
  gradient of the cast is a psum over those devices.
  """
  manual = jax.sharding.get_abstract_mesh().manual_axes

  def one(x):
    equal = set(manual) - set(jax.typeof(x).manual_axis_type.varying)
    if not equal:
      return x
    return jax.lax.pcast(x, tuple(sorted(equal)), to='varying')

  return jax.tree.map(one, tree)


def psum(x: Array, axes: tuple) -> Array:
  """Returns the sum over the devices along `axes`, which may be none."""
  return jax.lax.psum(x, axes) if axes else x


def pmean(x: PyTree, axes: tuple) -> PyTree:
  """Returns the mean over the devices along `axes`, which may be none.

  For results that are equal along `axes`: it is how a region proves that, and
  the gradient of the mean counts such a result once.
  """
  return jax.lax.pmean(x, axes) if axes else x


def axis_size(axes: tuple) -> int:
  """Returns the number of devices along `axes` of the mesh."""
  shape = jax.sharding.get_abstract_mesh().shape
  return math.prod(shape[a] for a in axes)


def target_platform() -> str:
  """Returns where the program being traced will run: cpu, gpu or tpu.

  A mesh may be of devices that are not here (compiling ahead of time).
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  name = jax.default_backend() if device is None else device.platform
  return {'cuda': 'gpu', 'rocm': 'gpu'}.get(name, name)


def ragged_exchange() -> bool:
  """Returns whether the devices of the program have a ragged all-to-all.

  XLA has none for CPUs, and libtpu (0.0.50) none for a v5e larger than 4x4:
  "not supported in limited ICI routing settings".
  """
  mesh = jax.sharding.get_abstract_mesh()
  kind = getattr(mesh.abstract_device, 'device_kind', '')
  too_large = kind == 'TPU v5 lite' and mesh.size > 16
  return target_platform() != 'cpu' and not too_large
