"""A run's checkpoints: what is there, whether it is whole, and out with it.

  python -m experiments.checkpoint ls DIR
  python -m experiments.checkpoint verify DIR [STEP ...]
  python -m experiments.checkpoint rm DIR STEP ... [--refused] [--force]

DIR is a run's folder, or its folder of checkpoints. `verify` reads every byte,
and ends with 1 where a step is not as it was sealed. `rm` leaves a run its last
whole step unless forced; --refused deletes what restarts had set aside.
"""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import shutil
import sys
import time

from experiments import workdir
from mla_moe.config import ConfigError


def main() -> None:
  """Does what the command line says."""
  parser = argparse.ArgumentParser(
    prog='python -m experiments.checkpoint', description=__doc__.split('\n')[0]
  )
  parser.add_argument('what', choices=('ls', 'verify', 'rm'))
  parser.add_argument('folder', metavar='DIR', type=pathlib.Path)
  parser.add_argument('steps', metavar='STEP', type=int, nargs='*')
  parser.add_argument('--refused', action='store_true', help='rm: these, too')
  parser.add_argument('--force', action='store_true', help='rm: the last one')
  args = parser.parse_args()
  try:
    folder = find(args.folder.expanduser())
    chosen = _chosen(folder, args.steps)
    if args.what == 'ls':
      ls(folder, chosen)
    elif args.what == 'verify':
      sys.exit(0 if verify(folder, chosen) else 1)
    else:
      rm(folder, args.steps, refused=args.refused, force=args.force)
  except (ConfigError, OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)


def find(folder: pathlib.Path) -> pathlib.Path:
  """The folder of checkpoints that a person means.

  Raises:
    ConfigError: there is none.
  """
  for path in (folder / 'checkpoints', folder):
    if path.is_dir():
      return path
  raise ConfigError(f'{folder}: is no folder')


def ls(folder: pathlib.Path, steps: list[int]) -> None:
  """A line for each step: seal, size, age, held-out score, versions."""
  from mla_moe.checkpoint import seal, store

  if not steps:
    print(f'{folder}: no checkpoints')
  for step in steps:
    path = folder / str(step)
    size = sum(f.stat().st_size for f in path.rglob('*') if f.is_file())
    line = f'{step:>10}  {size / 2**20:>10,.1f} MiB'
    try:
      sealed = seal.read(path)
    except store.Damaged as error:
      print(f'{line}  DAMAGED: {error}')
      continue
    if sealed is None:
      print(f'{line}  not sealed')
      continue
    when = time.localtime((path / seal.NAME).stat().st_mtime)
    score = sealed['facts'].get('bits_per_byte')
    versions = sealed['versions']
    print(
      f'{line}  sealed {time.strftime("%Y-%m-%d %H:%M", when)}'
      f'  bits_per_byte {"-" if score is None else f"{score:.4f}"}'
      f'  mla_moe {versions["mla_moe"]}, jax {versions["jax"]}'
    )
  refused = folder / 'refused'
  if refused.is_dir() and any(refused.iterdir()):
    names = ', '.join(sorted(path.name for path in refused.iterdir()))
    print(f'set aside: {names} in {refused}')


def verify(folder: pathlib.Path, steps: list[int]) -> bool:
  """Whether every one is as it was sealed; says so of each."""
  from mla_moe.checkpoint import store

  good = bool(steps)
  for step in steps:
    try:
      sealed = store.check(folder, step)
    except store.Damaged as error:
      print(f'{step}: DAMAGED. {error}')
      good = False
      continue
    if sealed is None:
      print(f'{step}: not sealed: nothing vouches for it')
      good = False
    else:
      print(f'{step}: whole ({len(sealed["files"])} files)')
  if not steps:
    print(f'{folder}: no checkpoints')
  return good


def rm(
  folder: pathlib.Path, steps: list[int], *, refused: bool, force: bool
) -> None:
  """Deletes steps, and what was set aside.

  Raises:
    ConfigError: nothing to delete, a run that writes to the folder, or no
      whole step would be left.
  """
  from mla_moe.checkpoint import store

  if not steps and not refused:
    raise ConfigError('rm: name the steps to delete, or --refused')
  run = folder.parent
  busy = (
    workdir.lock(run) if (run / 'lock').exists() else contextlib.nullcontext()
  )
  with busy:
    there = store.steps(folder)
    left = [step for step in there if step not in steps]
    if steps and not force and not any(_whole(folder, step) for step in left):
      raise ConfigError(
        'rm: no whole step would be left; --force deletes all the same'
      )
    for step in steps:
      store.remove(folder, step)
      print(f'{step}: deleted')
    place = folder / 'refused'
    if refused and place.is_dir():
      shutil.rmtree(place)
      print(f'{place}: deleted')


def _chosen(folder, named) -> list[int]:
  from mla_moe.checkpoint import store

  there = store.steps(folder)
  for step in named:
    if step not in there:
      raise ConfigError(f'{folder}: has no step {step}, only {there}')
  return named or there


def _whole(folder, step) -> bool:
  from mla_moe.checkpoint import store

  try:
    return store.check(folder, step) is not None
  except store.Damaged:
    return False


if __name__ == '__main__':
  main()
