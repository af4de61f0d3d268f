"""Schedules at the recipes' boundaries; AdamW and Muon against numpy."""

import dataclasses
import functools
import importlib
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from configs import smoke
from mla_moe import sharding
from mla_moe.config import (
  Config,
  MeshConfig,
  MLAConfig,
  MoEConfig,
  MTPConfig,
  OptimConfig,
  freeze,
  thaw,
)
from mla_moe.model import transformer
from mla_moe.train import optim, stage
from mla_moe.train.state import init_state

V3 = OptimConfig()


@functools.partial(jax.jit, static_argnums=(0, 5))
def apply(tx, grads, opt, params, learning_rate, clip):
  grads, norms = stage.clipped(grads, clip)
  return *optim.apply(tx, grads, opt, params, learning_rate), *norms.values()


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
  load = lambda name: (
    freeze(importlib.import_module(f'configs.{name}').get_config()).optim
  )
  v2 = load('deepseek_v2')
  for tokens, fraction in ((4e12, 1), (5e12, 0.316), (7.4e12, 0.316**2)):
    assert rate(v2, tokens) == pytest.approx(2.4e-4 * fraction)
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
  config = OptimConfig(clip=0.5)
  tx = optim.optimizer(config)
  params = tree(0)
  opt = tx.init(params)
  slow = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
  m = jax.tree.map(np.zeros_like, slow)
  v = jax.tree.map(np.zeros_like, slow)
  for t in range(1, 5):
    grads = tree(t)
    params, opt, norm = apply(tx, grads, opt, params, 0.01, config.clip)
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


@pytest.mark.parametrize('clip, expected', [(10.0, [3, 4]), (1.0, [0.6, 0.8])])
def test_only_gradients_above_the_clip_are_scaled(clip, expected):
  grads, norms = stage.clipped({'w': jnp.array([3.0, 4.0])}, clip)
  np.testing.assert_allclose(grads['w'], expected, rtol=1e-6)
  assert norms == {'grad_norm': 5.0}


def test_muon_orthogonalises_each_matrix_of_a_stack():
  config = OptimConfig(optimizer='muon', weight_decay=0.0)
  tx = optim.optimizer(config)
  params, grads = tree(0), tree(1)
  new, _, _ = apply(tx, grads, tx.init(params), params, 1.0, 1e9)
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
  config = OptimConfig(optimizer=name, weight_decay=0.0)
  tx, params = optim.optimizer(config), tree(0)
  opt = tx.init(params)
  kinds = {str(x.dtype) for x in jax.tree.leaves(opt) if x.ndim}
  assert kinds == {'float32'}
  zeros = jax.tree.map(jnp.zeros_like, params)
  new, _, norm = apply(tx, zeros, opt, params, 0.1, 1.0)
  assert norm == 0
  chex.assert_trees_all_close(new, params, atol=1e-6)


def test_anneal_of_k2_and_exact_boundaries_of_v2_and_moonlight():
  load = lambda name: (
    freeze(importlib.import_module(f'configs.{name}').get_config()).optim
  )
  k2 = load('kimi_k2')
  for tokens, expected in (
    (0, 2e-4),
    (10e12, 2e-4),
    (12.75e12, 1.1e-4),
    (15.5e12, 2e-5),
    (15.9e12, 7e-6),
  ):
    assert rate(k2, tokens) == pytest.approx(expected, rel=1e-6)
  v2 = load('deepseek_v2')
  for edge, before, after in ((0.6, 1, 0.316), (0.9, 0.316, 0.316**2)):
    assert rate(v2, edge * 8.1e12 - 1e6) == pytest.approx(2.4e-4 * before)
    assert rate(v2, edge * 8.1e12 + 1e6) == pytest.approx(2.4e-4 * after)
  moonlight = load('moonlight_16b')
  assert rate(moonlight, 0) == pytest.approx(4.2e-4)
  assert rate(moonlight, 2.6e12) == pytest.approx((4.2e-4 + 4.2e-5) / 2)
  assert rate(moonlight, 5.45e12) == pytest.approx(0.5e-4, rel=0.01)


def test_only_a_constant_phase_jumps():
  """V3's recipe: continuous at both ends of the cosine, then a step."""
  for edge, jump in ((10e12, False), (14.3e12, False), (14.633e12, True)):
    before, after = rate(V3, edge - 1e6), rate(V3, edge + 1e6)
    assert (abs(after / before - 1) > 1e-6) == jump
  # A phase without length only moves the point that the next one starts from.
  phases = (('constant', 0.0, 0.5), ('linear', 100.0, 0.0))
  for tokens, fraction in ((0, 0.5), (50, 0.25), (100, 0), (1e9, 0)):
    assert optim.decay(phases, tokens) == pytest.approx(fraction)


# Rows, which a product with the matrix sums, and columns; width is 18 or 22.
SIZES = {
  'w_q_down': (32, 10), 'w_q_up': (10, 30), 'w_q': (32, 30),
  'w_kv_down': (32, 14), 'w_k_rope': (32, 4), 'w_k_up': (14, 18),
  'w_v_up': (14, 15), 'w_out': (15, 32), 'w_router': (32, 8),
  'w_join': (64, 32), 'w_gate_up': (32, 'width'), 'w_down': ('width', 32),
  'w_k': (32, 10), 'w_v': (32, 5),
}  # fmt: skip


def test_every_parameter_is_known_to_both_optimizers():
  """A new weight must be entered in Muon's table, or here."""
  mla = MLAConfig(3, 10, 14, nope_dim=6, rope_dim=4, value_dim=5)
  moe = MoEConfig(experts=8, top_k=2, width=18, groups=2, top_groups=1)
  model = dataclasses.replace(
    freeze(thaw(smoke(Config()))).model,
    **dict(dim=32, dense_width=22, mla=mla, moe=moe),
  )
  plain = dataclasses.replace(mla, query_rank=0)
  plain = dataclasses.replace(model, mla=plain)
  grouped = dataclasses.replace(plain, attention='gqa', kv_heads=1)
  sizes = set()
  for c in (model, plain, grouped):
    shapes = jax.eval_shape(
      transformer.Transformer(c).init,
      jax.random.key(0),
      jnp.zeros((1, 8), jnp.int32),
    )['params']
    assert shapes['w_head'].names == shapes['embedding'].names[::-1]
    params = nn.unbox(shapes)
    paths = jax.tree_util.tree_flatten_with_path(params)[0]
    names = {path[-1].key for path, _ in paths}
    assert names - set(optim._MATRICES) == {'embedding', 'w_head', 'scale'}
    mask = jax.tree_util.tree_flatten_with_path(optim.decayed(params))[0]
    assert {p[-1].key for p, decays in mask if not decays} == {'scale'}
    for path, leaf in paths:
      for axes in optim._MATRICES.get(path[-1].key, ()):
        size = math.prod(leaf.shape[a] for a in axes)
        is_width = 'w_gate_up' == path[-1].key and axes == (-1,)
        is_width |= 'w_down' == path[-1].key and axes == (-2,)
        assert not is_width or size in (18, 22)
        sizes.add((path[-1].key, axes, 'width' if is_width else size))
  assert sizes == {
    (name, *pair)
    for name, axes in optim._MATRICES.items()
    for pair in zip(axes, SIZES[name], strict=True)
  }


def test_muon_of_a_stack_is_muon_of_each_layer():
  config = OptimConfig(optimizer='muon')
  tx = optim.optimizer(config)
  names = {'w_gate_up': (4, 2, 6), 'w_q_up': (4, 2, 3), 'w_out': (2, 3, 4)}
  random = np.random.default_rng(0)
  draw = lambda: {
    n: jnp.asarray(random.normal(size=(3, *s)), jnp.float32)
    for n, s in names.items()
  }

  @jax.jit
  def run(params, grads):
    opt = tx.init(params)
    for g in grads:
      params, opt, _ = apply(tx, g, opt, params, 0.1, 1e9)
    return params

  params, grads = draw(), [draw(), draw()]
  stacked = run(params, grads)
  for i in range(3):
    layer = lambda tree, i=i: jax.tree.map(lambda x: x[i], tree)
    alone = run(layer(params), [layer(g) for g in grads])
    chex.assert_trees_all_close(layer(stacked), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name, decays', [('adamw', False), ('muon', True)])
def test_norms_decay_under_muon_only(name, decays):
  tx, params = optim.optimizer(OptimConfig(optimizer=name)), tree(0)
  zeros = jax.tree.map(jnp.zeros_like, params)
  new, _, _ = apply(tx, zeros, tx.init(params), params, 0.1, 1.0)
  shrunk = jax.tree.map(lambda p: p * (1 - 0.1 * 0.1), params)
  expected = (
    shrunk
    if decays
    else {**shrunk, 'moe': {**shrunk['moe'], 'norm': params['moe']['norm']}}
  )
  chex.assert_trees_all_close(new, expected, rtol=1e-6)


@pytest.mark.parametrize('name', ['adamw', 'muon'])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_a_quadratic_falls_and_all_stays_float32(name, dtype):
  config = OptimConfig(optimizer=name, weight_decay=0.0)
  tx, params, aim = optim.optimizer(config), tree(0), tree(1)
  opt = tx.init(params)
  loss = lambda p: sum(
    jnp.square(a - b).sum()
    for a, b in zip(jax.tree.leaves(p), jax.tree.leaves(aim), strict=True)
  )
  first = loss(params)

  @jax.jit
  def step(params, opt):
    grads = jax.tree.map(lambda g: g.astype(dtype), jax.grad(loss)(params))
    return apply(tx, grads, opt, params, 0.1, 1.0)

  for _ in range(40):
    params, opt, norm = step(params, opt)
  assert loss(params) < 0.5 * first
  for leaf in jax.tree.leaves((params, opt, norm)):
    assert leaf.dtype in (jnp.float32, jnp.int32)


def test_adamw_works_in_place():
  """The new state takes the old one's memory, and nothing else is made."""
  tx = optim.optimizer(V3)
  params = {'w': jnp.ones((512, 512)), 'norm': {'scale': jnp.ones((512,))}}
  opt = tx.init(params)
  chex.assert_trees_all_equal_shapes_and_dtypes(opt[0].mu, params)
  chex.assert_trees_all_equal_shapes_and_dtypes(opt[0].nu, params)
  # Donated buffers are matched in order: state goes out as it came in.
  f = lambda p, opt, g, accept: optim.apply(tx, g, opt, p, 1e-3, accept)
  run = jax.jit(f, donate_argnums=(0, 1))
  compiled = run.lower(params, opt, params, jnp.bool_(True))
  memory = compiled.compile().memory_analysis()
  assert memory.alias_size_in_bytes >= 3 * 4 * 512 * 513
  assert memory.temp_size_in_bytes < 4 * 512 * 16


@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_an_update_that_is_not_accepted_changes_nothing(name):
  tx, params = optim.optimizer(OptimConfig(optimizer=name)), tree(0)
  opt = tx.init(params)
  grads = jax.tree.map(lambda p: jnp.full(p.shape, jnp.nan), params)
  apply = jax.jit(optim.apply, static_argnums=0)
  unchanged = apply(tx, grads, opt, params, 0.1, jnp.bool_(False))
  chex.assert_trees_all_equal(unchanged, (params, opt))


@pytest.mark.parametrize('decay', [0.0, 0.1])
def test_adam_from_stored_moments_is_optaxs(decay):
  config = OptimConfig(weight_decay=decay)
  ours, params = optim.optimizer(config), tree(0)
  theirs = optax.adamw(
    1.0,
    config.beta1,
    config.beta2,
    config.eps,
    weight_decay=decay,
    mask=optim.decayed,
    mu_dtype=jnp.float32,
  )
  one, other = ours.init(params), theirs.init(params)
  chex.assert_trees_all_equal_shapes_and_dtypes(one, other)
  for seed in range(3):
    grads = tree(seed + 1)
    updates, one = ours.update(grads, one, params, accept=True)
    expected, other = theirs.update(grads, other, params)
    chex.assert_trees_all_close((updates, one), (expected, other), rtol=1e-6)


@pytest.mark.slow
def test_muon_on_a_mesh_lies_where_its_parameters_lie():
  config = freeze(thaw(smoke(Config())))
  config = dataclasses.replace(
    config,
    model=dataclasses.replace(
      config.model, layers=1, dense_layers=0, mtp=MTPConfig(depth=0)
    ),
    optim=OptimConfig(optimizer='muon'),
    mesh=MeshConfig(data=4, expert=2),
  )
  mesh = sharding.make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    state = init_state(jax.random.key(0), config, mesh)
  where = state.params['moe']['ffn']['w_gate_up'].sharding
  assert 'expert' in where.spec
  flat = jax.tree_util.tree_flatten_with_path(state.opt)[0]
  end = "['moe']['ffn']['w_gate_up']"
  same = [x for p, x in flat if jax.tree_util.keystr(p).endswith(end)]
  assert len(same) == 1 and same[0].sharding == where
