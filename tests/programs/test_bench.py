"""The benchmarks' own arithmetic, and their contenders' turns."""

import argparse
import dataclasses
import json
import os
import pathlib
import re
import sys
import types

import chex
import children
import jax
import numpy as np
import pytest

from configs import r1_tiny
from experiments.bench import __main__ as program
from experiments.bench import (
  card,
  card_checks,
  checkpoint,
  contender,
  decode,
  mesh,
  mismatch,
  models,
  paired,
  precision,
  products,
  rl,
  sealing,
  show,
  sparse,
  sparse_quality,
  thought,
  train,
)
from experiments.rl import checks, tasks
from mla_moe import cost
from mla_moe.config import ConfigError, freeze
from mla_moe.train.state import init_state

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
  shape = models.Shape(dense_layers=dense, layers=4, batch=2, length=64)
  ours = sum(3 * p.times * p.useful * p.flops for p in products.of(shape))
  per_token = cost.train_flops_per_token(models.config(shape), shape.length)
  chex.assert_trees_all_close(ours, per_token * 128.0, rtol=1e-12)


def test_one_rate_lies_between_the_products_rates():
  listed = products.of(models.Shape())
  rates = [(p, 1e9 * (1 + i)) for i, p in enumerate(listed)]
  assert 1e9 < products.together(rates) < 1e9 * len(rates)
  same = [(p, 7e9) for p in listed]
  chex.assert_trees_all_close(products.together(same), 7e9, rtol=1e-12)


def test_contenders_take_turns_and_absent_ones_are_known(capsys):
  command = [sys.executable, '-c', ANSWERS]
  shape = models.Shape(batch=3)
  racers = {m: contender.Contender(command, shape, m) for m in ('a', 'b')}
  assert [racer.versions for racer in racers.values()] == ['a', 'b']
  contender.take_turns(racers, 2)
  assert [racer.seconds for racer in racers.values()] == [[3, 4], [3, 4]]
  absent = contender.Contender([sys.executable, '-c', 'exit(1)'], shape, 'a')
  assert absent.versions is None
  assert contender.started({**racers, 'c': absent}) == racers
  assert 'left out: c (did not start' in capsys.readouterr().out


def test_every_measurement_has_its_rows_and_the_page_its_pictures():
  speed = {'tokens_per_s': 10.0, 'slowest': 9.0, 'fastest': 11.0}
  peers = ('mla_moe float32', 'transformers float32')
  parts = {
    'speed': {name: speed for name in peers},
    'products': {
      'fraction': 0.5,
      'step_rate': 1e9,
      'products_rate': 2e9,
      'widest': 3e9,
    },
    'length': {'512': 10.0, '1024': 20.0, '8192': 160.0},
    'experts': {'16': [1.0, 2.0, 1.0], '256': [1.0, 2.0, 1.2]},
    'layers': {'2': 4.0, '16': 5.0},
    'start': {'first': 10.0, 'second': 4.0},
  }
  results = {
    k: {'machine': {'cores': 2}, 'figures': v} for k, v in parts.items()
  }
  rows = train.rows(results)
  text = '\n'.join(' '.join(row) for row in rows)
  for words in ('16.0 x for 16 x', '1.20 x that of 16', '0.40 of the first'):
    assert words in text
  figure = train.draw(results)
  page = show.html('Training', rows, show.machines(results), figure)
  assert page.count('<svg') == 1 and 'MaxText' in page and 'cores 2' in page
  assert 'src=' not in page and 'href="http' not in page


@pytest.mark.filterwarnings('default')  # Orbax's, which is called
def test_the_price_of_a_seal_is_measured(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(checkpoint, '_PAUSE_MIB', 4)
  monkeypatch.setattr(checkpoint, '_SEAL_MIB', 8)
  monkeypatch.setattr(checkpoint.runtime, 'keep_memory', lambda: None)
  line = {'bytes': 2**20, 'seconds': 0.5, 'processor': 0.25}
  lines = [{'seal': line, 'alone': 0.125, 'beside': 0.375}]
  measured = lambda _, count, mib: lines * count  # below, by processes
  monkeypatch.setattr(checkpoint.halves, 'measured', measured)
  monkeypatch.chdir(tmp_path)
  words = ['bench', 'checkpoint', '--rounds=1', '--out=found']
  monkeypatch.setattr(sys, 'argv', words)
  program.main()
  results = json.loads((tmp_path / 'found/checkpoint.json').read_text())
  seal, pause = results['seal'], results['pause']
  assert 0 < seal['fraction'] == pytest.approx(seal['processor'] / 100)
  for one in pause.values():
    assert 0 < one['pause'] < one['safe']
  output = capsys.readouterr().out
  assert 'Orbax alone' in output
  assert '2 process(es) of a core: each hashes 1 MiB, 0.50 s' in output
  assert '125 ms, beside a seal that takes 12 s longer 375 ms' in output
  assert [p.name for p in (tmp_path / 'found').iterdir()] == ['checkpoint.json']


@pytest.mark.slow
def test_two_processes_hash_their_halves_and_no_save_waits(tmp_path):
  sleep = 5.0
  (one,) = sealing.measured(tmp_path / '1', 1, 16, sleep)
  two = sealing.measured(tmp_path / '2', 2, 16, sleep)
  parts = [line['seal']['bytes'] for line in two]
  whole = one['seal']['bytes']
  assert sum(parts) == pytest.approx(whole, rel=0.02)
  assert max(parts) < 0.52 * whole
  assert all(line['beside'] < sleep / 2 for line in (one, *two))


@pytest.mark.slow
def test_tokenising_and_a_later_start_are_measured(
  tmp_path, monkeypatch, capsys
):
  """A later start reads no text: it takes a small part of the first."""
  pytest.importorskip('tokenizers', reason='extra [hf]')
  monkeypatch.chdir(tmp_path)
  words = ['bench', 'data', '--out=found', '--rounds=1', '--megabytes=1']
  words += ['--vocab=600', '--start_megabytes=20']
  monkeypatch.setattr(sys, 'argv', words)
  program.main()
  results = json.loads((tmp_path / 'found/data.json').read_text())
  start = dict(results['start']['figures'])
  seconds = {name: float(text.split()[0]) for name, text in start.items()}
  assert seconds['third'] < 0.2 * seconds['first']
  ways = [row[0].strip() for row in results['encoding']['figures']]
  assert ways[:2] == ['library', 'tokenizers']
  mixing = {row[0].strip(): row for row in results['mixing']['figures']}
  assert int(mixing['mixed'][1].split()[0]) > 10
  assert 'MB/s' in capsys.readouterr().out


def test_the_gap_between_losses_is_relative_and_smoothed():
  reference = {
    'step': list(range(1, 101)),
    'loss': [3 / s for s in range(1, 101)],
  }
  same = precision.gap(reference, reference)
  worse = [1.01 * x for x in reference['loss']]
  other = {'step': reference['step'], 'loss': worse}
  gaps = precision.gap(reference, other)
  chex.assert_trees_all_close(gaps, [0.01] * 100, rtol=1e-9)
  assert precision.summary(reference['step'], [same])['over'] == 0
  summary = precision.summary(reference['step'], [gaps])
  assert summary['over'] == summary['points'] == 90
  # Seeds that part to either side say nothing against a recipe.
  both = [gaps, [-x for x in gaps]]
  summary = precision.summary(reference['step'], both)
  assert summary['over'] == 0 and summary['worst'] < 1e-12
  chex.assert_trees_all_close(summary['worst_seed'], 0.01, rtol=1e-9)
  chex.assert_trees_all_close(summary['late'], [0.01, -0.01], rtol=1e-9)
  jump = precision.smooth([0.0, 1.0, 1.0])
  chex.assert_trees_all_close(jump.tolist(), [0.0, 0.1, 0.19], rtol=1e-12)
  with pytest.raises(ConfigError, match='different steps'):
    precision.gap(reference, {'step': [1], 'loss': [1.0]})


def test_sparse_quality_is_the_mean_of_its_pairs():
  row = lambda seed, dense, sparse: {
    'seed': seed, 'before': 2.0, 'dense': dense, 'sets': 1.5, 'nll': sparse,
  }  # fmt: skip
  rows = [row(0, 1.0, 1.002), row(1, 2.0, 2.008)]
  (first, _) = sparse_quality.table(rows)
  assert first[1:] == ('2.8854', '1.4427', '2.1640', '1.4456', '+0.20%')
  text = sparse_quality.verdict(rows)
  # 12.71 standard errors of 0.1 % on either side.
  assert '+0.30%, 95 % from -0.97% to +1.57%; 2 pairs' in text
  assert '95 %' not in sparse_quality.verdict(rows[:1])


@pytest.mark.slow
def test_sparse_quality_trains_both_ways(tmp_path, monkeypatch, no_pictures):
  small = dataclasses.replace(sparse_quality.MODEL, layers=1, dense_layers=0)
  monkeypatch.setattr(sparse_quality, 'MODEL', small)
  out = tmp_path / 'out'
  sizes = dict(dense=2, warmup=2, sparse=2, length=32, topk=8, heldout=1)
  words = [f'--{name}={size}' for name, size in sizes.items()]
  program.run('sparse_quality', [f'--out={out}', '--seeds=1', *words])
  (row,) = paired.rows(out / 'sparse_quality.jsonl')
  counts = {name: len(steps) for name, steps in row['steps'].items()}
  assert counts == {'before': 2, 'dense': 4, 'warmup': 2, 'sparse': 2}
  losses = [row[name] for name in ('before', 'dense', 'sets', 'nll')]
  assert len({*losses}) == 4 and all(1 < loss < 7 for loss in losses)
  masses = [step['index_mass'] for step in row['steps']['warmup']]
  assert all(0 < mass <= 1.001 for mass in masses)
  assert (out / 'sparse_quality.html').exists()
  # The trunk is frozen in the warm-up, and the dense model reads all keys.
  args = argparse.Namespace(**sizes)
  stages = sparse_quality.configs(args)
  assert stages['warmup'].optim.trains == 'indexer'
  assert not stages['dense'].model.dsa.heads


@pytest.mark.slow
@pytest.mark.filterwarnings('default')
def test_precisions_are_trained_side_by_side(tmp_path, no_pictures):
  words = ['--config=configs/tiny.py:micro', '--steps=4', '--only=fp8_tensor']
  program.run('precision', [*words, f'--out={tmp_path}'])
  results = json.loads((tmp_path / 'precision.json').read_text())
  (run,) = results['loss']['bf16']
  assert run['step'] == [1, 2, 3, 4]
  # The first loss is of the same weights: rounding is all that differs.
  for name in ('control', 'fp8_tensor'):
    (gaps,) = results['gap'][name]
    assert 0 < abs(gaps[0]) < 0.01


def test_a_decoding_step_reads_what_its_rows_need():
  one, all_rows = models.Shape(batch=1), models.Shape(batch=10**6)
  counts = cost.parameters(models.config(one))
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
    'fraction': 0.4,
    'versions': 'jax',
  }
  parts = {
    'speed': {'rates': [rate], 'bandwidth': 1e10},
    'cache': decode.cache_table(),
    'layer': {'8': {'latent': 0.002, 'heads': 0.006, 'fraction': 0.5}},
    'context': {'512': {'ms': 2.0, 'floor_ms': 2.0}},
  }
  results = {
    k: {'machine': {'cores': 2}, 'figures': v} for k, v in parts.items()
  }
  text = '\n'.join(' '.join(row) for row in decode.rows(results))
  # V3 caches 576 numbers of two bytes, 71 times fewer than its heads have.
  for words in ('900 tokens/s', '(MLA): 1,152', 'head: 81,920', '3.0x'):
    assert words in text
  page = show.html('Decoding', decode.rows(results), [], decode.draw(results))
  assert page.count('<svg') == 1


def test_rows_of_pairs_are_measured_once(tmp_path):
  measured = []
  measure = lambda name, seed: measured.append((name, seed)) or {'nll': seed}
  for seeds in (2, 4):
    paired.add(tmp_path / 'rows.jsonl', 'ab', range(seeds), measure)
  assert len(measured) == len({*measured}) == 8
  rows = paired.rows(tmp_path / 'rows.jsonl')
  assert [(row['name'], row['seed']) for row in rows] == measured


def test_models_are_built_from_one_flat_list():
  model = models.build(dim=64, heads=2, experts=8, groups=1, top_groups=1)
  assert (model.dim, model.mla.heads, model.moe.experts) == (64, 2, 8)
  assert model.mtp.depth == 0
  with pytest.raises(TypeError, match='topk'):
    models.build(topk=3)


def card_words(monkeypatch, folder, *words):
  """The command's program, in `folder`; returns the rows that it leaves."""
  words = ['bench', 'card', f'--out={folder}', *words]
  monkeypatch.setattr(sys, 'argv', words)
  with pytest.raises(SystemExit) as ended:
    program.main()
  assert ended.value.code == 1
  results = json.loads((folder / 'card.json').read_text())
  return {name: part['figures'] for name, part in results.items()}


def test_a_part_that_fails_is_a_row_and_the_next_parts_have_its_time(
  tmp_path, monkeypatch, capsys
):
  clock, limits = [1000.0], {}

  def process(name, limit, out, toy):
    limits[name] = limit
    clock[0] += 10 if name != 'fp8' else limit
    rows = card.Rows(out / 'card.json', name)
    rows.add('figure', 3.0, 'ms', good=name != 'decode' or None)
    return (-9, 'over its 80 s') if name == 'fp8' else (0, '')

  monkeypatch.setattr(card, 'process', process)
  monkeypatch.setattr(card.time, 'monotonic', lambda: clock[0])
  found = card_words(monkeypatch, tmp_path, '--minutes=8')
  assert list(found) == list(card.PARTS) == list(limits)
  assert [len(rows) for rows in found.values()] == [1, 2, 1, 1, 1, 1, 1]
  failed = found['fp8'][1]
  assert (failed['value'], failed['good']) == (None, False)
  assert failed['beside'] == 'over its 80 s'
  # 480 s for weights of 480; 10 s of the first 25 are used, 15 go around.
  assert limits['card'] == 25 and limits['fp8'] == 470 * 75 / 455
  assert limits['train'] == pytest.approx(480 - 10 - limits['fp8'] - 40)
  assert '1 rows are wrong or failed' in capsys.readouterr().err


def test_a_part_is_killed_at_its_limit(tmp_path):
  code, line = card.process('train', 0.2, tmp_path, toy=True)
  assert (code, line) == (-9, 'over its 0 s')


def test_no_check_on_a_card_takes_nan_for_right(tmp_path):
  rows = card.Rows(tmp_path / 'card.json', 'fp8')
  for errors in ([1e-4, float('nan')], [float('nan'), 1e-4], [0.5, 0.0]):
    card_checks.add_errors(rows, 'y', ('y', 'dx'), errors, (1e-3, 1e-3))
  card_checks.add_errors(rows, 'y', ('y', 'dx'), [1e-4, 0.0], (1e-3, 1e-3))
  assert [row['good'] for row in rows.read()] == [False, False, False, True]
  assert [row['value'] for row in rows.read()] == [None, None, 0.5, 1e-4]
  card_checks.check_quantised(rows)
  assert rows.read()[-1]['value'] == 0.0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_parts_of_a_card_run_at_toy_size(tmp_path):
  process = bench('card', '--toy', '--minutes=12', f'--out={tmp_path}')
  assert process.returncode == 0, process.stdout + process.stderr
  results = json.loads((tmp_path / 'card.json').read_text())
  assert list(results) == list(card.PARTS)
  rows = [row for part in results.values() for row in part['figures']]
  assert len(rows) >= 25 and all(row['value'] is not None for row in rows)
  assert all(part['machine']['jax'] for part in results.values())


def bench(*words):
  """The command with one device, as it has outside the tests."""
  command = '-m', 'experiments.bench', *words
  return children.run(*command, env=children.on_devices(1))


def test_the_command_lists_its_benchmarks_and_each_has_flags(
  tmp_path, monkeypatch, capsys
):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, 'argv', ['bench', '--help'])
  program.main()
  listed = re.findall(
    r'(?m)^  (\w+) {2,}.*\(.*\d.*\)$', capsys.readouterr().out
  )
  folder = ROOT / 'experiments/bench'
  commands = [
    path.stem
    for path in folder.glob('*.py')
    if '\ndef flags(parser)' in path.read_text()
  ]
  assert sorted(listed) == sorted(commands) and len(listed) >= 8
  for name in listed:
    with pytest.raises(SystemExit) as ended:
      program.run(name, ['--help'])
    assert ended.value.code == 0 and '--out' in capsys.readouterr().out


@pytest.mark.parametrize(
  'words, message',
  [
    (['trains'], "'trains': is no benchmark; there are train, decode"),
    (['train', '--rounds=0'], '--rounds=0: must be at least 1'),
    (['precision', '--steps=-1'], '--steps=-1: must be at least 0'),
    (['decode', '--only=sped'], '--only=sped: there is only speed, cache'),
    (['mesh', '--mesh=expert=4'], 'is 4 devices, must be 8'),
    (['card'], 'needs an NVIDIA GPU, and jax sees none; --toy tries'),
  ],
)
def test_bad_requests_are_one_line(
  words, message, tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(decode.runtime, 'keep_memory', lambda: None)
  monkeypatch.setenv('XLA_FLAGS', os.environ.get('XLA_FLAGS', ''))
  monkeypatch.setenv('PYTHONPATH', str(ROOT))  # of a part in a process
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, 'argv', ['bench', *words])
  with pytest.raises(SystemExit) as ended:
    program.main()
  errors = capsys.readouterr().err
  assert ended.value.code == 2 and errors.count('\n') == 1
  assert message in errors


@pytest.mark.slow
def test_a_mesh_is_timed_beside_one_device(tmp_path, monkeypatch, capsys):
  """Of a smaller model than people's, on the devices that the tests have."""
  small = dataclasses.replace(models.MESH, layers=1, dense_layers=0, dim=64)
  short = dataclasses.replace(mesh.CONFIG.data, seq_len=32)
  config = dataclasses.replace(mesh.CONFIG, model=small, data=short)
  monkeypatch.setattr(mesh, 'CONFIG', config)
  monkeypatch.setenv('XLA_FLAGS', os.environ['XLA_FLAGS'])  # the program adds
  words = ['--mesh=data=2,expert=4', '--steps=1', f'--out={tmp_path}']
  program.run('mesh', words)
  pattern = r'temporary memory 1/\d+\.\d; loss \d'
  assert re.search(pattern, capsys.readouterr().out)


def test_written_steps_of_a_sum_lead_to_its_answer():
  for index in range(40):
    item = tasks.question(thought.TASK, 0, index)
    written = thought.steps(item.text)
    sums = written.rstrip('>').split(',')
    totals = []
    for part in sums:
      terms, total = part.split('=')
      assert sum(map(int, terms.split('+'))) == int(total)
      totals.append(int(total))
    digits = [total % 10 for total in totals[:-1]]
    value = totals[-1] * 10 ** len(digits)
    value += sum(digit * 10**i for i, digit in enumerate(digits))
    assert str(value) == item.answer
    assert thought.last(item, written + item.answer) == 1
    assert thought.last(item, item.answer) == 1
    assert thought.last(item, item.answer + written) == 0
  assert thought.steps('17+85=') == '7+5=12,1+1+8=10>'


def test_an_arm_has_the_interval_of_its_seeds():
  numbers = ['sampled_first', 'sampled', 'greedy_first', 'greedy']
  rows = [
    dict.fromkeys(numbers, part)
    | {'name': thought.ARMS[0], 'tokens': 4.0, 'cpu_seconds': 9.0}
    for part in (0.1, 0.2, 0.3)
  ]
  ((arm, cold, _, rest),) = thought.table(rows)
  assert arm == thought.ARMS[0] and rest == '4.0; 9'
  # Student's: 4.303 * 10 points / sqrt(3).
  assert 'greedy 20.0% ± 24.8% (10.0%, 20.0%, 30.0%)' in cold


def test_a_race_of_steps_has_its_medians_and_parts():
  racers = {
    name: types.SimpleNamespace(
      versions=name,
      stop=lambda: None,
      step=lambda: None,
      seconds=[{'rollout': s / 4, 'step': s} for s in seconds],
    )
    for name, seconds in {'a': [1.0, 2.0, 6.0], 'b': [4.0]}.items()
  }
  figures = rl._medians(racers, 0)
  assert figures['a'] == {
    'rollout': 0.5, 'step': 2.0, 'fastest': 1.0, 'slowest': 6.0, 'versions': 'a'
  }  # fmt: skip
  lines = rl.rows({'long': {'figures': figures}})
  assert [line[:2] for line in lines] == [
    ('long: a', '2.000 s'),
    ('long: b', '4.000 s'),
  ]
  assert '2.00 x; rollout 1.000' in lines[1][2]


@pytest.mark.filterwarnings('ignore:the load_module')  # of ml_collections
def test_both_sides_of_a_race_have_the_same_numbers(tmp_path):
  rl.questions(tmp_path / 'q.jsonl', 10)
  first = json.loads((tmp_path / 'q.jsonl').read_text().split('\n')[0])
  assert len(first['prompt']) == 9  # and the begin token
  job = rl.Job('m', str(tmp_path / 'q.jsonl'), 10, 10, 32, 16, 0.5, 0, (49, 64))
  config = rl.config(dataclasses.asdict(job))
  checks.check(config)
  assert config.data.batch_size == job.prompts * job.samples == 512
  assert (config.rl.beta, config.data.micro_batch) == (0.5, 64)
  assert config.run.eval_every == config.run.save_every == 0


def test_the_numbers_of_a_mismatch():
  """Of two tokens one is three times as likely, and one has another expert."""
  inside = np.array([[[True, True, False]]])
  rollout = np.array([[[-1.0, -2.0, 9.0]]])
  log_probs = rollout + np.array([[[np.log(3.0), 0.0, 5.0]]])
  own = np.array([[[[[0, 1]], [[0, 1]], [[4, 5]]]]])
  routes = np.array([[[[[1, 0]], [[0, 2]], [[0, 1]]]]])
  got = mismatch.numbers((log_probs, own), rollout, routes, inside)
  np.testing.assert_allclose(got['k3'], (2 - np.log(3)) / 2, rtol=1e-12)
  np.testing.assert_allclose(got['max'], np.log(3), rtol=1e-12)
  assert (got['extreme'], got['flips'], got['tokens']) == (0.5, 0.5, 2)


@pytest.mark.slow
def test_a_rollout_s_routes_take_the_tail_of_its_mismatch():
  """In bfloat16; a large head makes nats of what a flipped expert changes."""
  config = freeze(r1_tiny.get_config('v32,smoke'))
  sizes = {'dim': 32, 'dense_width': 32, 'layers': 2}
  model = dataclasses.replace(config.model, **sizes)
  config = dataclasses.replace(config, model=model)
  state = init_state(jax.random.key(1), config)
  params = {**state.params, 'w_head': 48 * state.params['w_head']}
  variables = {'params': params, 'router': state.router}
  args = argparse.Namespace(task='sort8', prompts=32, samples=2, seed=0)
  ids, fields = mismatch.questions_of(config, args)
  setting = mismatch.SETTINGS['bfloat16, int8 cache']
  got = mismatch.measure(config, fields, variables, ids, setting, 0)
  assert got['none']['flips'] > 0
  assert got['train'] == got['none']  # to the bit: its own routes
  assert got['rollout']['k3'] < got['none']['k3']
  assert got['rollout']['extreme'] < got['none']['extreme']


def test_sparse_attention_has_its_rows():
  step = {'length': 4096, 'sparse': 2.0, 'dense': 3.0, 'dense_mib': 50.0}
  token = {'context': 32768, 'sparse': 0.010, 'dense': 0.03, 'set': 0.004}
  token['rest'] = 0.006
  racer = {'name': 'mla_moe', 'seconds': 1.0, 'mib': 10.0, 'versions': 'jax'}
  figures = {
    'training': [
      {**step, 'sparse_mib': 10.0},
      {**step, 'length': 8192, 'sparse_mib': 24.0},
    ],
    'decoding': [
      token,
      {**token, 'context': 131072, 'sparse': 0.02, 'set': 0.011, 'rest': 0.009},
    ],
    'peer': [racer, {**racer, 'name': 'eager', 'seconds': 3.0, 'mib': 70.0}],
  }
  results = {name: {'figures': part} for name, part in figures.items()}
  text = '\n'.join(' '.join(row) for row in sparse.rows(results))
  for words in (
    'dense 1.50 x the time, 50 MiB; 1.20 x of linear memory',
    'the set 40% dense 3.00 x; attention to a set 6.0 ms, 1.00 x the first',
    'to a set 9.0 ms, 1.50 x the first; V3.2 reads 2.19 GB, not 9.21',
    '3.0 x the time, 7.0 x the memory of ours',
  ):
    assert words in text, text
  assert len(sparse.draw(results).axes) == 2


@pytest.mark.slow
def test_sparse_attention_is_measured_at_toy_size():
  sizes = sparse.Sizes(dim=16, query_rank=8, kv_rank=8, topk=8)
  (one,) = sparse.training(sizes, [32], 1)
  assert all(one[kind] > 0 for kind in ('sparse', 'dense', 'sparse_mib'))
  kinds = 'sparse', 'dense', 'set', 'rest'
  two = sparse.decoding(sizes, [64, 128], 1)
  assert all(x[kind] > 0 for x in two for kind in kinds)
  (ours,) = sparse.peer(sizes, 128, 'false')  # without the peer
  assert ours['seconds'] > 0 and ours['mib'] >= 0
