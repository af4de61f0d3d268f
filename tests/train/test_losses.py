"""Cross-entropy in blocks equals the plain one, and its memory is bounded."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_moe import sharding
from mla_moe.config import MeshConfig
from mla_moe.model import router
from mla_moe.train import losses


def inputs(m=20, d=6, v=37, dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(0), 4)
  hidden = jax.random.normal(keys[0], (m, d), dtype)
  head = jax.random.normal(keys[1], (d, v))
  # One is no token, one the first: a loss may confuse them.
  targets = (
    jax.random.randint(keys[2], (m,), 1, v).at[3:5].set(jnp.arange(-1, 1))
  )
  return hidden, head, targets, jax.random.normal(keys[3], (2, m))


@pytest.mark.parametrize('block', [8, 16, 36, 37])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_blocks_equal_the_plain_loss(block, dtype):
  hidden, head, targets, g = inputs(dtype=dtype)

  def plain(hidden, head):
    logits = (hidden.astype(jnp.float32) @ head.astype(dtype)).astype(
      jnp.float32
    )
    lse = jax.nn.logsumexp(logits, -1)
    nll = lse - logits[jnp.arange(len(targets)), targets]
    return jnp.where(targets >= 0, nll, 0), lse

  blocked = lambda hidden, head: losses.token_nll(hidden, head, targets, block)

  @jax.jit
  def both(hidden, head, g):
    results = []
    for f in (blocked, plain):
      out, pull = jax.vjp(f, hidden, head)
      results.append((out, pull((g[0], g[1]))))
    return results

  results = both(hidden, head, g)
  tolerance = 1e-5 if dtype == jnp.float32 else 0.05
  chex.assert_trees_all_close(*results, rtol=tolerance, atol=tolerance)


def test_an_ignored_target_has_neither_cost_nor_gradient():
  hidden, head, _, _ = inputs()
  nothing = jnp.full(len(hidden), -1)
  f = lambda h, w: losses.token_nll(h, w, nothing, 8)[0].sum()
  value, grads = jax.jit(jax.value_and_grad(f, (0, 1)))(hidden, head)
  assert value == 0 and not any(np.asarray(g).any() for g in grads)


def test_logits_of_a_large_vocabulary_never_exist_whole():
  m, d, v, block = 1024, 8, 131072, 4096
  shapes = (
    jax.ShapeDtypeStruct((m, d), jnp.float32),
    jax.ShapeDtypeStruct((d, v), jnp.float32),
    jax.ShapeDtypeStruct((m,), jnp.int32),
  )
  f = lambda h, w, t: losses.token_nll(h, w, t, block)[0].sum()
  compiled = jax.jit(jax.grad(f, (0, 1))).lower(*shapes).compile()
  temporaries = compiled.memory_analysis().temp_size_in_bytes
  assert temporaries < 6 * 4 * m * block < 4 * m * v


@pytest.mark.parametrize('v', [64, 256])
def test_every_product_of_a_bfloat16_model_takes_bfloat16(v):
  """On accelerators; the CPU's widening must not leak into their programs."""
  shapes = (
    jax.ShapeDtypeStruct((32, 16), jnp.bfloat16),
    jax.ShapeDtypeStruct((16, v), jnp.float32),
    jax.ShapeDtypeStruct((32,), jnp.int32),
  )
  f = lambda h, w, t: sum(x.sum() for x in losses.token_nll(h, w, t, 64))
  traced = jax.jit(jax.grad(f, (0, 1))).trace(*shapes)
  text = traced.lower(lowering_platforms=('cuda',)).as_text()
  kinds = re.findall(r'dot_general.*: \((.*)\) -> tensor<.*x(.*)>', text)
  assert len(kinds) == (3 if v <= 64 else 4)
  for operands, result in kinds:
    assert operands.count('bf16') == 2 and result == 'f32'


@pytest.mark.parametrize('block', [8, 37])
def test_gradient_of_the_master_head_is_not_rounded_to_bfloat16(block):
  hidden, head, targets, _ = inputs(dtype=jnp.bfloat16)
  f = lambda w: losses.token_nll(hidden, w, targets, block)[0].sum()
  grad = jax.jit(jax.grad(f))(head)
  assert grad.dtype == jnp.float32
  assert (grad != grad.astype(jnp.bfloat16).astype(jnp.float32)).mean() > 0.5


@pytest.mark.parametrize('block', [2, 4])
def test_the_first_token_id_costs_as_the_others(block):
  """log(2 e + 2) - 1 nats; -1 alone is no target."""
  args = np.ones((3, 2)), np.eye(2, 4), np.array([0, 1, -1])
  nll, lse = jax.jit(losses.token_nll, static_argnums=3)(*args, block)
  np.testing.assert_allclose(nll, [1.0064, 1.0064, 0], atol=1e-4)
  np.testing.assert_allclose(lse, [2.0064] * 3, atol=1e-4)


def test_each_token_has_its_own_logit_on_a_mesh():
  """Ids 0 and 1 lie on one device, 2 and 3 on another."""
  head = jnp.log(jnp.array([[1.0, 2.0, 3.0, 4.0]]))
  hidden, ids = jnp.ones((1, 2, 3, 1)), jnp.array([[[0, 1, 2], [3, -1, 0]]])
  with jax.set_mesh(
    sharding.make_mesh(MeshConfig(tensor=2), jax.devices()[:2])
  ):
    nll, lse = jax.jit(losses.sharded_token_nll)(hidden, head, ids)
  right = np.log([[[10, 5, 10 / 3], [2.5, 1, 10]]])
  np.testing.assert_allclose(nll, right, atol=1e-5)
  np.testing.assert_allclose(lse, np.full(ids.shape, np.log(10)), atol=1e-5)


@pytest.mark.parametrize('block', [8, 37])
def test_a_target_beyond_the_vocabulary_is_not_a_number(block):
  hidden, head, targets, _ = inputs()
  run = jax.jit(losses.token_nll, static_argnums=3)
  nll, lse = run(hidden, head, targets.at[5].set(37), block)
  assert np.isnan(nll[5]) and np.isfinite(np.delete(nll, 5)).all()
  assert np.isfinite(lse).all()


@pytest.mark.parametrize('block', [8, 37])
def test_a_tied_head_passes_its_gradient_to_the_embedding(block):
  hidden, head, targets, _ = inputs()
  f = lambda h, w: losses.token_nll(h, w, targets, block)[0].sum()
  untied = jax.jit(jax.grad(f, 1))(hidden, head)
  tied = jax.jit(jax.grad(lambda e: f(hidden, e.T)))(head.T)
  chex.assert_trees_all_close(tied, untied.T, rtol=1e-6)


def test_gradient_of_the_balance_loss_takes_the_counts_as_given():
  """Of sum_i f_i P_i alone, against float64 differences of P."""
  random = np.random.default_rng(0)
  scores = random.uniform(0.1, 1, size=(2, 5, 4))
  mask = np.ones((2, 5))
  mask[1, 3:] = 0

  def slow(scores):
    total = 0.0
    for row, row_mask in zip(scores, mask, strict=True):
      rows = row[row_mask > 0]
      chosen = np.argsort(rows)[:, ::-1][:, :2]
      f = np.bincount(chosen.reshape(-1), minlength=4) * 4 / (2 * len(rows))
      total += (f * (rows / rows.sum(1, keepdims=True)).mean(0)).sum() / 2
    return total

  expected = np.zeros_like(scores)
  for i in np.ndindex(*scores.shape):
    move = np.zeros_like(scores)
    move[i] = 1e-6
    expected[i] = (slow(scores + move) - slow(scores - move)) / 2e-6
  counted = jax.lax.top_k(jnp.float32(scores), 2)[1]
  balance = lambda s: router.balance(s, counted, np.float32(mask))
  got = jax.jit(jax.grad(balance))(np.float32(scores))
  chex.assert_trees_all_close(np.float64(got), expected, rtol=1e-4, atol=1e-6)
