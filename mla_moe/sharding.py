"""Where arrays live: one mesh, one table from logical axes to mesh axes.

Modules name the axes of their parameters and activations by what they are
(`heads`, `experts`); RULES says on which axes of the mesh each is laid. GSPMD
does the rest. The expert axis is a data axis outside the experts: a batch is
split over `data`, `fsdp` and `expert` alike. The mesh's axes are `Auto`: jax's
default, `Explicit`, turns every constraint into an assertion.
"""

from __future__ import annotations

import jax
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mla_moe import config as config_lib
from mla_moe.types import Array, PyTree

AXES = ('data', 'fsdp', 'expert', 'tensor', 'context', 'stage')

RULES = (
  # activations
  ('batch', ('data', 'fsdp', 'expert')),
  ('length', 'context'),
  ('stream', None),
  # parameters
  ('vocab', 'tensor'),
  ('embed', 'fsdp'),
  ('heads', 'tensor'),
  ('experts', 'expert'),
  ('mlp', 'tensor'),
  ('latent', None),
  ('head_dim', None),
  ('gate_up', None),
  ('norm', None),
  ('layers', None),
)


def make_mesh(mesh: config_lib.MeshConfig) -> jax.sharding.Mesh:
  """The mesh of all devices with the sizes of `mesh`.

  Raises:
    ConfigError: the sizes do not multiply to the number of devices.
  """
  have = jax.device_count()
  if mesh.devices != have:
    raise config_lib.ConfigError(
      f'config.mesh holds {mesh.devices} devices, but {have} are here; for '
      f'one, set config.mesh.data={have // (mesh.devices // mesh.data) or 1}'
    )
  sizes = tuple(getattr(mesh, axis) for axis in AXES)
  return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check(config: config_lib.Config):
  """Refuses, before any compilation, a mesh that the model cannot be laid on.

  Raises:
    ConfigError: a parameter's width that its mesh axis does not divide, or an
      axis that nothing is laid on yet.
  """
  mesh, model = config.mesh, config.model
  for axis in ('context', 'stage'):
    if getattr(mesh, axis) > 1:
      raise config_lib.ConfigError(
        f'config.mesh.{axis}={getattr(mesh, axis)}: nothing is laid on this '
        'axis yet; set it to 1 and use data, fsdp, expert or tensor'
      )
  for axis, name in (
    ('fsdp', 'dim'),
    ('tensor', 'vocab'),
    ('tensor', 'dense_width'),
  ):
    if getattr(model, name) % getattr(mesh, axis):
      raise config_lib.ConfigError(
        f'config.mesh.{axis}={getattr(mesh, axis)}: must divide '
        f'model.{name}={getattr(model, name)}'
      )
  if model.moe_layers and model.moe.width % mesh.tensor:
    raise config_lib.ConfigError(
      f'config.mesh.tensor={mesh.tensor}: must divide '
      f'model.moe.width={model.moe.width}'
    )


def constrain(x: Array, *axes: str | None) -> Array:
  """`x` laid out by the logical names of its axes; itself without a mesh."""
  assert len(axes) == x.ndim, (axes, x.shape)
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, spec(axes))


def spec(axes: tuple) -> PartitionSpec:
  """The mesh axes of logical `axes`; a name without a rule is a KeyError."""
  rules = dict(RULES)
  return PartitionSpec(*(None if a is None else rules[a] for a in axes))


def shardings(boxed: PyTree, mesh: jax.sharding.Mesh) -> PyTree:
  """NamedSharding of every leaf of a tree with logically boxed parameters."""

  def one(leaf):
    names = leaf.names if isinstance(leaf, nn.LogicallyPartitioned) else ()
    return NamedSharding(mesh, spec(names))

  is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
  return jax.tree.map(one, boxed, is_leaf=is_box)
