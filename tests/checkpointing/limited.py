"""Saves three steps; the system lets no file grow during the second.

python tests/checkpointing/limited.py FOLDER
"""

import resource
import signal
import sys

import jax.numpy as jnp

from experiments.checkpointing import folders, saving, store


def limit(size):
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def main(folder):
  signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  like = {'w': jnp.zeros(1 << 20, jnp.float32)}
  state = lambda step: {'w': like['w'] + step + jnp.arange(1 << 20)}
  with saving.Writer(folder, 9) as writer:
    writer.save(1, state(1), {})
    writer.wait()
    limit(100_000)
    try:
      writer.save(2, state(2), {})
      writer.wait()
      print('saved?')
    except saving.NotSaved as error:
      print(error)
    limit(resource.RLIM_INFINITY)
    assert store.restore(folder, like).step == 1
    writer.save(3, state(3), {})
  assert store.restore(folder, like).step == 3
  assert folders.steps(folder) == [1, 3]


if __name__ == '__main__':
  main(sys.argv[1])
