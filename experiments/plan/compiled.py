"""The training step compiled for machines that are not here.

libtpu compiles for TPUs and XLA's CUDA plugin for NVIDIA's GPUs, on any CPU, in
a process of its own: neither shares one with this one's devices. It reads a
config as JSON, compiles, and writes what it found. The program is the real one,
its memory and its collectives are what a run has, but for two things on GPUs:
XLA cannot measure which form of a product is fastest, and jax asks a card
before it takes cuDNN's attention, so that the portable one stands in its place.
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

from experiments import chips
from experiments.plan import gpus
from mla_moe.config import Config, ConfigError, freeze

_CUDA = 'jax-cuda13-plugin'


def compiler(on: chips.Slice) -> str:
  """The package that compiles for `on`."""
  return _CUDA if on.gpu else 'libtpu'


def run(config: Config, on: chips.Slice) -> dict:
  """Bytes of arguments and scratch, collectives, versions, seconds.

  Raises:
    ConfigError: the compiler is not installed or too old for the chip, or the
      program does not fit (with its numbers).
  """
  package = compiler(on)
  if importlib.util.find_spec(package.replace('-', '_')) is None:
    extra = 'cuda' if on.gpu else 'tpu'
    raise ConfigError(
      f'--compile: {package} is missing; pip install "mla_moe[{extra}]"'
    )
  environment = {
    **os.environ,
    'JAX_PLATFORMS': 'cpu',
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_WORKER_HOSTNAMES': 'localhost',
  }
  asked = {'config': dataclasses.asdict(config), 'topology': str(on)}
  done = subprocess.run(
    [sys.executable, '-m', 'experiments.plan.compiled'],
    input=json.dumps(asked),
    capture_output=True,
    text=True,
    env=environment,
  )
  if done.returncode:
    raise ConfigError(_why(done.stderr, on))
  found = json.loads(done.stdout.splitlines()[-1])
  needs = found['arguments'] + found['temporary']
  if on.gpu and needs > on.chip.usable:  # libtpu refuses by itself
    gib = lambda size: f'{size / chips.GIB:.2f}G'
    raise ConfigError(_refusal(on, gib(needs), gib(on.chip.usable)))
  return found


def _refusal(on: chips.Slice, needs: str, has: str) -> str:
  return (
    f'--compile: {compiler(on)} says that the step needs {needs} of memory on '
    f'{on}, where there is {has}; shard more or lower micro_batch'
  )


def _why(text: str, on: chips.Slice) -> str:
  """The compiler's complaint in one line."""
  full = re.search(
    r'total memory required .*?\(([\d.]+\w)\).*?\(([\d.]+\w)\)', text
  )
  full = full or re.search(r'Used ([\d.]+\w) of ([\d.]+\w) hbm', text)
  if full:
    return _refusal(on, full[1], full[2])
  if 'lockfile' in text or 'already in use' in text:
    return '--compile: another process is using libtpu; wait for it'
  last = [line for line in text.splitlines() if 'Error' in line] or ['?']
  return f'--compile: {compiler(on)} failed for {on}: {last[-1].strip()}'


def describe(on: chips.Slice):
  """The slice's devices, for a mesh: `jax.experimental.topologies`."""
  from jax.experimental import topologies

  if on.gpu:
    return topologies.get_topology_desc(platform='cuda', **gpus.topology(on))
  name = f'{on.kind}:{"x".join(map(str, on.shape))}'
  several = {'num_slices': on.count} if on.count > 1 else {}
  return topologies.get_topology_desc(name, platform='tpu', **several)


def lower(config: Config, devices: list):
  """The step's lowering on a mesh of `devices`, and the mesh."""
  import jax
  import jax.numpy as jnp
  from flax import linen as nn
  from jax.sharding import NamedSharding, PartitionSpec

  from mla_moe import fp8, sharding
  from mla_moe.data import batches
  from mla_moe.train import optim, step
  from mla_moe.train.state import abstract_state, placement

  # What 'auto' stands for there, and not on the device that is here.
  model = config.model
  if model.precision != 'bf16':
    impl, _ = fp8.choose(model.precision, model.compute.fp8, device=devices[0])
    compute = dataclasses.replace(model.compute, fp8=impl)
    model = dataclasses.replace(model, compute=compute)
    config = dataclasses.replace(config, model=model)
  mesh = sharding.make_mesh(config.mesh, devices)
  everywhere = NamedSharding(mesh, PartitionSpec())
  boxed = abstract_state(config)
  state = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    nn.unbox(boxed),
    placement(config, mesh),
  )
  rows = config.data.micro_batch or config.data.batch_size
  shape = (config.data.batch_size // rows, rows, config.data.seq_len)
  by_row = NamedSharding(mesh, sharding.spec((None, 'batch', None)))
  array = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=by_row)
  number = lambda dtype: jax.ShapeDtypeStruct((), dtype, sharding=everywhere)
  batch = batches.Batch(array, array, array, array, number(jnp.int32))
  rates = optim.Rates(*(number(jnp.float32),) * len(optim.Rates._fields))
  train = functools.partial(step.train_step, config=config)
  with jax.set_mesh(mesh):
    return jax.jit(train, donate_argnums=0).lower(state, batch, rates), mesh


def main() -> None:
  """Compiles what stdin asks for; the last line of stdout is the answer."""
  asked = json.loads(sys.stdin.read())
  config = freeze(asked['config'])
  on = chips.parse(asked['topology'])
  import jax

  from experiments.plan import hlo

  began = time.perf_counter()
  lowered, mesh = lower(config, describe(on).devices)
  program = lowered.compile()
  seconds = time.perf_counter() - began
  memory = program.memory_analysis()
  rows = config.data.micro_batch or config.data.batch_size
  package = compiler(on)
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
    'compiler': f'{package} {importlib.metadata.version(package)}',
  }
  print(json.dumps(answer))


if __name__ == '__main__':
  main()
