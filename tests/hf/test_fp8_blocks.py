"""FP8 tiles: a dequantised weight is quantised to the same bytes again."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from releases import dequantized

from mla_moe.hf import fp8_blocks


@pytest.mark.parametrize('power_of_two', [False, True])
@pytest.mark.parametrize('shape', [(128, 128), (200, 300), (8, 136)])
def test_quantising_what_was_dequantised_gives_the_same_bytes(
  power_of_two, shape
):
  random = np.random.default_rng(1)
  weight = random.normal(0, 0.02, shape).astype(np.float32)
  q, scale = fp8_blocks.quantize(weight, power_of_two)
  wide = dequantized(q, scale)
  rows = np.arange(shape[0]) // 128
  columns = np.arange(shape[1]) // 128
  oracle = q.astype(np.float32) * scale[rows][:, columns]
  np.testing.assert_array_equal(wide, oracle)
  assert np.abs(wide - weight).max() <= np.abs(weight).max() / 16
  for powers in (False, True):  # what the weights contain wins
    q2, scale2 = fp8_blocks.quantize(wide, powers)
    assert q2.tobytes() == q.tobytes() and scale2.tobytes() == scale.tobytes()
  if power_of_two:
    assert (np.frexp(scale)[0] == 0.5).all()


@hypothesis.settings(deadline=None, max_examples=40)
@hypothesis.given(st.integers(0, 2**32 - 1), st.floats(1e-6, 1e3))
def test_any_fp8_block_keeps_its_values(seed, scale):
  """Also one whose largest q is not 448: the bytes may differ, never values."""
  random = np.random.default_rng(seed)
  raw = random.integers(0, 256, (64, 140)).astype(np.uint8)
  raw[(raw & 127) > random.integers(1, 127)] = 0
  scales = np.full((1, 2), scale, np.float32)
  wide = dequantized(raw.view(fp8_blocks.E4M3), scales)
  q, new_scale = fp8_blocks.quantize(wide)
  np.testing.assert_array_equal(dequantized(q, new_scale), wide)
