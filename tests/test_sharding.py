"""Every axis of the mesh, alone and mixed, gives the single device's step."""

import dataclasses
import functools
import math
import re

import chex
import emulated
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from experiments import mesh_check
from experiments.data import batches
from mla_moe import sharding
from mla_moe.config import (
  ComputeConfig,
  Config,
  ConfigError,
  DataConfig,
  MeshConfig,
  MLAConfig,
  ModelConfig,
  MoEConfig,
  MTPConfig,
)
from mla_moe.model import (
  block,
  collectives,
  moe,
  pipeline,
  rope,
  sequence,
  transformer,
)
from mla_moe.train import optim, step
from mla_moe.train.state import init_state, placement

# The smallest model that has all parts: dense and MoE layers, MTP, groups of
# experts, segments.
MODEL = ModelConfig(
  vocab=264,
  dim=32,
  layers=3,
  dense_layers=1,
  dense_width=64,
  max_positions=64,
  init_std=0.05,
  bos_id=256,
  eos_id=257,
  dtype='float32',
  mla=MLAConfig(
    heads=4, query_rank=16, kv_rank=16, nope_dim=8, rope_dim=8, value_dim=8
  ),
  moe=MoEConfig(experts=8, top_k=2, width=16, groups=2, top_groups=1),
)
TINY = Config(
  model=MODEL,
  data=DataConfig(seq_len=32, batch_size=8, packing='separate'),
)
RATES = optim.Rates(1e-3, 0.01, 0.3)


@functools.cache
def batch():
  random = np.random.default_rng(0)
  stream = random.integers(0, 256, 4000).astype(np.uint16)
  stream[::11] = 256
  return batches.batch_at(stream, TINY.data, 0, 256)


@functools.cache
def single():
  """Returns (state before, state after, metrics) of a step on one device."""
  before = init_state(jax.random.key(0), TINY)
  train = jax.jit(functools.partial(step.train_step, config=TINY))
  return before, *jax.device_get(train(before, batch(), RATES))


def bytes_per_device(tree, shardings):
  """Returns the bytes of `tree` (arrays or shapes) on one device."""

  def one(leaf, sharding):
    size = math.prod(sharding.shard_shape(leaf.shape))
    return size * np.dtype(leaf.dtype).itemsize

  return sum(jax.tree.leaves(jax.tree.map(one, tree, shardings)))


@functools.cache
def step_on(config):
  """Returns (config.mesh, the state's layout, the step on it)."""
  mesh_check.check(config)
  sizes = config.mesh
  mesh = sharding.make_mesh(sizes, jax.devices()[: sizes.devices])
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  with jax.set_mesh(mesh):
    where = placement(config, mesh)
  train = functools.partial(step.train_step, config=config)
  return mesh, where, jax.jit(train, out_shardings=(where, whole))


def on_mesh(config, state):
  """Returns the step from `state` on config.mesh, and the state's layout."""
  mesh, where, train = step_on(config)
  with jax.set_mesh(mesh):
    return train(jax.device_put(state, where), batch(), RATES), where


MIXED = dataclasses.replace(
  TINY, mesh=MeshConfig(expert=2, context=2, tensor=2)
)


def mixed(*, states='fsdp', exchange='auto', mark='slow', **sizes):
  mesh = MeshConfig(states=states, **sizes)
  compute = ComputeConfig(exchange=exchange)
  model = dataclasses.replace(MODEL, compute=compute)
  config = dataclasses.replace(TINY, model=model, mesh=mesh)
  name = '-'.join([*(f'{k}{v}' for k, v in sizes.items()), states, exchange])
  return pytest.param(config, id=name, marks=getattr(pytest.mark, mark))


@pytest.mark.parametrize(
  'config',
  [
    pytest.param(MIXED, marks=pytest.mark.slow),
    mixed(data=8, states='zero1'),
    mixed(fsdp=2, expert=4, exchange='padded'),
    mixed(expert=4, tensor=2, exchange='ragged'),
    mixed(data=2, expert=2, stage=2),
    # Each axis by itself, and two that split one dimension.
    mixed(fsdp=2, context=2, tensor=2, mark='by_hand'),
    *(mixed(**{axis: 2}, mark='by_hand') for axis in sharding.AXES),
  ],
)
def test_a_mesh_gives_the_single_devices_step(config, monkeypatch):
  emulation = emulated.ragged_all_to_all
  monkeypatch.setattr(collectives, 'ragged_all_to_all', emulation)
  before, expected, m = single()
  (got, n), where = on_mesh(config, before)
  assert float(n['loss']) == pytest.approx(float(m['loss']), rel=1e-5)
  chex.assert_trees_all_equal(jax.device_get(n['load']), m['load'])
  chex.assert_trees_all_equal(jax.device_get(got.router), expected.router)
  # AdamW's first moment is the clipped gradient, times a constant.
  grads, oracle = jax.device_get(got.opt[0].mu), expected.opt[0].mu
  for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(oracle), strict=True):
    assert np.abs(a - b).max() <= 1e-4 * np.abs(b).max()
  # Every device's copy of a bias is the same number.
  for leaf in jax.tree.leaves(got.router):
    copies = {}
    for part in leaf.addressable_shards:
      copies.setdefault(str(part.index), []).append(np.asarray(part.data))
    for same in copies.values():
      assert all((x == same[0]).all() for x in same)
  # The state is where it should be, and moments nowhere whole if parameters
  # are split.
  pairs = zip(jax.tree.leaves(got), jax.tree.leaves(where), strict=True)
  for leaf, layout in pairs:
    assert leaf.sharding.is_equivalent_to(layout, leaf.ndim)
  shard = lambda x: x.sharding.shard_shape(x.shape)
  pairs = zip(
    jax.tree.leaves(got.params), jax.tree.leaves(got.opt[0].mu), strict=True
  )
  for p, mu in pairs:
    assert np.prod(shard(mu)) <= np.prod(shard(p))
  if config.mesh.states == 'zero1':
    shapes = jax.tree.map(lambda x: x, got.opt)
    parameters = bytes_per_device(got.params, where.params)
    assert bytes_per_device(shapes, where.opt) < 0.5 * parameters


@pytest.mark.parametrize(
  'length, split, in_steps', [(64, 8, True), (1024, 8, False), (12, 2, False)]
)
def test_parts_of_tiles_are_gathered_in_two_steps(length, split, in_steps):
  """Over expert, then fsdp; at once where a device has whole tiles of 128.

  The gradient of the second step is asked for on fsdp's shards of the first
  axis, where libtpu scatters it.
  """
  names, shape = (None, 'dense'), (4, length)
  mesh = sharding.make_mesh(MeshConfig(fsdp=2, expert=4))
  box = nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, 'float32'), names)
  where = sharding.shardings(box, mesh)
  assert where.shard_shape(shape) == (4, length // split)
  w, x = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)

  def loss(w):
    return (sharding.gather_dense(w, names, w.dtype) * x).sum()

  with jax.set_mesh(mesh):
    text = str(jax.make_jaxpr(jax.grad(loss))(w))
    gradient = jax.jit(jax.grad(loss), out_shardings=where)(w)
  layouts = re.findall(r'spec=P\((.*)\)\)$', text, re.MULTILINE)
  both, fsdp = "('fsdp', 'expert'), None", "'fsdp', None"
  steps = [both, fsdp, 'None, None', fsdp, fsdp, both]
  assert layouts == (steps if in_steps else [])
  assert text.count('optimization_barrier') == 5 * in_steps
  np.testing.assert_array_equal(gradient, x)


@pytest.mark.slow
def test_another_mesh_continues():
  """Two steps on one device, or one and then one on a mesh."""
  _, after, _ = single()
  train = jax.jit(functools.partial(step.train_step, config=TINY))
  _, m = train(after, batch(), RATES)
  (_, n), _ = on_mesh(MIXED, after)
  assert float(n['loss']) == pytest.approx(float(m['loss']), rel=1e-5)


def test_features_are_in_natural_order_where_devices_split_a_row():
  compute = ComputeConfig(remat='none', attention='reference')
  model = dict(layers=1, mtp=MTPConfig(depth=0), compute=compute)
  network = transformer.Transformer(dataclasses.replace(MODEL, **model))
  tokens = np.random.default_rng(0).integers(0, 264, (1, 16)).astype(np.int32)
  shapes = jax.eval_shape(network.init, jax.random.key(0), tokens)
  random = np.random.default_rng(1)
  normal = lambda x: random.normal(0, 0.1, x.shape).astype(np.float32)
  variables = jax.tree.map(normal, nn.unbox(shapes))
  take = lambda *args: network.apply(*args, method=network.features).hidden
  alone = jax.jit(take)(variables, tokens)
  with jax.set_mesh(
    sharding.make_mesh(MeshConfig(context=2), jax.devices()[:2])
  ):
    split = jax.jit(take)(variables, tokens)
  np.testing.assert_allclose(split, alone, atol=1e-5)


@pytest.mark.parametrize(
  'rows, micro_batches, right',
  [(8, 0, True), (4, 0, True), (1, 0, False), (6, 0, False), (6, 3, True)],
)
def test_a_pipeline_takes_the_rows_that_its_micro_batches_divide(
  rows, micro_batches, right
):
  """The stack of layers computes the others: a sample's single row."""
  mesh = sharding.make_mesh(MeshConfig(stage=4, fsdp=2))
  assert not pipeline.takes(rows, micro_batches)
  with jax.set_mesh(mesh):
    micro_batches = micro_batches or 2
    assert pipeline.takes(rows, micro_batches) == right


class Affine:
  """A layer 10 x + w cos, in the place of a block of experts."""

  def apply(self, w, carry, angles, *_):
    (x, sets), cos = carry, angles.cos
    load = jnp.full(1, len(x), jnp.int32)
    stats = moe.Stats(load, cos.mean(), x.mean(), load[0])
    return (10 * x + w * cos, sets), block.Reports(stats, None, None)


@pytest.mark.parametrize('micro_batches', [2, 4])
def test_rows_leave_a_pipeline_in_order(micro_batches, monkeypatch):
  """10 (10 b + 1 (b + 1)) + 2 (b + 1) = 112 b + 12, by each row's own cos."""
  make = lambda *_: lambda c, routed, *_, parent: Affine() if routed else 0
  monkeypatch.setattr(pipeline.block, 'remat_block', make)
  x = jnp.arange(8.0)[:, None, None]
  run = lambda w, x, cos: pipeline.run(
    w, MODEL, x, rope.Angles(cos, cos, None), None, micro_batches
  )
  mesh = sharding.make_mesh(MeshConfig(stage=2), jax.devices()[:2])
  with jax.set_mesh(mesh):
    out, stats = jax.jit(run)(jnp.array([1.0, 2.0]), x, x + 1)
  np.testing.assert_array_equal(out[:, 0, 0], 112 * np.arange(8) + 12)
  np.testing.assert_array_equal(stats.load, [[8], [8]])
  np.testing.assert_array_equal(stats.balance, [4.5, 4.5])


def test_arranging_is_undone_and_parts_see_equally_much():
  x = np.arange(48, dtype=np.int32).reshape(2, 24)
  config = MeshConfig(context=2, tensor=4)
  with jax.set_mesh(sharding.make_mesh(config)):
    there = jax.jit(sequence.arrange)(x)
    back = jax.jit(sequence.restore)(there)
  np.testing.assert_array_equal(back, x)
  first, second = np.split(np.asarray(there[0]), 2)
  assert first.sum() == second.sum()
  chex.assert_trees_all_equal(sequence.arrange(x), x)  # without a mesh


def test_a_region_gathers_its_parts_in_natural_order():
  """Device p of 2 has pieces p and 3 - p of 4."""
  x = np.arange(24, dtype=np.int32).reshape(1, 12, 2)

  def region(x):
    part = sequence.this_part(2)
    return x, sequence.gather(x, 2), jnp.stack(part.pieces())

  with jax.set_mesh(
    sharding.make_mesh(MeshConfig(context=2), jax.devices()[:2])
  ):
    rows = jax.P(None, 'context')
    run = jax.shard_map(
      region, in_specs=rows, out_specs=(rows, jax.P(), jax.P('context')),
      check_vma=False,
    )  # fmt: skip
    there, whole, pieces = jax.jit(lambda x: run(sequence.arrange(x)))(x)
  order = [0, 1, 2, 9, 10, 11, 3, 4, 5, 6, 7, 8]
  np.testing.assert_array_equal(there, x[:, order])
  np.testing.assert_array_equal(whole, x)
  np.testing.assert_array_equal(pieces, [0, 3, 1, 2])


BAD = [
  (dict(data=3), 'mesh=data:3 is of 3 devices, but 8 are here; data:8 fits'),
  (dict(data=2, tensor=8), 'tensor:8 fits'),
  (dict(expert=4, tensor=4), 'expert:2,tensor:4 fits'),
]


@pytest.mark.parametrize('sizes, words', BAD)
def test_a_mesh_that_is_not_here_proposes_one(sizes, words):
  with pytest.raises(ConfigError, match='devices') as error:
    sharding.make_mesh(MeshConfig(**sizes))
  assert words in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize(
  'changes, words',
  [
    (dict(mesh=MeshConfig(fsdp=8), model=dict(dim=36)), 'model.dim=36'),
    (
      dict(
        mesh=MeshConfig(data=2, fsdp=4, states='zero1'),
        model=dict(mla=dataclasses.replace(TINY.model.mla, kv_rank=12)),
      ),
      r'data \* fsdp=8: must divide model.mla.kv_rank=12',
    ),
    (dict(mesh=MeshConfig(tensor=4), model=dict(vocab=270)), 'vocab=270'),
    (
      dict(mesh=MeshConfig(context=4), data=dict(seq_len=28)),
      r'context \* tensor=8 \(two pieces each\): must divide data.seq_len=28',
    ),
  ],
)
def test_what_does_not_divide_is_refused(changes, words):
  config = dataclasses.replace(TINY, mesh=changes['mesh'])
  for name in ('model', 'data'):
    part = dataclasses.replace(getattr(config, name), **changes.get(name, {}))
    config = dataclasses.replace(config, **{name: part})
  with pytest.raises(ConfigError, match=words):
    mesh_check.check(config)


def test_the_outermost_axis_goes_across_slices():
  assert sharding.slice_axis(MeshConfig(data=4, fsdp=8), 2) == 'data'
  assert sharding.slice_axis(MeshConfig(fsdp=8, stage=2), 2) == 'stage'
  with pytest.raises(ConfigError, match='slow network'):
    sharding.slice_axis(MeshConfig(expert=8), 2)


def test_rows_that_no_axis_splits_are_the_same_on_every_device():
  """One row on two devices: regions must say that their outputs are equal."""
  network = transformer.Transformer(MODEL)
  tokens = jnp.zeros((1, 8), jnp.int32)
  with jax.set_mesh(sharding.make_mesh(MeshConfig(data=2), jax.devices()[:2])):
    shapes = jax.eval_shape(network.init, jax.random.key(0), tokens)
  assert shapes['params']
