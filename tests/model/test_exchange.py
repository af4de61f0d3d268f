"""Experts on other devices equal the dense oracle on one, for any routing."""

import dataclasses
import functools

import chex
import emulated
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_moe import fp8, sharding
from mla_moe.config import (
  ComputeConfig,
  ConfigError,
  MeshConfig,
  ModelConfig,
  MoEConfig,
)
from mla_moe.model import collectives, exchange, moe, products, weights

SIZES = ModelConfig(
  moe=MoEConfig(experts=16, top_k=2, width=8, groups=1, top_groups=1, shared=0)
)


def computed(**kinds):
  return dataclasses.replace(SIZES, compute=ComputeConfig(**kinds))


B, T, D = 8, 16, 12


def inputs(dim=D, width=8):
  random = np.random.default_rng(0)
  make = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
  x = make(B, T, dim)
  mask = jnp.asarray(random.random((B, T)) < 0.8, jnp.float32)
  w_router, bias = make(dim, 16), make(16) * 0.1
  ws = (make(16, dim, 2, width) * dim**-0.5, make(16, width, dim))
  return (x, w_router, ws), mask, bias, make(B, T, dim)


@functools.cache
def compiled(mesh_config, config, recipe=products.NO_FP8):
  """Outputs, and gradients of them and of the balance loss."""

  def run(args, mask, bias, g):
    def f(x, w_router, ws):
      if recipe.precision != 'bf16':
        names = (moe.GATE_UP, moe.DOWN)
        pairs = zip(ws, names, strict=True)
        ws = tuple(weights.quantize(w, n, recipe) for w, n in pairs)
      y, stats, _ = moe.routed(x, mask, w_router, bias, ws, config, recipe)
      return (y * g).sum() + stats.balance, (y, stats)

    (_, out), grads = jax.value_and_grad(f, (0, 1, 2), has_aux=True)(*args)
    return out, grads

  if mesh_config is None:
    return jax.jit(run)
  mesh = sharding.make_mesh(mesh_config)

  def on_mesh(*args):
    with jax.set_mesh(mesh):
      return jax.jit(run)(*args)

  return on_mesh


MESHES = {
  'expert': dict(expert=8),
  'data': dict(data=2, expert=4),
  'tensor': dict(expert=4, tensor=2),
  'context': dict(fsdp=2, expert=2, context=2),
}
# Each exchange over one axis, and one over two.
FAST = [('expert', kind) for kind in ('gather', 'padded', 'ragged')]
FAST += [('tensor', 'gather')]
CASES = [
  pytest.param(
    mesh, kind, marks=() if (mesh, kind) in FAST else pytest.mark.slow
  )
  for kind in ('gather', 'padded', 'ragged')
  for mesh in MESHES
  if mesh in ('expert', 'tensor') or kind == 'gather'
]


@pytest.fixture
def emulation(monkeypatch):
  emulation = emulated.ragged_all_to_all
  monkeypatch.setattr(collectives, 'ragged_all_to_all', emulation)


@pytest.mark.parametrize('mesh, kind', CASES)
def test_every_exchange_equals_the_dense_oracle(mesh, kind, emulation):
  """Balanced, and with every token on two experts of one device."""
  config = computed(exchange=kind)
  run = compiled(MeshConfig(**MESHES[mesh]), config)
  oracle = compiled(None, computed(experts='dense'))
  args, mask, bias, g = inputs()
  for forced in (0, 2):
    bias = jnp.where(jnp.arange(16) < forced, 10.0, bias)
    (y, stats), grads = run(args, mask, bias, g)
    (expected, wanted), oracles = oracle(args, mask, bias, g)
    chex.assert_trees_all_equal(stats.load, wanted.load)
    close = functools.partial(chex.assert_trees_all_close, atol=2e-5, rtol=2e-5)
    close((y, stats.balance), (expected, wanted.balance))
    close(stats.entropy, wanted.entropy)
    close(grads, oracles, atol=2e-4)
    if forced:  # all go to one device, which has room for half as much again
      late = {
        'padded': {'expert': 8 * (32 - 8), 'tensor': 4 * (64 - 24)},
        'ragged': {'expert': 8 * 32 - 48, 'tensor': 4 * 64 - 96},
      }
      assert stats.overflow == (0 if kind == 'gather' else late[kind][mesh])
      assert not np.asarray(grads[2][0])[2:].any()


def test_a_cpu_refuses_the_ragged_exchange():
  args, mask, bias, g = inputs()
  run = compiled(MeshConfig(**MESHES['data']), computed(exchange='ragged'))
  with pytest.raises(ConfigError, match="exchange='ragged': a CPU or a"):
    run(args, mask, bias, g)


@pytest.mark.parametrize(
  'device, size, kind',
  [
    (('TPU v5 lite', 1, 'tpu'), 16, 'ragged'),
    (('TPU v5 lite', 1, 'tpu'), 32, 'padded'),  # which libtpu cannot compile
    (('TPU v6 lite', 1, 'tpu'), 32, 'ragged'),
    (('TPU v5', 1, 'tpu'), 32, 'ragged'),
    (('NVIDIA H100', 1, 'cuda'), 32, 'ragged'),
    (('cpu', None, 'cpu'), 16, 'padded'),
  ],
)
def test_auto_takes_an_exchange_that_the_devices_have(device, size, kind):
  config = dataclasses.replace(SIZES, moe=MoEConfig())
  mesh = jax.sharding.AbstractMesh(
    (2, size // 2),
    ('fsdp', 'expert'),
    abstract_device=jax.sharding.AbstractDevice(*device),
  )
  with jax.sharding.use_abstract_mesh(mesh):
    assert exchange._kind(config, 16, True) == kind
    assert exchange._kind(config, 8, True) == 'gather'


def test_a_batch_that_nothing_divides_is_computed_whole():
  args, mask, bias, g = inputs()
  small = (args[0][:1, :5], *args[1:]), mask[:1, :5], bias, g[:1, :5]
  run = compiled(MeshConfig(**MESHES['tensor']), SIZES)
  (y, stats), grads = run(*small)
  (expected, wanted), oracles = compiled(None, SIZES)(*small)
  chex.assert_trees_all_close(y, expected, atol=2e-5)
  chex.assert_trees_all_equal(stats.load, wanted.load)
  chex.assert_trees_all_close(grads, oracles, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['gather', 'padded'])
def test_rows_travel_in_fp8_without_being_rounded_twice(kind):
  recipe = fp8.Recipe('fp8_block')
  config = computed(exchange=kind)
  mesh = MeshConfig(expert=4, fsdp=2)
  args, mask, bias, g = inputs(128)
  (y, _), grads = compiled(mesh, config, recipe)(args, mask, bias, g)
  (expected, _), wanted = compiled(None, SIZES, recipe)(args, mask, bias, g)
  chex.assert_trees_all_close(y, expected, atol=1e-5, rtol=1e-5)
  error = np.linalg.norm(grads[0] - wanted[0]) / np.linalg.norm(wanted[0])
  assert error < 1e-5


def test_the_emulated_collective_follows_the_senders_offsets():
  """Device i sends j its rows j..j+s, to where the rows of i belong there."""
  n = 8
  random = np.random.default_rng(1)
  sizes = random.integers(0, 3, (n, n)).astype(np.int32)  # [from, to]
  first = (np.cumsum(sizes, 1) - sizes).astype(np.int32)
  target = (np.cumsum(sizes, 0) - sizes).astype(np.int32)
  rows = random.normal(size=(n, 16, 2)).astype(np.float32)
  expected = np.zeros((n, 24, 2), np.float32)
  for i in range(n):
    for j in range(n):
      moved = rows[i, first[i, j] : first[i, j] + sizes[i, j]]
      expected[j, target[i, j] : target[i, j] + sizes[i, j]] = moved
  mesh = jax.make_mesh((n,), ('e',), axis_types=(jax.sharding.AxisType.Auto,))
  p = jax.sharding.PartitionSpec('e')

  def region(rows, first, sizes, target, received):
    out = jax.lax.pcast(jnp.zeros((24, 2)), ('e',), to='varying')
    args = rows[0], out, first[0], sizes[0], target[0], received[0]
    return emulated.ragged_all_to_all(*args, axis_name='e')[None]

  with jax.set_mesh(mesh):
    run = jax.jit(jax.shard_map(region, in_specs=(p,) * 5, out_specs=p))
    out = run(rows, first, sizes, target, np.ascontiguousarray(sizes.T))
  np.testing.assert_array_equal(out, expected)
