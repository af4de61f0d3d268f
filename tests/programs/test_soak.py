"""The soak sees what it is there to see."""

import json
import pathlib
import random
import subprocess
import sys

import jax.numpy as jnp
import pytest

from experiments import soak
from experiments.checkpointing import saving

pytestmark = pytest.mark.filterwarnings('default')  # Orbax's, which is called


def actor(wrong):
  """A training that ends at once; disturbed, it has `wrong` numbers."""

  def start(folder, path, steps, rule=''):
    path = pathlib.Path(path)
    disturbed = path.name != 'whole'
    shift = 1 if disturbed and wrong == 'state' else 0
    with saving.Writer(path / 'checkpoints', 1) as writer:
      writer.save(steps, {'w': jnp.arange(4.0) + shift}, {})
    shift = 1e-9 if disturbed and wrong == 'metrics' else 0.0
    for file in ('metrics', 'load', 'fingerprints'):
      row = {
        'step': steps,
        'loss': 1.0 + shift,
        'tokens_per_s': random.random(),
      }
      (path / f'{file}.jsonl').write_text(json.dumps(row) + '\n')
    (path / 'report.html').write_text('')
    code = 'exit(1)' if disturbed and wrong == 'code' else ''
    (folder / 'stderr.txt').write_text('')
    return subprocess.Popen([sys.executable, '-c', code])

  return start


@pytest.mark.parametrize('wrong', ['', 'state', 'metrics', 'code'])
def test_any_difference_fails_the_soak(tmp_path, monkeypatch, capsys, wrong):
  monkeypatch.setattr(soak, '_start', actor(wrong))
  monkeypatch.setattr(soak, '_DISASTERS', 0)
  assert soak.soak(tmp_path, 0.001, 10, 0) == (not wrong)
  output = capsys.readouterr().out
  words = {'': 'every bit', 'code': 'ended with 1'}
  assert words.get(wrong, 'differs from') in output


def test_damage_is_to_one_file_and_a_flip_is_one_bit(tmp_path):
  for name in 'abc':
    (tmp_path / name).write_bytes(bytes(range(100)))
  for damage, dice in (('flip', random.Random(0)), ('cut', random.Random(1))):
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    soak._damage(dice, damage, tmp_path)
    (path,) = [p for p in before if p.read_bytes() != before[p]]
    old, new = before[path], path.read_bytes()
    if damage == 'flip':
      assert (
        sum((a ^ b).bit_count() for a, b in zip(old, new, strict=True)) == 1
      )
    else:
      assert len(new) < len(old) and old.startswith(new)


def test_disasters_need_something_to_strike(tmp_path):
  for seed in range(50):
    name, rule, delay = soak._disaster(
      random.Random(seed), 60, tmp_path, late=False, alone=9.0
    )
    assert name not in ('flip', 'cut', 'lost seal', 'none') and bool(
      rule
    ) != bool(delay)
  disaster = soak._disaster(
    random.Random(0), 60, tmp_path, late=True, alone=9.0
  )
  assert disaster == ('none', '', 0.0)


def test_files_are_damaged_only_where_a_sealed_step_remains(tmp_path):
  """A full disk leaves steps without a seal: none to fall back to."""
  folder = tmp_path / 'checkpoints'
  with saving.Writer(folder, 3) as writer:
    for step in (5, 9):
      writer.save(step, {'w': jnp.arange(4.0)}, {})
  kinds = lambda: {
    soak._disaster(random.Random(seed), 60, tmp_path, False, 9.0)[0]
    for seed in range(20)
  }
  (folder / '5' / 'seal.json').unlink()
  assert kinds() == {'kill', 'kill at a point', 'term', 'full disk'}
