"""The training step: accumulation, balance, evaluation, a mesh."""

import dataclasses
import functools

import chex
import jax
import numpy as np
import pytest

from configs import tiny
from mla_moe import sharding
from mla_moe.config import MeshConfig, freeze
from mla_moe.data import batches
from mla_moe.train import optim, step
from mla_moe.train.state import init_state

TINY = freeze(tiny.get_config('smoke'))
ADAMW = dataclasses.replace(TINY.optim, optimizer='adamw')
SMOKE = dataclasses.replace(TINY, optim=ADAMW)
RATES = optim.Rates(1e-3, 0.01, 0.3)


def make(config, seed=0):
  """A batch of two documents a row, as `config` splits it."""
  d = config.data
  random = np.random.default_rng(seed)
  stream = random.integers(0, 256, 20000).astype(np.uint16)
  stream[:: 3 * d.seq_len // 4] = 256
  return batches.batch_at(stream, d, 0, 256)


def with_data(**changes):
  return dataclasses.replace(
    SMOKE, data=dataclasses.replace(SMOKE.data, **changes)
  )


# Most tests share its program.
PARTS = with_data(micro_batch=2)


@functools.cache
def compiled(config):
  train = functools.partial(step.train_step, config=config)
  return jax.jit(train)


@functools.cache
def start():
  return init_state(jax.random.key(0), SMOKE)


@pytest.mark.slow
@pytest.mark.parametrize('packing', ['joined', 'separate'])
def test_micro_batches_change_nothing(packing):
  """Even where their numbers of targets differ."""
  whole, parts = with_data(packing=packing), None
  parts = with_data(packing=packing, micro_batch=2)
  results = []
  for config in (whole, parts):
    batch = make(config)
    batch.targets.reshape(8, -1)[0, :100] = -1
    results.append(compiled(config)(start(), batch, RATES))
  (a, m), (b, n) = results
  chex.assert_trees_all_close(m, n, rtol=2e-4, atol=1e-5)
  chex.assert_trees_all_close(a.params, b.params, atol=2e-5)
  chex.assert_trees_all_equal(a.router, b.router)


@pytest.mark.slow
def test_the_ramp_counts_only_real_micro_batches():
  config = with_data(micro_batch=2, batch_start=4, ramp_tokens=1e5)
  half = with_data(micro_batch=2, batch_size=4)
  ramp, short = make(config), make(half)
  assert ramp.tokens.shape[0] == 4 and ramp.count == 2
  a, m = compiled(config)(start(), ramp, RATES)
  b, n = compiled(half)(start(), short, RATES)
  chex.assert_trees_all_close(m, n, rtol=1e-5)
  chex.assert_trees_all_close(a.params, b.params, atol=1e-6)


def test_the_bias_follows_the_load_of_the_whole_step():
  batch = make(PARTS)
  state, metrics = compiled(PARTS)(start(), batch, RATES)
  load = np.asarray(metrics['load'])
  # Two MoE layers and an MTP module, whose last position is left out.
  rows = batch.tokens.size * 4
  assert load.sum(-1).tolist() == [rows, rows, rows - 8 * 4]
  moved = 0.01 * np.sign(load.mean(-1, keepdims=True) - load)
  main = state.router['moe']['ffn']['bias']
  np.testing.assert_allclose(main, moved[:2], atol=1e-7)
  mtp = state.router['mtp_0']['block']['ffn']['bias']
  np.testing.assert_allclose(mtp, moved[2], atol=1e-7)


def test_the_head_has_one_gradient():
  """Not one for each prediction and their sum: it is a step's largest array."""
  train = functools.partial(step.train_step, config=SMOKE)
  text = str(jax.make_jaxpr(train)(start(), make(SMOKE), RATES))
  model = SMOKE.model
  assert model.mtp.depth and not model.tie_embeddings
  assert f'f32[{model.dim},{model.vocab}]' in text
  assert f'f32[{model.dim},{model.vocab}] = add_any' not in text


def test_evaluation_counts_nats_and_moves_nothing():
  batch = make(SMOKE)
  run = jax.jit(functools.partial(step.eval_step, config=SMOKE))
  out = run(start(), batch)
  assert out['tokens'] == (batch.targets >= 0).sum()
  _, metrics = compiled(PARTS)(start(), make(PARTS), RATES)
  got = float(out['nll']) / int(out['tokens'])
  assert got == pytest.approx(float(metrics['main_loss']), rel=1e-5)
  assert set(out) == {'nll', 'tokens'}


def test_the_loss_falls_on_one_batch():
  state, batch = start(), make(PARTS)
  losses = []
  for _ in range(12):
    state, metrics = compiled(PARTS)(state, batch, RATES)
    losses.append(float(metrics['main_loss']))
  assert losses[-1] < losses[0] - 0.5
  assert int(state.step) == 12


def test_every_logical_axis_has_a_rule_and_no_parameter_collides():
  from flax import linen as nn

  from mla_moe.model import transformer

  tokens = jax.ShapeDtypeStruct((1, 8), 'int32')
  init = transformer.Transformer(SMOKE.model).init
  boxed = jax.eval_shape(init, jax.random.key(0), tokens)
  is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)
  for leaf in jax.tree.leaves(boxed, is_leaf=is_box):
    assert is_box(leaf)
    assert len(leaf.names) == len(leaf.value.shape)
    spec = [a for a in sharding.spec(leaf.names) if a]
    assert len(set(spec)) == len(spec)


@pytest.mark.slow
@pytest.mark.parametrize(
  'sizes', [dict(data=8), dict(data=2, fsdp=4), dict(expert=4, tensor=2)]
)
def test_a_mesh_gives_the_single_device_step(sizes):
  mesh_config = MeshConfig(**sizes)
  config = dataclasses.replace(SMOKE, mesh=mesh_config)
  sharding.check(config)
  batch = make(SMOKE)
  expected, m = compiled(SMOKE)(start(), batch, RATES)
  mesh = sharding.make_mesh(mesh_config)
  with jax.set_mesh(mesh):
    state = init_state(jax.random.key(0), config, mesh)
    train = jax.jit(functools.partial(step.train_step, config=config))
    got, n = train(state, batch, RATES)
  assert float(n['loss']) == pytest.approx(float(m['loss']), rel=1e-5)
  chex.assert_trees_all_equal(
    jax.device_get(got.router), jax.device_get(expected.router)
  )
  for leaf, moment in zip(
    jax.tree.leaves(state.params), jax.tree.leaves(state.opt[0].mu), strict=True
  ):
    assert leaf.sharding == moment.sharding
