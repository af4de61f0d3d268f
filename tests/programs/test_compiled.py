"""What the compiled step sends: what the arithmetic says, and no experts."""

import dataclasses
import functools
import re
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from configs import r1_tiny, small, tiny
from experiments import chips
from experiments.data import batches
from experiments.plan import compiled, hlo, scheduled, traffic
from experiments.rl import episodes
from experiments.training import preparation, steps
from experiments.training import program as training
from mla_moe import sharding
from mla_moe.config import (
  CacheConfig,
  ComputeConfig,
  MeshConfig,
  MTPConfig,
  freeze,
)
from mla_moe.decode import forward, latent_cache
from mla_moe.model import transformer

NEEDS = 'needs libtpu: pip install jax[tpu]'
MESHES = {
  'expert': MeshConfig(expert=8),
  'both': MeshConfig(fsdp=2, expert=4),
  'data': MeshConfig(data=2, expert=4),
  'tensor': MeshConfig(tensor=2, expert=4),
}
# Width of the stream and of an expert. The arithmetic was written with the
# first two programs at hand; of the others it was a prediction.
WIDTHS = {
  'expert': (1024, 512),
  'both': (1024, 512),
  'data': (768, 640),
  'tensor': (1280, 384),
}


def step_of(mesh, dtype, dim, width, length):
  """A dense and two MoE layers; a width that no other length is equal to."""
  config = freeze(small.get_config())
  moe = dataclasses.replace(
    config.model.moe, experts=16, top_k=8, groups=1, top_groups=1, width=width
  )
  model = dataclasses.replace(
    config.model,
    dim=dim,
    layers=3,
    vocab=2048,
    compute=ComputeConfig(remat='full'),
    dtype=dtype,
    mtp=MTPConfig(0),
    moe=moe,
  )
  data = dataclasses.replace(
    config.data, seq_len=length, batch_size=16, micro_batch=0
  )
  return dataclasses.replace(config, model=model, data=data, mesh=MESHES[mesh])


def program(config, devices):
  lowered, mesh = compiled.lower(config, devices)
  text = lowered.compile().as_text()
  return text, mesh.axis_names, mesh.devices.shape


def gathered_over(axis, text, axes, sizes):
  """The shapes that are gathered along an axis of the mesh."""
  for line in text.splitlines():
    match = re.search(r'= (.*?) all-gather(-start)?\(', line)
    if match and axis in hlo._axis(hlo._group(line, 8), axes, sizes):
      for _, shape in hlo._SHAPE.findall(match[1]):
        yield [int(n) for n in shape.split(',') if n]


def no_experts_are_gathered(config, *text_and_mesh):
  dim, width = config.model.dim, config.model.moe.width
  shapes = list(gathered_over('expert', *text_and_mesh))
  assert any(dim in shape for shape in shapes)  # tokens are
  here = config.model.moe.experts // config.mesh.expert
  for shape in shapes:  # a shared expert has one axis less, or begins with dim
    sizes = [n for n in shape if n != 1]
    if len(sizes) > 2 and sizes[0] == here:
      assert not {dim, width} <= {*sizes[1:]}, shape
      assert not {dim, 2 * width} <= {*sizes[1:]}, shape


def received(text, axes, sizes):
  """Bytes by axis; of a sum over several at once all count as the first's.

  A gather over several counts as one after another, the last of them first.
  """
  sums = dict.fromkeys(sharding.AXES, 0.0)
  size_of = dict(zip(axes, sizes, strict=True))
  for row in hlo.collectives(text, axes, sizes):
    over, before = row['axis'].split('+'), 1
    if row['kind'] != 'all-gather':
      over = over[:1]
    parts = []
    for axis in over:
      parts.append((1 - 1 / size_of[axis]) / before)
      before *= size_of[axis]
    for axis, part in zip(over, parts, strict=True):
      sums[axis] += row['bytes'] * part / sum(parts)
  return sums


@pytest.mark.parametrize(
  'states', ['zero1', pytest.param('fsdp', marks=pytest.mark.slow)]
)
def test_the_plan_compiles_the_program_of_a_run(states):
  config = freeze(tiny.get_config('micro'))
  model = dataclasses.replace(config.model, layers=1, dense_layers=0)
  config = dataclasses.replace(config, model=model)
  data = dataclasses.replace(config.data, batch_size=16, micro_batch=8)
  host = dict(source='mine', fim_rate=0.0, heldout=0.5, seed=3)  # no program's
  data = dataclasses.replace(data, batch_start=8, ramp_tokens=1e3, **host)
  mesh = MeshConfig(data=2, fsdp=4, states=states)
  config = dataclasses.replace(config, data=data, mesh=mesh)
  lowered, mesh = compiled.lower(config, jax.devices())
  setup = types.SimpleNamespace(config=config, mesh=mesh, part=(0, 1))
  stream = np.zeros(10000, np.uint16)
  batch = batches.batch_at(stream, config.data, 0, 0)
  with jax.set_mesh(mesh):
    run, *_ = preparation._jitted(training.of_devices(config))
    args = (batch, steps.rates(config, 1))
    args = [preparation.Setup.place(setup, x) for x in args]
    text = run.lower(training.shapes(config, mesh), *args).as_text()
  assert lowered.as_text() == text


@pytest.mark.parametrize('replay', ['compare', 'none'])
def test_an_update_s_abstract_batch_is_like_a_packed_one(replay, monkeypatch):
  monkeypatch.setattr(training, 'shapes', lambda *_: None)  # of the state
  config = freeze(r1_tiny.get_config('zero'))
  rl = dataclasses.replace(config.rl, replay=replay)
  data = dataclasses.replace(config.data, batch_size=4, micro_batch=2)
  config = dataclasses.replace(config, rl=rl, data=data)
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  _, batch, _ = training.abstract_inputs(config, mesh)
  model, floats = config.model, np.zeros(2, np.float32)
  routes = None
  if replay == 'compare':
    routes = np.zeros((3, model.moe_layers, model.moe.top_k), np.int16)
  tokens = np.ones((2, 2), np.int32)
  answer = episodes.Answer(*tokens, floats, 1.0, 1.0, routes)
  packed = episodes.pack([answer] * 4, data.seq_len, data.micro_batch)
  chex.assert_trees_all_equal_shapes_and_dtypes(batch, packed)


@pytest.mark.slow
@pytest.mark.parametrize('mesh', ['expert', 'both'])
def test_tokens_travel_and_experts_do_not(mesh):
  config = step_of(mesh, 'float32', 256, 96, 128)
  text_and_mesh = program(config, jax.devices())
  no_experts_are_gathered(config, *text_and_mesh)


# Bytes of a program for CPUs beside the arithmetic. Their compiler has no
# scatter of its own for GSPMD's sums, which brings twice the bytes.
RATIOS = {'fsdp': 1.14, 'tensor': 1.4}


@pytest.mark.slow
@pytest.mark.parametrize('axis', sharding.AXES)
def test_every_axis_has_its_place_in_the_arithmetic(axis):
  mesh = MeshConfig(**{axis: 2})
  config = step_of('both', 'float32', 256, 96, 128)
  config = dataclasses.replace(config, mesh=mesh)
  sums = received(*program(config, jax.devices()[:2]))
  expected = traffic.by_axis(config)
  assert {a for a, size in sums.items() if size} == {axis}
  ratio = sums[axis] / expected[axis]
  assert ratio == pytest.approx(RATIOS.get(axis, 1.0), rel=0.03)


@functools.cache
def tpu(mesh):
  config = step_of(mesh, 'bfloat16', *WIDTHS[mesh], 1024)
  text = scheduled.step(config, chips.parse('v5e:2x4')).program
  sizes = tuple(getattr(config.mesh, axis) for axis in sharding.AXES)
  return config, (text, sharding.AXES, sizes)


@pytest.fixture
def libtpu(monkeypatch):
  pytest.importorskip('libtpu', reason=NEEDS)
  monkeypatch.setenv('TPU_SKIP_MDS_QUERY', '1')
  monkeypatch.setenv('TPU_WORKER_HOSTNAMES', 'localhost')


# CI has the same arithmetic of each axis beside programs for CPUs, above.
ONE_MESH = [
  pytest.param(mesh, marks=pytest.mark.by_hand if mesh != 'both' else ())
  for mesh in MESHES
]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize('mesh', ONE_MESH)
def test_a_tpu_receives_what_the_arithmetic_says(mesh, libtpu):
  config, text_and_mesh = tpu(mesh)
  no_experts_are_gathered(config, *text_and_mesh)
  sums, expected = received(*text_and_mesh), traffic.by_axis(config)
  total = sum(expected.values())
  assert sum(sums.values()) == pytest.approx(total, rel=0.1)
  for axis in expected:
    assert sums[axis] == pytest.approx(expected[axis], rel=0.1), axis


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize('mesh', ONE_MESH[:2])
def test_a_tpu_computes_the_shared_expert_while_tokens_travel(mesh, libtpu):
  """Tokens' gather is cut into fusions: its start, products, its end."""
  config, (text, _, _) = tpu(mesh)
  bodies, _ = hlo._bodies(text)
  each = config.data.batch_size // config.mesh.devices * config.data.seq_len
  rows = config.mesh.expert * each  # of an expert group
  moved = [
    name
    for name, lines in bodies.items()
    for line in lines
    if re.search(rf'= bf16\[{rows},1024\]\S* all-gather\(', line)
    and 'experts/all_gather' in line
  ]
  between = [name for name in moved if name.startswith('async_collective')]
  assert between
  # In the same fusion runs a product of the shared expert.
  work = [line for name in between for line in bodies[name]]
  assert any(' convolution(' in w and 'ffn/shared' in w for w in work)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_tpu_decodes_without_moving_or_copying_experts(libtpu):
  from jax.experimental import topologies

  described = topologies.get_topology_desc('v5e:2x4', platform='tpu')
  mesh = sharding.make_mesh(MESHES['expert'], described.devices)
  config = step_of('expert', 'bfloat16', 1024, 4096, 1024).model
  shaped = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
  with jax.set_mesh(mesh):
    boxed = jax.eval_shape(
      lambda: transformer.Transformer(config).init(
        jax.random.key(0), jnp.zeros((1, 8), jnp.int32)
      )
    )
    trained = jax.tree.map(
      shaped, nn.unbox(boxed), sharding.shardings(boxed, mesh)
    )
    unstack = jax.jit(functools.partial(forward.unstack, config))
    where = unstack.lower(trained).compile().output_shardings
    weights = jax.tree.map(shaped, jax.eval_shape(unstack, trained), where)
    cache_config = CacheConfig(page=128, impl='xla')
    cache = jax.eval_shape(
      lambda: latent_cache.empty(config, 64, 1024, cache_config)
    )
    # Rows, with their pages, lie on the devices that hold the batch.
    rows = jax.NamedSharding(mesh, sharding.spec(('batch',)))
    cache = jax.tree.map(lambda x: shaped(x, rows), cache)
    tokens = jax.ShapeDtypeStruct((64,), jnp.int32, sharding=rows)
    step = functools.partial(forward.decode_step, config=config)
    lowered = jax.jit(step, donate_argnums=1).lower(weights, cache, tokens)
    step = lowered.compile()
  text_and_mesh = step.as_text(), mesh.axis_names, mesh.devices.shape
  experts = weights['layers'][-1]['ffn']['w_down']
  each = experts.size * experts.dtype.itemsize / 8
  assert sum(received(*text_and_mesh).values()) < each / 2  # both MoE layers'
  assert step.memory_analysis().temp_size_in_bytes < each
