"""The benchmark's own arithmetic, and how it drives those it compares."""

import json
import pathlib
import re
import subprocess
import sys

import chex
import numpy as np
import pytest

from experiments.bench import __main__ as program
from experiments.bench import (
  balance,
  checkpoint,
  contender,
  decode,
  paired,
  pairs,
  precision,
  products,
  train,
)
from experiments.bench import shape as shapes
from mla_moe import cost
from mla_moe.config import ConfigError

ROOT = pathlib.Path(__file__).parents[2]

ANSWERS = """
import json, sys
job = json.loads(sys.stdin.readline())
print(json.dumps(job['mode']), flush=True)
for i, _ in enumerate(sys.stdin):
  print(json.dumps(i + job['shape']['batch']), flush=True)
"""


@pytest.mark.parametrize('dense', [0, 1, 4])
def test_products_have_the_flops_that_a_step_is_counted_for(dense):
  shape = shapes.Shape(dense_layers=dense, layers=4, batch=2, length=64)
  ours = sum(3 * p.times * p.useful * p.flops for p in products.of(shape))
  per_token = cost.train_flops_per_token(shapes.config(shape), shape.length)
  chex.assert_trees_all_close(ours, per_token * 128.0, rtol=1e-12)


def test_one_rate_lies_between_the_products_rates():
  listed = products.of(shapes.Shape())
  found = [(p, 1e9 * (1 + i)) for i, p in enumerate(listed)]
  assert 1e9 < products.together(found) < 1e9 * len(found)
  same = [(p, 7e9) for p in listed]
  chex.assert_trees_all_close(products.together(same), 7e9, rtol=1e-12)


def test_contenders_take_turns_and_absent_ones_are_known():
  command = [sys.executable, '-c', ANSWERS]
  shape = shapes.Shape(batch=3)
  racers = {m: contender.Contender(command, shape, m) for m in ('a', 'b')}
  assert [racer.versions for racer in racers.values()] == ['a', 'b']
  contender.take_turns(racers, 2)
  assert [racer.seconds for racer in racers.values()] == [[3, 4], [3, 4]]
  absent = contender.Contender([sys.executable, '-c', 'exit(1)'], shape, 'a')
  assert absent.versions is None


def test_every_measurement_has_its_rows_and_the_page_its_pictures():
  speed = {'tokens_per_s': 10.0, 'slowest': 9.0, 'fastest': 11.0}
  peers = ('mla_moe float32', 'transformers float32')
  parts = {
    'speed': {name: speed for name in peers},
    'products': {
      'share': 0.5,
      'step_rate': 1e9,
      'products_rate': 2e9,
      'widest': 3e9,
    },
    'length': {'512': 10.0, '1024': 20.0, '8192': 160.0},
    'experts': {'16': [1.0, 2.0, 1.0], '256': [1.0, 2.0, 1.2]},
    'layers': {'2': 4.0, '16': 5.0},
    'start': {'first': 10.0, 'second': 4.0},
  }
  found = {k: {'machine': {'cores': 2}, 'found': v} for k, v in parts.items()}
  text = '\n'.join(' '.join(row) for row in train._rows(found))
  for words in ('16.0 x for 16 x', '1.20 x that of 16', '0.40 of the first'):
    assert words in text
  page = train._page(found)
  assert page.count('<svg') == 1 and 'MaxText' in page and 'cores 2' in page
  assert 'src=' not in page and 'href="http' not in page


@pytest.mark.filterwarnings('default')  # Orbax's, which is called
def test_the_price_of_a_seal_is_measured(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(checkpoint, '_PAUSE_MIB', 4)
  monkeypatch.setattr(checkpoint, '_SEAL_MIB', 8)
  monkeypatch.setattr(checkpoint.runtime, 'keep_memory', lambda: None)
  monkeypatch.chdir(tmp_path)
  words = ['bench', 'checkpoint', '--rounds=1', '--out=found']
  monkeypatch.setattr(sys, 'argv', words)
  program.main()
  found = json.loads((tmp_path / 'found/checkpoint.json').read_text())
  seal, pause = found['seal'], found['pause']
  assert 0 < seal['share'] == pytest.approx(seal['processor'] / 100)
  for one in pause.values():
    assert 0 < one['pause'] < one['safe']
  assert 'Orbax alone' in capsys.readouterr().out
  assert [p.name for p in (tmp_path / 'found').iterdir()] == ['checkpoint.json']


def test_the_gap_between_losses_is_relative_and_smoothed():
  reference = {
    'step': list(range(1, 101)),
    'loss': [3 / s for s in range(1, 101)],
  }
  same = precision.gap(reference, reference)
  worse = [1.01 * x for x in reference['loss']]
  other = {'step': reference['step'], 'loss': worse}
  found = precision.gap(reference, other)
  chex.assert_trees_all_close(found, [0.01] * 100, rtol=1e-9)
  assert precision.summary(reference['step'], [same])['over'] == 0
  summary = precision.summary(reference['step'], [found])
  assert summary['over'] == summary['points'] == 90
  # Seeds that part to either side say nothing against a recipe.
  both = [found, [-x for x in found]]
  summary = precision.summary(reference['step'], both)
  assert summary['over'] == 0 and summary['worst'] < 1e-12
  chex.assert_trees_all_close(summary['worst_seed'], 0.01, rtol=1e-9)
  chex.assert_trees_all_close(summary['late'], [0.01, -0.01], rtol=1e-9)
  jump = precision.smooth([0.0, 1.0, 1.0])
  chex.assert_trees_all_close(jump.tolist(), [0.0, 0.1, 0.19], rtol=1e-12)
  with pytest.raises(ConfigError, match='different steps'):
    precision.gap(reference, {'step': [1], 'loss': [1.0]})


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings('default')
def test_precisions_are_trained_side_by_side(tmp_path):
  words = ['--config=configs/tiny.py:smoke', '--steps=4', '--only=fp8_tensor']
  command = [sys.executable, '-m', 'experiments.bench', 'precision']
  subprocess.run([*command, *words, f'--out={tmp_path}'], check=True, cwd=ROOT)
  found = json.loads((tmp_path / 'precision.json').read_text())
  (run,) = found['loss']['bf16']
  assert run['step'] == [1, 2, 3, 4]
  # The first loss is of the same weights: rounding is all that differs.
  for name in ('control', 'fp8_tensor'):
    (gaps,) = found['gap'][name]
    assert 0 < abs(gaps[0]) < 0.01


def test_a_decoding_step_reads_what_its_rows_need():
  one, all_rows = shapes.Shape(batch=1), shapes.Shape(batch=10**6)
  counts = cost.parameters(shapes.config(one))
  active = 4 * (counts.active - counts.embedding)
  latent = 4 * 4 * (128 + 16)  # float32, layers
  assert abs(decode.step_bytes(one, 100) - active - 100 * latent) < 1
  everything = 4 * (counts.total - counts.embedding)
  assert abs(decode.step_bytes(all_rows, 0) - everything) < 1


def test_the_decoding_page_has_every_measurement():
  rate = {
    'name': 'mla_moe',
    'batch': 8,
    'tokens_per_s': 900.0,
    'fastest': 950.0,
    'prefill': 9000.0,
    'share': 0.4,
    'versions': 'jax',
  }
  parts = {
    'speed': {'rates': [rate], 'bandwidth': 1e10},
    'cache': decode._cache_table(),
    'layer': {'8': {'latent': 0.002, 'heads': 0.006, 'share': 0.5}},
    'context': {'512': {'ms': 2.0, 'floor_ms': 2.0}},
  }
  found = {k: {'machine': {'cores': 2}, 'found': v} for k, v in parts.items()}
  text = '\n'.join(' '.join(row) for row in decode._rows(found))
  # V3 caches 576 numbers of two bytes, 71 times fewer than its heads have.
  for words in ('900 tokens/s', '(MLA): 1,152', 'head: 81,920', '3.0x'):
    assert words in text
  assert decode._page(found).count('<svg') == 1


def test_models_of_one_seed_are_compared_pair_by_pair():
  """What all models of a seed share is in no difference, nor in its error."""
  gains = {'loss 0.003': 0.01, 'bias 0.01': 0.03}
  rows = [
    {'name': name, 'seed': s, 'nll': 2 + s - gains.get(name, 0), 'maxvio': 1.0}
    for s in range(5)
    for name in balance.VARIANTS
  ]
  assert balance.best(rows, balance.LOSSES, range(2)) == 'loss 0.003'
  mean, error, count = balance.compared(rows, 'bias 0.01', 'nothing', range(5))
  np.testing.assert_allclose(mean, 100 * np.expm1(-0.03))
  assert error < 1e-9 and count == 5
  shown = balance.table(rows, tuning=2)
  assert 'bias 0.01 beside loss 0.003, 3 seeds' in shown and '-1.98' in shown


def test_pairs_tell_a_precision_by_the_mean_of_many(tmp_path):
  """Chance of either sign wears off, what is common stays; and rows resume."""
  file = tmp_path / 'rows.jsonl'
  asked = []

  def measure(name, seed):
    asked.append((name, seed))
    loss = 2 + seed / 100  # the seed's own; then 1 % of chance, 0.1 % of FP8
    gap = {'fp8_block': 0.001 + (-1) ** seed / 100}.get(name, 0)
    return {'nll': loss * (1 + gap), 'loss': [loss * (1 + gap)] * 20}

  paired.add(file, pairs.VARIANTS, range(2), measure)
  paired.add(file, pairs.VARIANTS, range(4), measure)
  assert len(asked) == len(set(asked)) == 4 * len(pairs.VARIANTS)
  shown = pairs.table(paired.rows(file)).splitlines()
  assert '| +0.10 ± 0.58 % | +0.10 ± 0.58 % | 0 of 18 | 1.10% |' in shown[-1]
  assert '| +0.00 ± 0.00 % | +0.00 ± 0.00 % | 0 of 18 | 0.00% |' in shown[-2]


def test_the_balance_benchmark_has_the_notebooks_model():
  """A notebook stands alone, so that the model is written down twice."""
  root = pathlib.Path(__file__).parents[2]
  names = 'experiments/bench/balance.py', 'notebooks/2_routing.py'
  ours, theirs = [
    re.search(r'(?s)c\.ModelConfig\(\n.*?\n\)', (root / name).read_text())
    for name in names
  ]
  assert ours[0] == theirs[0]
