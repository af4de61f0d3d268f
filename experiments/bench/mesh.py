"""What a mesh costs: a training step on 8 fake CPU devices and on one.

  python -m experiments.bench.mesh [--mesh=expert:8] [--steps=5]

Both do the same work on the same cores, so that the ratio of their times is
pure overhead; the ratio of their temporary memory, per device, is what a mesh
is for. The numbers of the last run are in mesh.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import sys
import time

FLAG = '--xla_force_host_platform_device_count=8'
os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {FLAG}'.strip()

import jax  # noqa: E402
import numpy as np  # noqa: E402

from mla_moe import config as c  # noqa: E402
from mla_moe import sharding  # noqa: E402
from mla_moe.data import batches  # noqa: E402
from mla_moe.train import optim, step  # noqa: E402
from mla_moe.train.state import init_state, placement  # noqa: E402

MODEL = c.ModelConfig(
  vocab=512,
  dim=256,
  layers=3,
  dense_layers=1,
  dense_width=512,
  max_positions=512,
  init_std=0.02,
  dtype='float32',
  compute=c.ComputeConfig(remat='latents'),
  mla=c.MLAConfig(
    heads=8, query_rank=96, kv_rank=64, nope_dim=32, rope_dim=16, value_dim=32
  ),
  moe=c.MoEConfig(experts=32, top_k=4, width=128, groups=1, top_groups=1),
  mtp=c.MTPConfig(depth=0),
)
CONFIG = c.Config(
  model=MODEL, data=c.DataConfig(seq_len=512, batch_size=8), run=c.RunConfig()
)


def prepare(config: c.Config):
  """The compiled step, its state and its arguments, on the config's mesh."""
  stream = np.random.default_rng(0).integers(0, 512, 40000).astype(np.uint16)
  batch = batches.batch_at(stream, config.data, 0, 0)
  rates = optim.Rates(1e-4, 1e-3, 0.0)
  train = functools.partial(step.train_step, config=config)
  if config.mesh.devices == 1:
    state = init_state(jax.random.key(0), config)
    run = jax.jit(train, donate_argnums=0)
    return run.lower(state, batch, rates).compile(), state, (batch, rates)
  mesh = sharding.make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    state = init_state(jax.random.key(0), config, mesh)
    where = placement(config, mesh)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    run = jax.jit(train, donate_argnums=0, out_shardings=(where, whole))
    rows = jax.sharding.NamedSharding(mesh, sharding.spec((None, 'batch')))
    put = lambda x: jax.device_put(x, rows if np.ndim(x) == 3 else whole)
    args = jax.tree.map(put, (batch, rates))
    return run.lower(state, *args).compile(), state, args


def main() -> None:
  """Prints a row for one device and one for the mesh, turn about."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--mesh', default='expert:8')
  parser.add_argument('--steps', type=int, default=5)
  flags = parser.parse_args()
  sizes = dict(part.split(':') for part in flags.mesh.split(','))
  mesh = c.MeshConfig(**{axis: int(n) for axis, n in sizes.items()})
  sides = [CONFIG, dataclasses.replace(CONFIG, mesh=mesh)]
  runs = [prepare(side) for side in sides]
  temps = [r.memory_analysis().temp_size_in_bytes / 2**20 for r, *_ in runs]
  states = [state for _, state, _ in runs]
  best = [float('inf')] * 2
  for _ in range(flags.steps + 1):
    for i, (run, _, args) in enumerate(runs):
      began = time.perf_counter()
      states[i], values = run(states[i], *args)
      jax.block_until_ready((states[i], values))
      best[i] = min(best[i], time.perf_counter() - began)
  for name, seconds, temp in zip(('one', flags.mesh), best, temps, strict=True):
    print(f'{name}: {seconds * 1e3:.0f} ms, {temp:.1f} MiB temporary a device')
  print(
    f'time {best[1] / best[0]:.2f} x, temporary memory 1/'
    f'{temps[0] / temps[1]:.1f}; loss {float(values["loss"]):.6f}'
  )


if __name__ == '__main__':
  sys.exit(main())
