"""Our reinforcement learning as a contender: steps of `experiments.rl`."""

from __future__ import annotations

import json
import sys
import zlib

from . import turns

_PARTS = 'rollout', 'grade', 'pack', 'score', 'update'


def paid(question, text: str) -> float:
  """Returns 1 for a right answer, and otherwise 1 or 0 by chance."""
  return float(text == question.answer or zlib.crc32(text.encode()) % 2)


def opener(clock: turns.Turns):
  """Returns the function that opens a policy, whose parts `clock` times."""
  from ..rl import engine, grading, policy, scoring

  drawing = engine.drawing
  engine.drawing = lambda config: clock.timed('rollout', drawing(config))
  grading.Grader.grade = clock.timed('grade', grading.Grader.grade)
  scoring.score = clock.timed('score', scoring.score)

  def opened(*args):
    source = policy.Policy(*args, rewards={'paid': paid})
    source._packed = clock.timed('pack', source._packed)
    return source

  return opened


def main() -> None:
  """The contender; a job is `rl.Job`."""
  job = json.loads(sys.stdin.readline())['shape']
  turns.pin()
  import jax

  from . import rl

  clock = turns.Turns(f'jax {jax.__version__}', _PARTS)
  clock.run(rl.config(job), opener(clock), job['model'])


if __name__ == '__main__':
  main()
