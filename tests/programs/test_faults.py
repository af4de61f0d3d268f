"""Faults of a run: numbers, signals, devices, folders (rows 11 to 45).

docs/reliability.md lists every row of the fault matrix and its test.
"""

import dataclasses
import functools
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import types

import chex
import children
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny
from experiments import cli, faults, runtime, soak, train, workdir
from experiments.checkpointing import folders, store
from experiments.data import batches, corpus, tokenizer
from experiments.training import (
  metrics,
  preparation,
  progress,
  recorder,
  skips,
  steps,
  warm_start,
)
from experiments.training import program as program_of
from mla_moe import ConfigError, load_huggingface
from mla_moe.config import Config, MeshConfig, freeze
from mla_moe.train import optim, step
from mla_moe.train.state import init_state

ROOT = pathlib.Path(__file__).parents[2]
MICRO = freeze(tiny.get_config('micro'))
RATES = optim.Rates(1e-2, 0.01, 0.3)
NAN = RATES._replace(mtp_loss=float('nan'))
MESH = MeshConfig(data=2, fsdp=4)

# Third-party code that the loop calls: none of it is ours to mend.
pytestmark = pytest.mark.filterwarnings('default')


def micro(steps=20, **changes):
  """Returns MICRO with other fields, each in the group that has its name."""
  changes['steps'] = steps
  groups, changed = {}, set()
  for group in ('model', 'optim', 'data', 'mesh', 'run'):
    fields = getattr(MICRO, group)
    names = {f.name for f in dataclasses.fields(fields)} & changes.keys()
    values = {name: changes[name] for name in names}
    groups[group] = dataclasses.replace(fields, **values)
    changed |= names
  assert changed == changes.keys()
  return Config(**groups)


@pytest.fixture(scope='module', autouse=True)
def folder(tmp_path_factory, no_pictures):
  """The folder of this file's texts and runs.

  Programs are compiled without optimizations, which would take most of the
  time.
  """
  global MICRO
  folder = tmp_path_factory.mktemp('faults')
  before = jax.config.read('jax_disable_most_optimizations')
  text = dataclasses.replace(
    MICRO.data, source=str(soak.texts(folder / 'texts'))
  )
  MICRO = dataclasses.replace(MICRO, data=text)
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
    jax.config.update('jax_disable_most_optimizations', True)
    yield folder
  jax.config.update('jax_disable_most_optimizations', before)


@pytest.fixture(scope='module')
def root(folder):
  """Where runs are; the programs that most of them need are compiled once."""
  train.run(micro(1), folder / 'first')
  return folder


@pytest.fixture(scope='module')
def spread(root):
  """The same, with the programs of a mesh."""
  train.run(dataclasses.replace(micro(1), mesh=MESH), root / 'spread')
  return root


@pytest.fixture
def fault(monkeypatch):
  faults.struck.clear()
  return functools.partial(monkeypatch.setenv, faults.VARIABLE)


def program(root, name, *args, fault=''):
  words = f'--workdir={root}/{name}', '--config=configs/tiny.py:micro'
  return children.Child(
    *('-m', 'experiments.train', *words),
    *(f'--config.data.source={root}/texts', *args),
    env=os.environ | {faults.VARIABLE: fault},
  )


def state_of(folder, number=None):
  like = fresh(MICRO)
  before = None if number is None else number + 1
  restored = store.restore(folder / 'checkpoints', like, before=before)
  assert number in (None, restored.step)
  return restored.state


def rows(folder, name='metrics'):
  timed = ('tokens_per_s', 'mfu', 'memory_mib')
  return [
    {k: v for k, v in row.items() if k not in timed}
    for row in workdir.rows(folder / f'{name}.jsonl')
  ]


def incidents(folder):
  return '\n'.join(row['what'] for row in rows(folder, 'incidents'))


# ------------------------------------------------------------- the step itself


def spiky(steps, **changes):
  """As small a model as there is, with a guard against spikes."""
  model = dict(layers=1, dense_layers=1)
  watch = dict(spike_sigma=4.0, spike_window=4, spike_patience=2, spike_jump=5)
  return micro(steps, **model, **watch, **changes)


GUARDED = spiky(20)


def stepped(config, *inputs):
  """A step of a run's own program, which takes a copy of the state's memory."""
  take, *_ = preparation._jitted(program_of.of_devices(config))
  state, batch, rates = (jax.tree.map(np.array, tree) for tree in inputs)
  state = jax.device_put(state, jax.devices()[0])
  rates = jax.tree.map(np.float32, rates)
  return take(state, *jax.device_put((batch, rates)))


@functools.cache
def fresh(config):
  return init_state(jax.random.key(0), program_of.of_devices(config))


def batch(number=0):
  stream = np.random.default_rng(0).integers(0, 256, 5000).astype(np.uint16)
  return batches.batch_at(stream, MICRO.data, number, 256)


def taken(config, *rates, state=None):
  """The state after a step with each of the rates, and all `skipped`."""
  state = state or fresh(config)
  skipped = []
  for i, rate in enumerate(rates):
    state, values = stepped(config, state, batch(i), rate)
    skipped.append(int(values['skipped']))
  return state, skipped


@pytest.fixture(scope='module')
def both(folder):
  """Both steps, compiled."""
  for config in (MICRO, GUARDED):
    taken(config, RATES)


@pytest.mark.parametrize('is_guarded', [False, True])
def test_row22_a_nan_changes_nothing_and_the_next_step_trains(both, is_guarded):
  config = GUARDED if is_guarded else MICRO
  before, _ = taken(config, RATES)
  after, skipped = taken(config, NAN, state=before)
  assert skipped == [1] and int(after.step) == 2
  chex.assert_trees_all_equal(after.replace(step=before.step), before)
  # The step after is the one that would have been taken without it.
  healthy, _ = stepped(config, before, batch(7), RATES)
  healed, values = stepped(config, after, batch(7), RATES)
  assert int(values['skipped']) == 0
  chex.assert_trees_all_equal(healed.replace(step=healthy.step), healthy)


def test_row23_a_nan_in_the_first_step_changes_nothing(both):
  state, skipped = taken(GUARDED, NAN, NAN, RATES)
  assert skipped == [1, 1, 0]
  first, values = stepped(GUARDED, fresh(GUARDED), batch(2), RATES)
  chex.assert_trees_all_equal(state.replace(step=first.step), first)


def test_row25_a_spike_is_skipped_and_is_no_measure_of_later_ones(both):
  state, skipped = taken(GUARDED, *4 * [RATES])
  losses = np.array(state.loss_window['losses'])
  assert skipped == 4 * [0] and (losses > 0).all()
  # The spike itself: all of the loss, many standard deviations above.
  window = state.loss_window | {'losses': losses - 3}
  spiked = state.replace(loss_window=window)
  after, skipped = taken(GUARDED, RATES, NAN, RATES, state=spiked)
  assert skipped == [2, 1, 2]
  chex.assert_trees_all_equal(after.replace(step=state.step), spiked)
  _, skipped = taken(MICRO, *6 * [RATES])
  assert skipped == 6 * [0]


def test_row27_all_tokens_to_one_expert_is_finite_and_shows(both):
  state = fresh(MICRO)
  forced = jax.tree.map(lambda b: b.at[..., :2].set(100.0), state.router)
  state = state.replace(router=forced)
  after, values = stepped(MICRO, state, batch(), RATES._replace(bias_rate=0.0))
  chex.assert_tree_all_finite((after, values))
  load = np.asarray(values['load'])
  assert (load[:, 2:] == 0).all() and load.sum() == 8 * 16 * 2
  health = metrics.health(load, load)
  assert health['dead_experts'] == 2 and health['max_vio'] == 1.0


def test_unset_nothing_of_the_faults_is_in_the_compiled_step(monkeypatch):
  """Nor set: faults are given to a step, or done between two of them."""
  state = jax.eval_shape(lambda: init_state(jax.random.key(0), GUARDED))

  def text():
    run = functools.partial(step.train_step, config=GUARDED)
    return jax.jit(run).lower(state, batch(), RATES).as_text()

  monkeypatch.delenv(faults.VARIABLE, raising=False)
  plain = text()
  monkeypatch.setenv(faults.VARIABLE, 'nan@step,flip@step,hang@step')
  assert text() == plain
  assert 'callback' not in plain and 'custom_call' not in plain


def test_a_fault_strikes_once_and_only_where_it_says(fault):
  fault('nan@step:3-4,full@before_seal:7')
  actions = [faults.reach('step', i) for i in (2, 3, 3, 4, 5)]
  assert actions == [set(), {'nan'}, set(), {'nan'}, set()]
  assert faults.reach('before_write', 7) == set()
  with pytest.raises(OSError, match='No space left'):
    faults.reach('before_seal', 7)
  fault('nonsense@step')
  with pytest.raises(ValueError, match='nonsense'):
    faults.reach('step', 1)


# --------------------------------------------------------------------- the run


def test_row11_and_14_stopped_by_sigterm_and_resumed_bit_for_bit(
  root, fault, capsys
):
  config = micro(12)
  whole = train.run(config, root / 'whole')
  fault('term@step:7')
  assert train.run(config, root / 'stopped')['step'] == 7
  output = capsys.readouterr().out
  assert output.count('Stopped by SIGTERM at step 7: saved.') == 1
  assert folders.steps(root / 'stopped/checkpoints')[-1] == 7
  assert train.run(config, root / 'stopped') == whole
  for name in ('metrics', 'load'):
    assert rows(root / 'whole', name) == rows(root / 'stopped', name)
  warm = [min(number / 5, 1) for number in range(1, 13)]
  np.testing.assert_allclose(
    [row['lr'] for row in rows(root / 'whole')], 8e-3 * np.array(warm)
  )
  chex.assert_trees_all_equal(
    state_of(root / 'whole'), state_of(root / 'stopped')
  )


def test_a_finished_run_tells_its_numbers_again(root):
  (row,) = rows(root / 'first')
  final = train.run(micro(1), root / 'first')
  assert final == {name: row[name] for name in ('step', 'loss', 'main_loss')}
  assert rows(root / 'first') == [row]


def test_row11_a_signal_while_a_text_is_tokenised_ends_it(tmp_path, capsys):
  """At once, with nothing left behind; before it the signal was not heard."""
  source = tmp_path / 'text'
  source.mkdir()
  (source / 'a.txt').write_text('a line of text\n' * 99)

  def open_source(config, words, path):
    cache = path.parent / '.corpus'

    def say(line):
      os.kill(os.getpid(), signal.SIGTERM)

    return corpus.prepare(config.data, words, cache, say)

  config = micro(2, source=str(source))
  end = train.run(config, tmp_path / 'run', open_source=open_source)
  assert end == {'step': 0}
  assert 'Stopped by SIGTERM before the first step' in capsys.readouterr().out
  cache = tmp_path / '.corpus'
  assert not cache.exists() or not os.listdir(cache)
  assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.slow
def test_row13_a_second_signal_ends_at_once_and_hurts_nothing(root):
  """It comes while the save that the first asked for is being written."""
  child = program(
    *(root, 'twice', '--config.run.save_every=2'),
    fault='term@step:5,slow@during_write:5,term@during_write:5',
  )
  child.communicate()
  assert child.returncode == -signal.SIGTERM
  assert int(state_of(root / 'twice').step) in (2, 4)  # 4 may have no seal yet


@pytest.mark.parametrize(
  'changes, words',
  [
    (dict(dim=32), 'model.dim: 32 != 16'),
    (dict(layers=3), 'model.layers: 3 != 2'),
    (dict(learning_rate=1.0), 'optim.learning_rate: 1.0 != 0.008'),
    (dict(seed=1), 'data.seed: 1 != 0; config.run.seed: 1 != 0'),
    (dict(batch_size=16), 'data.batch_size: 16 != 8'),
  ],
)
def test_row16_and_18_another_model_or_data_is_refused(
  tmp_path, changes, words
):
  with workdir.claim(tmp_path, MICRO):
    (tmp_path / 'metrics.jsonl').write_text('{"step": 1}\n')
  with pytest.raises(ConfigError) as error:
    with workdir.claim(tmp_path, micro(**changes)):
      pass
  assert words in str(error.value) and '\n' not in str(error.value)
  with workdir.claim(tmp_path, micro(7, save_every=1)):
    pass


def test_row18_another_text_is_refused(root, tmp_path):
  source = tmp_path / 'text'
  source.mkdir()
  for i in range(40):
    (source / f'{i}.txt').write_text(f'{i} is the number of this file. ' * 9)
  config = micro(2, source=str(source), heldout=0.3)
  train.run(config, root / 'text')
  (source / '7.txt').write_text('Another text. ' * 9)
  with pytest.raises(ConfigError, match='the text has changed since the run'):
    train.run(config, root / 'text')


def test_row20_damage_that_comes_later_trains_no_step(root, tmp_path):
  """A run that goes on stops before the step; mended, it goes on."""
  source = tmp_path / 'text'
  source.mkdir()
  for i in range(40):
    (source / f'{i}.txt').write_text(f'{i} is a line of a text. ' * 9)
  config = micro(2, source=str(source), heldout=0.3)
  train.run(config, root / 'damaged')
  words = tokenizer.load('byte')
  text = corpus.prepare(config.data, words, root / '.corpus', str)
  path = root / '.corpus' / text.fingerprint / '00000.train'
  content = path.read_bytes()
  path.write_bytes(content[:-1] + b'\x02')
  before = rows(root / 'damaged')
  config = micro(3, source=str(source), heldout=0.3)
  with pytest.raises(ConfigError, match='00000.train: MiB 0 is damaged'):
    train.run(config, root / 'damaged')
  assert rows(root / 'damaged') == before
  path.write_bytes(content)
  assert train.run(config, root / 'damaged')['step'] == 3


def test_row24_bad_steps_in_a_row_stop_the_run_with_its_last_good_state(
  root, fault
):
  config = micro(save_every=4, max_skips=3)
  train.run(micro(6, save_every=6), root / 'good')
  fault('nan@step:7-20')
  with pytest.raises(cli.Stopped, match='3 steps in a row') as error:
    train.run(config, root / 'bad')
  assert '\n' not in str(error.value)
  skipped = [r['skipped'] for r in rows(root / 'bad')]
  assert skipped[:9] == 6 * [0] + 3 * [1]
  last = folders.steps(root / 'bad/checkpoints')[-1]
  good, bad = state_of(root / 'good'), state_of(root / 'bad', last)
  assert last in (9, 10)
  chex.assert_trees_all_equal(bad.replace(step=good.step), good)
  assert 'not finite' in incidents(root / 'bad')
  assert (root / 'bad/report.html').exists()


def test_row25_after_spikes_the_run_goes_back_and_jumps_the_text(root, fault):
  fault('spike@step:9-10')
  config = spiky(16, keep=9)
  spiked = train.run(config, root / 'spiked')
  assert spiked['step'] == 16
  text = incidents(root / 'spiked')
  assert (
    'went back to step 5, from before the spikes that began at step 9' in text
  )
  written = rows(root / 'spiked')
  assert [row['step'] for row in written] == list(range(1, 17))
  assert not any(row['skipped'] for row in written)
  counts = store.facts(root / 'spiked/checkpoints', 15)['counts']
  late = [r for r in rows(root / 'spiked', 'fingerprints') if r['step'] > 5]
  assert {row['left_out'] for row in late} == {counts['left_out']}
  # The loop sees the spikes at step 10, or one step later.
  assert counts['left_out'] in ((10 - 5 + 5) * 8, (11 - 5 + 5) * 8)
  assert counts['rollbacks'] == 1
  # What follows is what a run does that never saw the text in between.
  setup = preparation.prepare(config, root / 'spiked')
  number, state, _ = progress.resume(setup, before=6)
  assert number == 5
  for number in (6, 7, 8):
    batch = functools.partial(setup.source.batch, setup, number, state)
    jumped = batch(counts['left_out'])
    assert (jumped.tokens != batch(0).tokens).any()
    rates = steps.rates(config, number)
    state, values = steps.take(setup, state, jumped, rates)
    assert float(values['loss']) == written[number - 1]['loss']


def test_row25_a_save_that_failed_before_the_spikes_is_an_incident(root, fault):
  fault('full@during_write:6,spike@step:8-9')
  assert train.run(spiky(10, save_every=3), root / 'unsaved')['step'] == 10
  text = incidents(root / 'unsaved')
  assert 'could not be saved' in text and 'went back to step 3' in text


def test_row25_going_back_is_bounded(root, fault):
  fault('spike@step:9-40')
  with pytest.raises(cli.Stopped, match='after 1 returns'):
    train.run(spiky(40, max_rollbacks=1), root / 'bounded')
  assert incidents(root / 'bounded').count('went back') == 1


def test_guard_counts_by_hand():
  run = micro(max_skips=3, spike_patience=2, max_rollbacks=1).run
  counts = skips.Counts()
  assert [counts.add(s, run) for s in (1, 0, 2, 0, 1, 1)] == 6 * ['']
  assert '3 steps in a row' in counts.add(1, run)
  counts = skips.Counts()
  assert [counts.add(s, run) for s in (2, 1, 2)] == ['', '', 'back']
  counts = counts.after_rollback(40)
  assert counts == skips.Counts(0, 0, 1, 40)
  assert [counts.add(s, run) for s in (2, 2)][1].startswith('2 spikes in a row')


def test_counts_of_older_checkpoints_are_read():
  older = {'streak': 1, 'spikes': 0, 'rollbacks': 2, 'passed': 40}
  counts = skips.Counts(1, 0, 2, 40)
  assert skips.read({'guard': older}) == counts
  assert skips.read({'counts': dataclasses.asdict(counts)}) == counts
  assert skips.read({}) == skips.Counts()


def test_row28_replay_finds_a_bit_that_flipped_between_two_steps(
  root, fault, capsys
):
  from experiments.training import replay

  fault('flip@step:9')
  train.run(micro(15), root / 'flipped')
  again = functools.partial(replay.replay, root / 'flipped')
  again(6)
  again(15)
  assert capsys.readouterr().out.count('arrays are the same') == 2
  with pytest.raises(
    cli.Stopped, match='of .* arrays differ from what the run'
  ):
    again(10)
  with pytest.raises(ConfigError, match='no fingerprints .* of 5, 6, 10'):
    again(8)
  # The record of an older version has other names.
  file = root / 'flipped/fingerprints.jsonl'
  file.write_text(file.read_text().replace('left_out', 'passed'))
  again(6)
  older = replay._renamed({'guard.seen': 1, 'step': 2, 'opt.0.mu.guard': 3})
  assert older == {'loss_window.seen': 1, 'step': 2, 'opt.0.mu.guard': 3}


@pytest.mark.parametrize(
  'chore, field', [('evaluate', 'eval_every'), ('sample', 'sample_every')]
)
def test_row45_a_chore_that_fails_is_an_incident_and_the_save_follows(
  root, monkeypatch, chore, field
):
  def broken(self, number, state):
    raise ConfigError('this model\nis broken')

  broken.__name__ = chore
  monkeypatch.setattr(recorder.Recorder, chore, broken)
  config = micro(2, save_every=2, **{field: 2})
  assert train.run(config, root / chore)['step'] == 2
  assert folders.steps(root / chore / 'checkpoints') == [2]
  text = f'{chore} failed: ConfigError: this model is broken'
  assert incidents(root / chore) == text


@pytest.mark.slow
def test_row29_replicas_that_differ_end_the_run(spread, fault):
  config = dataclasses.replace(micro(12), mesh=MESH)
  fault('flip@step:8')
  with pytest.raises(cli.Stopped, match='devices hold different copies'):
    train.run(config, spread / 'replicas')
  assert folders.steps(spread / 'replicas/checkpoints')[-1] == 5
  fault('')
  assert train.run(config, spread / 'replicas')['step'] == 12


def test_row11_a_run_that_is_stopped_at_once_is_no_failure(root, fault, capsys):
  """It has logged nothing: there is nothing to draw, and nothing wrong."""
  fault('term@step:2')
  train.run(micro(9, log_every=9, eval_every=0), root / 'at_once')
  assert 'Stopped by SIGTERM at step' in capsys.readouterr().out
  assert folders.steps(root / 'at_once/checkpoints')
  assert not (root / 'at_once/report.html').exists()
  train.run(micro(9, log_every=9, eval_every=0), root / 'at_once')
  assert (root / 'at_once/report.html').exists()


@pytest.mark.slow
def test_row40_a_run_begins_from_the_weights_of_another(
  root, monkeypatch, capsys
):
  """Killed before it has saved them, it begins from the same once more."""
  shutil.copytree(root / 'first', root / 'origin')
  config = micro(4)
  config = dataclasses.replace(
    config, run=dataclasses.replace(config.run, seed=7)
  )
  warm = train.Options(init=str(root / 'origin'))
  train.run(config, root / 'warm', warm)
  theirs, ours = state_of(root / 'origin', 1), state_of(root / 'warm', 0)
  assert int(ours.step) == 0 and int(theirs.step) == 1
  chex.assert_trees_all_equal(ours, theirs.replace(step=ours.step))
  assert rows(root / 'warm')[0]['lr'] == 8e-3 / 5
  words = f'from {root / "origin"} at step 1, weights and moments.'
  assert f'Begins {words}' in capsys.readouterr().out
  assert f'Began {words}' in (root / 'warm/report.html').read_text()

  def killed(*_):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(train, '_save', killed)
    train.run(config, root / 'again', warm)
  assert not folders.steps(root / 'again/checkpoints')
  train.run(micro(2), root / 'origin')  # it moves on
  train.run(config, root / 'again')
  assert rows(root / 'warm') == rows(root / 'again')
  chex.assert_trees_all_equal(
    state_of(root / 'warm', 4), state_of(root / 'again', 4)
  )
  # The same command resumes; another origin comes too late.
  choose = functools.partial(warm_start.chosen, begun=True)
  origin = warm_start.Origin(str(root / 'origin'), 1, True)
  assert choose(root / 'warm', str(root / 'origin')) == origin
  assert choose(root / 'warm', str(root / 'first')) == origin  # its copy
  assert choose(root / 'warm', '') == origin
  assert choose(root / 'first', '') is None
  for folder, source in (('warm', 'again'), ('first', 'origin')):
    with pytest.raises(ConfigError, match='has begun, from .*another --workd'):
      choose(root / folder, str(root / source))


def beginning(config, path, source):
  """The state of a run that begins from `source`; nothing is trained."""
  setup = types.SimpleNamespace(config=config, mesh=None, path=path)
  setup.tokenizer = tokenizer.load(config.data.tokenizer)
  return warm_start.begin(setup, warm_start.Origin(str(source)))


def test_a_warm_start_has_the_tokenizer_of_its_origin(tmp_path, monkeypatch):
  """Ids of another tokenizer are other texts, even where shapes agree."""
  config = Config()
  theirs = dataclasses.replace(
    config, data=dataclasses.replace(config.data, tokenizer='words')
  )
  setup = types.SimpleNamespace(config=config, tokenizer=tokenizer.load('byte'))
  warm_start.check_tokenizer(setup, config, tmp_path)
  warm_start.check_tokenizer(setup, theirs, tmp_path)  # no such file any more
  words = types.SimpleNamespace(fingerprint='1a2b:0:1')
  monkeypatch.setattr(tokenizer, 'load', lambda *_: words)
  with pytest.raises(ConfigError, match='set --config.data.tokenizer=words'):
    warm_start.check_tokenizer(setup, theirs, tmp_path)
  setup.tokenizer = types.SimpleNamespace(fingerprint='1a2b:5:6')
  warm_start.check_tokenizer(setup, theirs, tmp_path)


def test_a_warm_start_says_what_does_not_come_along(root, tmp_path, capsys):
  changed = micro(optimizer='muon')
  moe = dataclasses.replace(MICRO.model.moe, top_k=3)
  model = dataclasses.replace(changed.model, moe=moe, dtype='bfloat16')
  changed = dataclasses.replace(changed, model=model)
  state = beginning(changed, tmp_path, root / 'first')
  chex.assert_trees_all_equal(state.params, state_of(root / 'first', 1).params)
  moments = [leaf for leaf in jax.tree.leaves(state.opt) if leaf.ndim > 1]
  assert moments and not any(np.asarray(leaf).any() for leaf in moments)
  output = capsys.readouterr().out
  assert 'at step 1, weights alone.' in output
  line = f'computed otherwise than in {root / "first"}: config.model.moe.top_k:'
  assert f'{line} 3 != 2.' in output
  wrong = dataclasses.replace(MICRO.model, dim=32)
  with pytest.raises(ConfigError, match=r'shapes \(config.model.dim: 32 != 16'):
    beginning(dataclasses.replace(MICRO, model=wrong), tmp_path, root / 'first')
  with pytest.raises(ConfigError, match='neither a run'):
    beginning(MICRO, tmp_path, tmp_path)


def test_a_run_begins_from_a_release(tmp_path):
  release = ROOT / 'tests/golden/v3_release'
  model, variables = load_huggingface(release)
  state = beginning(dataclasses.replace(MICRO, model=model), tmp_path, release)
  assert int(state.step) == 0
  chex.assert_trees_all_equal(state.params, variables['params'])
  chex.assert_trees_all_equal(state.router, variables['router'])
  assert warm_start.recorded(tmp_path) == warm_start.Origin(str(release))


@pytest.mark.slow
def test_row15_a_run_goes_on_on_another_mesh(spread):
  """The same losses within rounding, from the very same state."""
  train.run(micro(5), spread / 'moved')
  train.run(dataclasses.replace(micro(9), mesh=MESH), spread / 'moved')
  train.run(micro(9), spread / 'stayed')
  moved, expected = (
    [row['loss'] for row in rows(spread / name)] for name in ('moved', 'stayed')
  )
  assert moved[:5] == expected[:5]
  np.testing.assert_allclose(moved, expected, rtol=2e-5)


def test_row30_a_step_that_hangs_is_ended_with_every_stack(root):
  child = program(
    *(root, 'hung', '--config.run.step_timeout=4'), fault='hang@step:4'
  )
  _, err = child.communicate()
  assert child.returncode == 1
  assert 'error: step 3' in err or 'error: step 4' in err
  assert 'step_timeout=4 s' in err and 'faults.py' in err and 'Thread' in err


def test_row09_a_save_that_fails_is_an_incident_and_training_goes_on(
  root, fault
):
  fault('full@during_write:5,full@before_seal:10')
  assert train.run(micro(15), root / 'full')['step'] == 15
  text = incidents(root / 'full')
  assert text.count('could not be saved') == 2 and 'MiB are free' in text
  assert folders.steps(root / 'full/checkpoints')[-1] == 15
  fault('full@during_write:20')
  with pytest.raises(cli.Stopped, match='could not be saved'):
    train.run(micro(20), root / 'full')


def test_row09_rows_wait_for_a_full_disk(tmp_path, capsys):
  file = workdir.Rows(tmp_path / 'rows.jsonl')
  file.append({'step': 1})
  real, file._file = file._file, open('/dev/full', 'ab', buffering=0)
  file.append({'step': 2})
  file.append({'step': 3})
  output = capsys.readouterr().out
  assert output.count('WARNING') == 1 and 'ENOSPC' in output
  with pytest.raises(OSError, match='No space left'):
    file.close()
  file._file = real
  file.append({'step': 4})
  file.close()
  assert [row['step'] for row in workdir.rows(file._path)] == [1, 2, 3, 4]


def test_a_torn_last_row_is_dropped_and_the_others_stay(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
  workdir.rewind(path, 9)
  assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_row33_a_place_that_cannot_be_written_is_one_line(tmp_path):
  (tmp_path / 'file').write_text('')
  for place in (tmp_path / 'file/run', '/proc/run', '/dev/null'):
    with pytest.raises(ConfigError) as error:
      train.run(MICRO, place)
    assert str(place) in str(error.value) and '\n' not in str(error.value)


def test_row35_out_of_memory_says_what_takes_it_and_what_helps(
  root, monkeypatch
):
  def full(*_):
    raise jax.errors.JaxRuntimeError(
      'RESOURCE_EXHAUSTED: Out of memory allocating 8589934592 bytes'
    )

  monkeypatch.setattr(preparation, '_jitted', lambda _: (full, full, full))
  with pytest.raises(cli.Stopped) as error:
    train.run(micro(), root / 'memory')
  for words in ('GiB', 'micro_batch', 'remat', 'mesh.fsdp', '8589934592'):
    assert words in str(error.value)
  assert '\n' not in str(error.value)


# ------------------------------------------------------------------- strangers


@pytest.mark.parametrize('name', ['model.pt', 'model.pkl', 'model.npy'])
def test_row36_files_of_other_kinds_are_no_checkpoints(tmp_path, name):
  from experiments import opened

  # A pickle that makes a folder when it is loaded.
  content = f'cposix\nmkdir\n(V{tmp_path}/sprung\ntR.'.encode()
  (tmp_path / name).write_bytes(content)
  load = 'import pickle, sys; pickle.load(open(sys.argv[1], "rb"))'
  subprocess.run([sys.executable, '-c', load, tmp_path / name], check=True)
  (tmp_path / 'sprung').rmdir()  # so the trap does work
  with pytest.raises(ConfigError):
    opened.load_variables(tmp_path / name)
  folder = tmp_path / 'checkpoints/3'
  folder.mkdir(parents=True)
  for file in (name, 'commit_success.txt', 'seal.json', '_METADATA'):
    (folder / file).write_bytes(content)
  with pytest.raises(ConfigError):
    store.restore(folder.parent, {'w': jnp.zeros(3)}, allow_unsealed=True)
  assert not (tmp_path / 'sprung').exists()


def listening():
  """Ports on which this process listens."""
  sockets = set()
  for link in pathlib.Path('/proc/self/fd').iterdir():
    try:
      sockets |= set(re.findall(r'socket:\[(\d+)\]', os.readlink(link)))
    except OSError:
      pass
  lines = []
  for name in ('tcp', 'tcp6'):
    path = pathlib.Path('/proc/self/net') / name
    if path.exists():
      lines += path.read_text().splitlines()[1:]
  words = [line.split() for line in lines]
  return [w[1] for w in words if w[3] == '0A' and w[9] in sockets]


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_row41_a_run_listens_on_no_port(root, monkeypatch):
  import socket

  monkeypatch.setattr(train, '_finish', ending := Recorded(train._finish))
  train.run(micro(1), root / 'ports')
  assert ending.seen == [[]]
  with socket.socket() as server:
    server.bind(('127.0.0.1', 0))
    server.listen()
    assert len(listening()) == 1


class Recorded:
  """A function that notes who listens when it is called."""

  def __init__(self, function):
    self.function, self.seen = function, []

  def __call__(self, *args):
    self.seen.append(listening())
    return self.function(*args)


SECRETS = {
  'HF_TOKEN': 'hf_AbCdEfGhIjKlMnOpQrStUvWx',
  'WANDB_API_KEY': '0123456789abcdef0123456789abcdef01234567',
}


def test_row42_keys_are_in_no_file_and_no_line(root, monkeypatch, fault, capfd):
  for name, value in SECRETS.items():
    monkeypatch.setenv(name, value)
  fault('nan@step:1')
  train.run(micro(2), root / 'secrets')
  files = [p for p in (root / 'secrets').rglob('*') if p.is_file()]
  output = capfd.readouterr()
  content = [p.read_bytes() for p in files]
  content += [output.out.encode(), output.err.encode()]
  for value in SECRETS.values():
    assert not any(value.encode() in text for text in content)
    assert value not in workdir.redacted(f'refused: {value}!')
    with pytest.raises(ConfigError, match='looks like a key') as error:
      train.run(micro(source=f'/texts/{value}'), root / 'leak')
    assert value not in str(error.value)
  assert not (root / 'leak').exists()
  snapshot = '/hub/snapshots/0123456789abcdef0123456789abcdef01234568/a.json'
  assert workdir.redacted(snapshot) == snapshot


def test_row44_compiled_programs_are_private(root, tmp_path, monkeypatch):
  monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR', raising=False)
  train.run(micro(1), root / 'private')
  for path in (root / '.jax_cache', root / '.corpus', root / 'private'):
    assert path.stat().st_mode & 0o077 == 0
    assert path.stat().st_uid == os.getuid()
  cache = tmp_path / 'cache'
  cache.mkdir()
  cache.chmod(0o777)
  with pytest.raises(ConfigError, match='others can write'):
    runtime.keep_compilations(cache)
