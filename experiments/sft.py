"""Fine-tunes a model on examples: prompts, and the answers to learn.

  python -m experiments.sft --config=configs/sft.py:tiny --data=FILE.jsonl \\
    --init=runs/tiny --workdir=DIR

A row of FILE.jsonl is {"prompt": TEXT, "completion": TEXT}, or {"messages":
[{"role": "user", "content": TEXT}, {"role": "assistant", ...}, ...]}, to which
the model's own chat template is applied. Only completions, and the end token
after each, are learned. --init is a run's folder or a released model's.

The loop is `experiments.train`'s with examples in the place of a text
(`training.example_source`): the same command again resumes, --replay=STEP
compares, and the folder holds the same files.
"""

from __future__ import annotations

from absl import flags

from . import cli, train
from .serving import template


def define(
  values: flags.FlagValues = flags.FLAGS, words: list[str] | None = None
) -> None:
  """Defines the flags of training, and those of the examples, in `values`."""
  train.define(values, words)
  template.define(values)
  text = 'The examples, *.jsonl: config.data.source.'
  cli.define_path('data', '', text, values)


def main() -> None:
  """Runs the config of the flags on the examples of the flags."""
  from .training import example_source

  values = flags.FLAGS
  if values.data:
    values.config.data.source = values.data
  train.begin(train.configured(), example_source.opened(template.own()))


if __name__ == '__main__':
  cli.run(main, define)
