"""Saving under kills, full disks and vanished folders; the steps that stay.

The row numbers are those of the table in docs/reliability.md.
"""

import errno
import math
import os
import pathlib
import random
import shutil
import signal
import threading
import time

import children
import jax.numpy as jnp
import numpy as np
import pytest
from states import make, restored, save

from experiments import faults
from experiments.checkpointing import (
  folders,
  retention,
  saving,
  seal,
  storage,
  store,
)

# Warnings of third-party code that is called here are not ours to mend.
pytestmark = pytest.mark.filterwarnings('default')


HERE = pathlib.Path(__file__).parent


def saver(*words, fault=''):
  environment = dict(os.environ, MLA_MOE_FAULT=fault)
  return children.Child(HERE / 'saver.py', *words, env=environment)


def newest(folder):
  """Returns the step that a saver's folder restores; its bytes are right."""
  like = {'w': jnp.zeros(1 << 20, jnp.float32)}
  checkpoint = store.restore(folder, like, set_aside=retention.set_aside)
  if checkpoint is None:
    return 0
  step, state, _ = checkpoint
  np.testing.assert_array_equal(
    state['w'], step + np.arange(1 << 20, dtype=np.float32)
  )
  return step


def test_row01_killed_while_saving_the_last_sealed_step_is_whole(tmp_path):
  first = 1
  for seed in range(3):
    child = saver(tmp_path, first, 10**6)
    begun = [int(child.stdout.readline()) for _ in range(3)]
    time.sleep(random.Random(seed).uniform(0, 0.35))
    child.kill()
    begun += [int(line) for line in child.communicate()[0].split()]
    step = newest(tmp_path)
    # A save begins when the one before the last is sealed.
    assert step >= begun[-1] - 2
    first = step + 1
  with saving.Writer(tmp_path, 3) as writer:
    writer.save(
      first, {'w': first + jnp.arange(1 << 20, dtype=jnp.float32)}, {}
    )
  assert newest(tmp_path) == first
  # A kill after Orbax's mkdir leaves an empty folder, which is no step.
  numbers = [
    p for p in tmp_path.glob('[1-9]*') if p.is_dir() and [*p.iterdir()]
  ]
  assert len(numbers) == len(folders.steps(tmp_path)) == 3


def test_row01_killed_while_deleting_nothing_stays(tmp_path, monkeypatch):
  """The first file that rmtree deletes may be any of them."""
  state = {'w': jnp.ones(4)}
  with saving.Writer(tmp_path, 3) as writer:
    for step in (1, 2):
      writer.save(step, state, {})

  def killed(path):
    (path / '_CHECKPOINT_METADATA').unlink()
    raise KeyboardInterrupt

  with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
    patched.setattr(storage.shutil, 'rmtree', killed)
    retention.remove(tmp_path, 1)
  assert folders.steps(tmp_path) == [2]
  with saving.Writer(tmp_path, 3):
    assert [p.name for p in tmp_path.iterdir()] == ['2']


@pytest.mark.parametrize('point', ['before_write', 'during_write'])
def test_row02_killed_around_the_write(tmp_path, point):
  child = saver(tmp_path, 1, 9, fault=f'kill@{point}:3')
  child.communicate()
  assert child.returncode == -signal.SIGKILL
  assert newest(tmp_path) in (1, 2)  # 2 is hashed while 3 is written


def test_row02_killed_before_the_seal_a_step_does_not_count(tmp_path, capsys):
  child = saver(tmp_path, 1, 9, fault='kill@before_seal:3')
  child.communicate()
  assert child.returncode == -signal.SIGKILL
  assert folders.steps(tmp_path)[-1] == 3
  like = {'w': jnp.zeros(1 << 20, jnp.float32)}
  assert store.restore(tmp_path, like, allow_unsealed=True).step == 3
  assert newest(tmp_path) == 2
  said = capsys.readouterr().out
  assert 'CHECKPOINT 3 REFUSED' in said and '--allow_unsealed' in said


def test_row02_killed_in_the_very_first_save_a_run_begins_again(tmp_path):
  child = saver(tmp_path, 1, 9, fault='kill@before_seal:1')
  child.communicate()
  assert folders.steps(tmp_path) == [1]
  assert newest(tmp_path) == 0
  assert folders.steps(tmp_path) == [] and (tmp_path / 'refused/1-0').exists()


def test_a_slow_hash_delays_no_save_but_the_one_after_the_next(
  tmp_path, monkeypatch
):
  """Step 1 is hashed for as long as the test likes; 2 is saved beside it."""
  records, may_end, begun = seal.records, threading.Event(), []

  def slow(path, *words):
    begun.append(path.name)
    assert may_end.wait(60)
    return records(path, *words)

  monkeypatch.setattr(seal, 'records', slow)
  with saving.Writer(tmp_path, 9) as writer:
    writer.save(1, make(1), {})
    writer.save(2, make(2), {})
    writer._completion.result()
    assert folders.steps(tmp_path) == [1, 2] and begun in ([], ['1'])
    assert not [*tmp_path.rglob(seal.NAME)]
    third = threading.Thread(target=writer.save, args=(3, make(3), {}))
    third.start()
    third.join(0.1)
    assert third.is_alive() and folders.steps(tmp_path) == [1, 2]
    may_end.set()
    third.join()
  assert restored(tmp_path) == (3, '') and begun == ['1', '2', '3']


def test_row08_a_failed_seal_is_told_by_name_and_the_next_step_stands(
  tmp_path, monkeypatch
):
  monkeypatch.setenv(faults.VARIABLE, 'full@before_seal:1')
  with saving.Writer(tmp_path, 9) as writer:
    writer.save(1, make(1), {})
    writer.save(2, make(2), {})
    with pytest.raises(saving.NotSaved, match='/1: .*No space left') as error:
      writer.wait()
    assert error.value.step == 1
    writer.wait()
  assert restored(tmp_path) == (2, '')


def test_row08_a_failed_save_is_told_and_does_not_block_later_ones(
  tmp_path, monkeypatch
):
  with saving.Writer(tmp_path, 9) as writer:
    writer.save(1, make(1), {})
    monkeypatch.setenv(faults.VARIABLE, 'full@during_write:2')
    writer.save(2, make(2), {})
    with pytest.raises(saving.NotSaved, match='/2: .*No space left'):
      writer.save(3, make(3), {})
    monkeypatch.delenv(faults.VARIABLE)
    writer.save(2, make(2), {})
    writer.save(3, make(3), {})
  assert restored(tmp_path) == (3, '')


def test_row09_a_disk_that_takes_no_more_bytes(tmp_path):
  ran = children.run(HERE / 'limited.py', tmp_path / 'run')
  assert ran.returncode == 0, ran.stderr
  (line,) = ran.stdout.splitlines()
  assert f'{tmp_path}/run/2: could not be saved' in line
  assert 'MiB are free' in line


@pytest.mark.parametrize(
  'exit_by, code',
  [('exit', 3), pytest.param('raise', 1, marks=pytest.mark.slow)],
)
def test_row10_leaving_right_after_a_save_keeps_it(tmp_path, exit_by, code):
  child = saver(tmp_path, 1, 9, exit_by)
  child.communicate()
  assert child.returncode == code
  assert newest(tmp_path) == 1


def test_the_policy_keeps_the_newest_the_spaced_and_the_best(tmp_path):
  scores = {10: 3.0, 20: 1.0, 30: 2.0, 40: None, 50: 2.5}
  assert retention.retained(scores, 2) == {40, 50}
  assert retention.retained(scores, 1, keep_every=20) == {20, 40, 50}
  assert retention.retained(scores, 1, keep_best=2) == {20, 30, 50}
  scores |= {1: math.nan, 2: -math.inf}  # no number is no score
  assert retention.retained(scores, 1, keep_best=2) == {20, 30, 50}
  save(tmp_path, 5, 4, 3, keep=1, keep_every=4, keep_best=1)
  assert folders.steps(tmp_path) == [4, 5]  # 1 / 5 is the best score


def test_folders_are_private_and_clocks_do_not_order_steps(
  tmp_path, monkeypatch
):
  clock = iter(range(10**9, 0, -3600))
  monkeypatch.setattr(time, 'time', lambda: next(clock))
  save(tmp_path / 'run', 1, 2, 3, keep=2)
  monkeypatch.undo()
  os.utime(tmp_path / 'run/3', (0, 0))
  assert restored(tmp_path / 'run') == (3, '')
  for path in (tmp_path / 'run', tmp_path / 'run/3'):
    assert path.stat().st_mode & 0o077 == 0


def test_a_folder_that_vanishes_is_one_line(tmp_path):
  with saving.Writer(tmp_path / 'run', 9) as writer:
    shutil.rmtree(tmp_path / 'run')
    with pytest.raises(saving.NotSaved, match='the folder is gone') as error:
      writer.save(1, make(1), {})
  assert '\n' not in str(error.value)
  assert not (tmp_path / 'run').exists()


def test_a_step_that_cannot_be_deleted_fails_no_save(tmp_path, monkeypatch):
  """As on a mount that renames no large folder; it is tried again later."""
  state = {'w': jnp.arange(4.0)}
  real, refused = os.rename, [1, 2]

  def rename(source, target):
    if str(target).endswith('.removed') and refused:
      refused.pop()
      raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    real(source, target)

  monkeypatch.setattr(storage.os, 'rename', rename)
  steps = lambda: folders.steps(tmp_path)
  with saving.Writer(tmp_path, 1) as writer:
    for step in (1, 2, 3):
      writer.save(step, state, {})
    writer.wait()  # raises nothing: all were sealed
    lines = [line.replace(str(tmp_path), '') for line in writer.notices()]
    right = '/1: could not be deleted (Too many open files)'
    assert lines == [right, right] and not writer.notices()
    assert steps() == [1, 3]
    writer.save(4, state, {})
    writer.wait()
    assert steps() == [4] and not writer.notices()
  (tmp_path / '3.removed').mkdir()  # of a deletion that ended half-way
  with saving.Writer(tmp_path, 1) as writer:
    writer.save(5, state, {})
  assert sorted(os.listdir(tmp_path)) == ['5']


def test_the_deadline_of_a_save_grows_with_the_state():
  """50 MB a second of each process, and never less than 20 minutes."""

  class Leaf:
    nbytes = 188 * 10**9  # V2-Lite with AdamW

  assert saving.deadline([Leaf()]) == 3760
  assert saving.deadline({'w': np.zeros(4)}) == 1200
  orbax = saving.checkpointer('', 3760)
  assert orbax._async_manager._timeout_secs == 3760
  orbax.close()


def test_row08_a_save_that_cannot_begin_is_heard_by_all(tmp_path, monkeypatch):
  """Else a process's next step would answer for this one."""
  heard = []

  def agree(turn, text, answer):
    heard.append((turn, bool(text)))
    return answer([text])

  monkeypatch.setattr(saving.agreement, 'agree', agree)
  monkeypatch.setenv(faults.VARIABLE, 'full@before_write:1')
  with saving.Writer(tmp_path, 9) as writer:
    with pytest.raises(saving.NotSaved, match='/1: could not be saved'):
      writer.save(1, make(1), {})
    writer.save(2, make(2), {})
  (first, before), (second, after) = heard
  assert second == first + 1 and not before and after
  assert folders.steps(tmp_path) == [2]


def test_row08_a_failed_prune_fails_no_sealed_save(tmp_path, monkeypatch):
  def fails(*_):
    raise RuntimeError('away')

  monkeypatch.setattr(retention, 'prune', fails)
  with saving.Writer(tmp_path, 9) as writer:
    writer.save(1, make(1), {})
    writer.wait()
    assert 'could not be deleted (RuntimeError: away)' in writer.notices()[0]
  assert restored(tmp_path) == (1, '')
