"""The frozen base of a run that trains adapters: a release, read once.

It is no part of the run's state: a checkpoint holds the adapters, their moments
and the base's fingerprint, by which another base is refused. The config names
its folder (`run.base`), which may move.
"""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
from typing import Any, NamedTuple

import jax

from mla_moe.config import Config, ConfigError, ModelConfig


class Base(NamedTuple):
  """Parameters of a release, its routers' biases, fingerprint and model.

  All are empty where a run trains every parameter.
  """

  params: Any = None
  router: Any = None
  fingerprint: str = ''
  model: ModelConfig | None = None


def load(config: Config, mesh: jax.sharding.Mesh | None) -> Base:
  """Returns the base of a config's adapters.

  Raises:
    ConfigError: a base without adapters, or adapters without one.
  """
  from ..checkpointing import fingerprint
  from . import lora
  from .load import load_base

  model, folder = config.model, config.run.base
  check(config)
  check_folder(config)
  if not model.lora.rank:
    return Base()
  loaded, variables = load_base(folder, model.base, model.dtype, mesh)
  own = dataclasses.replace(loaded, lora=model.lora)
  params = lora.join(variables['params'], {}, own)
  router = variables['router']
  values, _ = fingerprint.read(fingerprint.of((params, router)))
  text = repr(sorted(values.items())).encode()
  return Base(params, router, hashlib.sha256(text).hexdigest()[:16], own)


def compare(base: Base, facts: dict, config: Config, step: int) -> None:
  """Refuses another base than that of a checkpoint's adapters.

  Raises:
    ConfigError: names the config's base.
  """
  if facts.get('base', '') != base.fingerprint:
    raise ConfigError(
      f'run.base={config.run.base!r}: its numbers are not those that the '
      f'adapters of step {step} were trained over; name that release'
    )


def check(config: Config) -> None:
  """Refuses a frozen base, or adapters, that a run cannot train.

  Nothing is read: a base that is not here, or not named yet, may be planned.
  """
  from . import lora

  model, folder = config.model, config.run.base
  if not model.lora.rank:
    if model.base != 'trained' or folder:
      raise ConfigError(
        f'model.base={model.base!r}, run.base={folder!r}: a frozen base has '
        'nothing to train; set model.lora.rank'
      )
    return
  if model.precision != 'bf16':
    raise ConfigError(
      f'model.precision={model.precision!r}: a frozen base is multiplied in '
      "model.dtype; set 'bf16'"
    )
  if model.dsa.heads:
    raise ConfigError(
      f'model.dsa.heads={model.dsa.heads}: sparse attention has no '
      'frozen base; train all parameters (model.lora.rank=0)'
    )
  if config.optim.optimizer != 'adamw':
    raise ConfigError(
      f'optim.optimizer={config.optim.optimizer!r}: adapters have no matrices '
      "to orthogonalise; use 'adamw'"
    )
  check_mesh(config)
  lora.boxed_base(model, model.dtype)  # lengths that the codes do not divide
  lora.boxed_shapes(model)  # a rank, or a target, that is no matrix's


def check_mesh(config: Config) -> None:
  """Refuses a mesh that cannot hold a frozen base."""
  from .frozen import GROUPS

  model, mesh = config.model, config.mesh
  if not model.lora.rank:
    return
  if mesh.stage > 1:
    raise ConfigError(
      f'mesh.stage={mesh.stage}: a pipeline has no frozen base; use mesh.fsdp'
    )
  group = GROUPS.get(model.base, 1)
  if mesh.tensor > 1 and model.moe_layers:
    width = model.moe.width // mesh.tensor
    if width % group:
      raise ConfigError(
        f'mesh.tensor={mesh.tensor}: leaves {width} of '
        f'model.moe.width={model.moe.width}, which groups of {group} '
        f'(model.base={model.base!r}) do not divide'
      )


def check_folder(config: Config) -> None:
  """Refuses a run of adapters whose `run.base` is no folder."""
  rank, folder = config.model.lora.rank, config.run.base
  if rank and not folder:
    raise ConfigError(
      f'model.lora.rank={rank}: adapters need a base; set run.base '
      'to a Hugging Face folder'
    )
  if rank and not pathlib.Path(folder).is_dir():
    raise ConfigError(f'run.base={folder!r}: is no folder')
