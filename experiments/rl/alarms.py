"""Alarms of a reinforcement learning run, from the rows of its metrics.

The reward falls late; these numbers tell earlier that a run no longer learns,
or learns from wrong numbers. Questions whose answers are all right or
all wrong have no advantages. A policy without entropy draws the same answer G
times. An answer without an end was cut, so its reward is an accident. A k3
divergence between the rollout's probabilities and the trainer's means wrong
ratios. Errors of the grader take answers out of the mean.

An alarm is one line when it begins, and the next one only after it has ended.
The rows are its whole state: a run that resumes reads its earlier rows again.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable

FLAT, ROLLOUTS = 0.9, 20  # share of questions without spread, so many times
ENTROPY = 0.1  # of the first rollout's
ENDED = 0.5
MISMATCH = 1e-2  # k3, nats a token
ERRORS = 0.05


class Alarms:
  """The alarms that are on after the rows that `see` has got."""

  def __init__(self):
    self._on: set[str] = set()
    self._flat = 0  # rollouts without spread, up to the last row
    self._first = math.nan  # the first entropy

  @classmethod
  def after(cls, rows: Iterable[dict]) -> Alarms:
    """Returns the alarms of a run that has logged these rows."""
    alarms = cls()
    for row in rows:
      alarms.see(row)
    return alarms

  def see(self, row: dict) -> list[str]:
    """Returns a line for each alarm that begins with a row of metrics.jsonl.

    Shares are from 0 to 1. A number that the row lacks changes no alarm; one
    that is not finite is beyond its limit. A row with zero_right is a rollout.
    """
    lines = []
    for name, line in self._judge(row).items():
      if line and name not in self._on:
        lines.append(line)
      (self._on.add if line else self._on.discard)(name)
    return lines

  def _judge(self, row: dict) -> dict[str, str]:
    """Returns {alarm: its line, or '' for off} of the numbers in the row."""
    values = {name: _number(row, name) for name in row}
    values = {name: x for name, x in values.items() if x is not None}
    judged = {}
    is_taught = 'teacher_kl' in values  # by each token, whatever the rewards
    if not is_taught and {'zero_right', 'zero_wrong'} <= values.keys():
      judged['spread'] = self._spread(
        values['zero_right'], values['zero_wrong']
      )
    if 'entropy' in values:
      judged['entropy'] = self._entropy(values['entropy'])
    if 'ended' in values:
      x = values['ended']
      judged['ended'] = _unless(
        x >= ENDED,
        f'only {x:.0%} of the answers ended, below {ENDED:.0%}: raise max_new, '
        'or teach the model to end by fine-tuning first',
      )
    if 'mismatch_k3' in values:
      x = values['mismatch_k3']
      judged['mismatch'] = _unless(
        x <= MISMATCH,
        f'rollout and trainer differ by k3 = {x:.2g} nats a token, above '
        f'{MISMATCH:g}: the ratios are wrong; roll out in a finer dtype, or '
        'correct by rl.correct',
      )
    if 'grader_errors' in values:
      x = values['grader_errors']
      judged['grader'] = _unless(
        x <= ERRORS,
        f'the grader failed on {x:.0%} of the answers, above {ERRORS:.0%}: '
        'they teach nothing',
      )
    return judged

  def _spread(self, right: float, wrong: float) -> str:
    self._flat = 0 if right + wrong <= FLAT else self._flat + 1
    cause = 'nothing is left to learn'
    if not right >= wrong:
      cause = 'the base is too weak for these questions'
    return _unless(
      self._flat < ROLLOUTS,
      f'{ROLLOUTS} rollouts had no spread of rewards in more than {FLAT:.0%} '
      f'of their questions (now {right:.0%} all right, {wrong:.0%} all wrong): '
      f'{cause}',
    )

  def _entropy(self, entropy: float) -> str:
    if math.isnan(self._first) and math.isfinite(entropy):
      self._first = entropy
    return _unless(
      entropy >= ENTROPY * self._first,
      f'the entropy is {entropy:.2g} nats a token, below {ENTROPY:.0%} of its '
      f'start ({self._first:.2g}): the policy no longer explores',
    )


def _number(row: dict, name: str) -> float | None:
  value = row[name]
  is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
  return float(value) if is_number else None


def _unless(fine: bool, line: str) -> str:
  return '' if fine else line
