"""A run by reinforcement that ends with SIGKILL in a named part of a step.

  python tests/programs/killed.py FOLDER STEPS PART CALL DELAY

PART is draw, grade or take (the update), or '' for a run that nothing disturbs.
The signal comes DELAY seconds after the part's CALL-th beginning in this
process, or at the part's end where that is earlier.
"""

import dataclasses
import os
import signal
import sys
import threading

from experiments import cli, train
from experiments.rl import grading, policy, rollouts
from experiments.training import steps

PARTS = {
  'draw': (rollouts, 'draw'),
  'grade': (grading.Grader, 'grade'),
  'take': (steps, 'take'),
}


def main(folder, count, part, call, delay):
  if part:
    owner, name = PARTS[part]
    setattr(owner, name, doomed(getattr(owner, name), int(call), float(delay)))
  words = {'steps': count, 'eval_every': count, 'save_every': 2, 'keep': 3}
  words |= {'sample_every': 2, 'check_every': 1}
  config = cli.config_of(
    [
      '--config=r1_tiny:v32,smoke',
      *(f'--config.run.{name}={value}' for name, value in words.items()),
    ],
    cli.define,
  )
  rl = dataclasses.replace(config.rl, rewards=(('variety', 1.0),))
  sizes = dict(layers=1, dense_layers=0, dim=32)
  model = dataclasses.replace(config.model, **sizes)
  config = dataclasses.replace(config, model=model, rl=rl)
  rewards = {'variety': lambda _, text: len({*text}) % 3}
  train.run(config, folder, open_source=policy.opened(rewards=rewards))


def doomed(function, call, delay):
  """Returns the function, in whose `call`-th call the process is killed."""
  calls = []

  def wrapped(*args, **options):
    calls.append(1)
    if len(calls) < call:
      return function(*args, **options)
    kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
    threading.Timer(delay, kill).start()
    function(*args, **options)
    kill()

  return wrapped


if __name__ == '__main__':
  main(*sys.argv[1:])
