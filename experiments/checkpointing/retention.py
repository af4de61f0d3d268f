"""The checkpoints to keep, and the ways in which a step leaves its folder.

`remove` deletes a step, `set_aside` moves it into `refused`, where a person can
still look at it. Both start with a rename, which is atomic: a process that is
killed half-way leaves no broken folder under a step's name. A bucket has no
rename but a copy of each object: there both begin by deleting the commit file.
"""

from __future__ import annotations

import math
import os
import shutil
from typing import Any

from . import folders, seal, storage

_ORBAX = '_CHECKPOINT_METADATA'  # in every folder that Orbax has begun
_REFUSED = 'refused'
_REMOVED = '.removed'


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


def prune(
  folder: os.PathLike, policy: tuple[int, int, int], best: str
) -> list[str]:
  """Deletes old steps; returns lines about those that stay.

  Args:
    policy: the numbers of `retained`.
    best: the fact that is a step's score.
  """
  scores, lines = {}, []
  for step in folders.steps(folder):
    try:
      sealed = seal.read(folder / str(step))
    except seal.Damaged:
      continue
    if sealed is not None:
      scores[step] = sealed['facts'].get(best)
  doomed = scores.keys() - retained(scores, *policy)
  for step in sorted(doomed | half_removed(folder)):
    try:
      remove(folder, step)
    except Exception as error:  # a bucket's are of many types
      text = getattr(error, 'strerror', None) or error
      lines.append(f'{folder / str(step)}: could not be deleted ({text})')
  return lines


def set_aside(folder: os.PathLike | str, step: int) -> os.PathLike:
  """Moves the step into `refused`, where nothing reads it; returns its path."""
  folder = storage.path(folder)
  if storage.is_bucket(folder):
    (folder / str(step) / folders.COMMIT).unlink(missing_ok=True)
  refused = folder / _REFUSED
  refused.mkdir(exist_ok=True, **private(folder))
  number = 0
  while (target := refused / f'{step}-{number}').exists():
    number += 1
  _move(folder / str(step), target)
  return target


def remove(folder: os.PathLike | str, step: int) -> None:
  """Deletes a step; `clean` finishes the work if this process is killed."""
  path = storage.path(folder) / str(step)
  if storage.is_bucket(path):
    (path / folders.COMMIT).unlink(missing_ok=True)
    _delete(path)
    return
  doomed = path.with_suffix(_REMOVED)
  if doomed.exists():
    _delete(doomed)
  if path.exists():
    os.rename(path, doomed)
    _delete(doomed)


def half_removed(folder: os.PathLike) -> set[int]:
  """Returns the steps whose deletion was begun and has not ended."""
  if storage.is_bucket(folder):
    return set()
  names = (path.stem for path in folder.glob(f'*{_REMOVED}'))
  return {int(name) for name in names if folders.is_step(name)}


def clean(folder: os.PathLike) -> None:
  """Deletes the remains of a kill: uncommitted and half-deleted steps.

  A folder that Orbax did not write stays, even if its name is a number.
  """
  for path in folder.iterdir() if folder.is_dir() else ():
    name = path.name.removesuffix(_REMOVED)
    half_deleted = name != path.name
    uncommitted = (path / _ORBAX).exists() and not (
      path / folders.COMMIT
    ).exists()
    if folders.is_step(name) and (uncommitted or half_deleted):
      _delete(path)


def private(folder: os.PathLike | str) -> dict[str, int]:
  """Returns the mode of new folders as mkdir's option; a bucket has none."""
  return {} if storage.is_bucket(folder) else {'mode': 0o700}


def _delete(folder: Any) -> None:
  """Deletes a folder and all below; in a bucket, last what `clean` needs."""
  if not storage.is_bucket(folder):
    shutil.rmtree(folder)
    return
  for child in folder.iterdir():
    if child.name != _ORBAX:
      child.rmtree() if child.is_dir() else child.unlink(missing_ok=True)
  folder.rmtree()


def _move(folder: os.PathLike, target: os.PathLike) -> None:
  """Renames a folder; of a bucket, each object is copied by the service."""
  if not storage.is_bucket(folder):
    os.rename(folder, target)
    return
  whole, names = os.fspath(folder), storage.objects(folder)
  name, _, source = whole.removeprefix(storage.SCHEME).partition('/')
  place = os.fspath(target).removeprefix(f'{storage.SCHEME}{name}/')
  bucket = storage.client().bucket(name)
  for each in names:
    blob = bucket.blob(f'{source}/{each}')
    bucket.copy_blob(blob, bucket, f'{place}/{each}')
    blob.delete()
