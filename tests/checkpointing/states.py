"""States to save and restore, different at every step."""

import pathlib

import chex
import jax.numpy as jnp

from experiments.checkpointing import saving, store

ROOT = pathlib.Path(__file__).parents[2]


def make(step):
  """Returns a state of several dtypes, different at every step."""
  return {
    'step': jnp.int32(step),
    'params': {
      'w': step + jnp.arange(64 * 64, dtype=jnp.float32).reshape(64, 64),
      'half': jnp.full(8, step / 3, jnp.bfloat16),
      'fp8': jnp.full((4, 4), step / 4, jnp.float8_e4m3fn),
    },
    'router': {},
  }


LIKE = make(0)


def save(folder, *steps, **policy):
  with saving.Writer(folder, policy.pop('keep', 9), **policy) as writer:
    for step in steps:
      writer.save(step, make(step), {'corpus': 'x', 'bits_per_byte': 1 / step})


def restored(folder, **kwargs):
  """Returns (step, printed lines); the state must equal the saved one."""
  lines = []
  checkpoint = store.restore(folder, LIKE, say=lines.append, **kwargs)
  chex.assert_trees_all_equal(checkpoint.state, make(checkpoint.step))
  return checkpoint.step, '\n'.join(lines)
