"""The grades of a run's answers in rewards.jsonl, before they are used.

Graders have clocks, so that a second judgement of an answer may differ from the
first. A run that was killed draws the same answers again, and reads here what
they were worth. A row belongs to its answers by a hash of their tokens. A row
that a disk or a person has damaged is as good as none: its answers are graded
anew, with a line that says so.
"""

from __future__ import annotations

import hashlib
import math
import pathlib
from collections.abc import Sequence

import numpy as np

from mla_moe.checked import is_number

from .. import workdir
from . import grading


class Record:
  """The rows of rewards.jsonl from step `number` on; close it after the run.

  Without `writes` the file stays as it is.
  """

  def __init__(self, file: pathlib.Path, number: int, writes: bool = True):
    self._draws: dict[int, dict] = {}
    for _, row in workdir.backwards(file):  # the last row of a draw counts
      if is_number(row.get('step')) and row['step'] >= number:
        if isinstance(row.get('rollout'), int):
          self._draws.setdefault(row['rollout'], row)
    self._rows = workdir.Rows(file) if writes else None

  def close(self) -> None:
    """Writes the rows that still wait for the disk, and closes the file."""
    if self._rows:
      self._rows.close()

  def find(
    self, number: int, draw: int, tokens: Sequence[np.ndarray]
  ) -> list[grading.Graded] | None:
    """Returns the grades of these answers, None where there are none.

    Args:
      number: of the step that asks, for the line about a row of no use.
      draw: the number of the draw, which is the row's `rollout`.
      tokens: the ids of each answer.
    """
    row = self._draws.get(draw)
    if row is None:
      return None
    cause = (
      'differ from those that rewards.jsonl has (another device or version?)'
    )
    if row.get('tokens') == _hash(tokens):
      grades = _grades(row.get('grades'))
      if grades and len(grades) == len(tokens):
        return grades
      cause = f'have a damaged row in rewards.jsonl (rollout {draw})'
    print(
      f'ATTENTION, step {number}: the answers {cause}; they are graded anew.'
    )
    return None

  def add(
    self,
    number: int,
    draw: int,
    tokens: Sequence[np.ndarray],
    grades: list[grading.Graded],
  ) -> None:
    """Writes the grades of a draw; the arguments are those of `find`."""
    key = _hash(tokens)
    row = {'step': number, 'rollout': draw, 'tokens': key, 'grades': grades}
    if self._rows:
      self._rows.append(row)
    self._draws[draw] = row


def _hash(tokens: Sequence[np.ndarray]) -> str:
  digest = hashlib.sha256()
  for ids in tokens:
    digest.update(np.append(len(ids), ids).astype('<i4').tobytes())
  return digest.hexdigest()[:32]


def _grades(rows: object) -> list[grading.Graded] | None:
  """Returns the grades in a row, None where one is of a wrong type."""
  grades = []
  for row in rows if isinstance(rows, list) else ():
    if not isinstance(row, (list, tuple)) or len(row) != 3:
      return None
    reward, parts, error = row
    if not is_number(reward) or not isinstance(error, str):
      return None
    if math.isfinite(reward) == bool(error):  # an error is NaN, and no other
      return None
    if not isinstance(parts, dict) or not all(map(is_number, parts.values())):
      return None
    grades.append(grading.Graded(reward, parts, error))
  return grades
