"""Where arrays live: one mesh, one table from logical axes to mesh axes.

Modules name the axes of their parameters and activations by what they are
(`heads`, `experts`); RULES says on which axes of the mesh each is laid. GSPMD
does the rest, but for the parts that it does badly, which run in `local`
regions, where collectives are written out: attention, experts, the loss.

The expert axis is a data axis outside the experts, and so is the stage axis
outside the pipeline: a batch is split over `data`, `fsdp`, `expert` and `stage`
alike. The stream between the layers is split along
its length over `context` and `tensor` (Korthikanti et al. 2022). ZeRO-1 is not
code but a second table, for the optimizer's state alone. The mesh's axes are
`Auto`: jax's default, `Explicit`, turns every constraint into an assertion.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mla_moe.config import Config, ConfigError, MeshConfig
from mla_moe.types import Array, PyTree

# Slowest links first: collectives over the last axes are the most frequent.
AXES = ('data', 'stage', 'fsdp', 'expert', 'context', 'tensor')

RULES = (
  # activations
  ('batch', ('data', 'fsdp', 'expert', 'stage')),
  ('length', ('context', 'tensor')),  # of the stream
  ('part', 'context'),  # the length where heads or widths have `tensor`
  ('stream', None),
  # parameters
  ('vocab', 'tensor'),
  ('embed', 'fsdp'),
  ('rank', 'fsdp'),  # of a latent, where weights expand it
  ('heads', 'tensor'),
  ('experts', 'expert'),
  ('mlp', 'tensor'),
  ('latent', None),
  ('head_dim', None),
  ('gate_up', None),
  ('norm', None),
  ('layers', None),
  ('routed_layers', 'stage'),
)

# The optimizer's state under `config.mesh.states = 'zero1'` (Rajbhandari et
# al. 2020): parameters are whole on every `data` replica, moments are not.
ZERO1 = tuple(
  (name, ('fsdp', 'data') if axes == 'fsdp' else axes) for name, axes in RULES
)

# What FSDP splits, and gathers before use: one axis of each matrix.
FSDP = tuple(name for name, axes in RULES if axes == 'fsdp')


def make_mesh(
  mesh: MeshConfig, devices: list | None = None
) -> jax.sharding.Mesh:
  """The mesh of all devices (or of `devices`) with the sizes of `mesh`.

  Where the devices are of several TPU slices, the first axis that their number
  divides goes across them (the slow network), all others stay inside.

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

  # Not jax.make_mesh: but on v5e, it refuses an axis that is no product of a
  # torus' own axes, such as 16 of 4x8x8.
  split = {'allow_split_physical_axes': True}
  if slices == 1:
    laid = mesh_utils.create_device_mesh(sizes, devices, **split)
  else:
    across = outermost(mesh, slices)
    outer = [slices if a == across else 1 for a in AXES]
    inner = [n // o for n, o in zip(sizes, outer, strict=True)]
    laid = mesh_utils.create_hybrid_device_mesh(inner, outer, devices, **split)
  return jax.sharding.Mesh(laid, AXES, axis_types=kinds)


def outermost(mesh: MeshConfig, slices: int) -> str:
  """The axis that goes across slices: `data`, `stage` or `fsdp`.

  Raises:
    ConfigError: their number divides none of them.
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


def _proposal(mesh: MeshConfig, have: int) -> str:
  """As much of `mesh` as divides `have`; what is left goes to fsdp or data."""
  sizes = {}
  left = have
  for axis in ('tensor', 'context', 'expert', 'stage', 'fsdp'):
    sizes[axis] = math.gcd(getattr(mesh, axis), left)
    left //= sizes[axis]
  return _shown(MeshConfig(data=left, **sizes))


def check(config: Config):
  """Refuses, before any compilation, a mesh that the model cannot be laid on.

  Raises:
    ConfigError: a length that its mesh axes do not divide, or a core that
      cannot work on a part of a sequence. (`Config` has already compared
      heads, experts, MoE layers and the batch with the mesh.)
  """
  mesh, model, data = config.mesh, config.model, config.data
  wanted = [
    ('tensor', mesh.tensor, 'model.vocab', model.vocab),
    ('tensor', mesh.tensor, 'model.dense_width', model.dense_width),
  ]
  axes, size = 'fsdp', mesh.fsdp
  if mesh.states == 'zero1':
    axes, size = 'data * fsdp', mesh.data * mesh.fsdp
  wanted += [
    (axes, size, 'model.dim', model.dim),
    (axes, size, 'model.mla.kv_rank', model.mla.kv_rank),
    (axes, size, 'model.mla.query_rank', model.mla.query_rank),
  ]
  if model.moe_layers:
    width = model.moe.width
    wanted.append(('tensor', mesh.tensor, 'model.moe.width', width))
  # Each part of a sequence is two pieces, one early and one late.
  pieces = 2 * mesh.context if mesh.context > 1 else 1
  both = math.lcm(mesh.context * mesh.tensor, pieces)
  wanted.append(('context * tensor', both, 'data.seq_len', data.seq_len))
  for axes, size, name, length in wanted:
    if length % size:
      also = ' (two pieces each)' if size == pieces > 1 else ''
      raise ConfigError(
        f'config.mesh.{axes}={size}{also}: must divide {name}={length}'
      )
  core = model.compute.attention
  if mesh.context > 1 and core not in ('auto', 'xla', 'reference'):
    raise ConfigError(
      f'model.compute.attention={core!r}: does not attend from a part of '
      f'a sequence (config.mesh.context={mesh.context}); use auto or xla'
    )


# ---------------------------------------------------------- logical axes


def laid(axes: tuple, shape: tuple, table: tuple = RULES) -> tuple:
  """For each logical axis, the mesh axes that it is laid on here.

  Of the axes in the table, those before the first that does not divide the
  length: a batch of one row is whole everywhere. Axes of size one, or that an
  enclosing region has taken, are left out.
  """
  mesh = jax.sharding.get_abstract_mesh()
  rules = dict(table)
  found = []
  for name, length in zip(axes, shape, strict=True):
    laid = rules[name] if name is not None else None
    fitting = []
    for axis in (laid,) if isinstance(laid, str) else laid or ():
      size = mesh.shape.get(axis, 1)
      if axis in mesh.manual_axes or size == 1:
        continue
      # A part of a sequence is two pieces (`sequence`).
      if length % (2 * size if axis == 'context' else size):
        break
      length //= size
      fitting.append(axis)
    found.append(tuple(fitting))
  return tuple(found)


def partition(axes: tuple, x: Array | None) -> PartitionSpec:
  """`laid` of an array, as a spec; that of nothing for None."""
  shape = (0,) * len(axes) if x is None else x.shape
  return PartitionSpec(*(a or None for a in laid(axes, shape)))


def constrain(x: Array, *axes: str | None) -> Array:
  """`x` laid out by the logical names of its axes; itself without a mesh."""
  assert len(axes) == x.ndim, (axes, x.shape)
  if not automatic():
    return x
  return jax.lax.with_sharding_constraint(x, partition(axes, x))


def spec(axes: tuple, table: tuple = RULES) -> PartitionSpec:
  """The mesh axes of logical `axes`; a name without a rule is a KeyError."""
  rules = dict(table)
  return PartitionSpec(*(None if a is None else rules[a] for a in axes))


def shardings(
  boxed: PyTree, mesh: jax.sharding.Mesh, table: tuple = RULES
) -> PyTree:
  """NamedSharding of every leaf of a tree with logically boxed parameters."""

  def one(leaf):
    names = leaf.names if isinstance(leaf, nn.LogicallyPartitioned) else ()
    return NamedSharding(mesh, spec(names, table))

  is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
  return jax.tree.map(one, boxed, is_leaf=is_box)


def held(tree: PyTree, where: PyTree) -> int:
  """Bytes of `tree` (shapes) that one device holds, laid out by `where`."""

  def one(leaf, sharding):
    size = math.prod(sharding.shard_shape(leaf.shape))
    return size * np.dtype(leaf.dtype).itemsize

  return sum(jax.tree.leaves(jax.tree.map(one, tree, where)))


# ---------------------------------------------------------- local regions


def automatic() -> tuple[str, ...]:
  """The mesh axes that GSPMD takes care of here; none without a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  return tuple(a for a in mesh.axis_names if a not in mesh.manual_axes)


def local(
  f: Callable, in_specs: tuple, out_specs: PyTree, *, checked: bool = True
) -> Callable:
  """`f` of each device's parts; just `f` where there is no mesh to split.

  Every axis is manual inside, those of size one, too. `checked` regions prove
  that what they hand out as equal on several devices is; a library's kernel
  (jax's for TPUs) that does not say over which axes its result varies cannot
  be called in one.
  """
  axes = automatic()
  if not axes:
    return f
  # In a pipeline, jax (0.10 to 0.12) gives residuals of a checked region the
  # pipeline's axis, which is not the region's own, and then refuses them.
  nested = bool(jax.sharding.get_abstract_mesh().manual_axes)
  return jax.shard_map(
    f,
    in_specs=in_specs,
    out_specs=out_specs,
    axis_names=set(axes),
    check_vma=checked and not nested,
  )


def varying(tree: PyTree) -> PyTree:
  """Arrays marked as different on every device of the region.

  What is the same on some of them, a weight or zeros to start from, must be
  marked before it meets what is not in a loop or a hand-written gradient; the
  mark's own gradient is the sum over those devices.
  """
  manual = jax.sharding.get_abstract_mesh().manual_axes

  def one(x):
    new = set(manual) - set(jax.typeof(x).manual_axis_type.varying)
    return jax.lax.pcast(x, tuple(sorted(new)), to='varying') if new else x

  return jax.tree.map(one, tree)


def total(x: Array, axes: tuple) -> Array:
  """The sum over the devices along `axes`, the same on all of them."""
  return jax.lax.psum(x, axes) if axes else x


def count(axes: tuple) -> int:
  """Devices along `axes` of the mesh."""
  shape = jax.sharding.get_abstract_mesh().shape
  return math.prod(shape[a] for a in axes)


def platform() -> str:
  """Where the program that is being traced will run: cpu, gpu or tpu.

  A mesh may be of devices that are not here (compiling ahead of time).
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  name = jax.default_backend() if device is None else device.platform
  return {'cuda': 'gpu', 'rocm': 'gpu'}.get(name, name)
