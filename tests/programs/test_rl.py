"""Reinforcement learning in the loop: ratios, references, resume, refusals."""

import contextlib
import dataclasses
import json
import pathlib
import re
import shutil
import types

import chex
import jax
import numpy as np
import pytest
from flax import linen as nn

from configs import r1, r1_tiny
from experiments import cli, reject, train, workdir
from experiments import opened as opened_model
from experiments import r1 as r1_program
from experiments.adapters import state as adapters_state
from experiments.bench import ours_rl
from experiments.checkpointing import store
from experiments.checkpointing.load import load_run, load_state
from experiments.data import tokenizer
from experiments.rl import (
  checks,
  engine,
  grading,
  grouping,
  policy,
  prompts,
  questions,
  record,
  rollouts,
  room,
  scoring,
  tasks,
)
from experiments.rl.__main__ import taught
from experiments.training import example_source, program
from mla_moe import config as c
from mla_moe import save_huggingface
from mla_moe.config import ConfigError, freeze
from mla_moe.model import transformer
from mla_moe.train.state import init_state

# Of ml_collections, where a test reads a config as the command line does.
pytestmark = pytest.mark.filterwarnings('ignore:the load_module')

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 6
# A rollout and its two updates, where no more is looked at.
TWO = {'steps': 2, 'eval_every': 0, 'sample_every': 0}


def small(run=None, data=None, optim=None, model=None, mesh=None, **rl):
  """The smoke config: six updates, two a rollout, of four questions."""
  config = freeze(r1_tiny.get_config('v32,smoke'))
  change = dataclasses.replace
  fields = dict(temperature=0.7, kl_form='k3', refresh=2, beta=0.1)
  fields |= dict(replay='compare')
  sizes = dict(dim=32, dense_width=32, layers=2) | (model or {})
  run = dict(steps=STEPS, save_every=2, eval_every=6, sample_every=4) | (
    run or {}
  )
  run = {'keep': 9, 'check_every': 1} | run
  return change(
    config,
    model=change(config.model, **sizes),
    run=change(config.run, **run),
    data=change(config.data, **(data or {})),
    optim=change(config.optim, **(optim or {})),
    mesh=change(config.mesh, **(mesh or {})),
    rl=change(config.rl, **(fields | rl)),
  )


sound_grader = grading.Grader


class Fake(grading.Grader):
  """Pays for the variety of an answer's bytes; the fifth is an error."""

  graded = 0

  def _one(self, item, text, is_cut):
    Fake.graded += 1
    reward = float(len(set(text)) % 3)
    if len(set(text)) % 7 == 5:
      return grading.Graded(float('nan'), {}, 'no answer')
    return grading.Graded(reward, {'accuracy': float(reward > 1)}, '')


@pytest.fixture(autouse=True)
def _fake(monkeypatch):
  monkeypatch.setattr(grading, 'Grader', Fake)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """A run that nothing disturbs."""
  folder = tmp_path_factory.mktemp('rl') / 'run'
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(grading, 'Grader', Fake)
    train.run(small(), folder, open_source=policy.opened())
  return folder


def rows(folder, name='metrics'):
  return workdir.rows(folder / f'{name}.jsonl')


def steps(folder):
  return [row for row in rows(folder) if 'reward' in row]


def test_a_run_has_the_numbers_and_files_of_its_rollouts(whole):
  first = steps(whole)[0]
  names = 'reward rewards completion_length entropy kl mismatch_k3 ended '
  names += 'zero_right zero_wrong grader_errors ratio_max kl_old clipped'
  assert set(names.split()) <= first.keys()
  assert [row['step'] for row in rows(whole) if 'pass_at_1' in row] == [6]
  rewards = [row['reward'] for row in steps(whole)]
  assert rewards[::2] == rewards[1::2]  # one a rollout, of two updates
  assert len({*rewards}) > 1
  assert [row['rollout'] for row in rows(whole, 'rewards')] == [0, 1, 2]
  groups = rows(whole, 'groups')
  assert {row['step'] for row in groups} == {4, 6}
  assert all(len(row['answers']) == 4 for row in groups)
  report = (whole / 'report.html').read_text()
  assert 'pass@1' in report or 'pass_at_1' in report
  advantage = np.array([a['advantage'] for a in groups[0]['answers']])
  reward = np.array([a['reward'] for a in groups[0]['answers']])
  chex.assert_trees_all_close(advantage, reward - reward.mean(), atol=1e-9)


def test_the_policy_of_a_rollout_is_that_of_its_first_update(whole):
  for row in steps(whole):
    is_first = row['step'] % 2 == 1
    assert (row['ratio_max'] == 1.0) == is_first
    assert (row['kl_old'] == 0.0) == is_first
    # Rollout and trainer, at T = 0.7: two programs, one policy.
    assert 0 < row['mismatch_max'] < 5e-5
    assert row['mismatch_extreme'] == 0
    if is_first:
      assert row['route_flips'] == 0  # in float32


def test_the_reference_is_the_policy_of_each_second_step(whole):
  kl = {row['step']: row['kl'] for row in steps(whole)}
  # The reference's likelihoods are of a program of their own.
  assert all((kl[step] < 1e-9) == (step % 2 == 1) for step in kl), kl


def test_biases_do_not_move(whole):
  saved = [store_state(whole, step) for step in (2, 6)]
  chex.assert_trees_all_equal(saved[0].router, saved[1].router)
  different = jax.tree.map(
    lambda a, b: bool((a != b).any()), saved[0].params, saved[1].params
  )
  assert all(jax.tree.leaves(different))


def store_state(folder, step):
  like = program.state_shapes(workdir.read_config(folder), None)
  return store.restore(folder / 'checkpoints', like, before=step + 1).state


@pytest.fixture(scope='module')
def resumed(whole, no_pictures, tmp_path_factory):
  """The run, killed after its third update and before the rewards' end."""
  folder = tmp_path_factory.mktemp('again') / 'run'
  shutil.copytree(whole, folder)
  for step in (4, 6):
    shutil.rmtree(folder / 'checkpoints' / str(step))
  Fake.graded = 0
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(grading, 'Grader', Fake)
    train.run(small(), folder, open_source=policy.opened())
  return folder


def test_a_run_goes_on_bit_for_bit(whole, resumed):
  clean = lambda row: {
    name: value
    for name, value in row.items()
    if name not in ('seconds', 'memory_mib', 'tokens_per_s', 'mfu')
  }
  assert list(map(clean, rows(whole))) == list(map(clean, rows(resumed)))
  assert rows(whole, 'fingerprints') == rows(resumed, 'fingerprints')
  assert rows(whole, 'groups') == rows(resumed, 'groups')
  texts = [(run / 'samples.txt').read_bytes() for run in (whole, resumed)]
  assert texts[0] == texts[1] and texts[0].count(b'--- step') >= 2


def test_rewards_are_read_and_not_judged_again(whole, resumed):
  assert Fake.graded == 8  # of the greedy answers at the end, alone
  assert len(rows(resumed, 'rewards')) == 3


def test_a_step_computed_again_is_the_same(whole, capsys):
  from experiments.training import replay

  files = [path for path in whole.glob('*') if path.is_file()]
  before = {path: path.read_bytes() for path in files}
  replay.replay(whole, 4, open_source=policy.opened())
  assert 'arrays are the same' in capsys.readouterr().out
  assert {path: path.read_bytes() for path in files} == before


def test_other_answers_are_judged_anew(whole, tmp_path, capsys):
  folder = tmp_path / 'run'
  shutil.copytree(whole, folder)
  shutil.rmtree(folder / 'checkpoints' / '6')
  file = folder / 'rewards.jsonl'
  lines = [json.loads(line) for line in file.read_text().splitlines()]
  lines[2]['tokens'] = 'of another machine'
  file.write_text(''.join(json.dumps(line) + '\n' for line in lines))
  train.run(small(), folder, open_source=policy.opened())
  assert 'graded anew' in capsys.readouterr().out
  assert rows(whole, 'fingerprints') == rows(folder, 'fingerprints')


def test_a_damaged_row_of_rewards_is_graded_anew(tmp_path, capsys):
  tokens = [np.array([1, 2], np.int32), np.array([3], np.int32)]
  grades = [
    grading.Graded(1.5, {'accuracy': 1.0}, ''),
    grading.Graded(float('nan'), {}, 'accuracy: no answer'),
  ]
  file = tmp_path / 'rewards.jsonl'
  with contextlib.closing(record.Record(file, 1)) as written:
    written.add(3, 7, tokens, grades)
  right = file.read_text()
  with contextlib.closing(record.Record(file, 1)) as rows:
    assert repr(rows.find(3, 7, tokens)) == repr(grades)
    assert rows.find(3, 8, tokens) is None  # no such draw, and no line
  with contextlib.closing(record.Record(file, 4)) as rows:
    assert rows.find(3, 7, tokens) is None  # of an earlier step
  assert not capsys.readouterr().out
  whole = json.loads(right)
  for name, value in [
    ('grades', whole['grades'][:1]),
    ('grades', [[1.5, {}]] * 2),
    ('grades', [['1.5', {}, '']] * 2),
    ('grades', [[1.5, {'accuracy': 'no'}, '']] * 2),
    ('grades', [[None, {}, '']] * 2),
    ('grades', 3),
    ('step', 'x'),
    ('rollout', [7]),
  ]:
    file.write_text(
      json.dumps(whole | {name: value}) + '\nno row\n' + right[:9]
    )
    with contextlib.closing(record.Record(file, 1)) as rows:
      assert rows.find(3, 7, tokens) is None, (name, value)
      assert ('damaged' in capsys.readouterr().out) == (name == 'grades')
      rows.add(3, 7, tokens, grades)
    with contextlib.closing(record.Record(file, 1, writes=False)) as rows:
      assert repr(rows.find(3, 7, tokens)) == repr(grades)


def test_a_row_is_of_its_own_rollout(tmp_path, monkeypatch):
  """The loop reads the row of a step when it has the batch of the next one."""

  def draw(self, number, rollout, variables):
    self._row = {'rollout': rollout}
    return [], {}

  monkeypatch.setattr(policy.Policy, '_draw', draw)
  monkeypatch.setattr(policy.Policy, '_packed', lambda *_: [None] * 2)
  score = lambda setup, updates, *_: (updates, {})
  monkeypatch.setattr(scoring, 'score', score)
  source = opened(small(), tmp_path)  # two updates a rollout
  state = types.SimpleNamespace(params=None, router=None, reference=None)
  setup = types.SimpleNamespace(variables=lambda *_: None)
  rows = []
  for number in range(1, 7):
    source.batch(setup, number, state, 0)
    rows += [source.row(n)['rollout'] for n in (number - 1, number) if n]
  source.close()
  assert rows == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2]


def test_the_benchmark_times_the_parts_of_a_policy(tmp_path, monkeypatch):
  places = (engine, 'drawing'), (grading.Grader, 'grade'), (scoring, 'score')
  for place, name in places:  # which the benchmark replaces
    monkeypatch.setattr(place, name, getattr(place, name))
  parts = []
  timed = lambda part, f: parts.append(part) or f
  open_source = ours_rl.opener(types.SimpleNamespace(timed=timed))
  open_source(small(), words_of(small()), tmp_path).close()
  assert sorted(parts) == ['grade', 'pack', 'rollout', 'score']


def words_of(config):
  return tokenizer.load(config.data.tokenizer)


def opened(config, folder, **options):
  """A policy that has opened its questions, of a config with a vocabulary."""
  return policy.opened(**options)(config, words_of(config), folder)


def test_a_question_that_is_too_long_is_found_before_the_run(tmp_path):
  lines = [{'prompt': f'{i}', 'answer': i} for i in range(400)]
  lines[300]['prompt'] = 'one that is too long'
  file = tmp_path / 'mine.jsonl'
  file.write_text(''.join(json.dumps(line) + '\n' for line in lines))
  config = small(task=str(file), rewards=(('accuracy', 1.0),))
  with pytest.raises(ConfigError, match='one that is too long'):
    opened(dataclasses.replace(
      config, data=dataclasses.replace(config.data, seq_len=20)
    ), tmp_path)  # fmt: skip


def test_a_question_that_is_too_long_later_gives_way(tmp_path, monkeypatch):
  config = small()
  first = opened(config, tmp_path)
  long = tasks.Question('9' * config.data.seq_len, '9')
  sound = first._questions.train
  train_side = lambda index: long if index == 5 else sound(index)
  first._questions = first._questions._replace(train=train_side)
  items, ids = room.fitting(
    config, first._prompts, first._questions.train, range(4, 7)
  )
  assert items == [sound(4), sound(5 + (1 << 48)), sound(6)]
  assert [len(x) for x in ids] == [len(x.text) + 1 for x in items]
  first._questions = first._questions._replace(train=lambda index: long)
  with pytest.raises(ConfigError, match='one after the other'):
    room.fitting(config, first._prompts, first._questions.train, range(1))


def test_rows_without_a_step_stop_no_run(tmp_path):
  metrics = '{"reward": 1}\n{"step": "x", "reward": 1}\n'
  (tmp_path / 'metrics.jsonl').write_text(metrics)
  groups = '{"step": 2}\n{"stop": 3}\n{"step": null}\n{"step": 9}\n'
  (tmp_path / 'groups.jsonl').write_text(groups)
  source = opened(small(), tmp_path)
  source._begin(4)
  source.close()
  assert rows(tmp_path, 'groups') == [{'step': 2}]


def test_a_run_has_rewards_of_ones_own(tmp_path):
  config = small(rewards=(('short', 1.0),))
  with pytest.raises(ConfigError, match='no such reward'):
    opened(config, tmp_path)
  short = lambda question, text: 1 / (1 + len(text))
  opened(config, tmp_path, rewards={'short': short}).close()


def test_a_chat_keeps_its_messages():
  words = tokenizer.load('byte')
  own = '{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}>'
  ids = prompts.Prompts('chat', words, None, own).ids
  chat = tasks.Question(
    'Sort.\n31', '13', (), (('system', 'Sort.'), ('user', '31'))
  )
  assert words.decode(ids(chat)) == '[system]Sort.[user]31>'
  assert words.decode(ids(tasks.Question('31', '13'))) == '[user]31>'
  plain = prompts.Prompts('plain', words, None).ids
  assert plain(chat)[0] == words.bos_id
  assert words.decode(plain(chat)[1:]) == chat.text


def test_the_stages_of_r1_fit_each_task(tmp_path, monkeypatch):
  """A task is refused before its cold start, or both stages have room."""
  runs = []

  def run(config, folder, options=None, open_source=None):
    runs.append(config)
    if config.rl.task:
      open_source(config, words_of(config), folder).close()
    return {'step': config.run.steps}

  monkeypatch.setattr(train, 'run', run)
  monkeypatch.setattr(r1_program, 'compared', lambda folder: dict.fromkeys(
    ('first', 'last', 'greedy_first', 'greedy'), 0.0
  ))  # fmt: skip
  for task in ('sort3', 'add12', 'count1', 'countdown3'):
    folder = tmp_path / task
    r1_program.run(folder, task, 0, 1, 2)
    cold, reinforced = runs[-2:]
    lines = workdir.rows(folder / 'cold.jsonl')
    assert len(lines) == 64
    assert all(len(x['completion']) < reinforced.rl.max_new for x in lines)
    assert cold.model == reinforced.model
  runs.clear()
  with pytest.raises(ConfigError, match='another --task'):
    r1_program.run(tmp_path / 'sort3', 'reverse3', 0, 1, 2)
  for wrong in (dict(cold=0), dict(steps=0), dict(task='sort99')):
    options = dict(task='sort3', cold=1, steps=1) | wrong
    with pytest.raises(ConfigError):
      r1_program.run(tmp_path / 'wrong', seed=0, **options)
  assert not runs and not (tmp_path / 'wrong').exists()


def test_a_stage_that_a_signal_ends_is_neither_base_nor_result(
  tmp_path, monkeypatch, capsys
):
  ends = []
  monkeypatch.setattr(train, 'run', lambda *_, **__: {'step': ends.pop()})
  for ends, stage in (([3], 'cold start'), ([3, 9], 'reinforcement')):
    assert not r1_program.run(tmp_path, 'sort3', 0, 9, 5)
    out = capsys.readouterr().out
    assert not ends and f'The {stage} has not ended' in out
    assert 'at the end' not in out


def test_an_answer_that_ends_with_its_last_token_is_whole():
  """Of answers with all `max_new` tokens, one has its end and is graded."""
  drawn = rollouts.Drawn(
    [np.array([49, 50, 257]), np.array([49, 50, 49])],
    [np.zeros(3)] * 2,
    np.array([[True, False]]),
  )
  assert [x.tolist() for x in drawn.bodies] == [[49, 50], [49, 50, 49]]
  source = questions.Source('mine.jsonl', '', None, None)
  item = tasks.Question('1 and 2?', '12')
  with sound_grader(source, {'accuracy': 1.0}, longest=3) as grader:
    rows = grader.grade([item] * 2, ['12', '12'], drawn.lengths)
  assert [row.reward for row in rows] == [1, 0]


def test_a_policy_without_finite_logits_ends_in_a_line(capsys):
  with pytest.raises(SystemExit) as ended, cli.edge():
    raise FloatingPointError('the logits of step 0 are not finite')
  assert ended.value.code == 1
  assert capsys.readouterr().err == (
    'error: the logits of step 0 are not finite\n'
  )


@pytest.mark.slow
@pytest.mark.parametrize('replay', ['compare', 'train'])
def test_a_prompt_that_answers_share_changes_nothing(replay, whole, tmp_path):
  """Each column has the same history, so only the columns are fewer.

  Nor does the split of an update's two rows into micro-batches of one.
  """
  data = {'seq_len': 40, 'micro_batch': 1}
  config = small(prompt='shared', replay=replay, data=data, run=TWO)
  train.run(config, tmp_path / 'run', open_source=policy.opened())
  # After an update, replayed routes are no longer the router's own.
  same = steps(whole)[: 1 if replay == 'train' else 2]
  for one, two in zip(same, steps(tmp_path / 'run'), strict=False):
    assert one['reward'] == two['reward']
    for name in ('loss', 'grad_norm', 'kl', 'kl_old', 'ratio_max'):
      chex.assert_trees_all_close(one[name], two[name], rtol=1e-4, atol=1e-7)
  first, second = steps(tmp_path / 'run')
  assert (first['ratio_max'], first['kl_old']) == (1.0, 0.0)
  assert second['ratio_max'] > 1.0
  assert first['route_flips'] == 0


@pytest.mark.slow
@pytest.mark.parametrize('replay', ['none', 'rollout'])
def test_routes_without_a_flip_change_nothing(replay, whole, tmp_path):
  """In float32 two programs choose alike, so that all modes are one."""
  config = small(replay=replay, run=TWO)
  train.run(config, tmp_path / 'run', open_source=policy.opened())
  first, second = steps(tmp_path / 'run')
  assert (first.get('route_flips') is None) == (replay == 'none')
  skip = {'seconds', 'memory_mib', 'tokens_per_s', 'mfu', 'route_flips'}
  clean = lambda row: {k: v for k, v in row.items() if k not in skip}
  assert clean(first) == clean(steps(whole)[0])
  if replay == 'none':
    assert clean(second) == clean(steps(whole)[1])
  assert first['ratio_max'] == 1.0
  assert first.get('route_flips', 0) == 0


@pytest.mark.slow
def test_equal_rewards_and_no_reference_move_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr(
    Fake, '_one', lambda *_: grading.Graded(1.0, {'accuracy': 1.0}, '')
  )
  config = small(beta=0.0, run=TWO)
  train.run(config, tmp_path, open_source=policy.opened())
  assert [row['grad_norm'] for row in steps(tmp_path)] == [0.0, 0.0]
  assert steps(tmp_path)[0]['zero_right'] == 1.0
  key = jax.random.key(config.run.seed)
  fresh = init_state(key, program.of_state(config))  # as the run compiled it
  _, variables = load_run(tmp_path)
  chex.assert_trees_all_equal(variables['params'], fresh.params)


@pytest.mark.parametrize(
  ('rewards', 'kept', 'said'),
  [
    ([[0, 1], [1, 1], [0, 1], [0, 0]], [0, 2, 4, 6], False),
    ([[0, 0], [1, 1], [0, 1], [0, 0]], [2, 6, 0, 1], True),
  ],
)
def test_dynamic_sampling_fills_a_rollout_or_says_so(
  rewards, kept, said, tmp_path, monkeypatch, capsys
):
  """Of two rounds of four questions, those with a spread come first."""

  def one_round(self, number, draw, variables, seconds):
    return [
      grouping.Group(4 * draw + i, *[None] * 3, np.array(r), [{}, {}], None)
      for i, r in enumerate(rewards)
    ]

  monkeypatch.setattr(policy.Policy, '_round', one_round)
  monkeypatch.setattr(grouping, 'summary', lambda groups: {'all': len(groups)})
  config = small(dynamic=2)
  source = policy.Policy(config, tokenizer.load('byte'), tmp_path)
  groups, _ = source._draw(1, 0, None)
  assert [group.question for group in groups] == kept
  assert source.row(1) == {'all': 8}
  text = 'only 2 of 4 questions have both right and wrong'
  assert (text in capsys.readouterr().out) == said


def test_seeds_are_all_different():
  seeds = [rollouts.seeds(7, number, 4096) for number in range(4)]
  assert len(set(np.concatenate(seeds).tolist())) > 4 * 4096 - 4
  assert np.concatenate(seeds).max() < 2**31
  chex.assert_trees_all_equal(seeds[1], rollouts.seeds(7, 1, 4096))
  # Neighbours are not alike: no seed follows another.
  assert np.mean(np.diff(seeds[0]) == 1) == 0


def test_answers_drawn_in_parts_are_the_same(whole):
  _, variables = load_run(whole)
  prompts = [np.array([256, *range(n)], np.int32) for n in (3, 4, 3, 4)]
  seeds = rollouts.seeds(0, 0, 16)
  one, two = (
    engine.drawing(config)(variables, prompts, seeds)
    for config in (small(), small(rows=8))  # the first is the run's program
  )
  chex.assert_trees_all_equal(one.tokens, two.tokens)
  chex.assert_trees_all_equal(one.routes, two.routes)
  chex.assert_trees_all_close(one.log_probs, two.log_probs, atol=1e-5)


@pytest.mark.slow
def test_the_scheduler_draws_the_answers_of_a_rollout():
  """With drafts, and their routes; of few rows, one policy after the other."""
  config = small(
    model={'mtp': c.MTPConfig(1), 'vocab': 260},
    rows=4,
    engine='scheduler',
    speculative=True,
  )
  draw = engine.drawing(config)
  other = engine.drawing(
    dataclasses.replace(
      config, rl=dataclasses.replace(config.rl, engine='rollout', rows=0)
    )
  )
  prompts = [np.array([256, *range(n)], np.int32) for n in (3, 4, 9, 4)]
  accepted = 0
  for seed in (0, 1):
    state = init_state(jax.random.key(seed), config)
    variables = {'params': state.params, 'router': state.router}
    seeds = rollouts.seeds(0, seed, 16)
    one, two = (f(variables, prompts, seeds) for f in (draw, other))
    chex.assert_trees_all_equal(one.tokens, two.tokens)
    chex.assert_trees_all_equal(one.ended, two.ended)
    chex.assert_trees_all_equal(one.routes, two.routes)
    chex.assert_trees_all_close(one.log_probs, two.log_probs, atol=1e-5)
    assert one.drafts == two.drafts
    accepted += one.drafts[1]
  assert accepted > 0


@pytest.mark.slow
def test_a_run_by_the_scheduler_is_that_by_rollouts(whole, tmp_path):
  """Without drafts; the second rollout, once more, too."""
  run = TWO | {'steps': 4}
  folder, config = tmp_path / 'run', small(engine='scheduler', run=run)
  train.run(config, folder, open_source=policy.opened())
  assert rows(folder, 'rewards') == rows(whole, 'rewards')[:2]
  prints = rows(folder, 'fingerprints')
  shutil.rmtree(folder / 'checkpoints' / '4')
  train.run(config, folder, open_source=policy.opened())
  assert rows(folder, 'fingerprints') == prints


@pytest.mark.slow
def test_the_policy_itself_teaches_nothing(whole, tmp_path):
  """Two updates by a teacher that is the policy: the gradient is 0."""
  config = small(beta=0.0, teachers=((str(whole), 1.0),), run=TWO)
  options = train.Options(init=str(whole))
  train.run(config, tmp_path / 'run', options, policy.opened())
  for row in steps(tmp_path / 'run'):
    assert row['grad_norm'] == row['teacher_kl'] == 0


@pytest.mark.slow
def test_adapters_learn_from_rewards_over_a_frozen_base(tmp_path):
  """An update moves them alone, and its first ratio is 1 to the bit.

  The base lies in eight bits and in no checkpoint. The reference of the KL is
  the base with the adapters of the start, and with the base's own biases.
  """
  model = dict(precision='bf16', dense_layers=0, layers=1, mtp=c.MTPConfig(0))
  plain = small(model=model).model
  shapes = jax.eval_shape(
    transformer.Transformer(plain).init,
    jax.random.key(0),
    np.zeros((1, 4), int),
  )
  random = np.random.default_rng(0)
  normal = lambda x: random.normal(0, 0.3, x.shape).astype(np.float32)
  save_huggingface(
    tmp_path / 'base', plain, jax.tree.map(normal, nn.unbox(shapes))
  )
  names = {path.name for path in (tmp_path / 'base').iterdir()}
  model |= dict(base='int8', lora=c.LoRAConfig(rank=2, alpha=4.0))
  optim = dict(optimizer='adamw', bias_rate=0.0, learning_rate=0.01)
  run = TWO | {'base': str(tmp_path / 'base'), 'seed': 1}
  config = small(run=run, model=model, optim=optim)
  train.run(config, tmp_path / 'run', open_source=policy.opened())
  first, second = steps(tmp_path / 'run')
  assert first['ratio_max'] == 1.0 != second['ratio_max']
  assert first['kl'] < 1e-9 < second['kl']
  state = load_state(tmp_path / 'run')[1].state
  before = adapters_state.init_state(jax.random.key(0), config)
  own = jax.tree.leaves(state.params)
  assert [x.shape for x in own] == [
    x.shape for x in jax.tree.leaves(before.params)
  ]
  whole = sum(x.size for x in jax.tree.leaves(shapes))
  assert sum(x.size for x in own) < 0.2 * whole
  ups = lambda tree: [x for x in jax.tree.leaves(tree) if not np.any(x)]
  assert ups(before.params) and not ups(state.params)  # B was 0
  assert names == {path.name for path in (tmp_path / 'base').iterdir()}


@pytest.mark.by_hand  # CI: test_a_teacher_teaches_the_questions_of_its_kind
def test_a_pupil_approaches_its_teacher(tmp_path):
  """From nothing to one that writes digits: most bytes are mistakes."""
  items = r1_program.examples('sort3', 0, 40)
  r1_program.write_examples(tmp_path / 'cold.jsonl', items)
  words = dict(steps=40, save_every=40, eval_every=0, sample_every=0)
  cold = r1_program._config(
    'cold',
    *(f'--config.run.{name}={value}' for name, value in words.items()),
    f'--config.data.source={tmp_path / "cold.jsonl"}',
  )
  teacher = tmp_path / 'teacher'
  train.run(cold, teacher, open_source=example_source.opened())
  config = small(
    beta=0.0,
    temperature=1.0,
    prompts=16,
    teachers=((str(teacher), 1.0),),
    data={'batch_size': 32},
    optim={'learning_rate': 3e-3},
    run=TWO | {'steps': 24, 'save_every': 24},
  )
  train.run(config, tmp_path / 'pupil', open_source=policy.opened())
  kl = [row['teacher_kl'] for row in steps(tmp_path / 'pupil')]
  assert np.mean(kl[-4:]) < 0.8 * np.mean(kl[:4]), kl


def test_teachers_share_the_weight():
  config = freeze(r1_tiny.get_config('distil'))
  assert config.rl.teachers == (('', 1.0),)
  assert taught(config, []) is config
  assert taught(config, ['a', 'b']).rl.teachers == (('a', 0.5), ('b', 0.5))
  plain = freeze(r1_tiny.get_config('zero'))
  assert taught(plain, ['a']).rl.teachers == (('a', 1.0),)
  assert taught(plain, ['runs/a=b']).rl.teachers == (('runs/a=b', 1.0),)
  kinds = taught(plain, ['x=a', 'x=b', 'y=c']).rl.teachers
  assert kinds == (('a', 0.5, 'x'), ('b', 0.5, 'x'), ('c', 1.0, 'y'))
  with pytest.raises(ConfigError, match='for some alone'):
    taught(plain, ['x=a', 'b'])


@pytest.mark.slow
def test_a_teacher_teaches_the_questions_of_its_kind(whole, tmp_path):
  """By the policy itself all gradient is gone, but for the other kind's."""
  lines = [
    {'prompt': f'{i:03}>', 'answer': 'a', 'kind': 'xy'[i % 2]}
    for i in range(64)
  ]
  task = tmp_path / 'questions.jsonl'
  task.write_text(''.join(f'{json.dumps(line)}\n' for line in lines))
  teachers = [(str(whole), 1.0, kind) for kind in 'xy']
  ends = []
  for name, chosen in (('both', teachers), ('one', teachers[:1])):
    config = small(task=str(task), beta=0.0, teachers=tuple(chosen), run=TWO)
    options = train.Options(init=str(whole))
    train.run(config, tmp_path / name, options, policy.opened())
    ends.append(steps(tmp_path / name))
  # Of another seed: the weights that teach are the teacher's, not its own.
  run = TWO | {'seed': 1}
  config = small(task=str(task), beta=0.0, teachers=tuple(teachers), run=run)
  train.run(config, tmp_path / 'other', open_source=policy.opened())
  first = steps(tmp_path / 'other')[0]
  assert first['teacher_kl'] > 1e-3 and first['grad_norm'] > 0
  assert all(row['grad_norm'] == row['teacher_kl'] == 0 for row in ends[0])
  assert any(row['grad_norm'] > 0 for row in ends[1])
  assert ends[1][0].get('teacher_kl', 0) == 0


@pytest.mark.parametrize('name', ['rollout', 'scheduler'])
def test_any_listed_end_ends_a_rollout(name, monkeypatch, tmp_path):
  """A release's files, beside the tokenizer, list others than the config."""
  listed = json.dumps({'eos_token_id': [7, 9]})
  (tmp_path / 'generation_config.json').write_text(listed)
  config = small()
  data = dataclasses.replace(config.data, tokenizer=str(tmp_path / 'x.json'))
  rl = dataclasses.replace(config.rl, engine=name)
  config = dataclasses.replace(config, data=data, rl=rl)

  class Ended(Exception):
    pass

  def draw(*_, stop_ids, **__):
    raise Ended(*stop_ids)

  work = types.SimpleNamespace(passes=0, accepted=0, submit=draw)
  monkeypatch.setattr(rollouts, 'draw', draw)
  monkeypatch.setattr(engine._Engine, '_with', lambda *_: work)
  prompts = [np.ones(3, np.int32)]
  with pytest.raises(Ended) as ended:
    engine.drawing(config)(None, prompts, np.zeros(rl.samples, int))
  assert ended.value.args == tuple(sorted({7, 9, config.model.eos_id}))


def test_short_answers_do_not_read_pages_of_128(monkeypatch):
  """A row of the cache is one page at least, and is read whole."""
  pages = []

  def rollout(model, variables, prompts, new, cache=c.CacheConfig(), **_):
    pages.append((cache.page, cache.dtype))
    raise StopIteration

  monkeypatch.setattr(rollouts.generation, 'rollout', rollout)
  config = small()
  for width, cache in [
    (8, {}),
    (8, {'cache': c.CacheConfig(dtype='int8')}),
    (8, {'cache': c.CacheConfig(impl='tpu')}),  # reads pages of 128 alone
    (60, {}),
  ]:
    prompts = [np.ones(width, np.int32)]
    parts = rollouts.parts(
      config.model, config.rl, None, prompts, None, **cache
    )
    with pytest.raises(RuntimeError):  # a generator's StopIteration
      next(parts)
  assert pages == [(16, 'auto'), (16, 'int8'), (128, 'auto'), (128, 'auto')]


@pytest.mark.parametrize(
  ('change', 'words'),
  [
    (dict(task=''), "rl.task='': names the questions"),
    (dict(task='sort99'), 'sort99'),
    (dict(minibatches=1), 'data.batch_size=8: the answers of an update'),
    (dict(data={'packing': 'joined'}), "data.packing='joined'"),
    (dict(data={'seq_len': 8}), 'rl.max_new=8 need'),
    (dict(run={'steps': 3}), 'run.steps=3: must be a multiple'),
    (dict(run={'save_every': 1}), 'run.save_every=1: must be a multiple'),
    (dict(optim={'spike_sigma': 3.0}), 'optim.spike_sigma=3.0'),
    (dict(rewards=(('luck', 1.0),)), 'luck'),
    (dict(rewards=(('accuracy', 0.0),)), 'reward'),
    (dict(rewards=('accuracy',)), '(name, weight) pairs'),
    (dict(rewards=(('format', 1.0), ('format', 1.0))), 'a reward twice'),
    (dict(max_new=300), 'model.max_positions=256: a prompt of'),
    (dict(template='chat'), 'template'),
    (dict(teachers=(('', 1.0),)), "names '': is no folder; set --teacher=RUN"),
    (dict(teachers=(('tests/golden/v2_lite', 1.0),)), 'tokenizer'),
    (
      dict(teachers=(('', 1.0, 'x'),)),
      "questions of the kind 'x', and sort3 has none",
    ),
    (dict(speculative=True), 'rl.speculative=True: the model has no MTP'),
    (dict(engine='scheduler', mesh={'data': 2}), "rl.engine='scheduler'"),
    (
      dict(replay='train', model={'dense_layers': 2}),
      "rl.replay='train': a model without experts",
    ),
  ],
)
def test_what_cannot_be_learned_is_refused(
  change, words, tmp_path, monkeypatch
):
  monkeypatch.undo()  # the real grader
  folder = tmp_path / 'runs' / 'one'
  with pytest.raises(ConfigError) as error:
    train.run(small(**change), folder, open_source=policy.opened())
  assert words in str(error.value)
  assert '\n' not in str(error.value)
  assert not (tmp_path / 'runs').exists(), 'a refused run leaves a folder'


@pytest.mark.parametrize(
  ('field', 'value', 'words'),
  [
    ('temperature', 0.0, 'greedy answers'),
    ('minibatches', 3, 'must divide prompts'),
    ('rows', 7, 'multiple of samples'),
    ('kl_form', 'k1', 'must be one of k3, unbiased'),
    ('teachers', (('a', 0.6), ('b', 0.5)), 'at most 1 in all'),
    ('teachers', ('a',), '(folder, weight) or (folder, weight, kind)'),
    ('teachers', (('a', 0.5, 3),), '(folder, weight, kind)'),
    ('teachers', (('a', 0.6), ('b', 0.5, 'x')), 'at most 1 in all'),
  ],
)
def test_fields_that_say_nothing_are_refused(field, value, words):
  with pytest.raises(ConfigError) as error:
    dataclasses.replace(small().rl, **{field: value})
  assert words in str(error.value)


def test_one_answer_has_no_spread():
  with pytest.raises(ConfigError, match='at least 2 answers'):
    dataclasses.replace(small().rl, samples=1, scale='std')


def test_programs_read_no_field_that_is_the_hosts():
  """Runs that differ in those have the same programs."""
  text = (ROOT / 'experiments' / 'rl' / 'objective.py').read_text()
  for folder in ('train', 'model'):
    for path in (ROOT / 'mla_moe' / folder).glob('*.py'):
      text += path.read_text()
  assert re.search(r'\brl\.beta\b', text) and '.data.packing' in text
  for group, fields in program.HOST.items():
    assert not re.search(rf'\b{group}\.({"|".join(fields)})\b', text)
  config = small(heldout=3, dynamic=2, rewards=(('accuracy', 2.0),))
  assert program.of_devices(config) == program.of_devices(small())
  other = small(beta=0.2)
  assert program.of_devices(other) != program.of_devices(small())
  # A fresh state's program is that of the task and the reference alone.
  text = (ROOT / 'mla_moe' / 'train' / 'state.py').read_text()
  text += (ROOT / 'experiments' / 'adapters' / 'state.py').read_text()
  assert {*re.findall(r'\brl\.(\w+)', text)} == {'task', 'beta'}
  other = small(replay='train', temperature=1.0, samples=8, prompts=2)
  assert program.of_state(other) == program.of_state(small())
  assert program.of_state(small(beta=0.0)) != program.of_state(small())


def test_text_is_not_trained_on_by_a_task(tmp_path):
  with pytest.raises(ConfigError, match='is for python -m experiments.rl'):
    train.run(small(), tmp_path)


@pytest.mark.parametrize(
  ('module', 'variants'),
  [
    (r1_tiny, 'cold zero dr dapo gspo cispo v32 distil'),
    (r1, 'zero long cold reason reject all'),
  ],
)
def test_each_variant_can_run_as_it_is(module, variants):
  for name in variants.split():
    for arg in (name, f'{name},smoke'):
      config = freeze(module.get_config(arg))
      data = dataclasses.replace(config.data, source='mine.jsonl')
      config = dataclasses.replace(config, data=data)
      (checks if config.rl.task else example_source).check(config)


def test_the_published_numbers():
  rl = freeze(r1.get_config()).rl
  assert (rl.beta, rl.clip_low, rl.clip_high) == (0.001, 10.0, 10.0)
  assert (rl.samples, rl.prompts // rl.minibatches) == (16, 32)
  assert (rl.refresh, rl.temperature, rl.max_new) == (400, 1.0, 32768)
  assert freeze(r1.get_config()).optim.learning_rate == 3e-6
  final = freeze(r1.get_config('all'))
  assert (final.rl.temperature, final.run.steps) == (0.7, 1696)
  assert dict(final.rl.rewards)['language'] == 1.0


@pytest.mark.slow
@pytest.mark.parametrize('axes', [dict(data=2, fsdp=2, expert=2)])
def test_eight_devices_are_one(axes, whole, tmp_path):
  config = dataclasses.replace(small(run=TWO), mesh=c.MeshConfig(**axes))
  train.run(config, tmp_path / 'run', open_source=policy.opened())
  for one, two in zip(steps(whole), steps(tmp_path / 'run'), strict=False):
    assert one['reward'] == two['reward']
    for name in ('loss', 'grad_norm', 'kl'):
      chex.assert_trees_all_close(one[name], two[name], rtol=1e-3, atol=1e-6)


@pytest.mark.by_hand
@pytest.mark.timeout(900)
def test_a_small_model_learns_from_rewards(tmp_path, monkeypatch):
  monkeypatch.undo()
  numbers = r1_program.run(tmp_path, 'sort4', 0, 60, 30)
  assert numbers['last'] >= numbers['first'] + 0.05, numbers
  assert numbers['greedy'] > numbers['greedy_first'], numbers


@pytest.mark.by_hand
@pytest.mark.timeout(1800)
@pytest.mark.parametrize('seed', [0, 1, 2])
def test_a_model_learns_to_sort(seed, tmp_path, monkeypatch):
  """The worst of three seeds: more than half right, from a tenth."""
  monkeypatch.undo()
  numbers = r1_program.run(tmp_path, 'sort8', seed, 100, 150)
  assert numbers['first'] <= 0.2 and numbers['last'] >= 0.55, numbers
  assert numbers['greedy'] >= 0.70, numbers
  # It teaches: the program takes its right answers to other questions alone.
  model = opened_model.open_model(tmp_path / 'rl')
  rl = freeze(r1_tiny.get_config('zero')).rl
  rl = dataclasses.replace(rl, prompts=64, samples=8)
  out = tmp_path / 'chosen.jsonl'
  counts = reject.run(model, rl, out, seed=seed + 1)
  assert 0.4 <= counts['pass_at_1'] < counts['pass_at_k'] <= 1, counts
  chosen = workdir.rows(out)
  assert len(chosen) == counts['rows'] >= 32
  for row in chosen:
    assert row['completion'] == ''.join(sorted(row['prompt'][:-1]))


@pytest.mark.by_hand
@pytest.mark.timeout(1800)
@pytest.mark.parametrize('seed', [0, 1, 2])
def test_a_model_learns_countdown(seed, tmp_path, monkeypatch):
  """The worst of three seeds: a tenth more of the questions."""
  monkeypatch.undo()
  numbers = r1_program.run(tmp_path, 'countdown3', seed, 600, 200, 'anneal')
  assert numbers['greedy'] >= numbers['greedy_first'] + 0.10, numbers


def test_a_variant_with_teachers_is_another_program_s(tmp_path):
  with pytest.raises(ConfigError, match='--variant=distil: has teachers'):
    r1_program.run(tmp_path / 'one', 'sort4', 0, 1, 1, 'distil')
  with pytest.raises(ConfigError, match="variant 'zeros'"):
    r1_program.run(tmp_path / 'one', 'sort4', 0, 1, 1, 'zeros')
  assert not any(tmp_path.iterdir())
