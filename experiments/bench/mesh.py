"""The cost of a mesh: a training step on 8 fake CPU devices beside one.

Both do the same work on the same cores, so that the ratio of their times is
pure overhead; the ratio of their temporary memory, per device, is the gain.
Only ratios within one run say anything: between runs the same machine differs
by a third. Its results stand in mesh.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import time

import jax
import numpy as np

from mla_moe import config as c
from mla_moe import sharding
from mla_moe.train import optim
from mla_moe.train.state import init_state

from ..data import batches
from ..plan import search
from ..training import program
from . import models

CONFIG = c.Config(
  model=models.MESH, data=c.DataConfig(seq_len=512, batch_size=8)
)


def flags(parser) -> None:
  """Adds this benchmark's flags."""
  parser.add_argument('--mesh', default='expert=8', help='data=2,expert=4, ...')
  parser.add_argument('--steps', type=int, default=5)


def run(out: pathlib.Path, args) -> None:
  """Prints the best step on one device and on the mesh, in turns."""
  flag = '--xla_force_host_platform_device_count=8'
  environment = os.environ.get('XLA_FLAGS', '')
  os.environ['XLA_FLAGS'] = f'{environment} {flag}'.strip()
  jax.config.update('jax_platforms', 'cpu')
  configs = [CONFIG, dataclasses.replace(CONFIG, mesh=mesh_of(args.mesh))]
  runs = [prepare(config) for config in configs]
  temps = [r.memory_analysis().temp_size_in_bytes / 2**20 for r, *_ in runs]
  states = [state for _, state, _ in runs]
  best = [float('inf')] * 2
  for _ in range(args.steps + 1):
    for i, (run, _, inputs) in enumerate(runs):
      began = time.perf_counter()
      states[i], values = run(states[i], *inputs)
      jax.block_until_ready((states[i], values))
      best[i] = min(best[i], time.perf_counter() - began)
  for name, seconds, temp in zip(('one', args.mesh), best, temps, strict=True):
    print(f'{name}: {seconds * 1e3:.0f} ms, {temp:.1f} MiB temporary a device')
  print(
    f'time {best[1] / best[0]:.2f} x, temporary memory 1/'
    f'{temps[0] / temps[1]:.1f}; loss {float(values["loss"]):.6f}'
  )


def mesh_of(text: str) -> c.MeshConfig:
  """Returns the mesh of 'data=2,expert=4', as `experiments.plan` reads it.

  Raises:
    ConfigError: no such axis, or another number of devices than 8.
  """
  mesh = search.mesh_of(text)
  if mesh.devices != 8:
    raise c.ConfigError(f'--mesh={text}: is {mesh.devices} devices, must be 8')
  return mesh


def prepare(config: c.Config):
  """Returns the compiled step, its state and inputs, on the config's mesh."""
  stream = np.random.default_rng(0).integers(0, 512, 40000).astype(np.uint16)
  inputs = (
    batches.batch_at(stream, config.data, 0, 0),
    optim.Rates(1e-4, 1e-3, 0),
  )
  mesh, context = None, contextlib.nullcontext()
  if config.mesh.devices > 1:
    mesh = sharding.make_mesh(config.mesh)
    context = jax.set_mesh(mesh)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    rows = program.batch_sharding(mesh)
    put = lambda x: jax.device_put(x, rows if np.ndim(x) == 3 else whole)
    inputs = jax.tree.map(put, inputs)
  with context:
    state = init_state(jax.random.key(0), config, mesh)
    run = program.jitted_step(config, mesh).lower(state, *inputs)
    return run.compile(), state, inputs
