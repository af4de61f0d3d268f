"""Ablates a model: trains variants in pairs, and says which one is better.

  python -m experiments.ablate --name=moe --pairs=3 --workdir=runs/ablate-moe

--name is a file of configs/ablate, a folder of experiments/ideas, or a file of
one's own; --list lists them. Each arm is trained at each size from the same
seeds, to equal steps, tokens, training FLOPs or seconds (--equal). The same
command goes on where it stopped, and more --pairs are added to those that are
there. After each size the folder has report.html: curves, differences with
intervals, speed-ups, and a verdict in words. --table trains nothing and writes
the page of the runs that are finished, also while others are under way. --smoke
trains toys of the first size in a minute.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys

from mla_moe.config import ConfigError

from .. import cli, commands, runtime, workdir
from . import folder, reading
from . import plan as plans

_SMOKE = dict(pairs=2, points=3)


def flags(words: list[str]) -> argparse.Namespace:
  """Returns the values of the command line's flags.

  Raises:
    ConfigError: a number is too small.
  """
  parser = argparse.ArgumentParser(
    prog=commands.typed('python -m experiments.ablate'),
    description=commands.typed(__doc__),
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  add = parser.add_argument
  add('--name', default='', help='of the ablation, or its file')
  add(
    '--workdir', default='', help='runs/ablate-NAME (-smoke) if it is left out'
  )
  add('--pairs', type=int, default=3, help='seeds of each arm at each size')
  add('--seed', type=int, default=0, help='the first of the seeds')
  add('--equal', default='', help='steps, tokens, flops or seconds')
  add('--sizes', default='', help='some of the sizes, joined by commas')
  add('--arms', default='', help='some of the arms; the first is the reference')
  add('--steps', type=int, default=0, help="of the reference; 0: its config's")
  add('--seconds', type=float, default=0.0, help='budget of --equal=seconds')
  add(
    '--points', type=int, default=10, help='evaluations, and chunks, of a run'
  )
  add('--smoke', action='store_true', help='a toy size, two pairs')
  add('--table', action='store_true', help='train nothing')
  add('--list', action='store_true', help='list the ablations')
  args = parser.parse_args(words)
  if args.smoke:
    chosen = {word.partition('=')[0].lstrip('-') for word in words}
    vars(args).update({k: v for k, v in _SMOKE.items() if k not in chosen})
  if args.pairs < 2:
    raise ConfigError(
      f'--pairs={args.pairs}: one pair has no interval; give at least 2'
    )
  for name, least in (('seed', 0), ('steps', 0), ('points', 1), ('seconds', 0)):
    if getattr(args, name) < least:
      value = getattr(args, name)
      raise ConfigError(f'--{name}={value}: must be at least {least}')
  if not math.isfinite(args.seconds):
    raise ConfigError(f'--seconds={args.seconds}: must be a finite number')
  if args.seed + args.pairs > 2**31:
    raise ConfigError(
      f'--seed={args.seed}: the seed of the last of {args.pairs} pairs must be '
      'below 2**31'
    )
  return args


def main() -> None:
  """Runs the command line's ablation, and writes its page."""
  with cli.edge():
    args = flags(sys.argv[1:])
    if args.list:
      for name in reading.names():
        print(f'{name:14} {reading.read(name)[2].splitlines()[0]}')
      return
    if not args.name:
      raise ConfigError(f"--name='': give one of {', '.join(reading.names())}")
    plan = plans.make(
      args.name,
      sizes=args.sizes,
      arms=args.arms,
      equal=args.equal,
      steps=args.steps,
      seconds=args.seconds,
      points=args.points,
      seed=args.seed,
      smoke=args.smoke,
    )
    own = f'runs/ablate-{plan.name}{"-smoke" if args.smoke else ""}'
    path = cli.path('--workdir', args.workdir or own)
    lock = workdir.lock(path, folder.begun)
    with contextlib.nullcontext() if args.table else lock:
      try:
        run(path.resolve(), plan, args)
      except OSError as error:
        if error.errno not in workdir.DISK:
          raise
        raise cli.Stopped(workdir.trouble(path, error)) from error


def run(path, plan: plans.Plan, args: argparse.Namespace) -> None:
  """Trains the pairs that the folder lacks, unless --table; writes the page."""
  from . import outcome, report

  paid = finished(path, plan) if args.table else train(path, plan, args)
  comparisons = outcome.compared(
    folder.results(path), list(paid), plan.arms, plan.equal
  )
  show(plan, outcome.table(comparisons), outcome.HEAD)
  for line in outcome.clock(comparisons, plan.equal):
    print(line)
  if page := report.write(path, plan, paid):
    print(page)


def finished(path, plan: plans.Plan) -> dict:
  """Returns {size: recipes} of a folder's finished runs; writes nothing.

  Raises:
    ConfigError: there is none, or they are of another ablation.
  """
  sizes = {row['size'] for row in folder.results(path)}
  if not sizes:
    raise ConfigError(f'--table: {path} has no finished run')
  folder.merged(path, plan)
  speeds = folder.speeds(path)
  paid = {
    size: plans.paid(plan, size, speeds.get(size, {}))
    for size, recipes in plan.recipes.items()
    if size in sizes
    and (plan.equal != 'seconds' or set(recipes) <= set(speeds.get(size, {})))
  }
  if not paid:
    raise ConfigError(f'--table: {path} has no run of these sizes')
  return paid


def train(path, plan: plans.Plan, args: argparse.Namespace) -> dict:
  """Trains the pairs that the folder lacks; returns {size: recipes}.

  The page is written after each size.
  """
  import jax

  from ..training import starts
  from . import report, turns

  folder.bind(path, plan)
  if args.smoke:
    jax.config.update('jax_disable_most_optimizations', True)
  runtime.keep_memory()
  runtime.keep_compilations(path.parent / '.jax_cache')
  starts.record(path, len(folder.results(path)))
  paid, texts = {}, {}
  for size, recipes in plan.recipes.items():
    if paid:
      report.write(path, plan, paid)
    config = recipes[plan.arms[0]].config
    key = config.data, config.run.eval_batches
    if key not in texts:
      name = plans.of_text(config)
      known = folder.texts(path).get(name, '')
      texts[key] = turns.text(config, path.parent / '.corpus', known)
      folder.add_text(path, name, texts[key].fingerprint)
    seconds = folder.speeds(path).get(size, {})
    if plan.equal == 'seconds' and not set(recipes) <= set(seconds):
      seconds = turns.seconds_of_step(recipes, texts[key], seconds)
      folder.add_speeds(path, size, seconds)
    paid[size] = plans.paid(plan, size, seconds)
    for seed in range(plan.seed, plan.seed + args.pairs):
      turns.pair(path, size, paid[size], seed, plan.points, texts[key])
  return paid


def show(plan: plans.Plan, rows: list[tuple[str, ...]], head: tuple) -> None:
  """Prints the table of an ablation."""
  from rich import box
  from rich.console import Console
  from rich.table import Table

  title = f'{plan.name}: beside {plan.arms[0]}, at equal {plan.equal}'
  table = Table(*head, title=title, box=box.SIMPLE_HEAD)
  for row in rows:
    table.add_row(*row)
  Console(highlight=False, width=150).print(table)


if __name__ == '__main__':
  main()
