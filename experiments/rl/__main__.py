"""Teaches a model by reinforcement: it is paid for right answers (GRPO).

  python -m experiments.rl --config=configs/r1_tiny.py --init=runs/cold \\
    --workdir=runs/rl

--init is the run or released model that begins: it must already answer some
questions right, or no group of answers has a spread and nothing is learned.
`config.rl` has the questions (`rl.task`), the rewards and the variant of the
loss. The loop is `experiments.train`'s with the policy's answers in the place
of a text (`rl.policy`): the same command again resumes, --replay=STEP compares.
rewards.jsonl has each answer's reward, groups.jsonl some answers in full.
"""

from __future__ import annotations

from absl import flags

from .. import cli, train
from ..serving import template


def define() -> None:
  """Defines the flags of training, and those of the rewards."""
  train.define()
  template.define()
  flags.DEFINE_bool(
    'allow_code', False, 'Run the programs that answers hold, for rl.rewards.'
  )


def main() -> None:
  """Runs the config of the flags."""
  from . import policy

  values = flags.FLAGS
  opened = policy.opened(template.own(), values.allow_code)
  train.begin(cli.config(), opened)


if __name__ == '__main__':
  cli.run(main, define)
