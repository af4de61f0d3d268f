"""Plans: memory by arithmetic against the model's own shapes; the CLI."""

import dataclasses
import functools
import json
import math
import pathlib
import re
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from configs import (
  deepseek_v2_lite,
  deepseek_v3,
  deepseek_v32,
  glm5,
  r1,
  r1_tiny,
  small,
)
from experiments import chips
from experiments.plan import (
  bill,
  compiled,
  memory,
  report,
  rollout,
  scheduled,
  search,
  traffic,
)
from mla_moe import cost, load_huggingface, sharding
from mla_moe.config import (
  CacheConfig,
  ComputeConfig,
  ConfigError,
  MeshConfig,
  MTPConfig,
  RLConfig,
  freeze,
)
from mla_moe.decode import forward, latent_cache
from mla_moe.model import dispatch, transformer
from mla_moe.train import state

abstract_state = functools.cache(state.abstract_state)

V3 = freeze(deepseek_v3.get_config())
LITE = freeze(deepseek_v2_lite.get_config())
SMOKE = freeze(small.get_config('smoke'))
ZERO = freeze(r1_tiny.get_config('zero'))
ROOT = pathlib.Path(__file__).parents[2]


def on_mesh(config, **mesh):
  over = ('data', 'fsdp', 'expert', 'stage')
  rows = math.prod(mesh.get(a, 1) for a in over)
  return dataclasses.replace(
    config,
    mesh=MeshConfig(**mesh),
    data=dataclasses.replace(config.data, micro_batch=rows),
  )


@pytest.mark.parametrize('config', [V3, LITE], ids=['V3', 'V2-Lite'])
def test_the_layout_holds_what_the_arithmetic_counts(config):
  layout = abstract_state(config)
  counts = cost.parameters(config)
  size = memory.state_bytes((layout.params, layout.router), config.mesh)
  assert size == 4 * (counts.total + counts.mtp)
  assert memory.state_bytes(layout.opt, config.mesh) == pytest.approx(2 * size)


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_a_device_holds_what_jax_says_of_its_shards(optimizer):
  optim = dataclasses.replace(SMOKE.optim, optimizer=optimizer)
  config = dataclasses.replace(SMOKE, optim=optim)
  config = on_mesh(config, fsdp=2, expert=2, tensor=2)
  layout = abstract_state(config)
  mesh = sharding.make_mesh(config.mesh)
  where = jax.tree.leaves(sharding.shardings(layout, mesh))
  leaves = jax.tree.leaves(nn.unbox(layout))
  size = lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize
  expected = sum(size(x, s) for x, s in zip(leaves, where, strict=True))
  assert memory.state_bytes(layout, config.mesh) == expected


def kept_for_the_backward_pass(config, rows, length):
  """Bytes of the stacked residuals, from jax's own partial evaluation."""
  network = transformer.Transformer(config)
  tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
  key = jax.eval_shape(lambda: jax.random.key(0))
  variables = nn.unbox(jax.eval_shape(network.init, key, tokens))
  zeros = lambda x: jnp.zeros(x.shape, x.dtype)
  router = jax.tree.map(zeros, variables['router'])

  def residuals(params, tokens):
    def loss(params):
      both = {'params': params, 'router': router}
      return network.apply(both, tokens, method=network.features).hidden.sum()

    return jax.vjp(loss, params)[1]

  out = jax.eval_shape(residuals, variables['params'], tokens)
  stacks = (config.dense_layers, config.moe_layers)
  sizes = (length, rows * length, rows * length * config.moe.top_k)
  return sum(
    x.size * np.dtype(x.dtype).itemsize
    for x in jax.tree.leaves(out)
    if x.ndim > 1 and x.shape[0] in stacks and any(n in sizes for n in x.shape)
  )


def grouped(model, kv_heads):
  """The model with grouped-query attention."""
  mla = dataclasses.replace(model.mla, query_rank=0)
  return dataclasses.replace(model, mla=mla, attention='gqa', kv_heads=kv_heads)


@pytest.mark.parametrize(
  'remat, within, kv_heads',
  [
    ('products', 0, 0),
    pytest.param('products', 0, 2, marks=pytest.mark.slow),
    pytest.param('full', 0, 0, marks=pytest.mark.slow),
    pytest.param('latents', 0, 0, marks=pytest.mark.slow),
    pytest.param('none', 0.3, 0, marks=pytest.mark.slow),
  ],
)
def test_saved_bytes_are_those_of_the_residuals(remat, within, kv_heads):
  compute = ComputeConfig(remat=remat, attention='xla', experts='ragged')
  network = dataclasses.replace(
    SMOKE.model,
    dim=40,
    layers=8,
    dense_layers=3,
    compute=compute,
    mtp=MTPConfig(0),
  )
  if kv_heads:
    network = grouped(network, kv_heads)
  data = dataclasses.replace(
    SMOKE.data, seq_len=248, batch_size=2, micro_batch=0
  )
  config = dataclasses.replace(SMOKE, model=network, data=data)
  expected = kept_for_the_backward_pass(network, 2, 248)
  assert memory.residual_bytes(config) == pytest.approx(expected, rel=within)


def test_the_bill_of_v3_on_its_own_cluster():
  slice_ = chips.parse('h800:2048')
  config = on_mesh(V3, fsdp=8, expert=64, tensor=4)
  plan = search.Plan(config, slice_, memory.footprint(config))
  bill_ = bill.bill(plan, 14.8e12, bill.UTILISATION, 2.0)
  assert bill_.hours == pytest.approx(2.664e6, rel=0.01)
  assert bill_.days == pytest.approx(54.3, rel=0.01)
  assert bill_.computing == pytest.approx(19.926, rel=0.02)
  assert bill.tokens_of(V3) == pytest.approx(14.8e12, rel=1e-3)


def test_zero1_splits_the_moments_alone():
  mesh = dict(data=4, fsdp=2)
  layout = abstract_state(SMOKE)
  whole = memory.footprint(on_mesh(SMOKE, **mesh), layout)
  split = memory.footprint(on_mesh(SMOKE, **mesh, states='zero1'), layout)
  assert split.parameters == whole.parameters
  assert split.optimizer < 0.3 * whole.optimizer
  # A mesh that is searched for, or asked for by a flag, keeps the table.
  config = on_mesh(SMOKE, states='zero1')
  best = search.best_on(config, chips.parse('v5e:2x2'), layout)
  assert best.config.mesh.states == 'zero1'
  start = MeshConfig(fsdp=8, states='zero1', pipeline=8)
  mesh = search.mesh_of('data=2,stage=2', start)
  assert mesh == MeshConfig(data=2, stage=2, states='zero1', pipeline=8)


def test_no_matrix_of_v3_is_whole_under_fsdp():
  layout = abstract_state(V3)
  one, split = (memory.state_bytes(layout, MeshConfig(fsdp=n)) for n in (1, 8))
  assert split < 1.001 * one / 8  # norms and the router's second axis


def test_sharding_more_never_holds_more():
  layout = abstract_state(LITE)
  sizes = [
    memory.footprint(on_mesh(LITE, fsdp=n), layout).total for n in (4, 8, 16)
  ]
  assert sizes == sorted(sizes, reverse=True)
  narrow = memory.footprint(on_mesh(LITE, fsdp=4, expert=4), layout)
  assert (
    narrow.gathered < memory.footprint(on_mesh(LITE, fsdp=16), layout).gathered
  )


def test_traffic_follows_the_mesh():
  assert not any(traffic.by_axis(on_mesh(LITE)).values())
  for axis in sharding.AXES:
    sent = traffic.by_axis(on_mesh(LITE, **{axis: 2}))
    assert {a for a, size in sent.items() if size} == {axis}
  counts = cost.parameters(LITE)
  sent = traffic.by_axis(on_mesh(LITE, data=2))['data']
  steps = LITE.data.batch_size / 2
  a = LITE.model.mla
  up = 27 * a.kv_rank * a.heads * (a.nope_dim + a.value_dim)
  regions = counts.routed + counts.embedding + counts.head + up
  wide = 4 * regions + 2 * (counts.total - regions)
  assert sent == pytest.approx(wide * steps)  # half out, half in
  model = dataclasses.replace(LITE.model, precision='fp8_block')
  in_fp8 = on_mesh(dataclasses.replace(LITE, model=model), data=2)
  sent = traffic.by_axis(in_fp8)['data']
  assert sent == pytest.approx(4 * counts.total * steps)


def test_a_plan_has_an_exchange_that_its_slice_has():
  """A v5e beyond 4x4 has no ragged one: there whole buffers travel."""
  layout = abstract_state(LITE)
  on = lambda topology: (
    search.plan(
      on_mesh(LITE, data=chips.parse(topology).devices // 16, expert=16),
      chips.parse(topology),
      layout,
    ).config
  )
  small, large = on('v5e:4x4'), on('v5e:8x8')
  kinds = [c.model.compute.exchange for c in (small, large, on('v6e:8x8'))]
  assert kinds == ['auto', 'padded', 'auto']
  sent = [traffic._exchanged(c, 1.0)['expert'] for c in (on('v6e:8x8'), large)]
  assert sent[1] / sent[0] == dispatch.capacity(64, 8) / 64
  proposed = search._on_mesh(LITE, large.mesh, chips.parse('v5e:8x8'))
  assert proposed == large
  for topology, kind in (
    ('v5e:4x4', 'TPU v5 lite'),
    ('v5e:4x8', 'TPU v5 lite'),
    ('v5p:4x8x8', 'TPU v5'),
    ('h100:64', 'NVIDIA H100'),
  ):
    slice_ = chips.parse(topology)
    platform = 'cuda' if slice_.gpu else 'tpu'
    device = jax.sharding.AbstractDevice(kind, 1, platform)
    mesh = jax.sharding.AbstractMesh(
      (slice_.devices,), ('expert',), abstract_device=device
    )
    with jax.sharding.use_abstract_mesh(mesh):
      assert sharding.ragged_exchange() == slice_.ragged, topology


def test_a_gather_s_tokens_are_in_memory_and_on_the_way():
  """An exchange that a config names is that of both."""
  for expert, gathers in ((4, 'auto gather'), (16, 'gather')):
    on = on_mesh(LITE, expert=expert)
    rows = expert * memory.tokens_per_device(on) * LITE.model.dim
    sizes = {}
    for kind in ('auto', 'gather', 'ragged'):
      compute = dataclasses.replace(on.model.compute, exchange=kind)
      model = dataclasses.replace(on.model, compute=compute)
      one = dataclasses.replace(on, model=model)
      sizes[kind] = memory.working_bytes(one), traffic.by_axis(one)['expert']
    working, sent = sizes['ragged']
    for kind, (size, bytes_sent) in sizes.items():
      more = rows * (2 + 4) if kind in gathers else 0
      assert size == pytest.approx(working + more), (expert, kind)
      assert (bytes_sent != sent) == (kind in gathers), (expert, kind)


def test_several_slices_leave_more_memory_free():
  one, four = (chips.parse(f'v6e:16x16{n}') for n in ('', '*4'))
  assert one.planned > four.planned
  for more, count in ((0, 256), (1, math.ceil(256 * 0.96 / 0.85))):
    assert chips.holding('v6e', 256 * one.planned + more) == count
  a_gpu = chips.parse('h100:1').planned
  assert chips.holding('h100', 2**12 * a_gpu) == 2**12  # one network
  usable = (1 - four.margin) * four.chip.usable
  full = memory.Footprint(*(0,) * len(dataclasses.fields(memory.Footprint)))
  full = dataclasses.replace(full, parameters=usable + 1)
  fits = [search.Plan(LITE, s, full).fits for s in (one, four)]
  assert fits == [True, False]


def test_long_sequences_are_split_over_context():
  """Eight rows, and eight devices along tensor, are 64 devices of 256."""
  sizes = dict(seq_len=65536, batch_size=8, micro_batch=8)
  data = dataclasses.replace(LITE.data, **sizes)
  config = dataclasses.replace(LITE, data=data)
  slice_, layout = chips.parse('v5e:16x16'), abstract_state(LITE)
  best = search.best_on(config, slice_, layout)
  assert best.fits and best.config.mesh.context >= 4
  assert 8 % best.config.data.micro_batch == 0
  core = dataclasses.replace(config.model.compute, attention='splash')
  model = dataclasses.replace(config.model, compute=core)
  whole = dataclasses.replace(config, model=model)
  assert search.best_on(whole, slice_, layout) is None  # no parts of a row
  meshes = list(search._meshes(LITE, 64))
  assert {mesh.context for mesh in meshes} == {1}  # 4,096 tokens
  assert len({*meshes}) == len(meshes)


def test_traffic_has_index_keys_and_gradients_of_the_trained():
  """A scan brings keys for shared layers; the warm-up trains no expert."""
  config = on_mesh(freeze(glm5.get_config('shared')), context=2)
  sent = traffic.by_axis(config)['context'] - grads_over_context(config)
  model, mtp = config.model, config.model.mtp.depth
  latents = (78 + mtp) * (model.mla.kv_rank + model.mla.rope_dim)
  numbers = latents + (78 + mtp) * model.dsa.dim
  tokens = config.data.batch_size * config.data.seq_len / 2
  # Forward, again backward, and the gradients; two bytes each.
  assert sent == pytest.approx(3 * 2 * numbers * tokens)
  for types, count in (
    (('full', 'shared'), 1),  # its stack of MoE layers has no indexer
    (('full', 'full'), 2),
  ):
    dsa = dataclasses.replace(model.dsa, types=types)
    two = dataclasses.replace(model, layers=2, dense_layers=1, dsa=dsa)
    assert traffic._indexed(two) == count
  assert traffic._indexed(LITE.model) == 0
  warm = on_mesh(freeze(deepseek_v32.get_config('warmup')), data=2)
  own = memory.training_bytes_per_device(on_mesh(warm))['gradients'] / 4
  micro_batches = warm.data.batch_size / 2
  assert traffic.by_axis(warm)['data'] == pytest.approx(2 * own * micro_batches)
  trained = dataclasses.replace(warm.optim, trains='all')
  whole = dataclasses.replace(warm, optim=trained)
  for axis in ('fsdp', 'expert', 'tensor', 'context'):
    both = (traffic.by_axis(on_mesh(x, **{axis: 2})) for x in (warm, whole))
    less, more = (sent[axis] for sent in both)
    assert 0 < less < more, axis


def grads_over_context(config):
  """Bytes of the gradients' sums, which are those over data."""
  mesh = dict(data=2)
  steps = config.data.batch_size / 2, config.data.batch_size
  return traffic.by_axis(on_mesh(config, **mesh))['data'] * steps[1] / steps[0]


def test_grouped_attention_is_planned_by_its_heads():
  model = grouped(LITE.model, 4)
  config = on_mesh(dataclasses.replace(LITE, model=model), context=2)
  a, layers = model.mla, model.layers + model.mtp.depth
  pair = a.nope_dim + a.rope_dim + a.value_dim
  sent = traffic.by_axis(config)['context'] - grads_over_context(config)
  tokens = config.data.batch_size * config.data.seq_len / 2
  assert sent == pytest.approx(3 * 2 * layers * 4 * pair * tokens)
  assert memory.cached_here(on_mesh(config, tensor=2)) == 2 * pair
  assert memory.cached_here(on_mesh(LITE, tensor=2)) == 512 + 64
  flops = functools.partial(rollout.answer_flops_per_token, config)
  assert flops(101) - flops(100) == 2 * a.heads * pair * model.layers


def test_the_smallest_slice_is_the_smallest():
  layout = abstract_state(LITE)
  best = search.smallest(LITE, 'v5p', layout)
  assert best.fits and best.config.mesh.devices == best.slice.devices
  before = chips.slices('v5p').index(best.slice)
  for slice_ in chips.slices('v5p')[:before]:
    assert search.best_on(LITE, slice_, layout) is None


def size_of(tree):
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def test_a_rollout_has_the_decoder_s_own_bytes():
  model = dataclasses.replace(ZERO.model, dtype='bfloat16')
  config = dataclasses.replace(ZERO, model=model)
  layout = abstract_state(config)
  got = memory.footprint(config, layout)
  assert got.reference == size_of(layout.reference)
  both = nn.unbox({'params': layout.params, 'router': layout.router})
  weights = jax.eval_shape(lambda x: forward.unstack(model, x), both)
  assert got.decoding == pytest.approx(size_of(weights), rel=0.02)
  pages = CacheConfig(page=20, dtype='bfloat16')
  pools = jax.eval_shape(lambda: latent_cache.pools(model, 512, pages))
  assert got.cache == size_of(pools)
  # An update and a rollout are never at once.
  assert got.total == got.state + max(got.update, got.rollout)
  assert got.state + got.update + got.rollout == sum(dataclasses.astuple(got))
  text = memory.footprint(dataclasses.replace(config, rl=RLConfig()), layout)
  assert text.reference == text.rollout == 0
  assert text.update == got.update - got.routes
  # The page draws what is there at once.
  assert list(report._sizes(text)) == list(report._at_once(text))
  full = dataclasses.replace(got, cache=10**9)
  for size in (got, full, text):
    assert sum(report._at_once(size).values()) == size.total
  assert 'cache' in report._at_once(full) and 'logits' in report._at_once(got)


def test_teachers_and_routes_have_their_bytes():
  """Those of a release's own weights; of one elsewhere, the policy's."""
  folder = ROOT / 'tests' / 'golden' / 'v2_lite'
  change = lambda config, **rl: dataclasses.replace(
    config, rl=dataclasses.replace(config.rl, **rl)
  )
  pairs = (str(folder), 0.5, 'x'), ('elsewhere', 1.0, 'y')
  config = change(ZERO, teachers=pairs, replay='rollout')
  got, none = memory.footprint(config), memory.footprint(ZERO)
  _, weights = load_huggingface(folder, config.model.dtype)
  assert got.teachers == size_of(weights) + got.parameters
  assert got.state == none.state + got.teachers and none.teachers == 0
  rl, data, moe = config.rl, config.data, config.model.moe
  layers = config.model.layers - config.model.dense_layers
  routes = np.zeros(
    (data.batch_size, data.seq_len, layers, moe.top_k), np.int16
  )
  assert got.routes == routes.nbytes
  assert rollout.record_bytes(config, rl.prompts * rl.samples) == routes.nbytes
  assert memory.footprint(change(ZERO, replay='none')).routes == 0
  halves = on_mesh(config, data=2)
  assert memory.footprint(halves).routes == got.routes // 2
  # The old policy, the reference and two teachers: four passes of a third.
  assert rollout.scoring(change(config, beta=0.1)) == pytest.approx(4 / 3)


def test_a_mesh_splits_the_reference_and_the_rows():
  config = on_mesh(ZERO, data=2, expert=2, tensor=2)
  layout = abstract_state(config)
  got, one = (memory.footprint(x, layout) for x in (config, ZERO))
  assert got.reference == memory.state_bytes(layout.reference, config.mesh)
  assert got.cache == one.cache / 4  # tensor has the same latents
  few = dataclasses.replace(config.rl, rows=16, samples=2, prompts=9)
  assert rollout.rows_here(dataclasses.replace(config, rl=few)) == 4
  odd = dataclasses.replace(few, rows=18)
  assert rollout.rows_here(dataclasses.replace(config, rl=odd)) == 18


def test_the_seconds_of_r1_s_steps():
  """A rollout's token: weights twice, and the latents before it for heads."""
  config = on_mesh(freeze(r1.get_config('zero')), fsdp=128, expert=2, tensor=4)
  slice_ = chips.parse('v5p:8x8x16')
  plan = search.Plan(config, slice_, memory.footprint(config))
  paid = bill.bill(plan, bill.tokens_of(config), 0.3, 1.0)
  model, a = config.model, config.model.mla
  counts = cost.parameters(model)
  active = counts.active - counts.embedding - counts.norms
  mean = 2048 + 16384
  token = 2 * active + mean * 61 * 2 * a.heads * (2 * a.kv_rank + a.rope_dim)
  answers = 8192 * 32768 * token
  prompts = 512 * 2048 * cost.train_flops_per_token(model, 2048) / 3
  rate = 1024 * slice_.chip.bf16 * 0.3
  seconds = (answers + prompts) / rate / 16
  assert paid.answering == pytest.approx(seconds, rel=1e-3)
  # The reference in each update, the old policy in all but the first of 16.
  assert paid.scoring == pytest.approx(paid.computing * (1 + 15 / 16) / 3)
  steps = config.run.steps
  step = paid.computing + paid.scoring + paid.answering
  assert paid.days == pytest.approx(steps * step / 86400)
  assert paid.dollars == paid.hours == pytest.approx(paid.days * 24 * 1024)
  # One row reads the weights: memory and not the products is the limit.
  one = dataclasses.replace(config.rl, prompts=16, samples=2, rows=2)
  lone = dataclasses.replace(config, rl=one)
  size = plan.footprint.decoding + 2 * mean * cost.cache_bytes_per_token(model)
  got = rollout.seconds(lone, slice_.chip, 0.5, plan.footprint.decoding)
  reading = 16 * 32768 * size / slice_.chip.bandwidth
  assert got == pytest.approx(reading, rel=0.01)


def test_a_plan_of_reinforcement_has_its_rows(call):
  words = '--config=configs/r1_tiny.py', '--topology=v5e:2x2'
  code, out, err = call('plan', *words)
  assert code == 0, err
  for word in ('reference', 'decoding', 'cache ', 'answering', 'fuller'):
    assert word in out


@pytest.mark.parametrize(
  'text, devices',
  [
    ('v5p:4x4x4', 64),
    ('v5e-16', 16),
    ('tpu7x:2x2x1', 8),
    ('h100:64', 64),
    ('a100-40gb:4', 4),
    ('rtx4090-2', 2),
    ('v6e:16x16*2', 512),
  ],
)
def test_slices_by_name(text, devices):
  assert chips.parse(text).devices == devices


@pytest.mark.parametrize('text', ['v5e:3x5', 'v9:4x4', 'x', '', 'h100:0'])
def test_slices_that_there_are_not(text):
  with pytest.raises(ConfigError, match='--topology='):
    chips.parse(text)


@pytest.mark.parametrize(
  'args, message',
  [
    (['--topology=v5e:4x4', '--mesh=fsdp=8'], r'is 8 devices, .* has 16'),
    (['--topology=v5e:9x9'], r'v5e slices are'),
    (['--mesh=rows=4'], r'is no axis=size'),
    (
      ['--config=configs/deepseek_v2_lite.py', '--topology=v5e:4x8']
      + ['--mesh=fsdp=2,expert=16', '--config.data.micro_batch=32']
      + ['--config.model.compute.exchange=ragged'],
      r'v5e:4x8 has no ragged all-to-all',
    ),
    (['--compile'], r'needs a --topology'),
    (['--schedule', '--topology=h100:8'], r'^error: --schedule: is of TPUs'),
    (
      ['--schedule', '--compile', '--topology=v5e:2x2'],
      r'--schedule: is a part of --compile',
    ),
    (
      ['--config=configs/deepseek_v3.py', '--topology=v5p:4x4x4'],
      r'needs [\d.]+ GiB .* the smallest that fits is --topology=v5p:\S+ '
      r'--mesh',
    ),
  ],
)
def test_bad_plans_are_one_line(call, args, message):
  code, _, err = call('plan', *args)
  assert code == 2
  assert re.search(message, err) and err.count('\n') == 1


@pytest.mark.parametrize(
  'topology, package', [('v5e:2x2', 'libtpu'), ('h100:8', 'jax-cuda13-plugin')]
)
def test_a_missing_compiler_is_named(topology, package, monkeypatch):
  monkeypatch.setattr(compiled.importlib.util, 'find_spec', lambda name: None)
  extra = 'tpu' if package == 'libtpu' else 'cuda'
  message = f'{package} is missing; pip install "mla_moe[{extra}]"'
  with pytest.raises(ConfigError, match=re.escape(message)):
    compiled.run(LITE, chips.parse(topology))
  if extra == 'tpu':
    with pytest.raises(ConfigError, match='^--schedule: libtpu is missing'):
      scheduled.run(LITE, chips.parse(topology))


def test_a_card_without_a_description_is_not_compiled_for():
  with pytest.raises(ConfigError, match='no description of t4 .* h100'):
    compiled.run(LITE, chips.parse('t4:8'))


def test_a_program_too_large_for_a_gpu_is_refused(monkeypatch):
  answer = {'arguments': 60 * 2**30, 'temporary': 20 * 2**30}
  process = subprocess.CompletedProcess([], 0, json.dumps(answer), '')
  monkeypatch.setattr(compiled.subprocess, 'run', lambda *_, **__: process)
  monkeypatch.setattr(compiled.importlib.util, 'find_spec', lambda name: name)
  message = 'needs 80.00G of memory on h100:8, where there is 72.81G'
  with pytest.raises(ConfigError, match=message):
    compiled.run(LITE, chips.parse('h100:8'))


def test_the_page_says_what_the_plan_says():
  text = (pathlib.Path(__file__).parents[2] / 'docs/plan.md').read_text()
  row = r'\| (\S+:\S+).*? \| ([a-z]+=[^|]*) \| ([\d.]+) \| ([\d.]+) \|'
  rows = re.findall(row, text)
  assert len(rows) == 7
  layouts = {config: abstract_state(config) for config in (V3, LITE)}
  for i, (name, mesh, needs, has) in enumerate(rows):
    config, slice_ = V3 if i < 4 else LITE, chips.parse(name)
    sizes = {k: int(v) for k, v in re.findall(r'(\w+)=(\d+)', mesh)}
    planned = search.plan(on_mesh(config, **sizes), slice_, layouts[config])
    assert f'{planned.footprint.total / 2**30:.1f}' == needs, name
    assert f'{slice_.chip.usable / 2**30:.1f}' == has, name


def test_no_figure_is_cut_off(capsys, monkeypatch):
  monkeypatch.setenv('COLUMNS', '80')
  config = on_mesh(LITE, fsdp=16, expert=8, tensor=2)
  plan = search.plan(config, chips.parse('v6e:16x16'), abstract_state(LITE))
  paid = bill.bill(plan, 1e9, 0.4, 0.0)
  report.show_choice(LITE, [(plan, paid)], 0.4)
  output = capsys.readouterr().out
  assert '…' not in output and str(plan.slice) in output


def test_a_plan_that_fits_writes_a_table_and_a_page(tmp_path, call):
  page = tmp_path / 'plan.html'
  words = '--config=configs/small.py', '--topology=v5e:2x2', f'--out={page}'
  code, out, err = call('plan', *words)
  assert code == 0, err
  assert '…' not in out
  for word in ('parameters', 'optimizer', 'there is', 'chip hours'):
    assert word in out
  assert re.search(
    r'^To train it so: --config.mesh.\w+=.* --config.data.micro_batch=\d+$',
    out,
    re.M,
  )
  assert page.read_text().count('<svg') == 2


@pytest.mark.parametrize(
  'days, shown',
  [
    (1113.6, '1,114 days'),
    (54.27, '54.3 days'),
    (0.25, '6 hours'),
    (0.01, '14.4 minutes'),
    (1e-4, '8.64 seconds'),
  ],
)
def test_small_and_large_plans_have_figures(days, shown):
  paid = bill.Bill(1e9, 0.25, 0.5, days, computing=0, sending=0)
  text = report._money(paid, 0.4)
  assert text == (
    f'1e+09 tokens: {shown}, 0.25 chip hours, $0.5 at 40.0% of the bf16 peak.'
  )
  assert report._count(2_310_000) == '2.31 M'
  assert report._count(671e9) == '671.00 B'


def test_a_pipeline_costs_its_bubble():
  """Filled and emptied in each micro-batch: (S - 1) / (M + S - 1) of turns."""
  mesh = dict(fsdp=16, stage=2, expert=16)
  config = on_mesh(LITE, **mesh)
  assert bill.bubble(config.mesh) == pytest.approx(1 / 3)
  assert bill.bubble(MeshConfig(stage=4, pipeline=12)) == pytest.approx(0.2)
  assert bill.bubble(MeshConfig(pipeline=12)) == 0
  planned = lambda c: bill.bill(
    search.Plan(c, chips.parse('v5p:8x8x8'), memory.footprint(c)), 1e9, 0.4, 0
  )
  flat = planned(on_mesh(LITE, fsdp=32, expert=16))
  staged = planned(config)
  # 26 of 27 layers are in it, and the head is not.
  for name in ('hours', 'dollars', 'days', 'computing'):
    ratio = getattr(staged, name) / getattr(flat, name)
    assert ratio == pytest.approx(1.45, abs=0.02), name


def test_turns_without_a_micro_batch_leave_residuals():
  """Of M + S - 1 turns, and of one more; all else is as on a data axis."""
  data = dataclasses.replace(LITE.data, micro_batch=16)
  lite = dataclasses.replace(LITE, data=data)
  numbers = memory.residuals_per_token(lite)
  dense = lite.model.dense_layers * numbers['dense']
  moe = lite.model.moe_layers * numbers['moe']
  token = 4 * 4096 * 2  # bytes of four rows' numbers
  on = lambda **mesh: dataclasses.replace(lite, mesh=MeshConfig(**mesh))
  plain = memory.footprint(on(fsdp=4))
  assert plain.residuals == pytest.approx((dense + moe) * token)
  for micro_batches, times in ((1, 3), (2, 4 / 2), (8, 10 / 8)):
    staged = memory.footprint(on(fsdp=2, stage=2, pipeline=micro_batches))
    assert staged.residuals == pytest.approx((dense + times * moe) * token)
    assert staged.logits == plain.logits


def test_a_stage_has_the_gradients_of_its_layers_twice():
  """One sum of all turns, and the turn that is added to it."""
  data = dataclasses.replace(LITE.data, batch_size=16, micro_batch=16)
  mesh = MeshConfig(stage=2, expert=2)
  config = dataclasses.replace(LITE, data=data, mesh=mesh)
  got = memory.footprint(config, abstract_state(config))
  counts = cost.parameters(LITE)
  dense, _ = memory.dense_parameters(config)
  others = counts.shared + counts.router + counts.attention * 26 / 27 - dense
  here = ((counts.routed + dense) / 2 + others) / 2
  assert got.gradients - got.parameters == pytest.approx(4 * here, rel=1e-3)


def test_training_flags_undo_the_flags_before_them():
  mesh = MeshConfig(fsdp=8, stage=2, pipeline=1)
  config = dataclasses.replace(on_mesh(LITE, fsdp=8, stage=2), mesh=mesh)
  words = search.training_flags(config, MeshConfig(tensor=2, fsdp=8)).split()
  assert sorted(words) == [
    '--config.data.micro_batch=16',
    '--config.mesh.fsdp=8',
    '--config.mesh.pipeline=1',
    '--config.mesh.stage=2',
    '--config.mesh.tensor=1',
  ]


@pytest.mark.parametrize(
  'slice_, precision, lines',
  [
    ('t4:8', 'fp8_tensor', ['no FP8 hardware on t4:', 'bfloat16']),
    ('a100:8', 'fp8_block', ['no FP8 hardware on a100-80gb:']),
    ('l4:8', 'fp8_block', ['no FP8 hardware on l4:']),
    ('rtx4090:8', 'fp8_tensor', []),
    ('l40s:8', 'fp8_channel', []),
    ('rtxpro6000:8', 'fp8_block', []),
    ('h100:8', 'fp8_block', []),
    ('mi300x:8', 'fp8_tensor', ['no FP8 hardware on mi300x:']),
    ('v5e:2x2', 'fp8_block', ['no FP8 hardware on v5e:']),
    ('tpu7x:2x2x1', 'fp8_block', []),
    ('a100-40gb:8', 'bf16', []),
  ],
)
def test_a_plan_names_the_formats_that_a_chip_has_not(slice_, precision, lines):
  network = dataclasses.replace(LITE.model, precision=precision)
  config = dataclasses.replace(LITE, model=network)
  got = list(report.lacking(config, [chips.parse(slice_)]))
  assert len(got) == len(lines)
  for line, words in zip(got, lines, strict=True):
    assert words in line


@pytest.mark.parametrize(
  'kind, name',
  [
    ('NVIDIA L40S', 'l40s'),
    ('NVIDIA L40', None),
    ('NVIDIA A100-SXM4-80GB', 'a100-80gb'),
    ('NVIDIA GeForce RTX 4090', 'rtx4090'),
    ('NVIDIA H100 80GB HBM3', 'h100'),
    ('Tesla T4', 't4'),
    ('cpu', None),
  ],
)
def test_chips_by_the_names_of_devices(kind, name):
  assert chips.of_device(kind) is chips.CHIPS.get(name)
