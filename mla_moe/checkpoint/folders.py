"""A folder of checkpoints: its steps, the ones to keep, and how a step leaves.

Each step is a folder named by its number. Orbax writes a commit file into it
when all arrays are on the disk, and a folder without that file is no step. A
step leaves in one of two ways: `remove` deletes it, `set_aside` moves it into
`refused`, where a person can still look at it. Both start with a rename, which
is atomic: a process that is killed half-way leaves no broken folder under a
step's name. A bucket has no rename but a copy of each object: there both begin
by deleting the commit file.
"""

from __future__ import annotations

import math
import os

from mla_moe.checkpoint import storage

COMMIT = 'commit_success.txt'  # Orbax's name for it
_ORBAX = '_CHECKPOINT_METADATA'  # in every folder that Orbax has begun
_REFUSED = 'refused'
_REMOVED = '.removed'


def steps(folder: os.PathLike | str) -> list[int]:
  """Returns the committed steps, ascending; other names are ignored."""
  path = storage.path(folder)
  if not path.is_dir():
    return []
  return sorted(
    int(child.name)
    for child in path.iterdir()
    if _is_step(child.name) and (child / COMMIT).is_file()
  )


def retained(
  scores: dict[int, float | None],
  keep: int,
  keep_every: int = 0,
  keep_best: int = 0,
) -> set[int]:
  """Returns the steps to keep.

  Args:
    scores: all steps with their scores, lower is better; a step without a score
      has None, and NaN or infinity count as none.
    keep: number of newest steps.
    keep_every: every step that it divides is kept; 0 for none.
    keep_best: number of steps with the lowest scores; of equal scores the
      newest.
  """
  newest = sorted(scores)[-keep:]
  spaced = [step for step in scores if keep_every and step % keep_every == 0]
  scored = [
    step
    for step, score in scores.items()
    if score is not None and math.isfinite(score)
  ]
  ranked = sorted(scored, key=lambda step: (scores[step], -step))[:keep_best]
  return {*newest, *spaced, *ranked}


def set_aside(folder: os.PathLike | str, step: int) -> os.PathLike:
  """Moves the step into `refused`, where nothing reads it; returns its path."""
  folder = storage.path(folder)
  if storage.is_bucket(folder):
    (folder / str(step) / COMMIT).unlink(missing_ok=True)
  refused = folder / _REFUSED
  refused.mkdir(exist_ok=True, **storage.private(folder))
  number = 0
  while (target := refused / f'{step}-{number}').exists():
    number += 1
  storage.move(folder / str(step), target)
  return target


def remove(folder: os.PathLike | str, step: int) -> None:
  """Deletes a step; `clean` finishes the work if this process is killed."""
  path = storage.path(folder) / str(step)
  if storage.is_bucket(path):
    (path / COMMIT).unlink(missing_ok=True)
    storage.delete(path)
    return
  doomed = path.with_suffix(_REMOVED)
  if doomed.exists():
    storage.delete(doomed)
  if path.exists():
    os.rename(path, doomed)
    storage.delete(doomed)


def half_removed(folder: os.PathLike) -> set[int]:
  """Returns the steps whose deletion was begun and has not ended."""
  if storage.is_bucket(folder):
    return set()
  names = (path.stem for path in folder.glob(f'*{_REMOVED}'))
  return {int(name) for name in names if _is_step(name)}


def clean(folder: os.PathLike) -> None:
  """Deletes the remains of a kill: uncommitted and half-deleted steps.

  A folder that Orbax did not write stays, even if its name is a number.
  """
  for path in folder.iterdir() if folder.is_dir() else ():
    name = path.name.removesuffix(_REMOVED)
    half_deleted = name != path.name
    uncommitted = (path / _ORBAX).exists() and not (path / COMMIT).exists()
    if _is_step(name) and (uncommitted or half_deleted):
      storage.delete(path)


def _is_step(name: str) -> bool:
  return name.isascii() and name.isdigit() and name == str(int(name))
