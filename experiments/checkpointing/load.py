"""Loads the model of a run's folder: the counterpart of `mla_moe.hf.load`.

A run has its config in config.json and its states in `checkpoints`. The newest
one that is whole is read and compared with its seal (`store`); the
optimizer's state is read with it and dropped.
"""

from __future__ import annotations

import os
from typing import Any

import jax
from flax import linen as nn

from mla_moe import files
from mla_moe.config import Config, ConfigError, freeze
from mla_moe.train.state import RENAMED, State
from mla_moe.types import PyTree


def load_run(
  folder: os.PathLike | str,
  *,
  mesh: jax.sharding.Mesh | None = None,
  allow_unsealed: bool = False,
) -> tuple[Config, dict[str, PyTree]]:
  """Returns (config, {'params', 'router'}) of a run's last trusted checkpoint.

  Args:
    folder: the `--workdir` of a training, gs://BUCKET/FOLDER, too.
    mesh: of `sharding.make_mesh`, for the leaves; None is one device.
    allow_unsealed: trust a checkpoint that was never sealed.

  Raises:
    ConfigError: no run, no checkpoint, or one of another config.
    store.Damaged: no checkpoint can be trusted.
  """
  from ..adapters import base as frozen_base
  from ..adapters import lora

  config, restored = load_state(folder, mesh, allow_unsealed)
  state, params = restored.state, restored.state.params
  if config.model.lora.rank:
    base = frozen_base.load(config, mesh)
    frozen_base.compare(base, restored.facts, config, restored.step)
    params = lora.join(base.params, params, config.model)
  return config, {'params': params, 'router': state.router}


def load_state(
  folder: os.PathLike | str,
  mesh: jax.sharding.Mesh | None = None,
  allow_unsealed: bool = False,
) -> tuple[Config, Any]:
  """Returns (config, `store.Restored`) of the last trusted checkpoint.

  Of a run of adapters the state has these alone. The errors are `load_run`'s.
  """
  from .. import workdir
  from . import bucket, store  # orbax is slow to import

  folder = bucket.here('folder', folder)
  config = freeze(files.read_json(folder / 'config.json'))
  restored = store.restore(
    workdir.checkpoints(folder),
    shapes(config, mesh),
    allow_unsealed=allow_unsealed,
    renamed=RENAMED,
  )
  if restored is None:
    raise ConfigError(f'{folder}: has no checkpoint yet')
  return config, restored


def shapes(config: Config, mesh: jax.sharding.Mesh | None = None) -> State:
  """Returns the shapes, dtypes and shardings of the state, without arrays.

  A shape without a device would be restored onto those that it was saved on.
  """
  from ..adapters.state import abstract_state, placement

  state = nn.unbox(abstract_state(config))
  one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  places = (
    placement(config, mesh) if mesh else jax.tree.map(lambda _: one, state)
  )
  place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
  return jax.tree.map(place, state, places)
