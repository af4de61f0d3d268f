"""The quantiser bit by bit, against loops over tiles in numpy."""

import itertools

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest

from mla_moe import fp8


@pytest.mark.parametrize(
  'shape, tiles, shards',
  [
    ((7, 300), (128,), ()),
    ((300, 200), (128, 128), ()),
    ((5, 130, 5), (128, 1), ()),
    ((9, 33), (fp8.quantize.WHOLE, fp8.quantize.WHOLE), ()),
    ((4, 40), (fp8.quantize.WHOLE,), ()),
    ((4, 130, 2, 140), (128, 1, 128), (1, 5, 1, 7)),
  ],
)
def test_the_quantiser_equals_loops_over_tiles(shape, tiles, shards):
  x = oracle.hard(shape)
  got = jax.jit(lambda x: fp8.quantize.quantize(x, tiles, shards))(x)
  values, scales, exact = oracle.tiled(x, tiles)
  chex.assert_trees_all_equal(got.scales, scales)
  bits = np.asarray(got.values).view(np.uint8)
  chex.assert_trees_all_equal(bits, values.view(np.uint8))
  wide = np.asarray(fp8.dequantize(got), np.float64)
  chex.assert_trees_all_equal(wide, exact.astype(np.float32).astype(float))


def test_powers_of_two_are_exact_in_bfloat16():
  """Products then do not depend on the dtype that they are widened to."""
  q = fp8.quantize.quantize(oracle.hard((40, 300))[4:], (128,))
  other = fp8.Quantized(q.values, q.scales * 1.1, q.tiles)
  for array, same in ((q, True), (other, False)):
    narrow = fp8.dequantize(array, jnp.bfloat16).astype(jnp.float32)
    assert bool((narrow == fp8.dequantize(array)).all()) == same
  product = fp8.quantize.exact(q).astype(jnp.float32)
  chex.assert_trees_all_equal(product, fp8.dequantize(q))


@pytest.mark.parametrize(
  'shape, tiles, crosses',
  [
    ((3, 130, 2, 256), (128, 1, 128), False),
    ((3, 130, 2, 200), (128, 1, 128), True),
    ((3, 5, 2, 6), (5, 2, 6), False),
    ((3, 5, 2, 6), (1, 2, 3), True),
  ],
)
def test_gate_and_up_are_one_axis_unless_a_tile_crosses(shape, tiles, crosses):
  q = fp8.quantize.quantize(oracle.normal(7, *shape), tiles)
  got = fp8.quantize.joined(q)
  assert (got is None) == crosses
  if got:
    wide = fp8.dequantize(q).reshape(*shape[:2], -1)
    chex.assert_trees_all_equal(fp8.dequantize(got), wide)


def test_tiling_again_changes_nothing_under_powers_of_two():
  @jax.jit
  def again(q):
    return fp8.dequantize(q), fp8.dequantize(fp8.retile(q, (128, 1)))

  q = fp8.quantize.quantize(oracle.normal(6, 300, 260), (128,))
  chex.assert_trees_all_equal(*again(q))
  first, second = again(fp8.Quantized(q.values, q.scales * 1.1, q.tiles))
  assert (first != second).mean() > 0.5


def test_a_released_checkpoints_blocks_are_read():
  """`weight` [out, in] and its multiplier `weight_scale_inv`, cut at 576."""
  random = np.random.default_rng(3)
  weight = random.normal(size=(576, 200)).astype(ml_dtypes.float8_e4m3fn)
  scale = random.uniform(0.5, 2, size=(5, 2)).astype(np.float32)
  expected = np.zeros((200, 576), np.float32)
  for i, j in itertools.product(range(576), range(200)):
    expected[j, i] = np.float32(weight[i, j]) * scale[i // 128, j // 128]
  ours = fp8.Quantized(jnp.asarray(weight.T), jnp.asarray(scale.T), (128, 128))
  chex.assert_trees_all_equal(fp8.dequantize(ours), expected)


def test_gate_and_up_have_scales_of_their_own():
  w = oracle.normal(0, 130, 2, 140)
  shapes = lambda p: [q.scales.shape for q in fp8.Recipe(p).weights(w)]
  assert shapes('fp8_block') == [(2, 2, 2)]
  assert shapes('fp8_channel') == [(1, 2, 140), (130, 1, 1)]
  assert shapes('fp8_tensor') == [(1, 1, 1)]


@pytest.mark.parametrize('blocks, tile', [(2, 128), (3, 128), (2, -1)])
def test_a_block_of_rows_has_its_own_scales(blocks, tile):
  q = fp8.quantize.quantize(oracle.hard((128 * blocks, 3)), (tile, 1))
  whole = fp8.dequantize(q)
  for i in range(blocks):
    block = fp8.dequantize(fp8.grouped._block(q, jnp.int32(i)))
    chex.assert_trees_all_equal(block, whole[128 * i : 128 * (i + 1)])
