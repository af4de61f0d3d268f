"""A run's files: rows are strict JSON, errors one line, keys are redacted."""

import collections
import contextlib
import dataclasses
import errno
import fcntl
import json
import math
import os
import shutil

import numpy as np
import pytest

from experiments import checkpoint, faults, history, report, workdir
from experiments.checkpointing import folders, retention, saving, seal, store
from experiments.training import logs, samples
from mla_moe.config import ConfigError, DataConfig, freeze


def test_rows_are_strict_json_and_nan_comes_back(tmp_path):
  path = tmp_path / 'rows.jsonl'
  file = workdir.Rows(path)
  file.append({'step': 1, 'loss': math.nan, 'layers': [1.5, -math.inf]})
  file.append({'step': 2, 'loss': 0.5})
  file.close()
  first = '{"step": 1, "loss": null, "layers": [1.5, null]}\n'
  text = first + '{"step": 2, "loss": 0.5}\n'
  assert path.read_text() == text
  one, two = workdir.rows(path)
  assert math.isnan(one['loss']) and math.isnan(one['layers'][1])
  assert one['layers'][0] == 1.5 and two == {'step': 2, 'loss': 0.5}
  workdir.rewind(path, 1)
  assert path.read_text() == first
  path.write_text('{"step": 1, "loss": NaN}\n[3]\n')  # of an older version
  (old,) = workdir.rows(path)
  assert math.isnan(old['loss'])


def test_rows_are_on_the_disk_within_a_minute(tmp_path, monkeypatch):
  """Forced there by the first row after 60 seconds, and at the end."""
  now, synced = 0.0, []
  monkeypatch.setattr(workdir.time, 'monotonic', lambda: now)
  size = lambda _: synced.append((tmp_path / 'rows.jsonl').stat().st_size)
  monkeypatch.setattr(workdir.os, 'fsync', size)
  file = workdir.Rows(tmp_path / 'rows.jsonl')
  for now in (0.0, 30.0, 59.0, 61.0, 100.0, 121.5):  # noqa: B007 (the clock)
    file.append({'step': 1})
  file.close()
  row = len('{"step": 1}\n')
  assert synced == [4 * row, 6 * row, 6 * row]


@pytest.mark.parametrize('block', [1, 7, 2**20])
def test_rows_are_read_and_dropped_from_the_end(tmp_path, monkeypatch, block):
  """The end of a long file is all that is read."""
  path = tmp_path / 'rows.jsonl'
  lines = [f'{{"step": {i}, "x": [{"7, " * i}null]}}\n' for i in range(6)]
  path.write_text(''.join(lines) + '{"step": 6, "x"\n[1]\n\0\0')
  monkeypatch.setattr(workdir, '_BLOCK', block)
  last = list(workdir.backwards(path))
  ends = np.cumsum([len(line) for line in lines])
  assert [end for end, _ in last] == ends[::-1].tolist()
  assert [row['step'] for _, row in last] == [5, 4, 3, 2, 1, 0]
  assert math.isnan(last[0][1]['x'][5])
  for step in (5, 3, 3, -1):
    workdir.rewind(path, step)
    assert path.read_text() == ''.join(lines[: step + 1])
  path.write_text('{"step": 1}')  # whole, but for the end of its line
  workdir.rewind(path, 2)
  assert path.read_text() == '{"step": 1}\n'
  assert not list(workdir.backwards(tmp_path / 'none'))


def test_samples_are_cut_back_to_a_step(tmp_path):
  """At every step, after a kill at any byte, and with headings by the model."""
  path, until = tmp_path / samples.FILE, {0: b''}
  for step in (2, 4, 16):
    samples.append(path, step, [f'ask<<<\nsays\r\n--- step 1\n{step}', '2\n3'])
    until[step] = path.read_bytes()
  assert samples.last(path) == '16\n2\n3\n'
  assert until[16].count(b'\n--- step') == 5 and b'\n --- step 1\n' in until[2]
  for size in range(len(until[4]), len(until[16]) + 1):
    for step in (4, 2, 0):
      path.write_bytes(until[16][:size])
      samples.rewind(path, step)
      assert path.read_bytes() == until[step]
  path.write_bytes(until[16])
  samples.rewind(path, 16)
  assert path.read_bytes() == until[16]


def test_a_program_that_is_refused_leaves_nothing(tmp_path):
  """Neither in a folder of its own, nor in one that a person has made."""
  path = tmp_path / 'runs' / 'one'
  for _ in range(2):
    with pytest.raises(ConfigError, match='no'), workdir.claim(path, CONFIG):
      (path / 'huggingface').mkdir()
      (path / '.jax_cache').write_text('')
      raise ConfigError('no')
    assert not (tmp_path / 'runs').exists()
  path.mkdir(parents=True)
  (path / 'notes').write_text('mine')
  with pytest.raises(ConfigError), workdir.claim(path, CONFIG):
    raise ConfigError('no')
  assert [entry.name for entry in path.iterdir()] == ['notes']
  with pytest.raises(ConfigError), workdir.claim(path, CONFIG):
    (path / 'metrics.jsonl').write_text('{"step": 1}\n')
    raise ConfigError('a later step')
  names = {entry.name for entry in path.iterdir()}
  assert names == {'notes', 'lock', 'config.json', 'metrics.jsonl'}


def test_a_refused_start_leaves_the_config_of_the_run(tmp_path):
  """Whose harmless fields, paths among them, may be those of the new start."""
  path = tmp_path / 'run'
  with workdir.claim(path, CONFIG):
    (path / 'checkpoints').mkdir()
  before = (path / 'config.json').read_text()
  run = dataclasses.replace(CONFIG.run, steps=CONFIG.run.steps + 7)
  other = dataclasses.replace(CONFIG, run=run)
  with pytest.raises(ConfigError, match='no'), workdir.claim(path, other):
    assert workdir.read_config(path).run.steps == run.steps
    raise ConfigError('no')
  assert (path / 'config.json').read_text() == before
  with pytest.raises(ConfigError, match='later'), workdir.claim(path, other):
    (path / 'metrics.jsonl').write_text('{"step": 1}\n')
    raise ConfigError('later')
  assert workdir.read_config(path).run.steps == run.steps
  with workdir.claim(path, CONFIG):
    pass
  assert (path / 'config.json').read_text() == before


def test_a_long_file_is_read_at_even_distances(tmp_path):
  path = tmp_path / 'rows.jsonl'
  path.write_text(''.join(f'{{"step": {i}}}\n' for i in range(100)))
  steps = lambda *most: [row['step'] for row in workdir.rows(path, *most)]
  assert steps() == steps(100) == list(range(100))
  assert steps(99) == list(range(0, 100, 2))
  assert steps(7) == list(range(0, 100, 16))


def test_the_running_load_of_a_run_that_resumes_is_the_same(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(logs, '_tensorboard', lambda _: None)
  loads = np.random.default_rng(0).integers(0, 9, (130, 1, 4))

  def healths(start):
    file = logs.Logs(tmp_path, start)
    values = [
      file.health(i, load) for i, load in enumerate(loads[start:], start + 1)
    ]
    file.close()
    return values

  whole = healths(0)
  assert healths(115) == whole[115:]
  one, two = (loads[i].max() / loads[i].mean() for i in (0, 1))
  np.testing.assert_allclose(whole[0]['max_vio_running'], one - 1)
  mean = 0.95 * loads[0] + 0.05 * loads[1]
  right = mean.max() / mean.mean() - 1
  np.testing.assert_allclose(whole[1]['max_vio_running'], right)
  np.testing.assert_allclose(whole[1]['max_vio'], two - 1)


@pytest.mark.parametrize(
  'content', [b'\xff', b'[' * 100_000, b'[]', b'{"model": 3}', None]
)
def test_a_config_that_is_none_is_one_line(content, tmp_path):
  path = tmp_path / 'config.json'
  if content is None:
    path.symlink_to('/dev/zero')
  else:
    path.write_bytes(content)
  with pytest.raises(ConfigError, match=r'config\.(json|model)') as error:
    workdir.read_config(tmp_path)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  'name, value, is_key',
  [
    ('TOKENIZER', '/data/tok/tokenizer.json', False),
    ('TOKENIZERS_PARALLELISM', 'disabled', False),
    ('SSH_KEY_DIR', '/home/me/keys', False),
    ('SIGNING_KEY', __file__, False),
    ('MONKEYS', 'chimpanzee', False),
    ('MY_TOKEN', 'abcdefgh12', True),
    ('TOKEN', 'abcdefgh12', True),
    ('AWS_SECRET_ACCESS_KEY', '/ab+cdefgh12', True),
    ('DB_PASSWORD', 'a"b\\c"long', True),
  ],
)
def test_keys_are_known_by_whole_words(name, value, is_key, monkeypatch):
  monkeypatch.setenv(name, value)
  for text in (f'the {value} loss', json.dumps({'source': value})):
    assert ('[redacted]' in workdir.redacted(text)) == is_key


def test_a_key_with_a_quote_is_not_written(tmp_path, monkeypatch):
  monkeypatch.setenv('MY_SECRET', 'a"b\\c"long')
  source = DataConfig(source='x a"b\\c"long').source
  config = freeze({'data': {'source': source}})
  with pytest.raises(ConfigError, match='looks like a key'):
    with workdir.claim(tmp_path / 'run', config):
      pass
  assert not (tmp_path / 'run').exists()


def test_a_report_of_odd_files_is_one_line(tmp_path):
  pytest.importorskip('matplotlib')
  row = dict.fromkeys((*history._NUMBERS['loss'], 'step'), 1)
  odd = [
    ('metrics.jsonl', json.dumps(row | {'step': '<b>'}), 'logged step'),
    ('metrics.jsonl', '[1]\n', 'logged step'),
    ('config.json', '[' * 10**5, 'not JSON'),
    ('config.json', '{"model": 3}', 'no model'),
    ('config.json', '/dev/zero', 'regular'),
    ('metrics.jsonl', '/dev/zero', 'regular'),
  ]
  for i, (name, content, words) in enumerate(odd):
    folder = tmp_path / str(i)
    folder.mkdir()
    (folder / 'metrics.jsonl').write_text(json.dumps(row))
    path = folder / name
    path.unlink(missing_ok=True)
    if content.startswith('/'):
      path.symlink_to(content)
    else:
      path.write_text(content)
    with pytest.raises(ConfigError, match=words) as error:
      report.write(folder)
    assert '\n' not in str(error.value)


def test_a_torn_last_row_hides_no_later_one(tmp_path):
  path = tmp_path / 'rows.jsonl'
  for torn in ('', '{"step": 1}\n{"step": 2, "wh', '{"step": 1}\n' * 999 + '{'):
    path.write_text(torn)
    file = workdir.Rows(path)
    file.append({'step': 3})
    file.close()
    *first, last = workdir.rows(path)
    assert last == {'step': 3} and len(first) == torn.count('\n')


class Killed(BaseException):
  """The end of a process, wherever it is."""


class Process:
  """A process that trains in the folder: it holds the lock, or none."""

  def __init__(self, root):
    self.root, self.folder = root, root / 'checkpoints'
    self.stack = None

  def begin(self):
    """Claims the folder; returns the step that it goes on from."""
    stack = contextlib.ExitStack()
    stack.enter_context(workdir.claim(self.root, CONFIG))
    restored = read(self.folder, set_aside=retention.set_aside)
    self.step = restored.step if restored else 0
    workdir.rewind(self.root / 'rows.jsonl', self.step)
    self.rows = workdir.Rows(self.root / 'rows.jsonl')
    self.writer = saving.Writer(self.folder, 1, keep_best=1)
    self.stack = stack

  def save(self, score, steps):
    for step in range(self.step + 1, self.step + steps + 1):
      self.rows.append({'step': step})
    self.step += steps
    state = {'w': np.arange(8.0) + self.step}
    self.writer.save(self.step, state, {'bits_per_byte': score})
    self.writer.wait()

  def end(self):
    """Ends without a word: the kernel frees the lock."""
    self.writer._writing.shutdown()
    self.writer._sealing.shutdown()
    self.writer._orbax.wait_until_finished()
    self.writer._orbax.close()
    self.rows._file.close()
    self.stack.close()
    self.stack = None


CONFIG = freeze({})


def read(folder, **options):
  """Returns what `restore` does; the arrays are those of the step."""
  like = {'w': np.zeros(8)}
  restored = store.restore(folder, like, say=lambda _: None, **options)
  if restored:
    expected = np.arange(8.0) + restored.step
    np.testing.assert_array_equal(restored.state['w'], expected)
  return restored


def tear(process, draws):
  """Leaves the remains of a kill: a torn row, and a torn unsealed step."""
  with open(process.root / 'rows.jsonl', 'ab') as file:
    file.write(b'{"step": 7, "lo'[: draws.integers(16)])
  folder = process.folder / str(process.step)
  if folder.exists() and not (folder / seal.NAME).exists():
    files = sorted(p for p in folder.rglob('*') if p.is_file())
    for path in draws.permutation(files)[: draws.integers(len(files) + 1)]:
      path.unlink()


@pytest.mark.filterwarnings('default')  # of Orbax
def test_row46_a_random_walk_of_two_processes_loses_no_step(
  tmp_path, monkeypatch
):
  """They train, are killed, prune, delete and read in one folder."""
  draws = np.random.default_rng(0)
  both = [Process(tmp_path), Process(tmp_path)]
  folder = both[0].folder
  scores = {}  # of the steps that are whole, as the folder must have them

  def staying(scores):
    """The newest step and the best one; of equal ones the newer."""
    best = [(scores[s], -s) for s in scores if scores[s] in (1.0, 2.0)]
    numbers = {max(scores), *(-step for _, step in sorted(best)[:1])}
    return {step: scores[step] for step in sorted(numbers)}

  def strike(target, name, condition=lambda *_: True):
    """Kills the process at its next call of this function."""
    real = getattr(target, name)

    def killed(*args, **options):
      if condition(*args):
        monkeypatch.undo()
        raise Killed
      return real(*args, **options)

    monkeypatch.setattr(target, name, killed)

  ends = collections.Counter()
  for _ in range(36):
    process = both[draws.integers(2)]
    holder = next((p for p in both if p.stack), None)
    if holder is None:
      process.begin()
      assert process.step == max(scores, default=0)
      rows = workdir.rows(tmp_path / 'rows.jsonl')
      assert [row['step'] for row in rows] == [*range(1, process.step + 1)]
      ends['begins'] += 1
      continue
    if process is not holder:  # reads, or does what the lock forbids
      with pytest.raises(ConfigError, match='is writing to it'):
        process.begin()
      if scores:
        with pytest.raises(ConfigError, match='is writing to it'):
          checkpoint.rm(folder, [max(scores)], refused=False, force=True)
    score = [None, math.nan, 2.0, 1.0][draws.integers(4)]
    step = holder.step + (steps := int(draws.integers(1, 4)))
    point = draws.choice(['', '', *faults.POINTS[1:], 'prune', 'beside'])
    if point == 'beside':  # the reader has listed the steps before the save
      listed = folders.steps

      def stale(path, listed=listed, score=score, steps=steps, holder=holder):
        monkeypatch.undo()
        steps_before = listed(path)
        holder.save(score, steps)
        return steps_before

      monkeypatch.setattr(folders, 'steps', stale)
      restored = read(folder)
      assert restored is None or restored.step in (*scores, step)
      scores = staying(scores | {step: score})
    elif not point:
      holder.save(score, steps)
      scores = staying(scores | {step: score})
    else:
      if point == 'prune':
        strike(shutil, 'rmtree', lambda path, *_: 'removed' in str(path))
      else:
        strike(faults, 'reach', lambda name, _, point=point: name == point)
      try:
        holder.save(score, steps)
        monkeypatch.undo()  # nothing was to be deleted
        scores = staying(scores | {step: score})
      except Killed:
        ends[point] += 1
        if point in ('after_seal', 'prune'):
          scores |= {step: score}
        if point == 'prune':
          scores = {s: scores[s] for s in folders.steps(folder)}
          assert staying(scores) == staying(scores | {step: score})
        holder.end()
        tear(holder, draws)
    restored = read(folder)
    assert (restored.step if restored else 0) == max(scores, default=0)
    whole = [s for s in folders.steps(folder) if checkpoint._intact(folder, s)]
    assert whole == sorted(scores)
    if not any(p.stack for p in both) and len(scores) > 1:
      checkpoint.rm(folder, [min(scores)], refused=False, force=False)
      del scores[min(scores)]
  assert len(ends) == 6 and scores
  for process in both:
    if process.stack:
      process.end()


@pytest.mark.parametrize(
  'code', ['ENOSYS', 'ENOLCK', 'EOPNOTSUPP', 'EWOULDBLOCK']
)
def test_row32_a_file_system_without_locks_is_no_other_process(
  tmp_path, monkeypatch, code
):
  def refused(*_):
    number = getattr(errno, code)
    raise OSError(number, os.strerror(number))

  monkeypatch.setattr(fcntl, 'flock', refused)
  right = 'has no locks' if code != 'EWOULDBLOCK' else 'is writing to it'
  with (
    pytest.raises(ConfigError, match=right) as error,
    workdir.lock(tmp_path / 'run'),
  ):
    pass
  assert '\n' not in str(error.value)
