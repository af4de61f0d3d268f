"""Teaches a model by reinforcement: it is paid for right answers (GRPO).

  python -m experiments.rl --config=configs/r1_tiny.py --init=runs/cold \\
    --workdir=runs/rl

--init is the run or released model that begins: it must already answer some
questions right, or no group of answers has a spread and nothing is learned.
`config.rl` has the questions (`rl.task`), the rewards and the variant of the
loss. The loop is `experiments.train`'s with the policy's answers in the place
of a text (`rl.policy`): the same command again resumes, --replay=STEP compares.
rewards.jsonl has each answer's reward, groups.jsonl some answers in full.
--teacher=RUN,DIR names models that distil into the policy (`rl.teachers`), and
--teacher=maths=RUN,code=DIR those of a kind of question each.
"""

from __future__ import annotations

import dataclasses
import re

from absl import flags

from mla_moe.config import Config, ConfigError

from .. import cli, train
from ..serving import template


def define(
  values: flags.FlagValues = flags.FLAGS, words: list[str] | None = None
) -> None:
  """Defines the flags of training, and those of the rewards, in `values`."""
  train.define(values, words)
  template.define(values)
  own = dict(flag_values=values)
  text = 'Run the programs that answers hold, for rl.rewards.'
  flags.DEFINE_bool('allow_code', False, text, **own)
  text = "Runs or releases that distil, in rl.teachers' place."
  flags.DEFINE_list('teacher', [], text, **own)


def main() -> None:
  """Runs the config of the flags."""
  from . import policy

  values = flags.FLAGS
  opened = policy.opened(template.own(), values.allow_code)
  train.begin(taught(train.configured(), values.teacher), opened)


def taught(config: Config, names: list[str]) -> Config:
  """Returns the config with these teachers; they share its teachers' weight.

  Where it has none they have all of it, and rewards teach nothing. Those of a
  kind share the questions of their kind.

  Raises:
    ConfigError: only some names have a kind.
  """
  if not names:
    return config
  parts = [re.fullmatch(r'(?:(\w+)=)?(.*)', name) for name in names]
  kinds = [part[1] for part in parts]
  if None in kinds and any(kinds):
    raise ConfigError(
      f'--teacher={",".join(names)}: names a kind of questions for some alone; '
      'give each one a kind, as in --teacher=maths=runs/a,code=runs/b, or none'
    )
  total = sum(weight for _, weight, *_ in config.rl.teachers) or 1.0
  teachers = tuple(
    (part[2], total / kinds.count(kind), *([kind] if kind else []))
    for part, kind in zip(parts, kinds, strict=True)
  )
  return dataclasses.replace(
    config, rl=dataclasses.replace(config.rl, teachers=teachers)
  )


if __name__ == '__main__':
  cli.run(main, define)
