"""The training step: accumulation, balance, evaluation, a mesh."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from configs import tiny
from experiments import mesh_check
from experiments.data import batches
from experiments.training import evaluation
from mla_moe import sharding
from mla_moe.config import ComputeConfig, MeshConfig, MTPConfig, freeze
from mla_moe.model import moe, transformer
from mla_moe.train import optim, step
from mla_moe.train.state import abstract_state, init_state

TINY = freeze(tiny.get_config('smoke'))
ADAMW = dataclasses.replace(TINY.optim, optimizer='adamw')
SMOKE = dataclasses.replace(TINY, optim=ADAMW)
MICRO = freeze(tiny.get_config('micro'))
RATES = optim.Rates(1e-3, 0.01, 0.3)


def make(config, seed=0):
  """A batch of two documents a row, as `config` splits it."""
  d = config.data
  random = np.random.default_rng(seed)
  stream = random.integers(0, 256, 20000).astype(np.uint16)
  stream[:: 3 * d.seq_len // 4] = 256
  return batches.batch_at(stream, d, 0, 256)


# The fast tests share its program: two MoE layers and an MTP module, of which
# nothing is made again for the backward pass.
PLAIN = dataclasses.replace(
  SMOKE.model, layers=2, dense_layers=0, compute=ComputeConfig(remat='none')
)


def with_data(**changes):
  data = dataclasses.replace(SMOKE.data, **changes)
  return dataclasses.replace(SMOKE, data=data, model=PLAIN)


WHOLE = with_data(seq_len=32)
PARTS = with_data(seq_len=32, micro_batch=2)


@functools.cache
def compiled(config):
  train = functools.partial(step.train_step, config=config)
  return jax.jit(train)


@functools.cache
def start(config=SMOKE):
  return init_state(jax.random.key(0), config)


@pytest.mark.slow
@pytest.mark.parametrize(
  'packing', [pytest.param('joined', marks=pytest.mark.by_hand), 'separate']
)
def test_micro_batches_change_nothing(packing):
  """Even where their numbers of targets differ."""
  whole, parts = with_data(packing=packing), None
  parts = with_data(packing=packing, micro_batch=2)
  results = []
  for config in (whole, parts):
    batch = make(config)
    batch.targets.reshape(8, -1)[0, :100] = -1
    results.append(compiled(config)(start(PARTS), batch, RATES))
  (a, m), (b, n) = results
  chex.assert_trees_all_close(m, n, rtol=2e-4, atol=1e-5)
  # Adam's first step divides a gradient by itself, be it rounding alone. Its
  # first moment is the clipped gradient, times a constant.
  grads, oracle = (jax.tree.leaves(state.opt[0].mu) for state in (a, b))
  for ours, theirs in zip(grads, oracle, strict=True):
    assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()
  chex.assert_trees_all_equal(a.router, b.router)


@pytest.mark.slow
def test_the_ramp_counts_only_real_micro_batches():
  config = with_data(micro_batch=2, batch_start=4, ramp_tokens=1e5)
  half = with_data(micro_batch=2, batch_size=4)
  ramp, short = make(config), make(half)
  assert ramp.tokens.shape[0] == 4 and ramp.count == 2
  a, m = compiled(config)(start(PARTS), ramp, RATES)
  b, n = compiled(half)(start(PARTS), short, RATES)
  chex.assert_trees_all_close(m, n, rtol=1e-5)
  chex.assert_trees_all_close(a.params, b.params, atol=1e-6)


def test_the_loss_has_every_part_by_its_own_count():
  """Where each token costs log V, and the balance of each MoE layer is 1.

  A row has two documents of 4 tokens, and one of the two rows no targets.
  Module k (from 1) predicts the token k further on in the row and the document:
  of 8 targets the first module has 6, the second 4.
  """
  compute = ComputeConfig(remat='none', attention='reference', experts='dense')
  model = dict(layers=1, dense_layers=0, mtp=MTPConfig(depth=2))
  model = dataclasses.replace(MICRO.model, compute=compute, **model)
  weights = dict(z_loss=1e-3, balance_loss=0.1)
  weights = dataclasses.replace(MICRO.optim, **weights)
  data = dataclasses.replace(MICRO.data, batch_size=2, packing='separate')
  config = dataclasses.replace(MICRO, model=model, optim=weights, data=data)
  # All logits are 0, and the scores of all experts are equal.
  state = jax.tree.map(
    lambda x: np.full(x.shape, 0.1, x.dtype), nn.unbox(abstract_state(config))
  )
  state.params['w_head'][:] = 0
  whole = np.ones((1, 2, 8), np.int32)
  targets, segments = whole * np.arange(8), whole * (np.arange(8) // 4)
  targets[:, 1] = -1
  arrays = whole, targets.astype(np.int32), segments.astype(np.int32)
  batch = batches.Batch(*arrays, 0 * whole, np.int32(1))
  names = 'loss', 'main_loss', 'mtp_loss', 'balance_loss', 'load'

  @jax.jit
  def forward(state):  # the gradient is not computed
    _, metrics = step.train_step(state, batch, RATES, config=config)
    return {name: metrics[name] for name in names}

  m = forward(state)
  nats = np.log(264)
  mtp = (6 + 4) / 2 / 8 * nats
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5)
  close(m['main_loss'], nats)
  close(m['mtp_loss'], mtp)
  close(m['balance_loss'], 1.0)
  close(m['loss'], nats + 0.3 * mtp + 1e-3 * nats**2 + 0.1 * 3)
  # The last tokens of a document have no successor for a module.
  np.testing.assert_array_equal(m['load'][:, 0], [16, 12, 8])
  assert m['load'][:, 2:].max() == 0


def test_biases_of_a_module_follow_its_own_row_of_the_load():
  """The busiest expert's bias falls by the rate, the others' rise by it."""
  names = {'moe': (1, 4), 'mtp_0': (4,), 'mtp_1': (4,)}
  biases = {name: {'bias': jnp.zeros(names[name])} for name in names}
  model = dataclasses.replace(
    MICRO.model, layers=1, dense_layers=0, mtp=MTPConfig(depth=2)
  )
  load = 4 * jnp.eye(3, 4, dtype=jnp.int32)
  rows = step._bias_rows(biases, model)
  moved = step._rebalance(biases, rows, load, 1.0)
  right = 1 - 2 * np.eye(3, 4)
  np.testing.assert_array_equal(moved['moe']['bias'], right[:1])
  np.testing.assert_array_equal(moved['mtp_0']['bias'], right[1])
  np.testing.assert_array_equal(moved['mtp_1']['bias'], right[2])
  assert step._norms(moved, rows)['bias_norm'].tolist() == [2, 2, 2]
  assert step._norms({}, {}) == {}


@pytest.mark.parametrize('count, right', [(1, 1), (2, 3), (3, 7)])
def test_only_the_real_micro_batches_of_a_ramp_are_summed(count, right):
  objective = lambda w, micro: (w * micro.tokens[0, 0], {'n': micro.tokens})
  tokens = 2 ** jnp.arange(3, dtype=jnp.int32).reshape(3, 1, 1)
  batch = batches.Batch(*[tokens] * 4, jnp.int32(count))
  grad, metrics = step._accumulate(objective, jnp.float32(5), batch)
  assert int(grad) == int(metrics['n'].sum()) == right


def test_targets_of_the_modules_end_with_the_row_and_the_document():
  ahead = lambda *args: step._ahead(*map(jnp.array, args[:2]), args[2])
  rows = [[5, -1, 7, 8]], [[1, 1, 2, 2]]
  np.testing.assert_array_equal(ahead(*rows, 1), [[-1, -1, 8, -1]])
  rows = [[5, 6, 7, 8]], [[0, 0, 0, 0]]
  np.testing.assert_array_equal(ahead(*rows, 1), [[6, 7, 8, -1]])
  np.testing.assert_array_equal(ahead(*rows, 2), [[7, 8, -1, -1]])


def test_a_model_without_experts_has_statistics_of_no_layers():
  fields = dataclasses.fields(transformer.Features)
  none = transformer.Features(*[None] * len(fields))
  stats = step._joined_stats(none)
  assert [x.shape for x in stats] == [(0, 1), (0,), (0,), (0,)]
  one = moe.Stats(jnp.ones((2, 4)), jnp.ones(2), jnp.ones(2), jnp.ones(2))
  last = jax.tree.map(lambda x: 5 * x[:1], one)
  both = step._joined_stats(
    dataclasses.replace(none, stats=one, mtp_stats=last)
  )
  assert both.balance.tolist() == [1, 1, 5] and both.load.shape == (3, 4)


def test_a_step_is_judged_by_its_loss_its_gradient_and_its_main_loss():
  named = lambda loss, main: {'loss': loss, 'main_loss': main}
  judge = lambda window, loss, main, norm: float(
    step._judge(window, named(loss, main), norm, watched)[0]
  )
  watched = dataclasses.replace(MICRO.optim, spike_sigma=2.0, spike_window=2)
  nan, one = jnp.nan, jnp.float32(1)
  assert judge({}, one, one, one) == 0
  assert judge({}, one, one, nan) == judge({}, nan, one, one) == 1
  # The mean is 2, the deviation 1: the limit is 4, of the main loss alone.
  window = {'losses': jnp.array([1.0, 3.0]), 'seen': jnp.int32(2)}
  assert judge(window, one * 9, one * 3.9, one) == 0
  assert judge(window, one, one * 4.1, one) == 2
  assert judge(window, nan, one * 4.1, one) == 1
  _, after = step._judge(window, named(one * 9, one * 3.5), one, watched)
  np.testing.assert_array_equal(after['losses'], [3.5, 3.0])
  assert judge(window | {'seen': jnp.int32(1)}, one, one * 9, one) == 0


def test_the_bias_follows_the_load_of_the_whole_step():
  batch = make(PARTS)
  state, metrics = compiled(PARTS)(start(PARTS), batch, RATES)
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
  text = str(jax.make_jaxpr(compiled(PARTS))(start(PARTS), make(PARTS), RATES))
  model = PARTS.model
  assert model.mtp.depth and not model.tie_embeddings
  assert f'f32[{model.dim},{model.vocab}]' in text
  assert f'f32[{model.dim},{model.vocab}] = add_any' not in text


def test_evaluation_counts_nats_and_moves_nothing():
  batch = make(WHOLE)
  run = jax.jit(functools.partial(evaluation.eval_step, config=WHOLE))
  out = run(start(PARTS), batch)
  assert out['tokens'] == (batch.targets >= 0).sum()
  _, metrics = compiled(PARTS)(start(PARTS), make(PARTS), RATES)
  got = float(out['nll']) / int(out['tokens'])
  assert got == pytest.approx(float(metrics['main_loss']), rel=1e-5)
  assert set(out) == {'nll', 'tokens'}


def test_the_loss_falls_on_one_batch():
  state, batch = start(PARTS), make(PARTS)
  losses = []
  for _ in range(12):
    state, metrics = compiled(PARTS)(state, batch, RATES)
    losses.append(float(metrics['main_loss']))
  assert losses[-1] < losses[0] - 0.5
  assert int(state.step) == 12


def test_every_logical_axis_has_a_rule_and_no_parameter_collides():
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


@pytest.mark.by_hand
@pytest.mark.parametrize(
  'sizes', [dict(fsdp=2, expert=2, tensor=2), dict(data=8)]
)
def test_a_mesh_gives_the_single_device_step(sizes):
  """From the smoke run's first state; test_sharding.py has more meshes."""
  mesh_config = MeshConfig(**sizes)
  config = dataclasses.replace(SMOKE, mesh=mesh_config)
  mesh_check.check(config)
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
