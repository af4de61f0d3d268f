"""One run for each combination of values, and a table of their results.

  python -m experiments.sweep --vary=optim.learning_rate=1e-3,3e-3 \\
    --vary=run.seed=0,1 --workdir=runs/sweep -- --config=configs/tiny.py:smoke

They run here one after the other. With words of experiments.launch before the
--, each run starts on other machines instead, its number appended to --name:

  python -m experiments.sweep --vary=run.seed=0,1 slurm --name=seeds \\
    --topology=h100:8 --storage=/shared/runs -- --config=configs/small.py \\
    --config.mesh.fsdp=8

--table only reads the runs in --workdir. A sweep that was stopped goes on from
there: finished runs are skipped, others resume.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import shlex
import subprocess
import sys

from rich import box
from rich.console import Console
from rich.table import Table

from mla_moe.config import ConfigError

from . import cli, commands, distributed, workdir
from .launch import __main__ as launcher
from .launch import preflight
from .launch.job import as_typed


def combinations(vary: list[str]) -> list[dict[str, str]]:
  """Returns the combinations of ['key=a,b', ...]; the last key turns fastest.

  Raises:
    ConfigError: a part is no key=value,value, or a key comes twice.
  """
  lists = {}
  for part in vary:
    key, equals, values = part.partition('=')
    key = key.removeprefix('config.')
    if not key or not equals or not values:
      raise ConfigError(f'--vary={part!r}: must be key=value,value,...')
    if key in lists:
      raise ConfigError(f'--vary={part!r}: {key} is there already')
    lists[key] = values.split(',')
  return [
    dict(zip(lists, values, strict=True))
    for values in itertools.product(*lists.values())
  ]


def name_of(values: dict[str, str]) -> str:
  """Returns the folder of a run: 'learning_rate=1e-3,seed=0'."""
  short = [f'{k.rpartition(".")[2]}={v}' for k, v in values.items()]
  return ','.join(short).replace('/', '_')


def overrides(values: dict[str, str]) -> list[str]:
  """Returns the flags that set the values."""
  return [f'--config.{key}={value}' for key, value in values.items()]


def run_here(
  path: str, runs: list[dict], train: list[str], dry_run: bool
) -> None:
  """Trains every run, one after the other; `train` are its other flags."""
  for i, values in enumerate(runs, start=1):
    folder = os.path.join(path, name_of(values))
    command = [*commands.program('train'), *train]
    command += [*overrides(values), f'--workdir={folder}']
    line = shlex.join(['python', *command[1:]])
    print(f'[{i}/{len(runs)}] {line}', flush=True)
    if not dry_run and subprocess.run(command).returncode:
      raise ConfigError(f'{folder}: the run failed; the sweep ends here')


def launch(
  runs: list[dict], words: list[str], train: list[str], dry_run: bool
) -> None:
  """Starts every run on other machines; `words` are experiments.launch's."""
  backend, action, first, _, force = launcher.parse(
    [words[0], 'up', *words[1:], '--', *train]
  )
  jobs = [
    dataclasses.replace(
      first,
      name=f'{first.name}-{i}',
      arguments=(*first.arguments, *overrides(values)),
    )
    for i, values in enumerate(runs)
  ]
  plans = [launcher.commands(backend, action, job) for job in jobs]
  module = launcher.BACKENDS[backend]
  faults = [preflight.findings(module, action, job) for job in jobs]
  launcher.refuse(list(dict.fromkeys(itertools.chain(*faults))), force)
  for lines in plans:
    if dry_run:
      print(as_typed(lines))
    else:
      launcher.execute(lines)


def results(path: str, runs: list[dict]) -> list[dict]:
  """Returns each run's values, and its last step, loss, bits and speed."""
  rows = []
  for values in runs:
    folder = distributed.records(os.path.join(path, name_of(values)), 0)
    logged = workdir.rows(folder / 'metrics.jsonl')
    row = dict(values)
    for key in ('step', 'main_loss', 'bits_per_byte', 'tokens_per_s'):
      column = [r[key] for r in logged if key in r]
      row[key] = column[-1] if column else None
    rows.append(row)
  return rows


def show(rows: list[dict]) -> None:
  """Prints the table, best run first: by held-out bits, else by loss."""
  last = float('inf')
  order = lambda row: (
    last if row['bits_per_byte'] is None else row['bits_per_byte'],
    last if row['main_loss'] is None else row['main_loss'],
  )
  table = Table(box=box.SIMPLE_HEAD)
  for key in rows[0]:
    table.add_column(key.rpartition('.')[2], justify='right')
  for row in sorted(rows, key=order):
    table.add_row(*map(_cell, row.values()))
  Console(highlight=False).print(table)


def _cell(value) -> str:
  if not isinstance(value, float):
    return '-' if value is None else str(value)
  return f'{value:,.0f}' if abs(value) >= 1000 else f'{value:.4g}'


def main() -> None:
  """Runs the command line's sweep, or prints its table."""
  words, train, launch_words = sys.argv[1:], [], []
  if '--' in words:
    end = words.index('--')
    words, train = words[:end], words[end + 1 :]
  backends = [i for i, word in enumerate(words) if word in launcher.BACKENDS]
  if backends:
    words, launch_words = words[: backends[0]], words[backends[0] :]
  parser = argparse.ArgumentParser(
    prog=commands.typed('python -m experiments.sweep'),
    description=commands.typed(__doc__),
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument('--vary', action='append', default=[], required=True)
  parser.add_argument('--workdir', default='runs/sweep')
  parser.add_argument('--dry-run', action='store_true')
  parser.add_argument('--table', action='store_true')
  args = parser.parse_args(words)
  with cli.edge():
    runs = combinations(args.vary)
    folder = str(cli.run_folder('--workdir', args.workdir))
    if launch_words and not args.table:
      launch(runs, launch_words, train, args.dry_run)
      return
    if not args.table:
      run_here(folder, runs, train, args.dry_run)
    if not args.dry_run:
      show(results(folder, runs))


if __name__ == '__main__':
  main()
