"""Which implementation a device gets, and refusals and fallbacks in a line."""

import inspect

import chex
import jax
import jax.numpy as jnp
import oracle
import pytest

from mla_moe import fp8
from mla_moe.config import ConfigError


class Device:
  """What `choose` asks of a device."""

  def __init__(self, platform, kind, capability=None):
    self.platform, self.device_kind = platform, kind
    self.compute_capability = capability


H100 = Device('gpu', 'NVIDIA H100 80GB HBM3', '9.0')


@pytest.mark.parametrize(
  'device, block, channel',
  [
    (Device('cpu', 'cpu'), 'dequant', 'dequant'),
    (H100, 'mgpu', 'native'),
    (Device('gpu', 'NVIDIA B200', '10.0'), 'mxfp8', 'native'),
    (Device('gpu', 'NVIDIA A100-SXM4-40GB', '8.0'), 'dequant', 'dequant'),
    (Device('tpu', 'TPU v5p'), 'dequant', 'dequant'),
    (Device('tpu', 'TPU v6 lite'), 'dequant', 'dequant'),
    (Device('tpu', 'TPU7x'), 'tpu', 'native'),
  ],
)
def test_the_implementation_follows_the_hardware(device, block, channel):
  for precision, expected in (('fp8_block', block), ('fp8_channel', channel)):
    impl, line = fp8.choose(precision, device=device)
    assert impl == expected
    assert (impl == 'dequant') == bool(line) and '\n' not in line


def test_what_cannot_be_done_is_refused_in_one_line():
  for device, precision, impl in (
    (Device('cpu', 'cpu'), 'fp8_block', 'mgpu'),
    (H100, 'fp8_block', 'tpu'),
    (H100, 'fp8_block', 'native'),
    (H100, 'fp8_tensor', 'mgpu'),
    (Device('gpu', 'NVIDIA A100-SXM4-40GB', '8.0'), 'fp8_tensor', 'native'),
  ):
    with pytest.raises(ConfigError, match='can be dequant'):
      fp8.choose(precision, impl, device=device)
  x, w = jnp.ones((2, 4)), jnp.ones((4, 2))
  for options in (
    {'precision': 'fp4'},
    {'impl': 'cuda'},
    {'impl': 'native'},
    {'impl': 'mgpu', 'precision': 'fp8_tensor'},
  ):
    with pytest.raises(ConfigError):
      fp8.dot(x, w, **options)
  with pytest.raises(ValueError, match=r'\(2, 4\).*no product'):
    inspect.unwrap(fp8.dots)(x, (x,))  # without the tests' own check


def test_calls_without_a_kernel_fall_back_and_are_counted():
  mesh = jax.make_mesh(
    (8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  x, w = oracle.normal(0, 16, 8), oracle.normal(1, 8, 8)
  with jax.set_mesh(mesh), fp8.collect_fallbacks() as lines:
    y = jax.jit(lambda x, w: fp8.dot(x, w, impl='tpu'))(x, w)
  assert len(lines) == 1 and '8 devices' in lines[0]
  chex.assert_trees_all_close(y, jax.jit(fp8.dot)(x, w), rtol=1e-6)
