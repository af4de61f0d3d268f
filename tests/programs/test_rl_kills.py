"""A run by reinforcement, killed in every part of a step, is the same run."""

import os
import pathlib
import random
import signal

import children
import pytest

from experiments import faults, soak, workdir

STEPS = 24  # two updates a rollout
CLOCKS = ('seconds', 'tokens_per_s', 'mfu', 'memory_mib')

# Where a start ends: in a call of a part, or at a point of the first save.
KILLS = [
  *[('draw', 1), ('draw', 2), ('draw', 3)],
  *[('grade', 1), ('grade', 2), ('take', 1), ('take', 4)],
  *['during_write', 'before_seal', 'after_seal'],
]


@pytest.fixture(scope='module')
def start(tmp_path_factory):
  """Runs a child with a kill; returns its exit code and its last lines."""
  folder = tmp_path_factory.mktemp('killed')

  def run(name, kill=('', 0), delay=0.0):
    rule = ''
    if isinstance(kill, str):
      rule, kill = f'kill@{kill}', ('', 0)
    script = pathlib.Path(__file__).parent / 'killed.py'
    words = [folder / name, STEPS, *kill, delay]
    environment = os.environ | {faults.VARIABLE: rule}
    child = children.run(script, *words, env=environment, timeout=300)
    return child.returncode, child.stderr[-2000:]

  run.folder = folder
  return run


def rows(folder, name):
  return [
    {k: v for k, v in row.items() if k not in CLOCKS}
    for row in workdir.rows(folder / f'{name}.jsonl')
  ]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_row50_ten_kills_change_no_bit(start):
  """Parameters, moments, metrics, rewards and samples are those of one start.

  The kills come in a random order, each at a random moment of its part.
  """
  whole, killed = start.folder / 'whole', start.folder / 'killed'
  code, error = start('whole')
  assert code == 0, error
  dice = random.Random(0)
  for kill in dice.sample(KILLS, len(KILLS)):
    code, error = start('killed', kill, dice.uniform(0.0, 0.1))
    assert code == -signal.SIGKILL, (kill, code, error)
  code, error = start('killed')
  assert code == 0, error
  first, second = soak.outcome(whole), soak.outcome(killed)
  assert first['state'] == second['state'] and second['step'] == STEPS
  for name in ('metrics', 'load', 'fingerprints', 'groups', 'rewards'):
    assert rows(whole, name) == rows(killed, name), name
  numbers = [row for row in rows(whole, 'metrics') if 'reward' in row]
  assert len(numbers) == STEPS and len({x['reward'] for x in numbers}) > 6
  texts = [(folder / 'samples.txt').read_bytes() for folder in (whole, killed)]
  assert texts[0] == texts[1] and texts[0].count(b'--- step') >= 6
