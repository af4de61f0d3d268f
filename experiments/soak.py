"""Trains a tiny model through disaster after disaster, then checks every bit.

  python -m experiments.soak --minutes=3 [--out=DIR] [--seed=0]

First the run is made undisturbed. Then, until the minutes are over, the same
run is started again and again, and each start is struck by something: killed at
a random moment or at a named point of a save, stopped by SIGTERM, given a full
disk, or one of its files has a bit flipped or its end cut off while nobody
looks. After six disasters it is left to finish; then its parameters, optimizer,
losses and loads must be those of the undisturbed run, bit for bit, and another
one begins. The exit code is 1 at the first difference, and the folder is kept.
"""

from __future__ import annotations

import argparse
import collections
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from experiments import workdir
from mla_moe.checkpoint import faults
from mla_moe.config import ConfigError

_STRIKES = 6  # disasters of one run, before it is left to finish
_TIMED = ('tokens_per_s', 'mfu', 'memory_mib')
_POINTS = ('before_write', 'during_write', 'before_seal', 'after_seal')
_WORDS = 'the a of model expert token router latent cache learns sees'.split()


def main() -> None:
  """Runs the command line's minutes."""
  parser = argparse.ArgumentParser(
    prog='python -m experiments.soak', description=__doc__.split('\n')[0]
  )
  parser.add_argument('--minutes', type=float, default=60.0)
  parser.add_argument('--steps', type=int, default=60)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--out', type=pathlib.Path, help='kept, if given')
  args = parser.parse_args()
  if args.minutes <= 0 or args.steps < 10:
    print('error: --minutes must be above 0, --steps at least 10')
    sys.exit(2)
  folder = args.out or pathlib.Path(tempfile.mkdtemp(prefix='soak-'))
  folder.mkdir(parents=True, exist_ok=True, mode=0o700)
  good = soak(folder.resolve(), args.minutes * 60, args.steps, args.seed)
  if good and args.out is None:
    shutil.rmtree(folder)
  sys.exit(0 if good else 1)


def texts(folder: pathlib.Path) -> pathlib.Path:
  """Some text that is the same everywhere; returns its folder."""
  folder.mkdir(parents=True, exist_ok=True)
  dice = random.Random(0)
  for i in range(60):
    words = ' '.join(dice.choices(_WORDS, k=200))
    (folder / f'{i:02}.txt').write_text(words)
  return folder


def soak(folder: pathlib.Path, seconds: float, steps: int, seed: int) -> bool:
  """Whether every disturbed run ended like the undisturbed one."""
  dice = random.Random(seed)
  texts(folder / 'texts')
  began = time.monotonic()
  child = _start(folder, 'whole', steps)
  if _wait(child) != 0:
    print(f'The undisturbed run failed:\n{_said(folder)}')
    return False
  expected = outcome(folder / 'whole')
  alone = time.monotonic() - began
  print(f'Undisturbed: {steps} steps in {alone:.0f} s, compilation included.')
  struck, ended, here = collections.Counter(), 0, 0
  began = time.monotonic()
  while here or not ended or time.monotonic() - began < seconds:
    path = folder / f'run{ended}'
    late = here == _STRIKES or time.monotonic() - began >= seconds
    what, rule, delay = _disaster(dice, steps, path, late, alone)
    child = _start(folder, path.name, steps, rule)
    code = _wait(child, delay)
    struck[what] += 1
    here += 1
    if code not in _allowed(what):
      print(f'{path}: {what} ({rule}) ended with {code}:\n{_said(folder)}')
      return False
    if _at_end(path, steps):
      found = outcome(path)
      wrong = [part for part in expected if found[part] != expected[part]]
      if wrong:
        print(f'{path}: differs from {folder}/whole in {wrong}')
        return False
      ended, here = ended + 1, 0
      shutil.rmtree(path)
  told = ', '.join(f'{n} x {what}' for what, n in sorted(struck.items()))
  print(
    f'{sum(struck.values())} starts ({told}); {ended} runs reached step '
    f'{steps}, each equal to the undisturbed one in every bit of its state and '
    'every logged number.'
  )
  return True


def outcome(folder: pathlib.Path) -> dict:
  """All that must be equal: the last seal's fingerprints, and the rows.

  Raises:
    ConfigError: the last checkpoint is not whole.
  """
  from mla_moe.checkpoint import folders, store

  last = folders.steps(folder / 'checkpoints')[-1]
  sealed = store.check(folder / 'checkpoints', last)
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
  dice, steps: int, path: pathlib.Path, late: bool, alone: float
) -> tuple[str, str, float]:
  """(name, rule of MLA_MOE_FAULT, seconds until SIGKILL or 0) of a start.

  Damage to files is done here; it needs a sealed step to fall back to.
  """
  from mla_moe.checkpoint import folders, seal

  saved = folders.steps(path / 'checkpoints')
  sealed = [
    step
    for step in saved
    if (path / 'checkpoints' / str(step) / seal.NAME).exists()
  ]
  kinds = ['kill', 'kill at a point', 'term', 'full disk']
  if len(sealed) > 1:
    kinds += ['flip', 'cut']
  what = 'none' if late else dice.choice(kinds)
  # What strikes at a step strikes soon: a run should suffer several times.
  first = (saved or [0])[-1]
  step = min(first + dice.randrange(1, steps // 3), steps)
  save = min(first // 5 * 5 + dice.choice((5, 10)), steps)
  if what == 'kill':
    return what, '', dice.uniform(1, min(alone, 20.0))
  if what in ('flip', 'cut'):
    _damage(dice, what, path / 'checkpoints' / str(sealed[-1]))
    # Stopped soon after: the step that was taken instead is gone over again.
    return what, f'term@step:{step}', 0.0
  rules = {
    'kill at a point': f'kill@{dice.choice(_POINTS)}:{save}',
    'term': f'term@step:{step}',
    'full disk': f'full@{dice.choice(_POINTS[:3])}:{save},term@step:{step}',
  }
  return what, rules.get(what, ''), 0.0


def _damage(dice, what: str, folder: pathlib.Path) -> None:
  """A flipped bit, or a cut, in one file of the step."""
  files = [p for p in folder.rglob('*') if p.is_file() and p.stat().st_size]
  path = dice.choice(sorted(files))
  content = bytearray(path.read_bytes())
  if what == 'flip':
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
  else:
    content = content[: dice.randrange(len(content))]
  path.write_bytes(content)


def _allowed(what: str) -> tuple[int, ...]:
  """Exit codes; a full disk is only fatal at the last save."""
  if what.startswith('kill'):
    return (0, -signal.SIGKILL)
  return (0, 1) if what == 'full disk' else (0,)


def _at_end(folder: pathlib.Path, steps: int) -> bool:
  """Whether the last step is there, sealed, and the run was closed after it."""
  from mla_moe.checkpoint import folders, seal

  path = folder / 'checkpoints'
  if folders.steps(path)[-1:] != [steps]:
    return False
  done = (folder / 'report.html').exists()
  return done and (path / str(steps) / seal.NAME).exists()


def _start(folder, name, steps, rule='') -> subprocess.Popen:
  environment = dict(os.environ) | {faults.VARIABLE: rule}
  command = [
    *(sys.executable, '-m', 'experiments.train'),
    *('--config=configs/tiny.py:micro', f'--workdir={folder / name}'),
    f'--config.data.source={folder}/texts',
    f'--config.run.steps={steps}',
  ]
  # A file: nobody reads along, and a pipe that is full stops its writer.
  with open(folder / 'stderr.txt', 'w') as file:
    return subprocess.Popen(
      command,
      cwd=pathlib.Path(__file__).parent.parent,
      env=environment,
      stdout=subprocess.DEVNULL,
      stderr=file,
    )


def _said(folder: pathlib.Path) -> str:
  return (folder / 'stderr.txt').read_text()


def _wait(child: subprocess.Popen, delay: float = 0.0) -> int:
  """The exit code, after a SIGKILL in `delay` seconds if it is not 0."""
  try:
    return child.wait(delay or 600)
  except subprocess.TimeoutExpired:
    child.kill()
    return child.wait()


if __name__ == '__main__':
  main()
