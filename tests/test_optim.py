"""Schedules at the recipes' boundaries; AdamW and Muon against numpy."""

import importlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_moe import config as config_lib
from mla_moe import optim

V3 = config_lib.OptimConfig()


def rate(config, tokens):
  return optim.rates(config, 10**6, tokens).learning_rate


@pytest.mark.parametrize(
  'tokens, expected',
  [
    (0, 2.2e-4),
    (9.99e12, 2.2e-4),
    (12.15e12, (2.2e-4 + 2.2e-5) / 2),
    (14.3e12, 2.2e-5),
    (14.632e12, 2.2e-5),
    (14.634e12, 7.3e-6),
    (20e12, 7.3e-6),
  ],
)
def test_learning_rate_of_v3(tokens, expected):
  assert rate(V3, tokens) == pytest.approx(expected, rel=1e-6)


def test_warmup_gamma_and_lambda_of_v3():
  assert optim.rates(V3, 0, 0).learning_rate == pytest.approx(1.1e-7)
  assert optim.rates(V3, 1999, 0).learning_rate == pytest.approx(2.2e-4)
  for tokens, gamma, weight in (
    (0, 0.001, 0.3),
    (9.9e12, 0.001, 0.3),
    (10e12, 0.001, 0.1),
    (14.2e12, 0.001, 0.1),
    (14.3e12, 0.0, 0.1),
  ):
    got = optim.rates(V3, 0, tokens)
    assert (got.bias_rate, got.mtp_loss) == (gamma, weight)


def test_step_decay_of_v2_and_cooldown_of_moonlight():
  load = lambda name: config_lib.freeze(
    importlib.import_module(f'configs.{name}').get_config()
  ).optim
  v2 = load('deepseek_v2')
  for tokens, share in ((4e12, 1), (5e12, 0.316), (7.4e12, 0.316**2)):
    assert rate(v2, tokens) == pytest.approx(2.4e-4 * share)
  moonlight = load('moonlight_16b')
  for tokens, expected in (
    (5.2e12 - 1, 4.2e-5),
    (5.2e12 + 100 * 4096 * 8192, 1e-4),
    (5.7e12, 0.0),
  ):
    assert rate(moonlight, tokens) == pytest.approx(expected, abs=1e-9)


def tree(seed):
  random = np.random.default_rng(seed)
  normal = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
  return {
    'embedding': normal(7, 4),
    'moe': {'w_down': normal(2, 3, 6, 4), 'norm': {'scale': normal(2, 4)}},
    'w_gate_up': normal(3, 4, 2, 6),
  }


def test_adamw_equals_numpy():
  config = config_lib.OptimConfig(clip=0.5)
  tx = optim.optimizer(config)
  params = tree(0)
  opt = tx.init(params)
  slow = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
  m = jax.tree.map(np.zeros_like, slow)
  v = jax.tree.map(np.zeros_like, slow)
  for t in range(1, 5):
    grads = tree(t)
    params, opt, norm = optim.apply(tx, grads, opt, params, 0.01, config.clip)
    g = jax.tree.map(lambda x: np.asarray(x, np.float64), grads)
    size = np.sqrt(sum((x**2).sum() for x in jax.tree.leaves(g)))
    assert float(norm) == pytest.approx(size, rel=1e-5)
    g = jax.tree.map(lambda x: x * min(1, 0.5 / size), g)  # noqa: B023
    m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, g)
    v = jax.tree.map(lambda v, g: 0.95 * v + 0.05 * g * g, v, g)

    def step(path, p, m, v, t=t):
      decay = 0 if path[-1].key == 'scale' else 0.1
      move = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
      return p - 0.01 * (move + decay * p)

    slow = jax.tree_util.tree_map_with_path(step, slow, m, v)
  expected = jax.tree.map(lambda x: x.astype(np.float32), slow)
  chex.assert_trees_all_close(params, expected, rtol=1e-5, atol=1e-6)


def test_muon_orthogonalises_each_matrix_of_a_stack():
  config = config_lib.OptimConfig(optimizer='muon', weight_decay=0.0)
  tx = optim.optimizer(config)
  params, grads = tree(0), tree(1)
  new, _, _ = optim.apply(tx, grads, tx.init(params), params, 1.0, 1e9)
  moved = np.asarray(params['moe']['w_down'] - new['moe']['w_down'])
  for one in moved.reshape(6, 6, 4):
    # Five Newton-Schulz steps bring singular values near 1, times the scale.
    values = np.linalg.svd(one / (0.2 * np.sqrt(6)), compute_uv=False)
    assert (values > 0.6).all() and (values < 1.3).all()
  pair = np.asarray(params['w_gate_up'] - new['w_gate_up'])
  for one in pair.transpose(0, 2, 1, 3).reshape(6, 4, 6):
    values = np.linalg.svd(one / (0.2 * np.sqrt(6)), compute_uv=False)
    assert (values > 0.6).all() and (values < 1.3).all()
  # The embedding is AdamW's: its first step is the sign of the gradient.
  sign = params['embedding'] - new['embedding']
  chex.assert_trees_all_close(sign, jnp.sign(grads['embedding']), atol=1e-3)


@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_state_is_float32_and_nothing_moves_without_gradient(name):
  config = config_lib.OptimConfig(optimizer=name, weight_decay=0.0)
  tx, params = optim.optimizer(config), tree(0)
  opt = tx.init(params)
  kinds = {str(x.dtype) for x in jax.tree.leaves(opt) if x.ndim}
  assert kinds == {'float32'}
  zeros = jax.tree.map(jnp.zeros_like, params)
  new, _, norm = optim.apply(tx, zeros, opt, params, 0.1, 1.0)
  assert norm == 0
  chex.assert_trees_all_close(new, params, atol=1e-6)
