"""Published figures, computed without JAX."""

import dataclasses
import importlib

import pytest

from experiments import chips
from experiments.data import batches
from experiments.plan import memory
from mla_moe import Config, cost
from mla_moe.config import (
  MeshConfig,
  MLAConfig,
  ModelConfig,
  MoEConfig,
  MTPConfig,
  freeze,
)


def load(name):
  module = importlib.import_module(f'configs.{name}')
  return freeze(module.get_config())


PUBLISHED = {  # total parameters, train GFLOP a token at 4096, cache bytes
  'deepseek_v3': (671026419200, 250.45, 70272),
  'deepseek_v2': (235741434880, 155.30, 69120),
  'deepseek_v2_lite': (15706484224, 16.41, 31104),
  'moonlight_16b': (15960110208, 17.17, 31104),
  'kimi_k2': (1026408232448, 205.47, 70272),
}


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_figures(name):
  config = load(name)
  total, gflop, cache = PUBLISHED[name]
  assert cost.parameters(config).total == total
  got = cost.train_flops_per_token(config, 4096) / 1e9
  assert round(got, 2) == gflop
  assert cost.cache_bytes_per_token(config, 'bfloat16') == cache


def test_the_parts_sum_to_the_total():
  counts = cost.parameters(Config())
  parts = 'embedding head attention dense routed shared router norms'.split()
  assert sum(getattr(counts, part) for part in parts) == counts.total
  assert round(counts.active / 1e9, 1) == 37.6  # with the embedding


@pytest.mark.parametrize('dense_layers', [1, 3], ids=['experts', 'dense'])
@pytest.mark.parametrize('method', ['noaux_tc', 'greedy'])
def test_an_mtp_module_is_one_more_layer_with_a_join_and_the_head(
  dense_layers, method
):
  moe = MoEConfig(
    experts=8, top_k=2, width=5, groups=1, top_groups=1, method=method
  )
  mla = MLAConfig(3, 0, 8, nope_dim=4, rope_dim=2, value_dim=6)
  model = ModelConfig(
    vocab=64, dim=16, layers=3, dense_layers=dense_layers, dense_width=24,
    mla=mla, moe=moe, mtp=MTPConfig(depth=0),
  )  # fmt: skip
  dense = model.moe_layers == 0
  longer = dataclasses.replace(
    model, layers=4, dense_layers=dense_layers + dense
  )
  two = dataclasses.replace(model, mtp=MTPConfig(depth=2))
  base, plus, counts = map(cost.parameters, (model, longer, two))
  join, norms = 2 * 16 * 16, 3 * 16
  assert counts.mtp == 2 * (plus.total - base.total + join + norms)
  assert counts.mtp_active == 2 * (plus.active - base.active + join + norms)
  assert (counts.total, counts.active) == (base.total, base.active)
  flops = lambda model, mtp: cost.train_flops_per_token(model, 10, mtp)
  layer = flops(longer, False) - flops(model, False)
  head = 64 * 16
  assert flops(two, True) - flops(two, False) == 2 * (layer + 6 * (join + head))
  assert flops(model, True) == flops(model, False) == flops(two, False)
  # By hand: 3 heads, queries and keys of 6, values of 6; 5 tokens on average.
  q, kv, up, out = 16 * 18, 16 * (8 + 2), 8 * 3 * (4 + 6), 18 * 16
  ffn = 3 * 16 * 24 if dense else 8 * 16 + (2 + moe.shared) * 3 * 16 * 5
  attention = 6 * 3 * (4 + 2 + 6) * 5
  assert layer == 6 * (q + kv + up + out + ffn) + attention


TOKENS = {
  'deepseek_v3': 14.8e12,
  'deepseek_v2': 8.1e12,
  'deepseek_v2_lite': 5.7e12,
  'moonlight_16b': 5.7e12,
  'kimi_k2': 15.9e12,
}


@pytest.mark.parametrize('name', TOKENS)
def test_the_steps_use_up_the_published_tokens(name):
  config = load(name)
  after = lambda steps: (
    batches.span(config.data, steps)[0] * config.data.seq_len
  )
  assert after(config.run.steps - 1) < TOKENS[name] <= after(config.run.steps)


@pytest.mark.parametrize(
  'sizes, parameters, moments',
  [  # MiB a device, by the exact layout of V2-Lite's parameters
    (dict(fsdp=8, expert=4), 2044, 4089),
    (dict(fsdp=8, expert=4, stage=2), 1127, 2255),
    (dict(fsdp=8, expert=4, data=2, states='zero1'), 2044, 2045),
  ],
)
def test_memory_of_the_state_on_a_mesh(sizes, parameters, moments):
  config = load('deepseek_v2_lite')
  mesh = MeshConfig(**sizes)
  got = memory.training_bytes_per_device(dataclasses.replace(config, mesh=mesh))
  assert got['parameters'] / 2**20 == pytest.approx(parameters, abs=2)
  assert got['optimizer'] / 2**20 == pytest.approx(moments, abs=4)


def test_the_bill_of_v3():
  """2048 H800 at the published 385 TFLOP/s (causal): 2.664M hours."""
  hours, dollars = chips.hours_and_money(
    Config(),
    14.8e12,
    4096,
    devices=2048,
    peak_flops=989e12,
    utilisation=0.3894,
    dollars_per_hour=2.0,
  )
  assert hours == pytest.approx(2.664e6, rel=0.01)
  assert dollars == pytest.approx(5.328e6, rel=0.01)


def test_hours_and_dollars_by_hand():
  config = load('deepseek_v2_lite')
  flops = 3e9 * cost.train_flops_per_token(config, 512)
  sizes = dict(devices=7, peak_flops=2e12, utilisation=0.25)
  hours, dollars = chips.hours_and_money(
    config, 3e9, 512, dollars_per_hour=1.5, **sizes
  )
  assert hours == pytest.approx(flops / 5e11 / 3600, rel=1e-9)
  assert dollars == pytest.approx(1.5 * hours, rel=1e-9)
