"""Memory, FLOPs and traffic of adapters over frozen codes, by arithmetic."""

import dataclasses
import importlib.util

import jax
import pytest
from flax import linen as nn

from configs import lora as recipes
from configs import tiny
from experiments import chips, train
from experiments.adapters import flops, lora
from experiments.plan import (
  bill,
  compiled,
  memory,
  scheduled,
  search,
  traffic,
)
from mla_moe import cost, sharding
from mla_moe.config import (
  LoRAConfig,
  MeshConfig,
  MLAConfig,
  MTPConfig,
  RLConfig,
  freeze,
)


def adapted(dim=128, width=256, length=32, dtype='float32', **mesh):
  """A model whose experts outweigh all else, layer by layer."""
  config = freeze(tiny.get_config('smoke'))
  change = dataclasses.replace
  moe = change(config.model.moe, experts=8, width=width, shared=1)
  model = change(
    config.model,
    dim=dim,
    dense_width=width,
    mla=MLAConfig(
      heads=4, query_rank=32, kv_rank=32, nope_dim=16, rope_dim=16, value_dim=16
    ),
    layers=6,
    dense_layers=1,
    moe=moe,
    mtp=MTPConfig(0),
    precision='bf16',
    dtype=dtype,
    base='int4',
    lora=LoRAConfig(rank=2),
    compute=change(config.model.compute, remat='full'),
  )
  data = change(config.data, seq_len=length, batch_size=2, micro_batch=0)
  data = change(data, batch_start=0, ramp_tokens=0.0)
  optim = change(config.optim, optimizer='adamw')
  mesh = MeshConfig(**mesh)
  return change(config, model=model, data=data, optim=optim, mesh=mesh)


def adapters_of(model):
  return jax.tree.leaves(nn.unbox(lora.boxed_shapes(model)))


def holds_codes_and_a_layer(config, devices):
  """The compiled step's arguments, and its scratch."""
  model = config.model
  counts, width = cost.parameters(model), memory.WIDTH[model.dtype]
  codes = counts.attention + counts.dense + counts.shared + counts.routed
  bias = model.moe_layers * model.moe.experts  # no part of the base
  base = codes * (1 / 2 + 2 / 32) + (counts.total - codes - bias) * width
  adapters = sum(x.size for x in adapters_of(model))
  lowered, _ = compiled.lower(config, devices)
  got = lowered.compile().memory_analysis()
  # Weights and moments are arguments; the gradient is the fourth number.
  state = base + 12 * adapters
  # Batch, biases and the window of losses are small, and so are a TPU's tiles.
  assert state <= got.argument_size_in_bytes < 1.02 * state + 2**14
  planned = memory.footprint(config)
  assert planned.base == base and planned.gradients == 4 * adapters
  assert planned.state == pytest.approx(state, rel=0.01)
  layer = width * counts.routed / model.moe_layers
  scratch = got.temp_size_in_bytes - 4 * adapters
  assert scratch < 1.5 * layer < width * counts.routed / 3


@pytest.mark.slow
def test_a_step_holds_codes_and_no_second_layer_of_floats():
  holds_codes_and_a_layer(adapted(), jax.devices()[:1])


@pytest.mark.slow
@pytest.mark.parametrize(
  'topology, layers',
  [('v5e:1x1', 2.5), pytest.param('h100:1', 1.2, marks=pytest.mark.by_hand)],
)
def test_so_does_an_accelerator_s_program(topology, layers):
  """Of five layers' floats a TPU has two and a half at once, a GPU one."""
  slice_ = chips.parse(topology)
  package = compiled.compiler(slice_).replace('-', '_')
  if importlib.util.find_spec(package) is None:
    pytest.skip('extra [ci]')
  config = adapted(1024, 512, 128, 'bfloat16')
  run = compiled.run if slice_.gpu else scheduled.run
  got, planned = run(config, slice_), memory.footprint(config)
  assert planned.state <= got['arguments'] < 1.01 * planned.state
  layer = 2 * cost.parameters(config.model).routed / config.model.moe_layers
  assert got['temporary'] - planned.gradients < layers * layer


LITE = freeze(recipes.get_config('lite_l4'))


def test_frozen_matrices_cost_four_flops_a_number_and_adapters_six():
  model, length = LITE.model, 2048
  counts, rank = cost.parameters(model), model.lora.rank
  matrices = counts.active - counts.embedding - counts.norms
  sums = lambda *pairs: rank * sum(map(sum, pairs))
  mla = sums((2048, 16 * 192), (2048, 576), (512, 16 * 256), (16 * 128, 2048))
  mlp = lambda width: sums((2048, width), (2048, width), (width, 2048))
  expert = sums((2048, 2 * 1408), (1408, 2048))
  adapters = 27 * mla + mlp(10944) + 26 * (mlp(2 * 1408) + 6 * expert)
  assert flops.active(model) == adapters
  attention = 27 * 3 * 2 * 16 * (128 + 64 + 128) * length / 2
  want = 4 * matrices + attention + 6 * adapters
  assert flops.train_flops_per_token(LITE, length) == pytest.approx(want)
  one = dataclasses.replace(model.lora, experts='shared')
  one = dataclasses.replace(model, lora=one)
  assert flops.active(one) == adapters  # K rows go through it
  full = dataclasses.replace(model, lora=LoRAConfig(), base='trained')
  full = dataclasses.replace(LITE, model=full)
  whole = cost.train_flops_per_token(full, length)
  assert flops.train_flops_per_token(full, length) == whole
  slice_ = chips.parse('h100:1')
  paid, more = (
    bill.bill(search.Plan(x, slice_, memory.footprint(x)), 1e9, 0.4, 1.0)
    for x in (LITE, full)
  )
  assert paid.hours / more.hours == pytest.approx(want / whole)
  assert paid.dollars / more.dollars == pytest.approx(want / whole)
  # A score goes forward alone: a frozen base spares it nothing.
  rl = RLConfig(task='sort8', beta=0.1, max_new=64)
  paid, more = (
    bill.bill(search.Plan(x, slice_, memory.footprint(x)), 1e9, 0.4, 1.0)
    for x in (dataclasses.replace(y, rl=rl) for y in (LITE, full))
  )
  assert paid.scoring == pytest.approx(more.scoring)


def test_a_tpu_has_a_layer_s_experts_as_floats():
  tpu, gpu = chips.parse('v5e:1x1'), chips.parse('l4:1')
  layer = 64 * 3 * 2048 * 1408 * 2
  working = memory.working_bytes
  assert working(LITE, tpu) - working(LITE, gpu) == layer
  assert working(LITE, gpu) == working(LITE)
  model = dataclasses.replace(LITE.model, base='trained')  # floats as they are
  trained = dataclasses.replace(LITE, model=model)
  assert working(trained, tpu) == working(LITE)
  compute = dataclasses.replace(LITE.model.compute, experts='ragged')
  model = dataclasses.replace(LITE.model, compute=compute)
  grouped = dataclasses.replace(LITE, model=model)
  assert working(grouped, gpu) == working(LITE, tpu)
  assert memory.footprint(LITE, None, tpu).working == working(LITE, tpu)


def test_reinforcement_decodes_codes_where_they_are():
  rl = RLConfig(task='sort8', beta=0.1, max_new=64)
  config = dataclasses.replace(LITE, rl=rl)
  counts, got = cost.parameters(config), memory.footprint(config)
  assert got.base == memory.footprint(LITE).base > 8 * 2**30
  assert got.decoding == 2 * (counts.total - counts.routed)
  assert got.reference == got.parameters
  codes = memory.expert_codes_bytes(config)
  assert codes == counts.routed * (1 / 2 + 2 / 32)
  mesh = MeshConfig(fsdp=4)
  data = dataclasses.replace(config.data, micro_batch=4)
  spread = dataclasses.replace(config, mesh=mesh, data=data)
  there = memory.footprint(spread)
  # A mesh copies the codes; a scale's groups are on all devices of their row.
  own = there.decoding - got.decoding // 4
  assert codes / 4 <= own == memory.expert_codes_bytes(spread) < codes / 3
  # A teacher that is not here is adapters and their base, as the policy.
  rl = dataclasses.replace(rl, teachers=(('there', 1.0),))
  taught = memory.footprint(dataclasses.replace(config, rl=rl))
  assert taught.teachers == got.parameters + got.base


def test_no_gradient_of_a_frozen_weight_travels():
  """Over fsdp: codes forward and back, adapters in float32 and gradients."""
  config = adapted(fsdp=2)
  codes = memory.base_bytes(dataclasses.replace(config, mesh=MeshConfig()))
  adapters = 4 * sum(x.size for x in adapters_of(config.model))
  sent = traffic.by_axis(config)
  assert sent['data'] == 0 and {*sent} == {*sharding.AXES}
  got = sent['fsdp']
  assert got < 2 * codes / 2 + 3 * adapters / 2 + 2**18
  whole = dataclasses.replace(config.model, lora=LoRAConfig(), base='trained')
  whole = dataclasses.replace(config, model=whole)
  assert got < traffic.by_axis(whole)['fsdp'] / 10


def test_out_of_memory_names_the_base():
  line = train._out_of_memory(LITE, RuntimeError('RESOURCE_EXHAUSTED: 1 B'))
  sizes = memory.footprint(LITE)
  own = (sizes.state + sizes.gradients) / 2**30
  assert f'and frozen base take {own:,.2f} GiB' in line and own > 12


@pytest.mark.parametrize('program', ['plan', 'rl'])
def test_a_base_that_cannot_be_is_refused_before_all_else(
  program, call, tmp_path
):
  words = ['--config=configs/lora.py:tiny', '--config.model.base=int4']
  words.append('--config.model.moe.width=99')
  if program == 'plan':
    words.append('--topology=h100:1')
  else:
    words.append(f'--workdir={tmp_path}/run')
  code, _, err = call(program, *words)
  assert code == 2 and err.count('\n') == 1, err
  assert 'sums over 99 numbers' in err
  assert not (tmp_path / 'run').exists()
