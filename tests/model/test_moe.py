"""Routing against a slow numpy version; experts against the dense oracle."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_moe import fp8, sharding
from mla_moe.config import MeshConfig, ModelConfig, MoEConfig
from mla_moe.model import (
  expert_loop,
  experts,
  moe,
  products,
  router,
  weights,
)

V3 = MoEConfig(experts=16, top_k=4, width=8, groups=4, top_groups=2, shared=0)
VARIANTS = {
  'v3': V3,
  'v2': dataclasses.replace(
    V3, scoring='softmax', method='group_limited_greedy', normalize=False
  ),
  'lite': dataclasses.replace(
    V3, scoring='softmax', method='greedy', groups=1, top_groups=1
  ),
  'kimi': dataclasses.replace(V3, groups=1, top_groups=1),
}


route = jax.jit(router.route, static_argnums=3)


def slow_route(logits, bias, c):
  """Token by token, in float64."""
  routings = []
  for row in logits.astype(np.float64):
    if c.scoring == 'sigmoid':
      s = 1 / (1 + np.exp(-row))
    else:
      s = np.exp(row - row.max())
      s /= s.sum()
    biased = s + (0 if bias is None else bias)
    allowed = np.arange(c.experts)
    if c.groups > 1:
      groups = allowed.reshape(c.groups, -1)
      best = 2 if c.method == 'noaux_tc' else 1
      value = [np.sort(biased[g])[::-1][:best].sum() for g in groups]
      top = np.argsort(value)[::-1][: c.top_groups]
      allowed = groups[top].reshape(-1)
    chosen = allowed[np.argsort(biased[allowed])[::-1][: c.top_k]]
    w = s[chosen]
    if c.normalize:
      w = w / w.sum()
    routings.append(dict(zip(chosen.tolist(), w * c.scale, strict=True)))
  return routings


@pytest.mark.parametrize('name', VARIANTS)
def test_routing_equals_the_slow_version(name):
  c = VARIANTS[name]
  random = np.random.default_rng(0)
  x = random.normal(size=(64, 12)).astype(np.float32)
  w = random.normal(size=(12, 16)).astype(np.float32)
  bias = None
  if c.method == 'noaux_tc':  # negative ones: a mask of 0 would win
    bias = (random.normal(size=16) - 1.5).astype(np.float32)
  got = route(x, w, bias, c)
  for i, expected in enumerate(slow_route(x @ w, bias, c)):
    assert set(got.chosen[i].tolist()) == set(expected)
    for expert, gate in zip(got.chosen[i], got.gates[i], strict=True):
      assert gate == pytest.approx(expected[int(expert)], rel=1e-4)


def test_the_router_multiplies_in_float32_on_every_platform():
  """By default a TPU would compute float32 products in bfloat16."""
  shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((32, 12), (12, 16))]
  gates = lambda x, w: router.route(x, w, None, VARIANTS['lite']).gates.sum()
  traced = jax.jit(jax.grad(gates, (0, 1))).trace(*shapes)
  text = traced.lower(lowering_platforms=('tpu',)).as_text()
  dots = [line for line in text.splitlines() if 'dot_general' in line]
  assert len(dots) == 3
  for line in dots:
    assert 'precision = [HIGHEST, HIGHEST]' in line


def test_a_bias_moves_the_selection_and_never_a_gate_value():
  random = np.random.default_rng(1)
  x = random.normal(size=(32, 12)).astype(np.float32)
  w = random.normal(size=(12, 16)).astype(np.float32)
  c = dataclasses.replace(V3, normalize=False)
  bias = np.zeros(16, np.float32)
  before = route(x, w, bias, c)
  bias = bias + np.float32(10) * (np.arange(16) == 3)  # it may still be read
  after = route(x, w, bias, c)
  assert (after.chosen == 3).any(1).all()
  assert not (before.chosen == 3).any(1).all()
  gates = jnp.take_along_axis(after.scores, after.chosen, 1) * c.scale
  chex.assert_trees_all_equal(after.gates, gates)
  grad = jax.grad(lambda b: route(x, w, b, c).gates.sum())(bias)
  assert not grad.any()


def test_rebalance_equals_the_slow_version():
  load = np.array([[5, 1, 3, 3], [0, 0, 12, 0]], np.int32)
  bias = np.arange(8, dtype=np.float32).reshape(2, 4)
  expected = bias.copy()
  for layer in range(2):
    for e in range(4):
      expected[layer, e] += 0.5 * np.sign(load[layer].mean() - load[layer, e])
  chex.assert_trees_all_equal(router.rebalance(bias, load, 0.5), expected)


def test_balance_loss_equals_the_slow_version():
  random = np.random.default_rng(2)
  scores = random.uniform(size=(3, 10, 8)).astype(np.float32)
  mask = np.ones((3, 10), np.float32)
  mask[1, 7:] = 0
  total = 0.0
  for b in range(3):
    rows = scores[b].astype(np.float64)[mask[b] > 0]
    f, p = np.zeros(8), np.zeros(8)
    for row in rows:
      f[np.argsort(row)[::-1][:2]] += 8 / (2 * len(rows))
      p += row / row.sum() / len(rows)
    total += (f * p).sum() / 3
  got = jax.jit(router.balance)(scores, jax.lax.top_k(scores, 2)[1], mask)
  assert float(got) == pytest.approx(total, rel=1e-5)
  eyes = np.tile(np.eye(8, dtype=np.float32), (1, 4, 1))
  ids = np.tile(np.arange(8, dtype=np.int32), 4)[None, :, None]
  assert float(router.balance(eyes, ids)) == pytest.approx(1.0)


@pytest.mark.parametrize('name', VARIANTS)
def test_balance_loss_counts_by_the_methods_own_rule(name):
  """V2 counts experts within the best groups, V3 without groups and bias."""
  c = VARIANTS[name]
  groups = min(c.groups, 2)
  c = dataclasses.replace(c, experts=4, top_k=2, groups=groups, top_groups=1)
  # The two best experts are 0 and 2, those of the best group 0 and 1; the bias
  # chooses 1 and 3.
  logits = jnp.float32([[3.0, 1.0, 2.0, -2.0]])
  bias = jnp.float32([-9, 9, -9, 9]) if c.method == 'noaux_tc' else None
  routing = route(logits, jnp.eye(4), bias, c)
  best = {0, 1} if name == 'v2' else {0, 2}
  assert set(router.counted(routing, c)[0].tolist()) == best
  # Of one token it is sum_i f_i P_i, with f = experts / top_k = 2 for the best.
  s = np.float64(routing.scores[0])
  expected = 2 * s[list(best)].sum() / s.sum()
  ws = jnp.ones((4, 4, 2, 8)), jnp.ones((4, 8, 4))
  config = ModelConfig(moe=c)
  arrays = logits[None], None, jnp.eye(4), bias, ws
  run = jax.jit(moe.routed, static_argnums=(5, 6))
  _, stats, _ = run(*arrays, config, products.NO_FP8)
  assert float(stats.balance) == pytest.approx(expected, rel=1e-6)


def test_entropy_of_even_scores_is_ln_e():
  scores = jnp.float32([[2, 2, 2, 2], [3, 0, 0, 0]])
  for mask, expected in (
    (None, np.log(4) / 2),
    (jnp.float32([1, 0]), np.log(4)),
    (jnp.float32([0, 1]), 0.0),
  ):
    assert float(router.entropy(scores, mask)) == pytest.approx(expected)


def expert_inputs(m=48, e=16, k=4, d=12, f=8, skew=0.0):
  random = np.random.default_rng(3)
  normal = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
  logits = normal(m, e) - skew * jnp.arange(e)[None]
  chosen = jnp.argsort(-logits, axis=1)[:, :k].astype(jnp.int32)
  gates = jnp.asarray(random.uniform(size=(m, k)), jnp.float32)
  x, w_gate_up, w_down = normal(m, d), normal(e, d, 2, f), normal(e, f, d)
  return (x, gates, w_gate_up, w_down), chosen, normal(m, d)


@pytest.mark.parametrize('impl', ['loop', 'ragged', 'padded', 'dense'])
def test_packed_experts_are_the_same(impl):
  (x, gates, gate_up, down), chosen, _ = expert_inputs()
  run = functools.partial(experts.feed_forward, x, gates, chosen, impl=impl)
  run = jax.jit(functools.partial(run, expected=8))  # most go through the loop
  joined = weights.packed(gate_up)
  assert joined.shape == (16, 12, 16)
  dense = experts.feed_forward(x, gates, chosen, gate_up, down, impl='dense')
  for up in (gate_up, joined):
    got = run(up, down)
    chex.assert_trees_all_close(got, dense, rtol=2e-4, atol=2e-4)


@functools.partial(jax.jit, static_argnames=('impl', 'expected'))
def output_and_gradients(args, chosen, g, impl, expected=0):
  f = lambda x, gates, *ws: experts.feed_forward(
    x, gates, chosen, *ws, impl=impl, expected=expected
  )
  out, pull = jax.vjp(f, *args)
  return out, pull(g)


@pytest.mark.parametrize('impl', ['loop', 'ragged', 'padded'])
@pytest.mark.parametrize(
  'm, skew', [(48, 0.0), (48, 9.0), (1, 0.0), (530, 0.0), (600, 9.0)]
)
def test_experts_equal_the_dense_oracle(impl, m, skew):
  """With skew, four experts get every token and the others none."""
  args, chosen, g = expert_inputs(m, skew=skew)
  got = output_and_gradients(args, chosen, g, impl)
  dense = output_and_gradients(args, chosen, g, 'dense')
  chex.assert_trees_all_close(got, dense, rtol=2e-4, atol=2e-4)
  if skew:  # experts without tokens have gradients of exactly zero
    assert not np.asarray(got[1][2])[4:].any()
    assert not np.asarray(got[1][3])[4:].any()


@pytest.mark.parametrize('impl', ['loop', 'ragged', 'padded'])
def test_rows_beyond_the_buffer_equal_the_dense_oracle(impl):
  """Four experts have all 2400 rows, where 512 (ragged) or 40 each fit.

  One in five ids is of another device's expert and adds nothing.
  """
  args, chosen, g = expert_inputs(600, skew=9.0)
  chosen = chosen.at[::5].set(16)
  got = output_and_gradients(args, chosen, g, impl, chosen.size // 8)
  dense = output_and_gradients(args, chosen, g, 'dense')
  chex.assert_trees_all_close(got, dense, rtol=2e-4, atol=2e-4)
  assert np.abs(dense[0]).max() > 10 and not np.asarray(got[0])[::5].any()


@pytest.mark.parametrize('impl', ['ragged', 'padded'])
def test_overflow_adds_to_the_gradient_that_there_is(impl):
  """Two gradients of all experts and their sum are a layer's largest arrays."""
  args, chosen, _ = expert_inputs(skew=9.0)
  f = functools.partial(
    experts.feed_forward, chosen=chosen, impl=impl, expected=8
  )
  loss = lambda *a: jnp.square(f(a[0], a[1], w_gate_up=a[2], w_down=a[3])).sum()
  text = str(jax.make_jaxpr(jax.grad(loss, (2, 3)))(*args))
  assert 'add_any' in text  # x has several
  for w in args[2:]:
    shape = ','.join(map(str, w.shape))
    assert f'f32[{shape}] = add_any' not in text


def test_in_fp8_an_expert_learns_from_its_own_rows_alone():
  """A huge token of expert 0 changes no scale of another expert's gradient.

  Padding of a block points at that token, the first that is sorted.
  """
  (x, gates, *ws), chosen, g = expert_inputs(64, e=8, k=1, d=128, f=128)
  ws = [w.reshape(8, 128, -1) for w in ws]
  x = x.at[0].set(0.5)  # a power of two keeps its mantissa at any scale
  chosen = chosen.at[0].set(0)
  recipe = fp8.Recipe('fp8_block')
  copies = [recipe.weights(w, 1) for w in ws]

  @jax.jit
  def gradients(x):
    def f(*masters):
      both = map(fp8.Weight, masters, copies)
      args = x, gates, chosen, *both
      return experts.feed_forward(*args, impl='loop', recipe=recipe)

    return jax.vjp(f, *ws)[1](g)

  plain, scaled = gradients(x), gradients(x.at[0].mul(1e7))
  for a, b in zip(plain, scaled, strict=True):
    np.testing.assert_array_equal(a[1:], b[1:])
    assert np.abs(a[0] - b[0]).max() > 1


def test_experts_in_bfloat16():
  args, chosen, _ = expert_inputs()
  half = [jnp.asarray(a, jnp.bfloat16) for a in args]
  half[1] = args[1]
  run = lambda impl, x, gates, *ws: experts.feed_forward(
    x, gates, chosen, *ws, impl=impl
  )
  got = jax.jit(functools.partial(run, 'loop'))(*half)
  assert got.dtype == jnp.bfloat16
  expected = run('dense', *args)
  error = got.astype(jnp.float32) - expected
  assert jnp.sqrt((error**2).mean() / (expected**2).mean()) < 0.02


@pytest.mark.parametrize(
  'platform, precision, form',
  [
    ('cpu', 'bf16', 'loop'), ('cpu', 'fp8_block', 'loop'),
    ('gpu', 'bf16', 'padded'), ('gpu', 'fp8_block', 'ragged'),
    ('tpu', 'bf16', 'ragged'), ('tpu', 'fp8_block', 'ragged'),
  ],
)  # fmt: skip
def test_each_platform_has_its_form(platform, precision, form, monkeypatch):
  taken = []
  record = lambda name: lambda x, *_: taken.append(name) or x
  monkeypatch.setattr(experts, '_ragged', record('ragged'))
  monkeypatch.setattr(experts, '_padded', record('padded'))
  monkeypatch.setattr(expert_loop, 'feed_forward', record('loop'))
  monkeypatch.setattr(sharding, 'target_platform', lambda: platform)
  x, up, down = jnp.ones((2, 4)), jnp.ones((3, 4, 10)), jnp.ones((3, 5, 4))
  gates, ids = jnp.ones((2, 1)), jnp.zeros((2, 1), jnp.int32)
  if precision != 'bf16':
    up, down = (fp8.Weight(w, ()) for w in (up, down))
  recipe = fp8.Recipe(precision)
  experts.feed_forward(x, gates, ids, up, down, recipe=recipe)
  assert taken == [form]


@pytest.mark.parametrize(
  'expected, block', [(0, 8), (63, 8), (72, 16), (136, 32), (9000, 128)]
)
def test_a_block_of_the_loop_is_about_the_mean_load(
  expected, block, monkeypatch
):
  """A power of two, at least as many rows as the mean of 8 experts."""
  blocks = []
  monkeypatch.setattr(
    expert_loop, 'cut', lambda chosen, order, block, skip: blocks.append(block)
  )
  monkeypatch.setattr(expert_loop, 'over_blocks', lambda x, *_: (x, None, None))
  x, up, down = jnp.ones((2, 4)), jnp.ones((8, 4, 10)), jnp.ones((8, 5, 4))
  gates, ids = jnp.ones((2, 1)), jnp.zeros((2, 1), jnp.int32)
  run = expert_loop.feed_forward
  run(x, gates, ids, up, down, expected, products.NO_FP8)
  assert blocks == [block]


def test_products_of_few_rows_read_weights_line_by_line_on_a_cpu():
  w = jnp.ones((3, 4))
  for rows, few in ((16, True), (17, False)):
    program = jax.make_jaxpr(products.matmul_transposed)(jnp.ones((rows, 4)), w)
    assert ('optimization_barrier' in str(program)) == few


def test_products_are_one_matmul_where_no_mesh_splits_them():
  ws = jnp.ones((4, 3)), jnp.ones((4, 5))
  run = lambda x, *ws: products.einsums(('bd,dn->bn', 'bd,dm->bm'), x, ws)
  x = jnp.ones((8, 4))
  assert str(jax.make_jaxpr(run)(x, *ws)).count('dot_general') == 1
  mesh = sharding.make_mesh(MeshConfig(data=2), jax.devices()[:2])
  with jax.set_mesh(mesh):
    assert str(jax.make_jaxpr(run)(x, *ws)).count('dot_general') == 2
