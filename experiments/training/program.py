"""The compiled training step, made in one place.

The loop runs it, benchmarks time it, and the plan compiles it for machines that
are not here: all of them mean the same program, down to its `out_shardings`.
Without those a compiler may hand out parameters in the layout of the moments,
and leave ZeRO-1's second half, the gather over `data`, undone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import (
  Mesh,
  NamedSharding,
  PartitionSpec,
)

from mla_moe import sharding
from mla_moe.config import Config, RLConfig, RunConfig
from mla_moe.train import optim, step
from mla_moe.train.state import State

from .. import runtime
from ..adapters import lora
from ..adapters.state import placement
from ..checkpointing.load import shapes
from ..data import batches
from ..rl import objective

# Fields that the host reads alone, by group; it alone reads all of `run`, too.
HOST = {
  'data': (
    *('source', 'tokenizer', 'fim_rate', 'heldout', 'seed'),
    *('batch_start', 'ramp_tokens', 'field', 'block_rows'),
  ),
  'rl': (
    *('template', 'rewards', 'truncated', 'dynamic', 'heldout'),
    *('teachers', 'engine', 'speculative'),
  ),
}


def of_devices(config: Config) -> Config:
  """Returns the config with every field that no program reads at its default.

  Programs are cached by it: runs that differ elsewhere compile none anew.
  """
  groups = {}
  for name, fields in HOST.items():
    group = getattr(config, name)
    defaults = {field: getattr(type(group)(), field) for field in fields}
    groups[name] = dataclasses.replace(group, **defaults)
  return dataclasses.replace(config, run=RunConfig(), **groups)


def of_state(config: Config) -> Config:
  """Returns `of_devices`, without the fields that no fresh state depends on.

  Of reinforcement only its being there counts, and that of a reference.
  """
  rl = config.rl
  own = RLConfig(task=rl.task, beta=rl.beta, prompt=rl.prompt)
  return dataclasses.replace(of_devices(config), rl=own)


def jitted_step(config: Config, mesh: Mesh | None) -> Callable:
  """Returns the jitted (state, batch, rates, base) -> (state, metrics).

  Args:
    config: of the run; with `rl.task` the loss is GRPO's and the batch
      `rl.objective.Episodes`.
    mesh: of its devices, which need not be here; None is the default device.
  """
  outputs = None
  if mesh:
    outputs = placement(config, mesh), NamedSharding(mesh, PartitionSpec())
  is_here = mesh is None or mesh.devices.flat[0] in jax.devices()
  own = {'objective': objective.grpo} if config.rl.task else {}
  own['assemble'] = functools.partial(lora.join, model=config.model)
  return jax.jit(
    functools.partial(step.train_step, config=config, **own),
    donate_argnums=0,
    out_shardings=outputs,
    compiler_options=runtime.step_options() if is_here else {},
  )


def state_shapes(config: Config, mesh: Mesh | None) -> State:
  """Returns `load.shapes` of a run's state, without a second trace."""
  return _shapes(of_devices(config), mesh)


_shapes = functools.lru_cache(maxsize=8)(shapes)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the layout of a batch's arrays, [micro-batches, rows, length]."""
  return NamedSharding(mesh, sharding.spec((None, 'batch', None)))


def abstract_inputs(
  config: Config, mesh: Mesh
) -> tuple[State, batches.Batch | objective.Episodes, optim.Rates]:
  """Returns the arguments of a step on a mesh, without arrays.

  With adapters, their base is the last.
  """
  data, model = config.data, config.model
  rows = data.micro_batch or data.batch_size
  shape = (data.batch_size // rows, rows, data.seq_len)
  split = batch_sharding(mesh)
  array = functools.partial(jax.ShapeDtypeStruct, shape, sharding=split)
  everywhere = NamedSharding(mesh, PartitionSpec())
  number = lambda dtype: jax.ShapeDtypeStruct((), dtype, sharding=everywhere)
  batch = batches.Batch(*(array(jnp.int32),) * 4, number(jnp.int32))
  if config.rl.task:
    routes = None
    if config.rl.replay != 'none' and model.moe_layers:
      each = (*shape, model.moe_layers, model.moe.top_k)
      routes = jax.ShapeDtypeStruct(each, jnp.int16, sharding=split)
    floats = (array(jnp.float32),) * 5
    numbers = (number(jnp.int32),) * 2
    batch = objective.Episodes(*batch[:4], *floats, *numbers, routes)
  rates = optim.Rates(*(number(jnp.float32),) * len(optim.Rates._fields))
  inputs = shapes(config, mesh), batch, rates
  if not model.lora.rank:
    return inputs
  boxed = lora.boxed_base(model, model.dtype)
  places = sharding.shardings(boxed, mesh)
  place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
  return *inputs, jax.tree.map(place, nn.unbox(boxed), places)
