"""FP8 layers' products beside float64, and the errors of hard numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.experimental.pallas import tpu as pltpu

from mla_moe import fp8
from mla_moe.config import FP8_IMPLS

NEW = jax.__version_info__ >= (0, 11)


def interpreted(impl):
  """The context in which `impl`'s kernels run on a CPU; skips where none."""
  if impl == 'mgpu':
    if not NEW:
      pytest.skip("jax 0.10's interpreter of Mosaic GPU kernels is unfinished")
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.force_gpu_interpret_mode()
  if impl == 'mxfp8' and not NEW:
    pytest.skip('jax 0.10 has no scaled_matmul on CPU')
  return pltpu.force_tpu_interpret_mode()


CASES = [
  (precision, impl) for precision, impls in FP8_IMPLS.items() for impl in impls
]


@pytest.mark.parametrize('precision, impl', CASES)
def test_products_equal_float64_of_the_same_operands(precision, impl):
  """Partial tiles everywhere: 150 tokens, 200 channels, 2 x 136 outputs."""
  x, w = oracle.normal(0, 2, 150, 200), oracle.normal(1, 200, 2, 136, scale=0.1)
  g = oracle.normal(2, 2, 150, 2, 136, scale=1e-3)
  run = functools.partial(fp8.dot, precision=precision, impl=impl)
  with interpreted(impl):
    got = oracle.products(run, x, w, g)
  expected = oracle.dense(x, w, g, precision)
  for a, b in zip(got, expected, strict=True):
    assert oracle.relative(a, b) < 1e-6
  full = (
    np.einsum('btk,kgn->btgn', x, w),
    np.einsum('btgn,kgn->btk', g, w),
    np.einsum('btk,btgn->kgn', x, g),
  )
  for a, b in zip(got, full, strict=True):
    assert 0.02 < oracle.relative(a, b) < 0.06, 'not quantised, or badly'


@pytest.mark.parametrize('precision, impl', CASES)
def test_grouped_products_equal_float64_by_expert(precision, impl):
  """An expert without rows, one of two tiles, and NaN after the last group."""
  sizes = (60, 0, 150, 7)
  x, w = oracle.normal(3, 230, 136), oracle.normal(4, 4, 136, 2, 72, scale=0.1)
  g = oracle.normal(5, 230, 2, 72)
  x, g = x.at[217:].set(jnp.nan), g.at[217:].set(jnp.inf)
  run = functools.partial(fp8.ragged_dot, precision=precision, impl=impl)
  with interpreted(impl):
    got = oracle.products(lambda x, w: run(x, w, jnp.asarray(sizes)), x, w, g)
  expected = oracle.grouped(x, w, g, sizes, precision)
  for a, b in zip(got, expected, strict=True):
    assert oracle.relative(a, b) < 1e-6
  assert not np.asarray(got[0])[217:].any()
  assert not np.asarray(got[1])[217:].any()
  assert not np.asarray(got[2])[1].any()


def test_blocks_survive_token_outliers_that_a_tensor_does_not():
  """Gradients whose scale spreads log-normally over tokens; dx by token."""
  random = np.random.default_rng(8)
  x, w = oracle.normal(9, 512, 128), oracle.normal(10, 128, 128, scale=0.1)
  spread = np.exp(random.normal(size=(512, 1)) * 4).astype(np.float32)
  g = oracle.normal(11, 512, 128) * spread

  def p99(precision):
    dx = oracle.products(lambda x, w: fp8.dot(x, w, precision), x, w, g)[1]
    error = np.asarray(dx - g @ w.T)
    norm = np.linalg.norm(error, axis=1) / np.linalg.norm(g @ w.T, axis=1)
    return np.percentile(norm, 99)

  assert p99('fp8_block') < 0.06
  assert p99('fp8_tensor') > 0.3


def test_row26_what_is_not_finite_stays_in_its_row_and_shows():
  x, w = oracle.normal(12, 4, 300), oracle.normal(13, 300, 40)
  x = x.at[1, 7].set(jnp.nan).at[2, 200].set(jnp.inf)
  bad = ~np.isfinite(np.asarray(jax.jit(fp8.dot)(x, w)))
  assert bad[1:3].all() and not bad[[0, 3]].any()


def test_row26_zeros_and_faint_gradients_survive():
  x, w = oracle.normal(14, 130, 200), oracle.normal(15, 200, 40)
  x = x.at[:, :128].set(0)
  g = oracle.normal(16, 130, 40, scale=1e-28)
  g = g.at[3].set(0)
  y, dx, dw = oracle.products(fp8.dot, x, w, g)
  assert oracle.relative(y, x @ w) < 0.06
  wide = lambda a: np.asarray(a, np.float64)
  assert oracle.relative(dx, wide(g) @ wide(w).T) < 0.06
  assert oracle.relative(wide(dw)[128:], (wide(x).T @ wide(g))[128:]) < 0.06
  assert not np.asarray(dx)[3].any() and not np.asarray(dw)[:128].any()
  nothing = jax.jit(fp8.dot)(jnp.zeros((3, 5)), jnp.zeros((5, 2)))
  assert not np.asarray(nothing).any()
