"""From nothing to a model that has learned a task by reinforcement.

  make r1        or        python -m experiments.r1 --workdir=runs/r1

Three steps, each a run in a folder of its own, as R1's first stages:

  cold.jsonl  questions of the task with right answers
  cold/       a model of 0.35 M parameters imitates them (`experiments.sft`)
              until it answers some questions right, as a cold start should
  rl/         it is paid for right answers, and learns the rest (`.rl`)

The same command resumes. --seed changes all three, --task is one of
`experiments.rl.tasks`, --variant one of `configs/r1_tiny.py`. The last lines
compare the cold start with the end, on questions that neither stage has seen.
"""

from __future__ import annotations

import argparse
import json
import pathlib

from mla_moe.config import Config, ConfigError

from . import cli, commands, train, workdir


def main() -> None:
  """Runs the stages that the command line asks for."""
  parser = argparse.ArgumentParser(
    prog=commands.typed('python -m experiments.r1'),
    description=commands.typed(__doc__),
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('--workdir', default='runs/r1')
  parser.add_argument('--task', default='sort8')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--cold', type=int, default=100, help='steps')
  parser.add_argument('--steps', type=int, default=150, help='by reinforcement')
  text = 'of configs/r1_tiny.py, for rl/'
  parser.add_argument('--variant', default='zero', help=text)
  args = parser.parse_args()
  with cli.edge():
    folder = cli.path('--workdir', args.workdir)
    run(folder, args.task, args.seed, args.cold, args.steps, args.variant)


def run(
  folder: pathlib.Path,
  task: str,
  seed: int,
  cold: int,
  steps: int,
  variant: str = 'zero',
) -> dict:
  """Runs the stages in `folder`; returns rewards before and after.

  After a signal it returns nothing.

  Raises:
    ConfigError: a task or variant that there is not, a number of steps below
      1, or a folder with another run.
  """
  from .rl import checks, policy
  from .training import example_source

  for name, value in (('cold', cold), ('steps', steps)):
    if value < 1:
      raise ConfigError(f'--{name}={value}: must be at least 1')
  items = examples(task, seed, cold)
  # An answer may be longer than the right one, and has an end token.
  longest = max(len(item.answer) for item in items) + 2
  text = max(len(x.text) for x in items)
  room = lambda answers: f'--config.data.seq_len={text + answers * longest}'
  seed_word = f'--config.run.seed={seed}'
  begin = _config(
    'cold', seed_word, room(1), f'--config.data.source={folder / "cold.jsonl"}',
    f'--config.run.steps={cold}', f'--config.run.save_every={cold}',
  )  # fmt: skip
  reinforced = _config(
    variant, seed_word, room(4), f'--config.rl.task={task}',
    f'--config.run.steps={steps}', f'--config.rl.max_new={longest}',
    '--config.rl.prompt=shared', '--config.data.micro_batch=32',
  )  # fmt: skip
  checks.check(reinforced)
  if reinforced.rl.teachers:
    raise ConfigError(
      f'--variant={variant}: has teachers; run it by experiments.rl, with '
      '--teacher=RUN'
    )
  folder.mkdir(parents=True, exist_ok=True, mode=0o700)
  write_examples(folder / 'cold.jsonl', items[: 64 * cold])
  print(f'Cold start: {cold} steps on {64 * cold:,} answers to {task}.')
  end = train.run(begin, folder / 'cold', open_source=example_source.opened())
  if end['step'] < cold:
    print('The cold start has not ended: the same command goes on with it.')
    return {}
  print(f'Reinforcement: {steps} steps.')
  options = train.Options(init=str(folder / 'cold'))
  end = train.run(reinforced, folder / 'rl', options, policy.opened())
  if end['step'] < steps:
    print('The reinforcement has not ended: the same command goes on with it.')
    return {}
  numbers = compared(folder / 'rl')
  print(
    'Sampled answers right: {first:.1%} at first, {last:.1%} at the end; '
    'held-out questions, greedily: {greedy_first:.1%}, then {greedy:.1%}.'
    ''.format(**numbers)
  )
  return numbers


def examples(task: str, seed: int, steps: int) -> list:
  """Returns training questions of a task, 64 for each step and at least 1024.

  Raises:
    ConfigError: a task that there is not.
  """
  from .rl import questions

  source = questions.source(task, seed)
  return [source.train(i) for i in range(max(64 * steps, 1024))]


def write_examples(file: pathlib.Path, items: list) -> None:
  """Writes the right answers to questions, unless the file has others.

  Raises:
    ConfigError: the file is that of another task, seed or cold start.
  """
  rows = (
    json.dumps({'prompt': item.text, 'completion': item.answer})
    for item in items
  )
  text = ''.join(f'{row}\n' for row in rows)
  if file.exists() and file.read_text(encoding='utf-8') != text:
    raise ConfigError(
      f'{file}: has examples of another --task, --seed or --cold; name another '
      'folder by --workdir'
    )
  workdir.write(file, text)


def compared(folder: pathlib.Path) -> dict:
  """Returns the mean reward of the first and last ten rollouts, and pass@1."""
  rows = workdir.rows(folder / 'metrics.jsonl')
  rewards = [row['reward'] for row in rows if 'reward' in row]
  greedy = [row['pass_at_1'] for row in rows if 'pass_at_1' in row]
  mean = lambda values: sum(values) / max(len(values), 1)
  return {
    'first': mean(rewards[:10]),
    'last': mean(rewards[-10:]),
    'greedy_first': greedy[0] if greedy else 0.0,
    'greedy': greedy[-1] if greedy else 0.0,
  }


def _config(variant: str, *words: str) -> Config:
  """Returns a variant of `configs/r1_tiny.py` with some fields changed."""
  return cli.config_of([f'--config=r1_tiny:{variant}', *words], cli.define)


if __name__ == '__main__':
  main()
