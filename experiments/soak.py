"""Trains a tiny model through disaster after disaster, then checks every bit.

  python -m experiments.soak --minutes=3 [--store=gs] [--out=DIR] [--seed=0]

One run is undisturbed. Then, until the minutes are over, the same run starts
again and again, and every start has a disaster: SIGKILL at a random moment or
at a named point of a save, SIGTERM, a full disk, or damage to a file of its
checkpoint (a flipped bit, a missing end, no seal). With --store=gs the
disturbed runs lie in a bucket, which a server on this machine has (extra [ci]),
and more may befall a start: a lock that another machine left, or holds, and
this machine's copies gone. After six disasters a run may finish.
Then its parameters, optimizer, losses and loads must be those of the
undisturbed run, bit for bit, and the next run begins. The exit code is 1 at the
first difference, and the folder stays.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

from mla_moe.config import ConfigError

from . import cli, commands, faults, workdir
from .checkpointing import bucket as buckets
from .checkpointing import emulator, folders, lease, seal, storage

_BUCKET = 'soak'
_DISASTERS = 6  # of one run, before it may finish
_TIMED = ('tokens_per_s', 'mfu', 'memory_mib')
_POINTS = ('before_write', 'during_write', 'before_seal', 'after_seal')
_WORDS = 'the a of model expert token router latent cache learns sees'.split()


def main() -> None:
  """Soaks for the command line's minutes."""
  parser = argparse.ArgumentParser(
    prog=commands.typed('python -m experiments.soak'),
    description=__doc__.split('\n')[0],
  )
  parser.add_argument('--minutes', type=float, default=60.0)
  parser.add_argument('--steps', type=int, default=60)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--store', choices=('disk', 'gs'), default='disk')
  parser.add_argument('--out', default='', help='else a temporary folder')
  args = parser.parse_args()
  with cli.edge():
    if args.minutes <= 0 or args.steps < 10:
      raise ConfigError('--minutes must be above 0, --steps at least 10')
    folder = cli.path('--out', args.out or tempfile.mkdtemp(prefix='soak-'))
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder = folder.resolve()
    place, bucket = str(folder), contextlib.nullcontext()
    if args.store == 'gs':
      place, bucket = f'gs://{_BUCKET}/runs', emulator.served(_BUCKET)
    with bucket:
      good = soak(folder, args.minutes * 60, args.steps, args.seed, place)
    if good and not args.out:
      shutil.rmtree(folder)
    sys.exit(0 if good else 1)


def texts(folder: pathlib.Path) -> pathlib.Path:
  """Writes text that is the same everywhere; returns its folder."""
  folder.mkdir(parents=True, exist_ok=True)
  dice = random.Random(0)
  for i in range(60):
    words = ' '.join(dice.choices(_WORDS, k=200))
    (folder / f'{i:02}.txt').write_text(words, encoding='utf-8')
  return folder


class Disaster(NamedTuple):
  """A start's disaster: its name, and how it comes.

  `rule` is that of MLA_MOE_FAULT; `delay` seconds until SIGKILL, or 0. Damage
  to a file has neither: it is there before the start.
  """

  name: str
  rule: str = ''
  delay: float = 0.0


def soak(
  folder: pathlib.Path, seconds: float, steps: int, seed: int, place: str = ''
) -> bool:
  """Returns whether every disturbed run ended like the undisturbed one.

  Args:
    folder: of the undisturbed run, of texts, and of this machine's copies.
    seconds: until no further run begins.
    steps: of a run.
    seed: of the disasters.
    place: of the disturbed runs, maybe in a bucket; '' is `folder`.
  """
  dice, place = random.Random(seed), place or str(folder)
  texts(folder / 'texts')
  began = time.monotonic()
  if _wait(_start(folder, str(folder / 'whole'), steps)) != 0:
    print(f'The undisturbed run failed:\n{_stderr(folder)}')
    return False
  expected = outcome(folder / 'whole')
  alone = time.monotonic() - began
  print(f'Undisturbed: {steps} steps in {alone:.0f} s, compilation included.')
  disasters, runs, starts = collections.Counter(), 0, 0  # starts: of this run
  began = time.monotonic()
  while starts or not runs or time.monotonic() - began < seconds:
    path = f'{place}/run{runs}'
    late = starts == _DISASTERS or time.monotonic() - began >= seconds
    disaster = _disaster(dice, steps, path, late, alone)
    if disaster.name == 'another machine':
      shutil.rmtree(folder / 'home', ignore_errors=True)
    child = _start(folder, path, steps, disaster.rule)
    code = _wait(child, disaster.delay)
    disasters[disaster.name] += 1
    starts += 1
    if code not in _allowed(disaster.name):
      name, rule = disaster.name, disaster.rule
      print(f'{path}: {name} ({rule}) ended with {code}:\n{_stderr(folder)}')
      return False
    if disaster.name == 'live lock':
      (storage.path(path) / lease.NAME).unlink()
    if _at_end(path, steps):
      reached = outcome(_records(folder, path))
      wrong = [part for part in expected if reached[part] != expected[part]]
      if wrong:
        print(f'{path}: differs from {folder}/whole in {wrong}')
        return False
      runs, starts = runs + 1, 0
      storage.of(path).delete()
  counts = ', '.join(f'{n} x {name}' for name, n in sorted(disasters.items()))
  print(
    f'{disasters.total()} starts ({counts}); {runs} runs reached step {steps}, '
    'each equal to the undisturbed one in every bit of its state and every '
    'logged number.'
  )
  return True


def _records(folder: pathlib.Path, path: str) -> pathlib.Path:
  """Returns a run's folder, or a fresh copy of the records in the bucket."""
  if not storage.is_bucket(path):
    return pathlib.Path(path)
  copy = folder / 'copy'
  shutil.rmtree(copy, ignore_errors=True)
  buckets.opened(path, copy)
  return copy


def outcome(folder: pathlib.Path) -> dict:
  """Returns all that must be equal: the last seal's fingerprints, and the rows.

  Raises:
    ConfigError: the last checkpoint is not whole.
  """
  from .checkpointing import store  # orbax is slow to import

  checkpoints = workdir.checkpoints(folder)
  last = folders.steps(checkpoints)[-1]
  sealed = store.check(checkpoints, last)
  if sealed is None:
    raise ConfigError(f'{folder}: the last checkpoint has no seal')
  rows = {
    name: [
      {k: v for k, v in row.items() if k not in _TIMED}
      for row in workdir.rows(folder / f'{name}.jsonl')
    ]
    for name in ('metrics', 'load', 'fingerprints')
  }
  return {'state': sealed['fingerprints'], 'step': last, **rows}


def _disaster(
  dice: random.Random, steps: int, path: Any, late: bool, alone: float
) -> Disaster:
  """Returns a random disaster for the next start of the run in `path`.

  Args:
    dice: draws it.
    steps: of the run.
    path: place of the run. Damage to its files needs a sealed step to fall
      back to; damage and locks are made here.
    late: no disaster any more.
    alone: seconds of the undisturbed run.
  """
  checkpoints = storage.path(f'{path}/checkpoints')
  saved_steps = folders.steps(checkpoints)
  sealed = [
    step
    for step in saved_steps
    if (checkpoints / str(step) / seal.NAME).exists()
  ]
  names = ['kill', 'kill at a point', 'term', 'full disk']
  if len(sealed) > 1:
    names += ['flip', 'cut', 'lost seal']
  if storage.is_bucket(path):
    names += ['stale lock', 'live lock', 'another machine']
  name = 'none' if late else dice.choice(names)
  # A disaster of a step comes soon: a run should have several.
  first = (saved_steps or [0])[-1]
  step = min(first + dice.randrange(1, steps // 3), steps)
  save = min(first // 5 * 5 + dice.choice((5, 10)), steps)
  if name == 'kill':
    return Disaster(name, delay=dice.uniform(1, min(alone, 20.0)))
  if name in ('stale lock', 'live lock'):
    _lock(path, name)
  if name in ('flip', 'cut', 'lost seal'):
    _damage(dice, name, checkpoints / str(sealed[-1]))
    # Stopped soon after, so that an earlier step's run is repeated, too.
    return Disaster(name, f'term@step:{step}')
  rules = {
    'kill at a point': f'kill@{dice.choice(_POINTS)}:{save}',
    'term': f'term@step:{step}',
    'stale lock': f'term@step:{step}',
    'another machine': f'term@step:{step}',
    'full disk': f'full@{dice.choice(_POINTS[:3])}:{save},term@step:{step}',
  }
  return Disaster(name, rules.get(name, ''))


def _damage(dice: random.Random, name: str, folder: Any) -> None:
  """Flips a bit of a file of the step, cuts its end off, or takes its seal."""
  if name == 'lost seal':
    (folder / seal.NAME).unlink()
    return
  sizes = storage.of(folder).listed()
  path = folder / dice.choice(sorted(x for x in sizes if sizes[x][0]))
  content = bytearray(path.read_bytes())
  if name == 'flip':
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
  else:
    content = content[: dice.randrange(len(content))]
  path.write_bytes(bytes(content))


def _lock(path: str, name: str) -> None:
  """Writes the lock of a process of another machine."""
  stale = 0 if name == 'stale lock' else 3600
  holder = {'pid': 1, 'host': 'another', 'boot': 'another', 'stale': stale}
  storage.of(path).write(lease.NAME, json.dumps(holder))


def _allowed(name: str) -> tuple[int, ...]:
  """Returns the exit codes; a full disk is fatal at the last save only."""
  if name == 'live lock':
    return (2,)
  if name.startswith('kill'):
    return (0, -signal.SIGKILL)
  return (0, 1) if name == 'full disk' else (0,)


def _at_end(folder: str, steps: int) -> bool:
  """Returns whether the last step is sealed and the run ended after it."""
  path = storage.path(folder)
  if folders.steps(path / 'checkpoints')[-1:] != [steps]:
    return False
  ended = (path / 'report.html').exists()
  return ended and (path / f'checkpoints/{steps}/{seal.NAME}').exists()


def _start(folder, path, steps, rule='') -> subprocess.Popen:
  home = folder / 'home'  # of the copies of a run in a bucket
  environment = os.environ | {faults.VARIABLE: rule, 'HOME': str(home)}
  command = [
    *commands.program('train'),
    *('--config=tiny:micro', f'--workdir={path}'),
    f'--config.data.source={folder}/texts',
    f'--config.run.steps={steps}',
  ]
  # A file, for nobody reads along, and a full pipe stops its writer.
  with open(folder / 'stderr.txt', 'w', encoding='utf-8') as file:
    return subprocess.Popen(
      command,
      env=environment,
      stdout=subprocess.DEVNULL,
      stderr=file,
    )


def _stderr(folder: pathlib.Path) -> str:
  return (folder / 'stderr.txt').read_text(encoding='utf-8')


def _wait(child: subprocess.Popen, delay: float = 0.0) -> int:
  """Returns the exit code, after a SIGKILL in `delay` seconds if not 0."""
  try:
    return child.wait(delay or 600)
  except subprocess.TimeoutExpired:
    child.kill()
    return child.wait()


if __name__ == '__main__':
  main()
