"""Reports of reinforcement learning: alarms, charts, and the viewer's safety.

The rows are as a run writes them; no model is trained here.
"""

import math

import pytest

from experiments.rl import alarms

FINE = {'step': 1, 'zero_right': 0.2, 'zero_wrong': 0.3, 'entropy': 2.0}
FINE |= {'ended': 0.9, 'mismatch_k3': 1e-6, 'grader_errors': 0.0}


def lines(rows):
  """The alarms that each row begins."""
  seen = alarms.Alarms()
  return [seen.see(row) for row in rows]


@pytest.mark.parametrize(
  'change, words',
  [
    ({'entropy': 0.19}, 'entropy is 0.19'),
    ({'ended': 0.49}, '49% of the answers ended'),
    ({'mismatch_k3': 0.011}, 'k3 = 0.011'),
    ({'mismatch_k3': math.nan}, 'k3 = nan'),
    ({'grader_errors': 0.06}, 'failed on 6%'),
  ],
)
def test_an_alarm_is_one_line_until_it_has_ended(change, words):
  bad = FINE | change
  assert not any(lines([FINE, FINE]))
  got = lines([FINE, bad, bad, {'step': 2, 'pass_at_1': 0.5}, FINE, bad])
  assert [len(x) for x in got] == [0, 1, 0, 0, 0, 1]
  assert words in got[1][0] and got[1] == got[5]
  for name in change:  # the limit itself is no alarm
    limit = {'entropy': 0.2, 'ended': 0.5, 'mismatch_k3': 0.01}
    edge = FINE | {name: limit.get(name, 0.05)}
    assert not any(lines([FINE, edge]))


@pytest.mark.parametrize(
  'right, wrong, cause', [(0.9, 0.05, 'left to learn'), (0, 1, 'too weak')]
)
def test_twenty_rollouts_without_spread_are_an_alarm(right, wrong, cause):
  flat = FINE | {'zero_right': right, 'zero_wrong': wrong}
  got = lines([flat] * 19 + [FINE] + [flat] * 21)
  assert [i for i, x in enumerate(got) if x] == [39]
  assert cause in got[39][0]


def test_alarms_resume_from_the_rows_alone():
  flat = FINE | {'zero_right': 1.0, 'zero_wrong': 0.0, 'ended': 0.1}
  rows = [FINE] + [flat] * 22 + [FINE | {'entropy': 0.1}, {'loss': None}] * 2
  whole = lines(rows)
  assert sum(map(len, whole)) == 3
  for cut in range(len(rows)):
    resumed = alarms.Alarms.after(rows[:cut])
    assert [resumed.see(row) for row in rows[cut:]] == whole[cut:]
