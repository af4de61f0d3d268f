"""A run by reinforcement, killed in every part of a step, is the same run."""

import os
import pathlib
import random
import signal

import children
import pytest

from experiments import faults, soak, workdir

CLOCKS = ('seconds', 'tokens_per_s', 'mfu', 'memory_mib')

# Where a start ends: in a call of a part, or at a point of the first save.
KILLS = [
  *[('draw', 1), ('draw', 2), ('draw', 3)],
  *[('grade', 1), ('grade', 2), ('take', 1), ('take', 4)],
  *['during_write', 'before_seal', 'after_seal'],
]
# One of each kind: in the second rollout, where grades are half written, in a
# rollout's second update, and with a step that is written and has no seal.
FEW = [('draw', 2), ('grade', 1), ('take', 2), 'before_seal']


@pytest.fixture(scope='module')
def start(tmp_path_factory):
  """Runs a child with a kill; returns its exit code and its last lines."""
  folder = tmp_path_factory.mktemp('killed')

  def run(name, steps, kill=('', 0), delay=0.0):
    rule = ''
    if isinstance(kill, str):
      rule, kill = f'kill@{kill}', ('', 0)
    script = pathlib.Path(__file__).parent / 'killed.py'
    words = [folder / name, steps, *kill, delay]
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
@pytest.mark.parametrize(
  'steps, kills',
  [(6, FEW), pytest.param(24, KILLS, marks=pytest.mark.by_hand)],
  ids=['few', 'ten'],
)
def test_row50_kills_change_no_bit(steps, kills, start):
  """Parameters, moments, metrics, rewards and samples are those of one start.

  The kills come in a random order, each at a random moment of its part. Two
  updates follow each rollout.
  """
  names = f'whole{steps}', f'killed{steps}'
  whole, killed = (start.folder / name for name in names)
  code, error = start(names[0], steps)
  assert code == 0, error
  dice = random.Random(0)
  for kill in dice.sample(kills, len(kills)):
    code, error = start(names[1], steps, kill, dice.uniform(0.0, 0.1))
    assert code == -signal.SIGKILL, (kill, code, error)
  code, error = start(names[1], steps)
  assert code == 0, error
  first, second = soak.outcome(whole), soak.outcome(killed)
  assert first['state'] == second['state'] and second['step'] == steps
  for name in ('metrics', 'load', 'fingerprints', 'groups', 'rewards'):
    assert rows(whole, name) == rows(killed, name), name
  numbers = [row for row in rows(whole, 'metrics') if 'reward' in row]
  assert len(numbers) == steps
  assert len({x['reward'] for x in numbers}) > steps // 4
  texts = [(folder / 'samples.txt').read_bytes() for folder in (whole, killed)]
  assert texts[0] == texts[1] and texts[0].count(b'--- step') >= steps // 4
