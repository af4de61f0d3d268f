"""Attention cores against the quadratic oracle; rotary golden values."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_moe import sharding
from mla_moe.config import MLAConfig, RopeConfig
from mla_moe.model import attention, flash, rope, sequence

BOTH = ('reference', 'xla')


@functools.partial(jax.jit, static_argnames='impls')
def outputs_and_gradients(args, g, segments, impls):
  """Those of each core."""
  outs = []
  for impl in impls:
    run = functools.partial(
      attention.attend, scale=0.2, segments=segments, impl=impl
    )
    out, pull = jax.vjp(run, *args)
    outs.append((out, pull(g)))
  return outs


def inputs(t, batch=2, heads=3, dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(t), 4)
  make = lambda key, d: jax.random.normal(key, (batch, t, heads, d), dtype)
  q, k, v, g = (make(*x) for x in zip(keys, (24, 24, 16, 16), strict=True))
  cuts = np.sort(np.random.default_rng(t).integers(0, t, (batch, 3)), 1)
  segments = (np.arange(t)[None, :, None] >= cuts[:, None]).sum(-1)
  return (q, k, v), g, jnp.asarray(segments, jnp.int32)


@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize(
  't, heads',
  [
    *((1, 3), (256, 3), (515, 4), (130, 32)),
    pytest.param(7, 3, marks=pytest.mark.slow),
  ],
)
def test_blocks_equal_the_oracle(t, heads, packed):
  """The last two are padded, and wide enough to be cut into parts."""
  args, g, segments = inputs(t, heads=heads)
  segments = (segments, segments) if packed else None
  block = flash._block_size(args[0], segments, 1)
  chunks = 4 if heads == 32 or block == 256 and heads == 4 else 1
  assert flash._chunks(args[0], block) == chunks
  outs = outputs_and_gradients(args, g, segments, BOTH)
  chex.assert_trees_all_close(*outs, atol=2e-5, rtol=2e-5)


def test_answers_see_the_prompt_that_they_share_and_no_other():
  """A tile in which no query sees a key is left out: a NaN is not read."""
  (q, k, v), g, documents = inputs(256)
  # A prompt, two answers, and another prompt; each row has its own lengths.
  names = np.array([0, 1 << 20, 2 << 20, 1])
  answers = jnp.asarray(names, jnp.int32)[documents]
  both = outputs_and_gradients((q, k, v), g, (answers,) * 2, BOTH)
  chex.assert_trees_all_close(*both, atol=2e-5, rtol=2e-5)
  row = np.repeat([0, 1 << 20, 2 << 20, -1], 64)
  row = jnp.asarray(np.stack([row, row]), jnp.int32)
  run = functools.partial(outputs_and_gradients, g=g, segments=(row, row))
  sound, (out, _) = run((q, k, v), impls=BOTH)
  chex.assert_trees_all_close(sound[0], out, atol=2e-5, rtol=2e-5)
  out, _ = run((q, k, v.at[:, 64:128].set(jnp.nan)), impls=BOTH)[1]
  chex.assert_trees_all_close(sound[0][:, 128:], out[:, 128:], atol=2e-5)
  assert np.isnan(out[:, 64:128]).all()


def test_yarn_scales_logits_by_one_m_and_rotations_by_the_ratio():
  """With unequal mscales, as no release has them: m = 0.1 mscale ln 40 + 1."""
  yarn = RopeConfig(
    factor=40.0, original_positions=4096, mscale=1.0, mscale_all_dim=0.707
  )
  cos, sin, _ = rope.angles(jnp.zeros((1, 1), jnp.int32), 64, yarn)
  np.testing.assert_allclose(cos, 1.36889 / 1.26080, rtol=1e-4)  # 1.0857
  assert not sin.any()
  scale = rope.softmax_scale(MLAConfig(rope=yarn))
  assert scale == pytest.approx(192**-0.5 * 1.26080**2, rel=1e-4)


@pytest.mark.parametrize('impl', ['reference', 'xla'])
def test_parts_of_a_sequence_are_rows_of_the_whole(impl):
  """Their gradients of keys and values add up to the whole's, too."""
  count, (args, g, segments) = 3, inputs(24)
  ((whole, (dq, dk, dv)),) = outputs_and_gradients(
    args, g, (segments,) * 2, ('auto',)
  )
  pieces = np.arange(24).reshape(2 * count, -1)

  @jax.jit
  def one(index, rows, q, k, v, g):
    part = sequence.Part(index, count)
    both = segments[:, rows], segments
    f = functools.partial(
      attention.attend, scale=0.2, segments=both, part=part, impl=impl
    )
    out, pull = jax.vjp(f, q[:, rows], k, v)
    return out, pull(g[:, rows])

  whole, dq = np.asarray(whole), np.asarray(dq)
  sums = [np.zeros_like(dk), np.zeros_like(dv)]
  for i in range(count):
    rows = pieces[[i, 2 * count - 1 - i]].reshape(-1)
    out, (part, *more) = one(i, rows, *args, g)
    chex.assert_trees_all_close(out, whole[:, rows], atol=2e-5, rtol=2e-5)
    chex.assert_trees_all_close(part, dq[:, rows], atol=2e-5, rtol=2e-5)
    sums = [a + b for a, b in zip(sums, more, strict=True)]
  chex.assert_trees_all_close(sums, [dk, dv], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize('packed', [False, True])
def test_splash_interpreted_equals_the_oracle(packed):
  args, g, segments = inputs(128, batch=1, heads=2)
  segments = (segments, segments) if packed else None
  outs = outputs_and_gradients(args, g, segments, ('reference', 'splash'))
  chex.assert_trees_all_close(*outs, atol=1e-4, rtol=1e-4)


def test_memory_is_linear_in_length():
  """Of a scan of layers, whose gradient keeps what is known before it runs."""

  def layer(args, w):
    q, k, v = args
    y = attention.attend(q * w, k, v, scale=0.2, impl='xla')
    return (q + y.sum(), k, v), None

  def loss(weights, args):
    return jax.lax.scan(layer, args, weights)[0][0].sum()

  def temporaries(t):
    args, *_ = inputs(t, batch=1)
    compiled = jax.jit(jax.grad(loss)).lower(jnp.ones(3), args).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert temporaries(8192) < 2.5 * temporaries(4096)


V3 = RopeConfig(factor=40.0, original_positions=4096)
K2 = RopeConfig(
  theta=50000.0,
  factor=32.0,
  original_positions=4096,
  beta_fast=1.0,
  beta_slow=1.0,
)


def test_yarn_frequencies_are_the_published_ones():
  got = rope.frequencies(64, V3)
  expected = {
    0: 1.0,
    10: 5.623413e-2,
    11: 3.900693e-2,
    16: 5.5e-3,
    20: 7.905694e-4,
    22: 1.778279e-4,
    23: 3.333804e-5,
    31: 3.333804e-6,
  }
  for index, value in expected.items():
    assert got[index] == pytest.approx(value, rel=2e-6)
  plain = 50000.0 ** (-np.arange(0, 64, 2) / 64)
  hard = rope.frequencies(64, K2) / plain
  np.testing.assert_allclose(
    hard, np.where(np.arange(32) < 20, 1, 1 / 32), 1e-6
  )


@pytest.mark.parametrize(
  'yarn, expected',
  [
    (RopeConfig(), 0.07216878),
    (V3, 0.13523378),
    (K2, 0.13086080),
    (
      RopeConfig(
        factor=40.0, original_positions=4096, mscale=0.707, mscale_all_dim=0.707
      ),
      0.11472139,
    ),
  ],
)
def test_softmax_scale_has_the_square_of_m(yarn, expected):
  got = rope.softmax_scale(MLAConfig(rope=yarn))
  assert got == pytest.approx(expected, abs=1e-8)


def test_rotated_products_depend_on_distance_alone():
  x, y = jax.random.normal(jax.random.key(0), (2, 1, 1, 64))

  def product(i, j):
    at = lambda p: rope.angles(jnp.full((1, 1), p, jnp.int32), 64, V3)
    turn = lambda v, p: rope.rotate(v[None], at(p))
    return (turn(x, i) * turn(y, j)).sum()

  chex.assert_trees_all_close(product(5, 2), product(905, 902), rtol=1e-4)
  chex.assert_trees_all_close(product(0, 0), (x * y).sum(), rtol=1e-5)


@pytest.mark.parametrize(
  'platform, length, parts, core',
  [
    ('cpu', 256, 1, 'xla'), ('tpu', 256, 1, 'splash'), ('tpu', 200, 1, 'xla'),
    ('tpu', 256, 2, 'xla'), ('gpu', 256, 1, 'xla'),
  ],
)  # fmt: skip
def test_the_fastest_core_is_the_platform_s(
  platform, length, parts, core, monkeypatch
):
  monkeypatch.setattr(sharding, 'target_platform', lambda: platform)
  q = jnp.zeros((1, length, 1, 8))
  assert attention.choose_core('auto', q, None, parts) == core
  assert attention.choose_core('cudnn', q, None, parts) == 'cudnn'


def test_a_ramp_without_length_is_a_step():
  """The context is so short that the ramp begins and ends at pair 0."""
  yarn = RopeConfig(factor=4.0, original_positions=4)
  plain = rope.frequencies(32, RopeConfig())
  assert rope._ramp(32, yarn) == (0.0, 0.001)
  short = rope.frequencies(32, yarn)
  np.testing.assert_allclose(short, [plain[0], *plain[1:] / 4], rtol=1e-6)
  slight = rope.frequencies(32, RopeConfig(factor=1.5, original_positions=4))
  np.testing.assert_allclose(slight[1:], plain[1:] / 1.5, rtol=1e-6)
  assert rope.magnitude(1.5, 1.0) == pytest.approx(1 + 0.1 * np.log(1.5))
