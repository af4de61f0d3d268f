"""Saves steps of 4 MiB one after the other, and says each that has begun.

  python tests/checkpointing/saver.py FOLDER FIRST LAST [exit | raise]

The fourth word ends the process after its first save.
"""

import sys

import jax.numpy as jnp

from experiments.checkpointing import saving


def main(folder, first, last, end=''):
  with saving.Writer(folder, 3) as writer:
    for step in range(int(first), int(last) + 1):
      w = step + jnp.arange(1 << 20, dtype=jnp.float32)
      writer.save(step, {'w': w}, {})
      print(step, flush=True)
      if end == 'exit':
        sys.exit(3)
      if end == 'raise':
        raise KeyError('of the test')


if __name__ == '__main__':
  main(*sys.argv[1:])
