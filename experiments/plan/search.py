"""Meshes and slices on which a config fits, by arithmetic alone.

Every mesh that a slice allows is measured (`memory.footprint`). Of those that
fit, the one with the least traffic wins: nothing here knows how much of it
hides behind computing. A device takes one sequence at a time, or a part of one:
at length `context` divides it, else one sequence may be too much for a device,
and 16 sequences occupy 16 devices alone.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

from mla_moe import sharding
from mla_moe.config import Config, ConfigError, MeshConfig
from mla_moe.types import PyTree

from .. import chips, mesh_check
from ..adapters import base as frozen_base
from . import memory, traffic

AXES = sharding.AXES
PART = 4096  # tokens of a sequence: the search makes no shorter parts


@dataclasses.dataclass(frozen=True)
class Plan:
  """A config on a slice, and the bytes on one device."""

  config: Config
  slice: chips.Slice
  footprint: memory.Footprint

  @property
  def fits(self) -> bool:
    return self.footprint.total <= self.slice.planned


def mesh_of(text: str, start: MeshConfig = MeshConfig()) -> MeshConfig:
  """Returns the mesh of 'fsdp=8,expert=8'; axes that it leaves out are 1.

  All else, such as a pipeline's micro-batches, is as in `start`.

  Raises:
    ConfigError: an axis that does not exist, or a size that is no number.
  """
  sizes = dict.fromkeys(AXES, 1)
  for part in text.split(','):
    axis, _, size = part.partition('=')
    if axis not in AXES or not size.isdigit():
      raise ConfigError(
        f'--mesh={text!r}: {part!r} is no axis=size; the axes are '
        f'{", ".join(AXES)}'
      )
    sizes[axis] = int(size)
  return dataclasses.replace(start, **sizes)


def plan(config: Config, slice_: chips.Slice, layout: PyTree) -> Plan:
  """Returns the plan of a config with its own mesh (layout: abstract_state's).

  Raises:
    ConfigError: the mesh is not the slice's size (names one that fits), or the
      model does not divide over it.
  """
  if config.mesh.devices != slice_.devices:
    best = best_on(config, slice_, layout)
    hint = f'; {flags(best)} fits' if best else ''
    raise ConfigError(
      f'--mesh={mesh_text(config.mesh)}: is {config.mesh.devices} devices, '
      f'{slice_} has {slice_.devices}{hint}'
    )
  mesh_check.check(config)
  frozen_base.check_mesh(config)
  if slice_.count > 1:
    sharding.slice_axis(config.mesh, slice_.count)
  config = exchanging(config, slice_)
  return Plan(config, slice_, memory.footprint(config, layout, slice_))


def exchanging(config: Config, slice_: chips.Slice) -> Config:
  """Returns the config with the exchange that `auto` is on a slice.

  Raises:
    ConfigError: the config's exchange is one that the slice does not have.
  """
  compute, expert = config.model.compute, config.mesh.expert
  if slice_.ragged or expert == 1:
    return config
  if compute.exchange == 'ragged':
    raise ConfigError(
      f"config.model.compute.exchange='ragged': {slice_} has no ragged "
      'all-to-all (libtpu has none for a v5e larger than 4x4); use auto'
    )
  if compute.exchange == 'auto' and expert > config.model.moe.top_k:
    compute = dataclasses.replace(compute, exchange='padded')
  model = dataclasses.replace(config.model, compute=compute)
  return dataclasses.replace(config, model=model)


def best_on(config: Config, slice_: chips.Slice, layout: PyTree) -> Plan | None:
  """Returns the plan that fits a slice with the least traffic, or None."""
  fitting = []
  state = memory.state_bytes(layout, MeshConfig())
  for mesh in _meshes(config, slice_.devices):
    # No mesh holds less than an even part of the state.
    shards = mesh.fsdp * mesh.expert * mesh.tensor
    shards *= mesh.data if mesh.states == 'zero1' else 1
    if state > shards * slice_.planned:
      continue
    on_mesh = _on_mesh(config, mesh, slice_)
    if on_mesh is None:
      continue
    size = memory.footprint(on_mesh, layout, slice_)
    candidate = Plan(on_mesh, slice_, size)
    if candidate.fits:
      size = sum(traffic.by_axis(on_mesh).values())
      fitting.append((size, candidate))
  return min(fitting, key=lambda pair: pair[0], default=(0, None))[1]


def smallest(config: Config, kind: str, layout: PyTree) -> Plan | None:
  """Returns the plan on the smallest slice of a kind that fits, or None."""
  for slice_ in chips.slices(kind):
    best = best_on(config, slice_, layout)
    if best:
      return best
  return None


def refuse_if_too_large(plan: Plan, layout: PyTree) -> None:
  """Refuses a plan that does not fit.

  Raises:
    ConfigError: names the largest parts and the smallest slice that fits.
  """
  if plan.fits:
    return
  parts = dataclasses.asdict(plan.footprint)
  worst = sorted(parts, key=parts.get)[:-4:-1]
  most = ', '.join(f'{name} {gib(parts[name])}' for name in worst)
  best = smallest(plan.config, plan.slice.kind, layout)
  hint = 'no slice of it fits: shard more or lower data.seq_len'
  if best:
    hint = f'the smallest that fits is --topology={best.slice} {flags(best)}'
  raise ConfigError(
    f'--topology={plan.slice} --mesh={mesh_text(plan.config.mesh)}: a device '
    f'needs {gib(plan.footprint.total)} ({most}) and has '
    f'{gib(plan.slice.chip.usable)}, {plan.slice.margin:.0%} of it kept '
    f'free; {hint}'
  )


def flags(plan: Plan) -> str:
  """Returns the flags of `experiments.plan` that give the plan's config."""
  rows = plan.config.data.micro_batch
  return (
    f'--mesh={mesh_text(plan.config.mesh)} --config.data.micro_batch={rows}'
  )


def mesh_text(mesh: MeshConfig) -> str:
  """Returns 'fsdp=8,expert=8' of a mesh."""
  sizes = {axis: getattr(mesh, axis) for axis in AXES}
  words = [f'{axis}={size}' for axis, size in sizes.items() if size > 1]
  return ','.join(words) or 'data=1'


def training_flags(config: Config, start: MeshConfig = MeshConfig()) -> str:
  """Returns the flags of `experiments.train` that train as planned.

  Typed after flags, or in place of a config file, that make the mesh `start`,
  they make the planned one.
  """
  mesh = dataclasses.asdict(config.mesh)
  default, start = (dataclasses.asdict(m) for m in (MeshConfig(), start))
  words = [
    f'--config.mesh.{name}={value}'
    for name, value in mesh.items()
    if not value == start[name] == default[name]
  ]
  rows = config.data.micro_batch
  return ' '.join([*words, f'--config.data.micro_batch={rows}'])


def gib(size: float) -> str:
  """Returns bytes as GiB, in words."""
  return f'{size / 2**30:.1f} GiB'


def _meshes(config: Config, devices: int) -> Iterator[MeshConfig]:
  experts = config.model.moe.experts if config.model.moe_layers else 1
  parts = max(config.data.seq_len // PART, 1)
  for context, expert, tensor in itertools.product(
    _powers(min(devices, parts)),
    _powers(min(devices, experts, 64)),
    _powers(min(devices, 8)),
  ):
    left = devices // (context * expert * tensor)
    for fsdp in _powers(left):
      sizes = dict(data=left // fsdp, fsdp=fsdp, expert=expert)
      sizes |= dict(context=context, tensor=tensor)
      others = dict.fromkeys(set(AXES) - set(sizes), 1)
      yield dataclasses.replace(config.mesh, **sizes, **others)


def _powers(most: int) -> list[int]:
  return [2**i for i in range(most.bit_length()) if 2**i <= most]


def _on_mesh(
  config: Config, mesh: MeshConfig, slice_: chips.Slice
) -> Config | None:
  """Returns the config on a mesh, a sequence a device at a time.

  None if the model or the mesh does not divide.
  """
  rows = mesh.data * mesh.fsdp * mesh.expert
  if config.data.batch_size % rows:
    return None
  try:
    data = dataclasses.replace(config.data, micro_batch=rows)
    on_mesh = dataclasses.replace(config, mesh=mesh, data=data)
    mesh_check.check(on_mesh)
    frozen_base.check_mesh(on_mesh)
    if slice_.count > 1:
      sharding.slice_axis(mesh, slice_.count)
    return exchanging(on_mesh, slice_)
  except ConfigError:
    return None
