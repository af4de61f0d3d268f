"""Meshes and slices on which a config fits, by arithmetic alone.

Every mesh that a slice allows is laid out and measured (`memory.footprint`);
of those that fit, the one that sends the least wins: nothing here knows how
much of the sending hides behind computing. A device takes one sequence at a
time, which is the least memory that there is without `context`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from experiments import chips
from experiments.plan import memory
from mla_moe import sharding
from mla_moe.config import Config, ConfigError, MeshConfig
from mla_moe.train.state import abstract_state

AXES = sharding.AXES


@dataclasses.dataclass(frozen=True)
class Plan:
  """A config on a slice, and what one device holds."""

  config: Config
  slice: chips.Slice
  footprint: memory.Footprint

  @property
  def fits(self) -> bool:
    return self.footprint.total <= self.slice.chip.planned


def mesh_of(text: str, states: str = 'fsdp') -> MeshConfig:
  """The mesh of 'fsdp=8,expert=8'; axes that are not named are 1.

  Raises:
    ConfigError: an axis that there is not, or a size that is no number.
  """
  sizes = {}
  for part in text.split(','):
    axis, _, size = part.partition('=')
    if axis not in AXES or not size.isdigit():
      raise ConfigError(
        f'--mesh={text!r}: {part!r} is no axis=size; the axes are '
        f'{", ".join(AXES)}'
      )
    sizes[axis] = int(size)
  return MeshConfig(**sizes, states=states)


def plan(config: Config, on: chips.Slice, layout) -> Plan:
  """The config with its own mesh on a slice.

  Raises:
    ConfigError: the mesh is not the slice's size (says one that fits), or the
      model cannot be laid on it.
  """
  have = on.devices
  if config.mesh.devices != have:
    best = smallest_on(config, on, layout)
    hint = f'; {flags(best)} fits' if best else ''
    raise ConfigError(
      f'--mesh={mesh_text(config.mesh)}: is {config.mesh.devices} devices, '
      f'{on} has {have}{hint}'
    )
  sharding.check(config)
  if on.count > 1:
    sharding.slice_axis(config.mesh, on.count)
  return Plan(config, on, memory.footprint(config, layout))


def smallest_on(config, on: chips.Slice, layout) -> Plan | None:
  """The mesh of a slice that fits and sends least; None if nothing fits."""
  fitting = []
  for mesh in _meshes(config, on.devices):
    laid = _laid(config, mesh, on.count)
    if laid is None:
      continue
    found = Plan(laid, on, memory.footprint(laid, layout))
    if found.fits:
      fitting.append((sum(memory.traffic(laid).values()), found))
  return min(fitting, key=lambda pair: pair[0], default=(0, None))[1]


def smallest(config, kind: str, layout) -> Plan | None:
  """The smallest slice of a kind on which the config fits, and its mesh."""
  for on in chips.slices(kind):
    found = smallest_on(config, on, layout)
    if found:
      return found
  return None


def refuse_if_too_large(plan: Plan, layout) -> None:
  """Raises ConfigError, with the smallest slice that fits, in one line."""
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
    f'{gib(plan.slice.chip.usable)}, {plan.slice.chip.margin:.0%} of it kept '
    f'free; {hint}'
  )


def flags(plan: Plan) -> str:
  """The flags that make the plan's config out of the one it came from."""
  rows = plan.config.data.micro_batch
  return (
    f'--mesh={mesh_text(plan.config.mesh)} --config.data.micro_batch={rows}'
  )


def mesh_text(mesh: MeshConfig) -> str:
  """'fsdp=8,expert=8' of a mesh."""
  sizes = {axis: getattr(mesh, axis) for axis in AXES}
  shown = [f'{axis}={size}' for axis, size in sizes.items() if size > 1]
  return ','.join(shown) or 'data=1'


def training_flags(config: Config) -> str:
  """What `experiments.train` must be told, to train as it was planned."""
  sizes = {axis: getattr(config.mesh, axis) for axis in AXES}
  words = [f'--config.mesh.{a}={n}' for a, n in sizes.items() if n > 1]
  rows = config.data.micro_batch
  return ' '.join([*words, f'--config.data.micro_batch={rows}'])


def gib(size: float) -> str:
  """Bytes as GiB, for people."""
  return f'{size / 2**30:.1f} GiB'


def layout_of(config: Config):
  """Shapes and axes of the state; the same for every mesh."""
  return abstract_state(config)


def _meshes(config, devices: int) -> Iterator[MeshConfig]:
  experts = config.model.moe.experts if config.model.moe_layers else 1
  for expert in _powers(min(devices, experts, 64)):
    for tensor in _powers(min(devices // expert, 8)):
      left = devices // (expert * tensor)
      for fsdp in _powers(left):
        yield MeshConfig(
          data=left // fsdp,
          fsdp=fsdp,
          expert=expert,
          tensor=tensor,
          states=config.mesh.states,
        )


def _powers(most: int) -> list[int]:
  return [2**i for i in range(most.bit_length()) if 2**i <= most]


def _laid(config, mesh, slices: int) -> Config | None:
  """The config on a mesh, a sequence a device at a time; None if it cannot."""
  rows = mesh.data * mesh.fsdp * mesh.expert
  try:
    data = dataclasses.replace(config.data, micro_batch=rows)
    laid = dataclasses.replace(config, mesh=mesh, data=data)
    sharding.check(laid)
    if slices > 1:
      sharding.slice_axis(mesh, slices)
  except ConfigError:
    return None
  return laid
