"""The state's fields: older checkpoints have another name for one of them."""

import dataclasses

import chex
import jax
import numpy as np
import pytest

from configs import tiny
from experiments.checkpointing import saving, store
from mla_moe import ConfigError
from mla_moe.config import freeze
from mla_moe.train.state import RENAMED, State, init_state

MICRO = freeze(tiny.get_config('micro'))


def _filled(shape, by):
  """An array of this shape and type with numbers from `by` on.

  It is committed to a device, as a restored one is: they share programs.
  """
  numbers = by + np.arange(shape.size).reshape(shape.shape)
  return jax.device_put(numbers.astype(shape.dtype), jax.devices()[0])


@pytest.mark.parametrize('sigma', [0.0, 4.0], ids=['plain', 'guarded'])
def test_a_checkpoint_with_the_older_name_of_a_field_is_restored(
  tmp_path, sigma
):
  optim = dataclasses.replace(MICRO.optim, spike_sigma=sigma, spike_window=4)
  model = dataclasses.replace(MICRO.model, layers=1, dense_layers=1)
  config = dataclasses.replace(MICRO, model=model, optim=optim)
  shapes = jax.eval_shape(lambda: init_state(jax.random.key(0), config))
  filled = lambda by: jax.tree.map(lambda s: _filled(s, by), shapes)
  state, like = filled(3), filled(0)
  older = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
  older['guard'] = older.pop('loss_window')
  with saving.Writer(tmp_path, 3) as writer:
    for step, tree in ((1, older), (2, state)):
      writer.save(step, tree, {})
      writer.wait()
      restored = store.restore(tmp_path, like, renamed=RENAMED)
      assert restored.step == step and isinstance(restored.state, State)
      chex.assert_trees_all_equal(restored.state, state)
  with pytest.raises(ConfigError):  # and another tree is still another tree
    store.restore(tmp_path, like.replace(params={}), renamed=RENAMED)
