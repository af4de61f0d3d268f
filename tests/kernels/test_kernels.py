"""The kernels beside their plain product, and lowered for what runs them."""

import functools
import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P
from oracles import block_product
from products import PRODUCTS

from mla_moe import fp8, sharding
from mla_moe.kernels import block_tpu

F8 = jnp.float8_e4m3fn
CHIPS = {
  'mgpu': ('cuda', AbstractDevice('NVIDIA H100 80GB HBM3', 132, 'gpu')),
  'mxfp8': ('cuda', AbstractDevice('NVIDIA B200', 148, 'gpu')),
  'tpu': ('tpu', AbstractDevice('TPU7x', 2, 'tpu')),
}

TARGETS = {
  'mgpu': 'mosaic_gpu',
  'mxfp8': '__op$block_scaled_dot',
  'tpu': 'tpu_custom_call',
}


def operands(rows, tiles, seed, per=1):
  random = np.random.default_rng(seed)
  values = random.normal(size=(rows, tiles * 128)) * 50
  scales = 2.0 ** random.integers(-9, 3, size=(rows // per, tiles))
  return jnp.asarray(values, F8), jnp.asarray(scales, jnp.float32)


@pytest.mark.parametrize(
  'rows, columns, tiles, per', [(128, 384, 3, 1), (256, 256, 8, 128)]
)
def test_the_tpu_kernel_equals_the_plain_product(rows, columns, tiles, per):
  args = *operands(rows, tiles, 0), *operands(columns, tiles, 1, per)
  expected = np.asarray(jax.jit(block_product)(*args))
  with pltpu.force_tpu_interpret_mode():
    got = jax.jit(block_tpu.matmul)(*args)
  error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
  assert error < 1e-6


def both(f):
  """y and the gradients, for a program that holds all three products."""

  def run(x, w, g):
    y, pull = jax.vjp(f, x, w)
    return y, *pull(g)

  return run


@pytest.mark.parametrize('impl', CHIPS)
def test_training_products_lower_for_their_hardware(impl):
  platform, device = CHIPS[impl]
  mesh = AbstractMesh((1,), ('x',), abstract_device=device)
  shape = jax.ShapeDtypeStruct
  x, w = shape((300, 576), jnp.bfloat16), shape((576, 400), jnp.float32)
  dot = both(functools.partial(fp8.dot, impl=impl))
  sizes = jnp.array([100, 0, 150])
  grouped = both(
    lambda x, w: fp8.ragged_dot(x, w, sizes, impl=impl),
  )
  experts = shape((3, 576, 400), jnp.float32)
  g = shape((300, 400), jnp.bfloat16)
  target = TARGETS[impl]
  for run, weight in ((dot, w), (grouped, experts)):
    lower = lambda run=run, weight=weight: (
      jax.jit(run).trace(x, weight, g).lower(lowering_platforms=(platform,))
    )
    if impl == 'mxfp8':
      text = lower().as_text()
    else:
      with jax.sharding.use_abstract_mesh(mesh):
        text = lower().as_text()
    calls = [
      line
      for line in text.splitlines()
      if 'custom_call' in line and target in line
    ]
    assert len(calls) == 3  # y, dx and dw


def in_region(kind, impl, **options):
  """y, dx and dw of tokens split over two devices, in a shard_map."""

  def run(x, w, g, sizes):
    if options.get('check_vma', True):
      w = sharding.pvary(w)
    f = functools.partial(fp8.dot, impl=impl)
    if kind == 'grouped':
      f = lambda x, w: fp8.ragged_dot(x, w, sizes, impl=impl)
    y, dx, dw = both(f)(x, w, g)
    return y, dx, jax.lax.psum(dw, 'data')

  split, whole = P('data'), P()
  ins, outs = (split, whole, split, split), (split, split, whole)
  return jax.shard_map(run, in_specs=ins, out_specs=outs, **options)


def shared_rows(kind):
  """x, w, g and the sizes of three groups on each of two devices."""
  random = np.random.default_rng(0)
  make = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
  w = make(144, 100) if kind == 'dot' else make(3, 144, 100)
  sizes = jnp.array([30, 0, 50, 60, 35, 0], jnp.int32)
  return make(200, 144), w, make(200, 100), sizes


@pytest.mark.parametrize('kind', ['dot', 'grouped'])
@pytest.mark.parametrize('impl', CHIPS)
def test_kernels_stay_kernels_in_a_checked_region(impl, kind):
  """Lowered under a mesh: three of them in shard_map, none outside."""
  platform, device = CHIPS[impl]
  mesh = AbstractMesh(
    (2,), ('data',), axis_types=(AxisType.Auto,), abstract_device=device
  )
  with jax.sharding.use_abstract_mesh(mesh), fp8.collect_fallbacks() as lines:
    traced = jax.jit(in_region(kind, impl)).trace(*shared_rows(kind))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count(f'stablehlo.custom_call @{TARGETS[impl]}') == 3
    assert not lines
    x, w, _, sizes = shared_rows(kind)
    if kind == 'dot':
      jax.eval_shape(lambda x, w: fp8.dot(x, w, impl=impl), x, w)
    else:
      run = lambda x, w: fp8.ragged_dot(x, w, sizes[:3], impl=impl)
      jax.eval_shape(run, x, w)
  assert len(lines) == 1 and 'outside shard_map' in lines[0]


@pytest.mark.parametrize('kind', ['dot', 'grouped'])
def test_a_kernel_in_a_region_equals_the_plain_product(kind, monkeypatch):
  """Interpreted, on two of the devices, which jax does in unchecked regions."""
  kernel = functools.partial(pl.pallas_call, interpret=True)
  mesh = jax.make_mesh(
    (2,), ('data',), axis_types=(AxisType.Auto,), devices=jax.devices()[:2]
  )
  args = shared_rows(kind)
  with jax.set_mesh(mesh), fp8.collect_fallbacks() as lines:
    expected = jax.jit(in_region(kind, 'dequant'))(*args)
    monkeypatch.setattr(block_tpu.pl, 'pallas_call', kernel)
    got = jax.jit(in_region(kind, 'tpu', check_vma=False))(*args)
  assert not lines
  for a, b in zip(got, expected, strict=True):
    assert float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) < 1e-6


AHEAD = """
import jax
from jax.experimental import topologies

chips = topologies.get_topology_desc('tpu7x:2x2x1', platform='tpu')
where = jax.sharding.SingleDeviceSharding(chips.devices[0])
shape = lambda s, d: jax.ShapeDtypeStruct(s, d, sharding=where)
impl, target = 'tpu', 'tpu_custom_call'
"""


@pytest.mark.slow
@pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None,
  reason='compiling for a TPU needs the extra [tpu]',
)
def test_the_tpu_kernels_compile_for_v7():
  """Really compiled, on any machine: libtpu needs no TPU for that."""
  env = {
    **os.environ,
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'JAX_PLATFORMS': 'cpu',
  }
  subprocess.run([sys.executable, '-c', AHEAD + PRODUCTS], check=True, env=env)
