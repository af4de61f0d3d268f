"""One run for each combination of values, and a table of what they reached.

  python -m experiments.sweep --vary=optim.learning_rate=1e-3,3e-3 \\
    --vary=run.seed=0,1 --workdir=runs/sweep -- --config=configs/tiny.py:smoke

Runs one after the other here; with a launcher's words before the --, each run
is started there instead, its number appended to --name:

  python -m experiments.sweep --vary=run.seed=0,1 slurm --name=seeds \\
    --topology=h100:8 --storage=/shared/runs -- --config=configs/small.py

--table only reads the runs in --workdir. A sweep that was cut short goes on
where it stopped: finished runs are skipped, others resume.
"""

from __future__ import annotations

import argparse
import itertools
import pathlib
import shlex
import subprocess
import sys

from rich import box
from rich.console import Console
from rich.table import Table

from experiments import cli, workdir
from experiments.launch import __main__ as launch
from mla_moe.config import ConfigError


def combinations(vary: list[str]) -> list[dict[str, str]]:
  """Every combination of ['key=a,b', ...], the last key turning fastest.

  Raises:
    ConfigError: a part that is no key=value,value, or a key given twice.
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
  """The folder of a run: 'learning_rate=1e-3,seed=0'."""
  short = [f'{k.rpartition(".")[2]}={v}' for k, v in values.items()]
  return ','.join(short).replace('/', '_')


def overrides(values: dict[str, str]) -> list[str]:
  """The flags that set the values."""
  return [f'--config.{key}={value}' for key, value in values.items()]


def run_here(path: pathlib.Path, runs, words: list[str], dry: bool) -> None:
  """Trains every run, one after the other."""
  for i, values in enumerate(runs, start=1):
    folder = path / name_of(values)
    command = [sys.executable, '-m', 'experiments.train', *words]
    command += [*overrides(values), f'--workdir={folder}']
    said = shlex.join(['python', *command[1:]])
    print(f'[{i}/{len(runs)}] {said}', flush=True)
    if not dry and subprocess.run(command).returncode:
      raise ConfigError(f'{folder}: the run failed; the sweep ends here')


def run_there(runs, words: list[str], train: list[str], dry: bool) -> None:
  """Starts every run through a launcher."""
  backend, action, first, _ = launch.parse(
    [words[0], 'up', *words[1:], '--', *train]
  )
  for i, values in enumerate(runs):
    arguments = (*first.arguments, *overrides(values))
    one = launch.renamed(first, f'{first.name}-{i}', arguments)
    for command in launch.commands(backend, action, one):
      if dry:
        print(command.shown())
      else:
        launch.execute(command)


def results(path: pathlib.Path, runs) -> list[dict]:
  """What each run has reached: its values, steps, loss, bits, speed."""
  rows = []
  for values in runs:
    found = workdir.rows(path / name_of(values) / 'metrics.jsonl')
    row = dict(values)
    for key in ('step', 'main_loss', 'bits_per_byte', 'tokens_per_s'):
      seen = [r[key] for r in found if key in r]
      row[key] = seen[-1] if seen else None
    rows.append(row)
  return rows


def show(rows: list[dict]) -> None:
  """The table, best run first: by held-out bits, else by loss."""
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
  """Runs or reads the sweep of the command line."""
  words, train = sys.argv[1:], []
  if '--' in words:
    at = words.index('--')
    words, train = words[:at], words[at + 1 :]
  there = next((i for i, w in enumerate(words) if w in launch.BACKENDS), None)
  far = [] if there is None else words[there:]
  parser = argparse.ArgumentParser(
    prog='python -m experiments.sweep',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument('--vary', action='append', default=[], required=True)
  parser.add_argument('--workdir', type=pathlib.Path, default='runs/sweep')
  parser.add_argument('--dry-run', action='store_true')
  parser.add_argument('--table', action='store_true')
  asked = parser.parse_args(words if there is None else words[:there])
  with cli.edge():
    runs = combinations(asked.vary)
    if far and not asked.table:
      run_there(runs, far, train, asked.dry_run)
      return
    if not asked.table:
      run_here(asked.workdir, runs, train, asked.dry_run)
    if not asked.dry_run:
      show(results(asked.workdir, runs))


if __name__ == '__main__':
  main()
