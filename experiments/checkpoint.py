"""Lists, verifies and deletes a run's checkpoints.

  python -m experiments.checkpoint ls DIR
  python -m experiments.checkpoint verify DIR [STEP ...]
  python -m experiments.checkpoint rm DIR STEP ... [--refused] [--force]

DIR is a run's folder, or its folder of checkpoints, on a disk or in a bucket
(gs://). `verify` reads every byte, or has the service's checksums of a bucket,
and exits with 1 if a step differs from its seal. `rm` refuses a run that is
being written to, and to delete a run's last intact step without --force; with
--refused it deletes the damaged steps that restarts have moved out of the way.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import sys
import time
from typing import Any

from mla_moe.config import ConfigError

from . import cli, commands, workdir
from .checkpointing import bucket, lease, retention, storage


def main() -> None:
  """Runs the command; exits with 2 on bad input."""
  parser = argparse.ArgumentParser(
    prog=commands.typed('python -m experiments.checkpoint'),
    description=__doc__.split('\n')[0],
  )
  parser.add_argument('command', choices=('ls', 'verify', 'rm'))
  parser.add_argument('folder', metavar='DIR')
  parser.add_argument('steps', metavar='STEP', type=int, nargs='*')
  parser.add_argument('--refused', action='store_true', help='rm: also these')
  parser.add_argument('--force', action='store_true', help='rm: the last one')
  args = parser.parse_args()
  with cli.edge(), contextlib.ExitStack() as stack:
    try:
      folder = cli.run_folder('DIR', args.folder)
      if storage.is_bucket(folder):
        bucket.reach(folder)
        stack.enter_context(bucket.one_line(folder))
      folder = find(folder)
      chosen = _chosen(folder, args.steps)
      if args.command == 'ls':
        ls(folder, chosen)
      elif args.command == 'verify':
        sys.exit(0 if verify(folder, chosen) else 1)
      else:
        rm(folder, args.steps, refused=args.refused, force=args.force)
    except OSError as error:
      raise ConfigError(str(error)) from None


def find(folder: os.PathLike | str) -> Any:
  """Returns the folder of checkpoints of a run's folder, or `folder` itself.

  Raises:
    ConfigError: there is none.
  """
  for path in map(storage.path, (f'{folder}/checkpoints', folder)):
    if path.is_dir():
      return path
  raise ConfigError(f'{folder}: is no folder')


def ls(folder: pathlib.Path, steps: list[int]) -> None:
  """Prints a line for each step: size, seal, date, score and versions."""
  from .checkpointing import seal, store

  if not steps:
    print(f'{folder}: no checkpoints')
  for step in steps:
    path = folder / str(step)
    place = storage.of(path)
    line = f'{step:>10}  {place.size() / 2**20:>10,.1f} MiB'
    try:
      sealed = seal.read(path)
    except store.Damaged as error:
      print(f'{line}  DAMAGED: {error}')
      continue
    if sealed is None:
      print(f'{line}  not sealed')
      continue
    when = time.localtime(place.moment(seal.NAME))
    score = sealed['facts'].get('bits_per_byte')
    versions = sealed['versions']
    print(
      f'{line}  sealed {time.strftime("%Y-%m-%d %H:%M", when)}'
      f'  bits_per_byte {"-" if score is None else f"{score:.4f}"}'
      f'  mla_moe {versions["mla_moe"]}, jax {versions["jax"]}'
    )
  refused = folder / retention.REFUSED
  if refused.is_dir() and any(refused.iterdir()):
    names = ', '.join(sorted(path.name for path in refused.iterdir()))
    print(f'set aside: {names} in {refused}')


def verify(folder: pathlib.Path, steps: list[int]) -> bool:
  """Returns whether every step matches its seal; prints a line for each."""
  from .checkpointing import store

  intact = bool(steps)
  for step in steps:
    try:
      sealed = store.check(folder, step)
    except store.Damaged as error:
      print(f'{step}: DAMAGED. {error}')
      intact = False
      continue
    if sealed is None:
      print(f'{step}: not sealed, so its bytes cannot be checked')
      intact = False
    else:
      print(f'{step}: whole ({len(sealed["files"])} files)')
  if not steps:
    print(f'{folder}: no checkpoints')
  return intact


def rm(
  folder: pathlib.Path, steps: list[int], *, refused: bool, force: bool
) -> None:
  """Deletes steps, and with `refused` the damaged ones that were moved away.

  Raises:
    ConfigError: nothing to delete, a run that writes to the folder, or no
      intact step would be left.
  """
  from .checkpointing import folders

  if not steps and not refused:
    raise ConfigError('rm: name the steps to delete, or --refused')
  with _lock(folder):
    left = [step for step in folders.steps(folder) if step not in steps]
    if steps and not force and not any(_intact(folder, step) for step in left):
      raise ConfigError(
        'rm: no whole step would be left; --force deletes all the same'
      )
    for step in steps:
      retention.remove(folder, step)
      print(f'{step}: deleted')
    path = folder / retention.REFUSED
    if refused and path.is_dir():
      storage.of(path).delete()
      print(f'{path}: deleted')


def _lock(folder: Any) -> contextlib.AbstractContextManager:
  """Returns the lock of the run that the checkpoints belong to, if it has one.

  A run in a bucket gets one.
  """
  run = storage.path(folder).parent  # of '.', too
  if storage.is_bucket(run):
    return lease.Lock(os.fspath(run))
  return (
    workdir.lock(run) if (run / 'lock').exists() else contextlib.nullcontext()
  )


def _chosen(folder, steps) -> list[int]:
  """Returns `steps`, which must exist, or all where none is named."""
  from .checkpointing import folders

  present = folders.steps(folder)
  for step in steps:
    if step not in present:
      raise ConfigError(f'{folder}: has no step {step}, only {present}')
  return steps or present


def _intact(folder, step) -> bool:
  from .checkpointing import store

  try:
    return store.check(folder, step) is not None
  except store.Damaged:
    return False
  except ConfigError:  # a copy, of which the names and sizes are right
    return True


if __name__ == '__main__':
  main()
