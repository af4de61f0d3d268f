"""Ours equals TRL 1.16: losses and gradients (make_trl_golden.py)."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.rl import advantages, objective
from mla_moe.rl_config import RLConfig

GOLDEN = np.load(pathlib.Path(__file__).parent / 'goldens' / 'trl.npz')
PLAIN = RLConfig(clip_low=0.2, clip_high=0.2, beta=0.0)
CASES = {
  'sequence': {},
  'token': {'aggregate': 'token'},
  'constant': {'aggregate': 'constant'},
  'dapo': {'aggregate': 'token', 'clip_high': 0.28},
  'k3': {'beta': 0.04},
  'unbiased': {'beta': 0.04, 'kl_form': 'unbiased'},
  'gspo': {'ratio': 'sequence', 'clip_low': 3e-4, 'clip_high': 4e-4},
  'cispo': {'aggregate': 'token', 'surrogate': 'cispo', 'clip_high': 5.0},
  'off_policy': {'off_policy': 0.05, 'beta': 0.04, 'kl_form': 'unbiased'},
}


@pytest.mark.parametrize('name', CASES)
def test_loss_and_gradient(name):
  rl = dataclasses.replace(PLAIN, **CASES[name])
  counts, mask = GOLDEN['counts'], GOLDEN['mask']
  rows, longest = mask.shape
  used = np.ones(rows, bool)
  weight = advantages.token_weights(counts, used, rl.aggregate, longest)
  advantage = np.broadcast_to(GOLDEN['advantages'][:, None], mask.shape)
  with jax.enable_x64(True):

    def total(log_probs):
      loss, arrays = objective.token_loss(
        log_probs,
        jnp.asarray(GOLDEN['old']),
        jnp.asarray(GOLDEN['old']),
        jnp.asarray(GOLDEN['reference']),
        jnp.asarray(advantage),
        jnp.asarray(np.where(mask, 0, -1)),
        rl,
      )
      return jnp.sum(loss * weight[:, None]), arrays

    run = jax.jit(jax.value_and_grad(total, has_aux=True))
    (loss, arrays), grad = run(jnp.asarray(GOLDEN['log_probs']))
  np.testing.assert_allclose(loss, GOLDEN[f'{name}_loss'], rtol=1e-10)
  np.testing.assert_allclose(
    grad, GOLDEN[f'{name}_grad'], rtol=1e-9, atol=1e-14
  )
  # The case reaches the branch that it is named after.
  if name in ('dapo', 'gspo', 'sequence'):
    assert 0 < np.mean(arrays['clipped'][mask > 0]) < 1
  if name == 'off_policy':
    assert 0 < np.sum(arrays['dropped']) < mask.sum()


def test_advantages():
  got, flat = advantages.advantages(GOLDEN['rewards'], 'std')
  assert not flat.any()
  np.testing.assert_allclose(got, GOLDEN['trl_advantages'], rtol=1e-3)
