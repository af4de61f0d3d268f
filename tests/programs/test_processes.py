"""Two processes of one run: signals, checkpoints and replicas (rows 12, 29)."""

import os
import pathlib
import signal
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from mla_moe.checkpoint import store

ROOT = pathlib.Path(__file__).parents[2]

_PROGRAM = """
import itertools, sys, time
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
rank, folder = int(sys.argv[1]), sys.argv[2]
address = f'unix:{folder}/socket'  # no port that another program may have
jax.config.update('jax_cpu_collectives_implementation', 'gloo')
jax.distributed.initialize(
  address, 2, rank, coordinator_bind_address=address)
from experiments.training import signals
from mla_moe.checkpoint import fingerprint, store

mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ('data', 'fsdp'))
whole = np.arange(8, dtype=np.float32)
def put(x, spec):
  where = NamedSharding(mesh, spec)
  return jax.make_array_from_callback(x.shape, where, lambda at: x[at])
state = {'w': put(whole, P('fsdp')), 'n': put(np.float32(0), P())}
train = jax.jit(lambda s: {'w': s['w'] + 1, 'n': s['n'] + s['w'].sum()})
with store.Writer(folder, 3) as writer, signals.Stop() as stop:
  for step in itertools.count(1):
    shared = stop.share()
    state = train(state)
    name = signals.agreed(shared)
    if step == 5:
      print('ready', flush=True)
    if name:
      writer.save(step, state, {})
      break
    time.sleep(0.05)
print(name, step, flush=True)
restored = store.restore(folder, state)
assert restored.step == step
prints, apart = fingerprint.read(fingerprint.of(restored.state))
assert not apart, apart
assert prints == fingerprint.read(fingerprint.of(state))[0]
# One process's copy of the replicated w drifts.
mine = (whole + 1) if rank else whole
state['w'] = jax.make_array_from_callback(
  whole.shape, NamedSharding(mesh, P('fsdp')), lambda at: mine[at])
print(*fingerprint.read(fingerprint.of(state))[1], flush=True)
"""


@pytest.fixture(scope='module')
def pair(tmp_path_factory):
  """The last lines of two processes, one of which got SIGTERM; their folder."""
  folder = tmp_path_factory.mktemp('pair')
  environment = dict(
    os.environ,
    PYTHONPATH=str(ROOT),
    XLA_FLAGS='--xla_force_host_platform_device_count=2',
  )
  children = [
    subprocess.Popen(
      [sys.executable, '-c', _PROGRAM, str(rank), str(folder)],
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for rank in range(2)
  ]
  try:
    while children[1].stdout.readline() not in ('ready\n', ''):
      pass  # gloo prints, too
    children[1].send_signal(signal.SIGTERM)
    outputs = [child.communicate() for child in children]
  finally:
    for child in children:
      child.kill()
  assert [child.returncode for child in children] == [0, 0], outputs
  return [out.splitlines()[-2:] for out, _ in outputs], folder


def test_row12_a_signal_to_one_process_stops_both_at_the_same_step(pair):
  (first, second), folder = pair
  assert first[0] == second[0]
  name, step = first[0].split()
  assert name == 'SIGTERM' and int(step) >= 5
  # One process reads the checkpoint of two.
  like = {'w': jnp.zeros(8), 'n': jnp.zeros(())}
  restored = store.restore(folder, like)
  assert restored.step == int(step)
  np.testing.assert_array_equal(restored.state['w'], np.arange(8) + int(step))


def test_row29_processes_see_that_their_replicas_differ(pair):
  (first, second), _ = pair
  assert first[1] == second[1] == 'w on the device at (1, 0)'
