"""Cross-entropy in blocks equals the plain one, and its memory is bounded."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_moe import losses


def inputs(m=20, d=6, v=37, dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(0), 4)
  hidden = jax.random.normal(keys[0], (m, d), dtype)
  head = jax.random.normal(keys[1], (d, v))
  targets = jax.random.randint(keys[2], (m,), 0, v).at[3].set(-1)
  return hidden, head, targets, jax.random.normal(keys[3], (2, m))


@pytest.mark.parametrize('block', [8, 16, 36, 37])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_blocks_equal_the_plain_loss(block, dtype):
  hidden, head, targets, g = inputs(dtype=dtype)

  def plain(hidden, head):
    logits = (hidden.astype(jnp.float32) @ head.astype(dtype)).astype(jnp.float32)
    lse = jax.nn.logsumexp(logits, -1)
    nll = lse - logits[jnp.arange(len(targets)), targets]
    return jnp.where(targets >= 0, nll, 0), lse

  blocked = lambda hidden, head: losses.token_nll(hidden, head, targets, block)
  results = []
  for f in (blocked, plain):
    out, pull = jax.vjp(f, hidden, head)
    results.append((out, pull((g[0], g[1]))))
  tolerance = 1e-5 if dtype == jnp.float32 else 0.05
  chex.assert_trees_all_close(*results, rtol=tolerance, atol=tolerance)


def test_an_ignored_target_has_neither_cost_nor_gradient():
  hidden, head, _, _ = inputs()
  nothing = jnp.full(len(hidden), -1)
  f = lambda h, w: losses.token_nll(h, w, nothing, 8)[0].sum()
  value, grads = jax.value_and_grad(f, (0, 1))(hidden, head)
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
