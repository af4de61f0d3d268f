"""The training step compiled by libtpu for a slice that is not here.

A process of its own, because the TPU's compiler and this one's devices do not
share one: it reads a config as JSON, compiles, and writes what it found. The
program is the real one: its memory and its collectives are what a run has.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import time

from mla_moe import config as config_lib
from mla_moe.config import ConfigError

_NAMES = {'v5e': 'v5e', 'v5p': 'v5p', 'v6e': 'v6e', 'tpu7x': 'tpu7x'}


def run(config: config_lib.Config, on) -> dict:
  """Bytes of arguments and scratch, collectives, versions, seconds.

  Raises:
    ConfigError: libtpu is not installed or too old for the chip, or it says
      that the program does not fit (with its numbers).
  """
  if importlib.util.find_spec('libtpu') is None:
    raise ConfigError(
      '--compile: libtpu is missing; pip install "mla_moe[tpu]"'
    )
  environment = {
    **os.environ,
    'JAX_PLATFORMS': 'cpu',
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_WORKER_HOSTNAMES': 'localhost',
  }
  asked = {
    'config': dataclasses.asdict(config),
    'topology': _name(on),
    'slices': on.count,
  }
  done = subprocess.run(
    [sys.executable, '-m', 'experiments.plan.compiled'],
    input=json.dumps(asked),
    capture_output=True,
    text=True,
    env=environment,
  )
  if done.returncode == 0:
    return json.loads(done.stdout.splitlines()[-1])
  text = done.stderr
  full = re.search(
    r'total memory required .*?\(([\d.]+\w)\).*?\(([\d.]+\w)\)', text
  )
  full = full or re.search(r'Used ([\d.]+\w) of ([\d.]+\w) hbm', text)
  if full:
    raise ConfigError(
      f'--compile: libtpu says that the step needs {full[1]} of memory on '
      f'{on}, where there is {full[2]}; shard more or lower micro_batch'
    )
  if 'lockfile' in text or 'already in use' in text:
    raise ConfigError('--compile: another process is using libtpu; wait for it')
  last = [line for line in text.splitlines() if 'Error' in line] or ['?']
  raise ConfigError(f'--compile: libtpu failed for {on}: {last[-1].strip()}')


def _name(on) -> str:
  return f'{_NAMES[on.kind]}:{"x".join(map(str, on.shape))}'


def lower(config: config_lib.Config, devices: list):
  """The step's lowering on a mesh of `devices`, and the mesh."""
  import jax
  import jax.numpy as jnp
  from flax import linen as nn
  from jax.sharding import NamedSharding, PartitionSpec

  from mla_moe import data, optim, sharding, step

  mesh = sharding.make_mesh(config.mesh, devices)
  everywhere = NamedSharding(mesh, PartitionSpec())
  boxed = step.layout(config)
  state = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    nn.unbox(boxed),
    step.placement(config, mesh),
  )
  rows = config.data.micro_batch or config.data.batch_size
  shape = (config.data.batch_size // rows, rows, config.data.seq_len)
  by_row = NamedSharding(mesh, sharding.spec((None, 'batch', None)))
  array = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=by_row)
  number = lambda dtype: jax.ShapeDtypeStruct((), dtype, sharding=everywhere)
  batch = data.Batch(array, array, array, array, number(jnp.int32))
  rates = optim.Rates(*(number(jnp.float32),) * len(optim.Rates._fields))
  train = functools.partial(step.train_step, config=config)
  with jax.set_mesh(mesh):
    return jax.jit(train, donate_argnums=0).lower(state, batch, rates), mesh


def main() -> None:
  """Compiles what stdin asks for; the last line of stdout is the answer."""
  asked = json.loads(sys.stdin.read())
  config = config_lib.freeze(asked['config'])
  import jax
  from jax.experimental import topologies

  from experiments.plan import hlo

  several = {'num_slices': asked['slices']} if asked['slices'] > 1 else {}
  described = topologies.get_topology_desc(
    asked['topology'], platform='tpu', **several
  )
  began = time.perf_counter()
  lowered, mesh = lower(config, described.devices)
  program = lowered.compile()
  seconds = time.perf_counter() - began
  memory = program.memory_analysis()
  rows = config.data.micro_batch or config.data.batch_size
  answer = {
    'arguments': memory.argument_size_in_bytes,
    'temporary': memory.temp_size_in_bytes,
    'collectives': hlo.collectives(
      program.as_text(),
      mesh.axis_names,
      mesh.devices.shape,
      config.data.batch_size // rows,
    ),
    'seconds': seconds,
    'jax': jax.__version__,
    'libtpu': importlib.metadata.version('libtpu'),
  }
  print(json.dumps(answer))


if __name__ == '__main__':
  main()
