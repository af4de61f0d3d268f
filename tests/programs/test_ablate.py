"""Ablations: their statistics on known data, and training that resumes.

The programs of the tests train a vector towards the mean of a batch's bytes
instead of a network: a pair takes milliseconds.
"""

import dataclasses
import functools
import itertools
import json
import math
import pathlib
import re
import types

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from configs import ablate as ladder
from experiments import workdir
from experiments.ablate import (
  __main__ as program,
)
from experiments.ablate import (
  differences,
  folder,
  outcome,
  plan,
  reading,
  report,
  turns,
)
from experiments.ablate.recipe import Recipe, stretched, tokens_of_step
from experiments.ideas.sqrt_softplus import router as own_router
from mla_moe import config as c
from mla_moe import cost
from mla_moe.model import router
from mla_moe.types import PyTree

ROOT = pathlib.Path(__file__).parents[2]

# ------------------------------------------------------------------ statistics


def simulated(generator, experiments, pairs, change):
  """Relative changes [experiments, pairs]: a seed's part in both, and chance.

  The spread of single runs is 1 %, that of seeds 5 %.
  """
  shape = experiments, pairs
  seeds = generator.normal(2.0, 0.1, shape)
  noise = lambda: generator.normal(0, 0.02, shape)
  reference, arm = seeds + noise(), seeds * (1 + change) + noise()
  return arm / reference - 1


@pytest.mark.parametrize('pairs', [2, 3, 8])
def test_an_interval_covers_the_difference_as_often_as_it_says(pairs):
  known = -0.01
  changes = simulated(np.random.default_rng(pairs), 1000, pairs, known)
  intervals = [differences.interval(x) for x in changes]
  covered = np.mean([i.low <= known <= i.high for i in intervals])
  assert abs(covered - 0.95) <= 0.015
  # scipy's own interval of a mean is the same.
  low, high = stats.t.interval(
    0.95, pairs - 1, changes[0].mean(), stats.sem(changes[0])
  )
  chex.assert_trees_all_close([*intervals[0][:1]], [changes[0].mean()])
  chex.assert_trees_all_close(
    (intervals[0].low, intervals[0].high), (low, high)
  )


def test_a_verdict_is_wrong_as_seldom_as_it_says():
  changes = simulated(np.random.default_rng(1), 1000, 5, 0.0)
  intervals = [differences.interval(x) for x in changes]
  told = [i.low > 0 or i.high < 0 for i in intervals]
  assert abs(np.mean(told) - 0.05) <= 0.015
  for change, is_told in zip(changes[:60], told, strict=False):
    is_open = outcome.verdict(change).startswith('cannot be told')
    assert is_open != is_told


def test_so_many_pairs_tell():
  """A fresh experiment of that many pairs tells four times in five."""
  generator = np.random.default_rng(2)
  seen = np.array([-1.5, -1.0, -0.5, 0.5, 0.0]) * 0.01
  count = differences.pairs_to_tell(seen)
  fresh = generator.normal(seen.mean(), seen.std(ddof=1), (1000, count))
  words = [outcome.verdict(x).split()[0] for x in fresh]
  assert abs(words.count('better') / 1000 - differences.POWER) <= 0.03
  fewer = seen.mean() + (seen - seen.mean()) / 2
  assert differences.pairs_to_tell(fewer) < count
  assert differences.pairs_to_tell([0.01, -0.01]) == 0  # their mean is 0


def test_verdicts_are_words():
  told = outcome.verdict([-0.010, -0.012, -0.011])
  assert told == 'better by 1.10%'
  assert outcome.verdict([0.010, 0.012, 0.011]) == 'worse by 1.10%'
  assert outcome.verdict([0.0, 0.0]) == 'the same to the last digit'
  assert outcome.verdict([0.01]) == 'one pair has no interval'
  assert outcome.verdict([], 2) == 'no pair is finished; 2 diverged'
  told = outcome.verdict([0.01, -0.01])
  assert told == 'cannot be told from 2 pairs: their mean is 0'
  text = outcome.verdict([0.01, -0.02, 0.002])
  assert text.startswith('cannot be told from 3 pairs; about 269')


def row(size, arm, seed, end, flops=2, **last):
  """The row of a run of two chunks: bits from 3 to `end`."""
  curve = [
    dict(step=n, tokens=n, flops=n * flops / 2, bits=b, seconds=1.0)
    | dict(loss=b, skipped=0)
    for n, b in ((1, 3.0), (2, end))
  ]
  curve[-1] |= last
  return {'size': size, 'arm': arm, 'seed': seed, 'curve': curve}


@pytest.mark.parametrize(
  'last', [{'bits': math.nan}, {'loss': math.nan}, {'skipped': 1}]
)
def test_a_pair_that_diverged_is_left_out_and_counted(last):
  """Also a run whose weights stand still while its held-out loss is good."""
  rows = [row('s', 'a', seed, 2.0) for seed in range(4)]
  rows += [row('s', 'b', seed, 1.0 + 0.1 * seed) for seed in range(2)]
  rows += [row('s', 'b', 2, 0.5, **last)]
  (got,) = outcome.compared(rows, ['s'], ['a', 'b'], 'tokens')
  chex.assert_trees_all_close(got.changes, [-0.5, -0.45])
  assert got.diverged == 1
  assert got.verdict == 'better by 47.50%; 1 diverged'
  (alone,) = outcome.compared(rows[:4] + rows[6:], ['s'], ['a', 'b'], 'tokens')
  assert alone.verdict == 'no pair is finished; 1 diverged'


def test_a_ladder_is_of_flops_and_of_seeds_that_all_sizes_have():
  """At equal tokens, where a token of m has four times the FLOPs of s."""
  rows = [row('s', 'a', seed, 2.0, 2) for seed in range(2)]
  rows += [row('m', 'a', seed, 1.0, 8) for seed in range(2)]
  rows += [row('s', 'b', seed, 1.5, 2) for seed in range(2)]
  stray = [row('s', 'a', 2, 9.0, 2), row('s', 'b', 2, 9.0, 2)]
  for more in ([], stray):
    small, large = outcome.compared(
      rows + more, ['s', 'm'], ['a', 'b'], 'tokens'
    )
    chex.assert_trees_all_close(small.ladder, 2.0)  # 4 FLOPs, by the logarithm
    assert large.ladder is None  # no run of b
  (few,) = outcome.compared(rows, ['s'], ['a', 'b'], 'tokens')
  assert few.ladder is None  # one size is no ladder


def curve(offset, factor=1.0, last=256):
  """Bits that fall by 0.1 with each doubling of factor * compute."""
  steps = [2**i for i in range(2, 20) if 2**i <= last]
  return [(float(x), offset - 0.1 * math.log2(factor * x)) for x in steps]


@pytest.mark.parametrize('factor', [1.0, 1.5, 3.0, 0.7])
def test_a_speedup_is_the_factor_of_compute(factor):
  got = differences.speedup(curve(5.0), curve(5.0, factor))
  chex.assert_trees_all_close(got, factor, rtol=1e-12)
  back = differences.speedup(curve(5.0, factor), curve(5.0))
  chex.assert_trees_all_close(back * got, 1.0, rtol=1e-12)
  rungs = [(2.0**i, 5.0 - 0.1 * i) for i in (4, 6, 9)]
  loss = 5.0 - 0.1 * math.log2(factor * 64)
  chex.assert_trees_all_close(
    differences.ladder_speedup(rungs, 64.0, loss), factor, rtol=1e-12
  )


def test_nothing_is_said_beyond_a_curve_or_a_ladder():
  assert differences.reached(curve(5.0), 0.0) is None
  assert differences.reached(curve(5.0), 9.0) == 4.0  # its first point
  assert differences.ladder_speedup([(1.0, 3.0), (2.0, 2.0)], 1.0, 1.9) is None
  assert differences.ladder_speedup([(1.0, 3.0)], 1.0, 3.0) is None
  # A run that rises at its end is as fast as itself.
  rising = [*curve(5.0), (512.0, 6.0)]
  assert differences.speedup(rising, rising) == 1.0
  # A loss that rose in between is not reached twice.
  bumpy = [(1.0, 3.0), (2.0, 2.0), (4.0, 2.5), (8.0, 1.0)]
  chex.assert_trees_all_close(
    differences.reached(bumpy, 1.5), math.sqrt(32.0), rtol=1e-12
  )


def test_a_clock_takes_the_ratio_of_each_round():
  """A round that all arms lost to the machine says the same as the others."""
  rounds = [{'a': 1.0, 'b': 2.5}] * 3 + [{'a': 9.0, 'b': 22.5}]
  got = turns.relative(rounds, 'a')
  chex.assert_trees_all_close(got, {'a': 1.0, 'b': 2.5})
  assert turns.ordered('ab', 1) == ['a', 'b'] == turns.ordered('ab', 2)[::-1]


# --------------------------------------------------------------------- training


@flax.struct.dataclass
class Vector:
  """The state of the tests' model: it says each byte with exp(w) / sum."""

  w: PyTree


def init(key, *, config):
  return Vector(0.01 * jax.random.normal(key, (config.model.vocab,)))


def train(state, batch, rates, *, config, speed=1.0):
  loss = lambda w: (jax.nn.logsumexp(w) - w[batch.targets]).mean()
  value, grad = jax.value_and_grad(loss)(state.w)
  w = state.w - 1e2 * speed * rates.learning_rate * grad
  return Vector(w), {
    'main_loss': value,
    'load': jnp.array([[1, 3]]),
    'skipped': jnp.zeros(()),
  }


def evaluate(state, batch, *, config):
  nll = jax.nn.logsumexp(state.w) - state.w[batch.targets]
  return {'nll': nll.sum(), 'tokens': batch.targets.size}


FAST = functools.partial(train, speed=1.05)
TOY = Recipe(
  ladder.size(16, 1, 1, 8, 20),  # its model is not trained
  *(init, train, evaluate),
  lambda config, length: 6.0 * config.model.dim,
)


@pytest.fixture(scope='module')
def texts(tmp_path_factory):
  path = tmp_path_factory.mktemp('texts')
  for i in range(40):
    (path / f'{i}.txt').write_text(f'{i} lines of a text. ' * 30)
  return path


@pytest.fixture
def make(texts, monkeypatch):
  """A plan of toys: `arms` are functions of a Recipe."""

  def made(
    equal='tokens', sizes=(16,), steps=0, seconds=0.0, code='1', seed=0, **arms
  ):
    def recipe(config, change):
      return change(TOY._replace(config=config))

    values = {
      'sizes': {f'd{dim}': small(texts, dim) for dim in sizes},
      'arms': {
        arm: functools.partial(recipe, change=change)
        for arm, change in arms.items()
      },
      'equal': equal,
      'paper': 'Nobody, 2026: 1 < 2',
    }
    source = values, 'toys', 'A test.', code
    monkeypatch.setattr(reading, 'read', lambda name: source)
    return plan.make('toys', points=4, steps=steps, seconds=seconds, seed=seed)

  return made


def small(texts, dim):
  config = ladder.size(dim, 1, 1, 8, 20)
  data = dataclasses.replace(
    config.data, source=f'{texts}/*.txt', seq_len=16, batch_size=4, heldout=0.2
  )
  run = dataclasses.replace(config.run, eval_batches=4)
  changed = dataclasses.replace(config, data=data, run=run)
  return stretched(changed, config, 20)


def same(recipe):
  return recipe


def fast(recipe):
  return recipe._replace(train=FAST)


def run(path, plan, *words):
  path.mkdir(exist_ok=True)
  program.run(path, plan, program.flags(['--name=toys', '--pairs=2', *words]))
  return folder.results(path)


def curves(rows):
  """{(size, arm, seed): curve without its seconds}."""
  drop = lambda point: {k: v for k, v in point.items() if k != 'seconds'}
  return {
    (r['size'], r['arm'], r['seed']): list(map(drop, r['curve'])) for r in rows
  }


def test_one_config_twice_differs_by_nothing(tmp_path, make, no_pictures):
  rows = run(tmp_path / 'a', make(one=same, two=same, fast=fast))
  got = curves(rows)
  for seed in (0, 1):
    assert got['d16', 'one', seed] == got['d16', 'two', seed]
    assert got['d16', 'one', seed] != got['d16', 'fast', seed]
  assert got['d16', 'one', 0] != got['d16', 'one', 1]
  equal, other = outcome.compared(
    rows, ['d16'], ['one', 'two', 'fast'], 'tokens'
  )
  assert equal.changes == [0.0, 0.0] and equal.log_speedup.mean == 0.0
  assert equal.verdict == 'the same to the last digit'
  assert other.change.mean < 0 < other.log_speedup.mean
  assert [x['step'] for x in got['d16', 'one', 0]] == [5, 10, 15, 20]
  last = got['d16', 'one', 0][-1]
  assert last['tokens'] == 20 * 64 and last['flops'] == 20 * 64 * 96
  assert last['max_vio'] == 0.5
  page = (tmp_path / 'a/report.html').read_text()
  for words in ('the same to the last digit', 'Nobody, 2026: 1 &lt; 2', '0.50'):
    assert words in page


def test_a_killed_ablation_goes_on_as_if_it_had_not_been(
  tmp_path, make, monkeypatch, no_pictures, capsys
):
  whole = run(tmp_path / 'a', make(one=same, fast=fast))
  chunks, saved = [], folder.save

  def killed(*args):
    chunks.append(args[1:4])
    if len(chunks) % 7 == 0:
      raise KeyboardInterrupt  # this chunk is lost
    saved(*args)

  monkeypatch.setattr(folder, 'save', killed)
  for _ in range(9):
    try:
      rows = run(tmp_path / 'b', make(one=same, fast=fast))
      break
    except KeyboardInterrupt:
      pass
  assert curves(rows) == curves(whole)
  assert len(chunks) == 2 * 2 * 4 + len(chunks) // 7  # one lost a kill
  assert not list((tmp_path / 'b/running').iterdir())
  # A third pair trains the third pair alone.
  chunks.clear()
  monkeypatch.setattr(folder, 'save', lambda *a: (chunks.append(a), saved(*a)))
  more = run(tmp_path / 'b', make(one=same, fast=fast), '--pairs=3')
  assert {args[3] for args in chunks} == {2} and len(more) == 6


def test_a_kill_at_the_end_of_a_run_trains_nothing_twice(
  tmp_path, make, monkeypatch
):
  """A kill before a row, in it, and between it and the end of its state."""
  made = make(one=same, fast=fast)
  recipes = {'fast': plan.paid(made, 'd16', {})['fast']}
  words = turns.text(recipes['fast'].config, tmp_path / '.corpus')
  chunks, file = [], tmp_path / 'results.jsonl'
  pair = lambda: turns.pair(
    *(tmp_path, 'd16', recipes, 0, 4, words), say=chunks.append
  )

  def killed(*_):
    raise KeyboardInterrupt

  for name in ('finish', 'drop'):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
      patch.setattr(folder, name, killed)
      pair()
  (first,) = folder.results(tmp_path)
  assert (tmp_path / 'running/d16-fast-0').exists()
  file.write_bytes(file.read_bytes()[:-9])
  assert folder.results(tmp_path) == []
  pair()
  assert folder.results(tmp_path)[0] == first
  assert len(chunks) == len(set(chunks)) == 4
  folder.save(tmp_path, 'd16', 'fast', 0, turns.Run(TOY, None, {}, []))
  pair()  # removes the state that no one needs
  assert len(chunks) == 4 and not list((tmp_path / 'running').iterdir())


def test_a_budget_pays_for_as_many_steps(make):
  def dear(recipe):
    flops = lambda config, length: 12.0 * config.model.dim
    data = dataclasses.replace(recipe.config.data, seq_len=32)
    config = dataclasses.replace(recipe.config, data=data)
    return recipe._replace(config=config, flops=flops)

  steps = {}
  for equal in ('tokens', 'flops', 'seconds'):
    made = make(equal, one=same, dear=dear)
    paid = plan.paid(made, 'd16', {'one': 0.1, 'dear': 0.25})
    steps[equal] = [r.config.run.steps for r in paid.values()]
  assert steps == {'tokens': [20, 10], 'flops': [20, 5], 'seconds': [20, 8]}
  with pytest.raises(c.ConfigError, match='the losses|--equal=tokens'):
    make('steps', one=same, dear=dear)
  with pytest.raises(c.ConfigError, match='pays for 2 steps of arm dear'):
    made = make('seconds', seconds=0.5, one=same, dear=dear)
    plan.paid(made, 'd16', {'one': 0.1, 'dear': 0.25})
  # The schedule ends with the run, whatever its length.
  for recipe in paid.values():
    config = recipe.config
    whole = config.run.steps * tokens_of_step(config)
    length = sum(n for _, n, _ in config.optim.phases)
    chex.assert_trees_all_close(length, float(whole), rtol=1e-12)
    chex.assert_trees_all_close(config.optim.bias_tokens, 0.95 * whole)


def test_equal_seconds_are_measured_and_stay(
  tmp_path, make, no_pictures, monkeypatch
):
  """By a clock that goes on by 10 ms whenever it is read."""
  ticks = itertools.count()
  clock = types.SimpleNamespace(perf_counter=lambda: 0.01 * next(ticks))
  monkeypatch.setattr(turns, 'time', clock)
  monkeypatch.setattr(turns, '_ROUND_SECONDS', 0.01)  # a step a round
  run(tmp_path, make('seconds', seconds=0.08, one=same, fast=fast))
  speeds = folder.speeds(tmp_path)['d16']
  chex.assert_trees_all_close(speeds, {'one': 0.01, 'fast': 0.01})
  last = [row['curve'][-1] for row in folder.results(tmp_path)]
  assert {point['step'] for point in last} == {8}
  chex.assert_trees_all_close(last[0]['seconds'], 4 * 0.01)  # chunks
  # An arm more is timed beside the reference, whose seconds stay.
  folder.add_speeds(tmp_path, 'd16', {'one': 0.02})
  with pytest.raises(c.ConfigError, match='of one at d16 has 8 steps, and the'):
    run(tmp_path, make('seconds', seconds=0.08, one=same, two=same))
  after = folder.speeds(tmp_path)['d16']
  chex.assert_trees_all_close(after, {'one': 0.02, 'two': 0.02})


def test_a_refused_command_does_not_bind_its_folder(
  tmp_path, make, texts, monkeypatch
):
  chunks = []
  monkeypatch.setattr(report, 'write', lambda *_: None)
  monkeypatch.setattr(turns, 'pair', lambda *args: chunks.append(args[1:4:2]))
  half = lambda recipe: recipe._replace(flops=lambda *_: 192.0)
  with pytest.raises(c.ConfigError, match='pays for 2 steps of arm half'):
    run(tmp_path, make('flops', steps=4, one=same, half=half))
  assert not folder.begun(tmp_path)
  made = make('flops', sizes=(16, 32), one=same, half=half)
  run(tmp_path, made)
  assert chunks == [('d16', 0), ('d16', 1), ('d32', 0), ('d32', 1)]
  # From the first chunk on it is bound, to its text, too.
  begin(tmp_path)
  with pytest.raises(c.ConfigError, match='steps.d16 is 12, there 20'):
    run(tmp_path, make('flops', steps=12, one=same, half=half))
  extra = texts / 'extra.txt'
  extra.write_text('A line more. ' * 40)
  with pytest.raises(c.ConfigError, match='the text has changed since'):
    run(tmp_path, made)
  extra.unlink()
  run(tmp_path, made)


def test_a_page_follows_each_size_and_table_needs_no_lock(
  tmp_path, make, no_pictures, call, monkeypatch
):
  def pair(path, size, recipes, seed, *_):
    if size == 'd32':
      raise KeyboardInterrupt
    for arm in recipes:
      folder.finish(path, row(size, arm, seed, 2.0 - (arm == 'two')))

  monkeypatch.setattr(turns, 'pair', pair)
  made = make(sizes=(16, 32), one=same, two=same)
  with pytest.raises(KeyboardInterrupt):
    run(tmp_path, made)
  page = tmp_path / 'report.html'
  assert 'better by 50.00%' in page.read_text()
  page.unlink()
  before = {x.name: x.stat().st_mtime_ns for x in tmp_path.iterdir()}
  words = '--name=toys', '--points=4', f'--workdir={tmp_path}'
  with workdir.lock(tmp_path, folder.begun):
    assert 'is writing to it' in refused(call, *words)
    code, output, _ = call('ablate', '--table', *words)
  assert code == 0 and 'better by 50.00%' in output and page.exists()
  after = {x.name: x.stat().st_mtime_ns for x in tmp_path.iterdir()}
  changed = {name for name in after if after[name] != before.get(name)}
  assert changed <= {'report.html', 'lock'}


def test_steps_that_were_not_accepted_are_counted(texts, tmp_path):
  """Over a whole run; their loads and losses are in no sum of the device."""
  config = small(texts, 16)
  words = turns.text(config, tmp_path / 'cache', '')
  metrics = lambda n: {
    'main_loss': np.float32(math.nan if n > 12 else n),
    'load': np.array([[1, 3]]),
    'skipped': np.float32(n == 2) + np.float32(n > 12),
  }
  programs = turns.Programs(
    *(None, lambda n, *_: (n + 1, metrics(n + 1)), lambda *_: {'nll': 1.0})
  )
  run = turns.Run(TOY._replace(config=config), programs, 0, [])
  for last in (6, 12, 18):
    run = turns.advance(run, words, last)
  assert [point['skipped'] for point in run.curve] == [1, 1, 7]
  chex.assert_trees_all_close(run.curve[0]['loss'], 3.5)
  assert run.curve[0]['max_vio'] == 0.5
  assert outcome.diverged(run.curve) and not outcome.diverged(run.curve[:2])


# ------------------------------------------------------------------- refusals


def refused(call, *words):
  code, _, errors = call('ablate', *words)
  assert code == 2 and errors.count('\n') == 1, errors
  return errors


def test_wrong_requests_are_one_line(call, tmp_path):
  (tmp_path / 'mine.py').write_text('"""An ablation without its function."""')
  (tmp_path / 'half.py').write_text(
    '"""Half."""\ndef get_ablation():\n  return {"sizes": {}}'
  )
  for words, message in (
    (['--name=granlarity'], 'did you mean granularity?'),
    (['--name=zzz'], 'is no ablation; ours: balance, fp8,'),
    ([], "--name='': give one of balance"),
    ([f'--name={tmp_path}/mine.py'], 'has no function get_ablation'),
    ([f'--name={tmp_path}/half.py'], "'arms' is missing or unknown"),
    (['--name=moe', '--pairs=1'], 'one pair has no interval'),
    (['--name=moe', '--points=0'], '--points=0: must be at least 1'),
    (['--name=moe', '--arms=moe'], 'one arm has nothing to be compared with'),
    (['--name=moe', '--arms=mo'], '--arms=mo: there is only dense, dense_low,'),
    (['--name=moe', '--sizes=xl'], '--sizes=xl: there is only s, m, l'),
    (['--name=moe', '--equal=luck'], '--equal=luck: there is only steps'),
    (['--name=moe', '--table'], '/run has no finished run'),
    (['--name=moe', '--steps=3'], '--points=10: size s has 3 steps'),
    (['--name=scoring', '--seconds=3'], 'is a budget of --equal=seconds'),
    (['--name=moe', '--seconds=nan'], '--seconds=nan: must be a finite'),
    (['--name=moe', '--seconds=inf'], '--seconds=inf: must be a finite'),
    (['--name=moe', '--seed=2147483646'], 'below 2**31'),
    (['--name=README.md'], '--name=README.md: is no Python file'),
  ):
    folder_of = f'--workdir={tmp_path}/run'
    assert message in refused(call, *words, folder_of)
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  'source, message',
  [
    ('1 / 0', 'line 2: ZeroDivisionError: division by zero'),
    ('import nothing_of_it', 'line 2: ModuleNotFoundError: No module'),
    ('def get_ablation():\n  return {}["x"]', "line 3: KeyError: 'x'"),
    ('get_ablation = lambda: None', 'gives None; it must return a dict'),
    ('get_ablation = lambda: mine("")', "'sizes' must be a dict of configs"),
    ('get_ablation = lambda: mine({"s": 3})', "'s' of 'sizes' is 3; it must"),
    ('get_ablation = lambda: mine(a=3)', "'a' of 'arms' is 3; it must be"),
    ('get_ablation = lambda: mine(**{"1/2": same})', "'1/2' of 'arms' names"),
    ('get_ablation = lambda: mine({"a-b": TOY})', "'a-b' of 'sizes' names"),
    ('get_ablation = lambda: mine(paper=1)', "'paper' must be a text"),
    ('get_ablation = lambda: mine(a=lambda c: None)', 'arm a gives None at s'),
    (
      'get_ablation = lambda: mine(a=lambda c: ablate.of_model(c, init_sd=1))',
      'arm a at s, line 2: TypeError: ',
    ),
    (
      'get_ablation = lambda: mine(a=lambda c: ablate.of_moe(c, top_k=99))',
      'arm a at s, line 2: top_k=99: ',
    ),
  ],
)
def test_a_mistake_in_ones_own_ablation_is_one_line(tmp_path, source, message):
  helpers = """
from configs import ablate
same = lambda config: config
TOY = ablate.size(16, 1, 1, 8, 20)
def mine(sizes={'s': TOY}, paper='', **arms):
  arms = {'same': same, **arms}
  return dict(sizes=sizes, arms=arms, equal='tokens', paper=paper)
"""
  file = tmp_path / 'mine.py'
  file.write_text(f'"""Mine."""\n{source}\n{helpers}')
  with pytest.raises(c.ConfigError) as error:
    plan.make(str(file))
  assert message in str(error.value) and '\n' not in str(error.value)


def test_functions_are_known_by_their_source(tmp_path):
  text = """
from configs import ablate
from experiments.ablate.recipe import Recipe
def get_ablation():
  own = lambda config: Recipe(config, init=lambda *_: None)
  return dict(sizes={'s': ablate.size(16, 1, 1, 8, 20)}, equal='tokens',
              arms={'config': lambda config: config, 'own': own}, paper='')
"""
  codes = []
  for end in ('', '', '# edited'):
    (tmp_path / 'mine.py').write_text(text + end)
    code = plan.described(plan.make(str(tmp_path / 'mine.py')))['code']
    assert set(code) == {'own'}
    codes.append(code['own'])
  assert codes[0] == codes[1] != codes[2]
  assert plan.described(plan.make('moe', sizes='s'))['code'] == {}
  one, other = (reading.read(x)[3] for x in ('sqrt_softplus', 'moe'))
  assert one and other and one != other


def test_a_list_and_a_folder_for_toys(call, monkeypatch, tmp_path, capsys):
  code, output, _ = call('ablate', '--list')
  assert code == 0
  assert [x.split()[0] for x in output.splitlines()] == reading.names()
  monkeypatch.chdir(tmp_path)
  words = ['ablate', '--name=moe', '--table']
  for more, name in ([], 'ablate-moe'), (['--smoke'], 'ablate-moe-smoke'):
    monkeypatch.setattr('sys.argv', [*words, *more])
    with pytest.raises(SystemExit):
      program.main()
    assert f'/runs/{name} has no finished run' in capsys.readouterr().err


def begin(path):
  """Leaves a file as a run under way does."""
  (path / 'running').mkdir()
  (path / 'running/d16-one-0').touch()


def test_a_folder_has_one_ablation(tmp_path, make):
  folder.bind(tmp_path, make(one=same, fast=fast))
  begin(tmp_path)
  folder.bind(tmp_path, make(one=same, two=same, sizes=(16, 32)))  # is added
  folder.bind(tmp_path, make(one=same, fast=fast))
  with pytest.raises(c.ConfigError, match='reference is two, there one'):
    folder.bind(tmp_path, make(two=same, one=same))
  with pytest.raises(c.ConfigError, match='equal is flops, there tokens'):
    folder.bind(tmp_path, make('flops', one=same, fast=fast))
  with pytest.raises(c.ConfigError, match='steps.d16 is 24, there 20'):
    folder.bind(tmp_path, make(one=same, fast=fast, steps=24))
  with pytest.raises(c.ConfigError, match='seconds is 9.0, there 0'):
    folder.bind(tmp_path, make(one=same, fast=fast)._replace(seconds=9.0))
  with pytest.raises(c.ConfigError, match='seed is 100, there 0'):
    folder.bind(tmp_path, make(one=same, fast=fast, seed=100))
  with pytest.raises(c.ConfigError, match='code.one is 2, there 1'):
    folder.bind(tmp_path, make(one=same, fast=fast, code='2'))
  # A version without a field, or without an entry of the plan.
  file = tmp_path / 'ablation.json'
  values = json.loads(file.read_text())
  del values['configs']['d16-one']['optim']['z_loss'], values['seed']
  file.write_text(json.dumps(values))
  folder.bind(tmp_path, make(one=same, fast=fast))
  (tmp_path / 'ablation.json').write_text('{"na')
  with pytest.raises(c.ConfigError, match='is damaged; name another'):
    folder.bind(tmp_path, make(one=same, fast=fast))


def test_a_damaged_state_is_refused(tmp_path):
  state = Vector(jnp.arange(3.0))
  where = tmp_path, 's', 'a', 0
  folder.save(*where, turns.Run(TOY, None, state, [{'step': 1}]))
  back, points = folder.load(*where, Vector(jnp.zeros(3)), 20)
  chex.assert_trees_all_equal(back, state)
  assert points == [{'step': 1}]
  assert folder.load(tmp_path, 's', 'a', 1, state, 20) is None
  with pytest.raises(c.ConfigError, match='a run of 20 steps, and the budget'):
    folder.load(*where, state, 24)
  for like in (Vector(jnp.zeros(4)), {'other': jnp.zeros(3)}):
    with pytest.raises(c.ConfigError, match='s-a-0: cannot be read'):
      folder.load(*where, like, 20)
  path = tmp_path / 'running/s-a-0'
  path.write_bytes(path.read_bytes()[:-9])
  with pytest.raises(c.ConfigError, match='s-a-0: cannot be read'):
    folder.load(*where, state, 20)


@pytest.mark.parametrize(
  'group, field, value, message',
  [
    ('data', 'heldout', 0.5, 'their losses cannot be compared; judge both'),
    ('data', 'fim_rate', 0.5, 'their losses cannot be compared'),
    ('model', 'vocab', 300, 'their losses cannot be compared'),
    ('mesh', 'data', 2, 'an ablation trains on one device'),
  ],
)
def test_arms_that_cannot_be_compared_are_refused(
  group, field, value, message, make
):
  def other(recipe):
    changed = dataclasses.replace(
      getattr(recipe.config, group), **{field: value}
    )
    config = dataclasses.replace(recipe.config, **{group: changed})
    return recipe._replace(config=config)

  with pytest.raises(c.ConfigError, match=message) as error:
    make(one=same, other=other)
  assert 'of arm other at d16' in str(error.value)


# ------------------------------------------------------------ shipped ablations


@pytest.fixture(scope='module')
def shipped():
  """{name: whole plan} of all ablations; their toys are checked, too."""
  for name in reading.names():
    toy = plan.make(name, smoke=True, points=3)
    configs = [r.config for r in next(iter(toy.recipes.values())).values()]
    assert {config.run.steps for config in configs} == {12}
  return {name: plan.make(name) for name in reading.names()}


def active(recipe):
  counts = cost.parameters(recipe.config)
  return counts.active, counts.total


def test_shipped_ablations_are_plans_of_their_papers(shipped):
  assert {'moe', 'mtp', 'fp8', 'balance', 'sqrt_softplus'} <= set(shipped)
  for name, made in shipped.items():
    assert len(made.arms) >= 2 and made.paper and made.title
    if name != 'sqrt_softplus':
      assert 'arXiv' in made.paper, name


def test_arms_have_the_parameters_that_their_files_say(shipped):
  for recipes in shipped['moe'].recipes.values():
    dense, moe = active(recipes['dense']), active(recipes['moe'])
    assert abs(moe[0] / dense[0] - 1) < 0.05 and moe[1] > 1.5 * dense[1]
  for name, part in (('granularity', 0.03), ('shared', 0.03), ('mla', 0.002)):
    for recipes in shipped[name].recipes.values():
      sizes = [active(recipe) for recipe in recipes.values()]
      assert np.ptp(sizes, axis=0).max() < part * min(map(min, sizes)), name
  cached = [
    [sum(cost.cached(recipe.config.model)) for recipe in recipes.values()]
    for recipes in shipped['mla'].recipes.values()
  ]
  assert cached == [[136, 91, 48], [201, 100, 64], [264, 176, 80]]
  for name in ('balance', 'scoring', 'optimizer', 'groups', 'fp8'):
    for recipes in shipped[name].recipes.values():
      assert len({active(recipe) for recipe in recipes.values()}) == 1, name


def test_an_idea_differs_in_its_score_alone(shipped):
  """Scores, choice and gates are those of numpy; shapes are the library's."""
  arms = shipped['sqrt_softplus'].recipes['s']
  assert arms['sigmoid'].config == arms['sqrt_softplus'].config
  generator = np.random.default_rng(0)
  moe = dataclasses.replace(arms['sigmoid'].config.model.moe, scale=1.0)
  x = generator.normal(size=(7, 5)).astype(np.float32)
  w = generator.normal(size=(5, moe.experts)).astype(np.float32)
  bias = generator.normal(size=moe.experts).astype(np.float32)
  own = functools.partial(own_router.route, moe=moe)
  got = jax.jit(own)(x, w, bias)
  scores = np.sqrt(np.logaddexp(0, x.astype(float) @ w))
  chex.assert_trees_all_close(np.asarray(got.scores, float), scores, rtol=1e-5)
  chosen = np.argsort(-(scores + bias), -1)[:, : moe.top_k]
  chex.assert_trees_all_equal(np.asarray(got.chosen), chosen.astype(np.int32))
  gates = np.take_along_axis(scores, chosen, -1)
  gates = gates / gates.sum(-1, keepdims=True)
  chex.assert_trees_all_close(np.asarray(got.gates, float), gates, rtol=1e-5)
  theirs = functools.partial(router.route, moe=moe)
  assert jax.eval_shape(theirs, x, w, bias) == jax.eval_shape(own, x, w, bias)


def test_an_ablation_of_ones_own_is_one(tmp_path):
  """mine.py, as docs/ablate.md has it."""
  text = (ROOT / 'docs' / 'ablate.md').read_text()
  (source,) = re.findall(r'```python\n(.*?)```', text, re.S)
  (tmp_path / 'mine.py').write_text(source)
  made = plan.make(str(tmp_path / 'mine.py'), sizes='s')
  own, smaller = made.recipes['s'].values()
  assert smaller.config.model.init_std == 0.01 != own.config.model.init_std
  assert made.name == 'mine'
