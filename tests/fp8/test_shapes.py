"""Sizes of zero and odd ones: no row, no group, one token, parts of a tile."""

import functools

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import strategies as st

from mla_moe import fp8
from mla_moe.config import FP8_IMPLS

DERANDOMIZED = hypothesis.settings(
  max_examples=8, deadline=None, derandomize=True
)
PRECISIONS = [name for name, impls in FP8_IMPLS.items() if impls]
ROWS, EXPERTS, K, N = 140, 4, 10, 6


@functools.cache
def compiled(precision):
  """(y, dx, dw) of sorted rows, for any group sizes; one compilation."""
  dot = functools.partial(fp8.ragged_dot, precision=precision, impl='dequant')

  @jax.jit
  def run(x, w, g, sizes):
    y, pull = jax.vjp(lambda x, w: dot(x, w, sizes), x, w)
    return (y, *pull(g))

  return run


@pytest.mark.parametrize(
  'precision',
  ['fp8_block']
  + [pytest.param(p, marks=pytest.mark.slow) for p in PRECISIONS[:-1]],
)
@DERANDOMIZED
@hypothesis.given(
  # Boundaries between experts: groups may be empty, or end before the rows do.
  st.lists(st.integers(0, ROWS), min_size=EXPERTS, max_size=EXPERTS)
)
@hypothesis.example([0] * EXPERTS)
@hypothesis.example([0, 0, 1, 1])
@hypothesis.example([ROWS] * EXPERTS)
@hypothesis.example([128, 128, 129, ROWS])
def test_any_groups_give_the_products_of_float64(precision, ends):
  sizes = np.diff([0, *sorted(ends)])
  x, w = oracle.normal(0, ROWS, K), oracle.normal(1, EXPERTS, K, 1, N)
  g = oracle.normal(2, ROWS, 1, N)
  got = compiled(precision)(x, w, g, jnp.asarray(sizes, jnp.int32))
  expected = oracle.grouped(x, w, g, sizes, precision)
  chex.assert_trees_all_close(
    got, jax.tree.map(np.float32, expected), rtol=1e-5, atol=1e-5
  )


@pytest.mark.parametrize('precision', [*PRECISIONS, 'bf16'])
@pytest.mark.parametrize(
  'x, w',
  [
    ((2, 0, 5), (5, 2, 3)),
    ((4, 0), (0, 3)),
    ((4, 5), (5, 0)),
    ((0,), (0, 3)),
  ],
)
def test_a_product_without_rows_or_features_is_empty_or_zero(precision, x, w):
  """Every gradient is zero, whatever an array's other sizes are."""
  dot = functools.partial(fp8.dot, precision=precision)
  y, pull = jax.vjp(dot, jnp.ones(x), jnp.ones(w))
  chex.assert_trees_all_equal(y, jnp.zeros((*x[:-1], *w[1:])))
  chex.assert_trees_all_equal(pull(y), (jnp.zeros(x), jnp.zeros(w)))
  if precision != 'bf16':  # a prepared weight, too
    copies = fp8.Recipe(precision).weights(jnp.ones(w))
    ready = fp8.Weight(jnp.ones(w), copies)
    chex.assert_trees_all_equal(dot(jnp.ones(x), ready), y)


@pytest.mark.parametrize('precision', [*PRECISIONS, 'bf16'])
def test_a_layer_without_features_gives_zeros(precision):
  """As flax calls it: the summed axes are reshaped to one, of no number."""
  dimensions = ((1, 2), (0, 1)), ((), ())
  dot = fp8.DotGeneral(precision)
  y = dot(jnp.ones((2, 0, 5)), jnp.ones((0, 5, 3)), dimensions)
  chex.assert_trees_all_equal(y, jnp.zeros((2, 3)))


@pytest.mark.parametrize('precision', [*PRECISIONS, 'bf16'])
@pytest.mark.parametrize(
  'x, w', [((0, 5), (2, 5, 3)), ((4, 0), (2, 0, 1, 3)), ((4, 5), (0, 5, 3))]
)
def test_no_rows_or_no_experts_give_zeros(precision, x, w):
  sizes = jnp.zeros(w[0], jnp.int32)
  dot = lambda x, w: fp8.ragged_dot(x, w, sizes, precision)
  y, pull = jax.vjp(dot, jnp.ones(x), jnp.ones(w))
  chex.assert_trees_all_equal(y, jnp.zeros((x[0], *w[2:])))
  chex.assert_trees_all_equal(pull(y), (jnp.zeros(x), jnp.zeros(w)))


@pytest.mark.parametrize('tiles', [(128, 1), (-1, -1)])
def test_an_empty_array_has_no_tile(tiles):
  for shape in (0, 5), (5, 0):
    q = fp8.quantize.quantize(jnp.ones(shape), tiles)
    assert q.shape == shape and 0 in q.scales.shape
    chex.assert_trees_all_equal(fp8.dequantize(q), jnp.ones(shape))
