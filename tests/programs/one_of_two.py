"""One of two processes that step, save at a signal, and compare replicas.

  python tests/programs/one_of_two.py RANK FOLDER

Two devices each. The last two lines are the signal with its step, and the leaf
whose copies differ after the second process's copy has drifted.
"""

import itertools
import sys
import time

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.training import signals
from mla_moe.checkpoint import fingerprint, store

WHOLE = np.arange(8, dtype=np.float32)


def main(rank, folder):
  address = f'unix:{folder}/socket'  # no port that another program may have
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  jax.distributed.initialize(address, 2, rank, coordinator_bind_address=address)
  mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ('data', 'fsdp'))

  def put(x, spec):
    where = NamedSharding(mesh, spec)
    return jax.make_array_from_callback(x.shape, where, lambda at: x[at])

  state = {'w': put(WHOLE, P('fsdp')), 'n': put(np.float32(0), P())}
  step, state = steps(state, folder)
  restored = store.restore(folder, state)
  assert restored.step == step
  prints, apart = fingerprint.read(fingerprint.of(restored.state))
  assert not apart, apart
  assert prints == fingerprint.read(fingerprint.of(state))[0]
  state['w'] = put((WHOLE + 1) if rank else WHOLE, P('fsdp'))
  print(*fingerprint.read(fingerprint.of(state))[1], flush=True)


def steps(state, folder):
  """Steps until both have seen a signal; the step and state that are saved."""
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
        print(name, step, flush=True)
        return step, state
      time.sleep(0.05)


if __name__ == '__main__':
  main(int(sys.argv[1]), sys.argv[2])
