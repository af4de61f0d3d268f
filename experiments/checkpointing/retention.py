"""The checkpoints to keep, and the ways in which a step leaves its folder.

`remove` deletes a step, `set_aside` moves it into `refused`, where a person can
still look at it. Both start with a rename, which is atomic: a process that is
killed half-way leaves no broken folder under a step's name. A bucket has no
rename but a copy of each object: there both begin by deleting the commit file
(`storage`).
"""

from __future__ import annotations

import math
import os

from . import folders, seal, storage

REFUSED = 'refused'


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
  paths = [folder / str(step) for step in sorted(doomed)]
  for path in paths + half_deleted(folder):
    try:
      storage.of(path).delete()
    except Exception as error:  # a bucket's are of many types
      text = getattr(error, 'strerror', None) or error
      lines.append(f'{path}: could not be deleted ({text})')
  return lines


def set_aside(folder: os.PathLike | str, step: int) -> os.PathLike:
  """Moves the step into `refused`, where nothing reads it; returns its path."""
  folder = storage.path(folder)
  place, refused = storage.of(folder / str(step)), storage.of(folder / REFUSED)
  place.retire()
  refused.make()
  number = 0
  while (target := refused.path / f'{step}-{number}').exists():
    number += 1
  place.move(target)
  return target


def remove(folder: os.PathLike | str, step: int) -> None:
  """Deletes a step; `clean` finishes the work if this process is killed."""
  storage.of(storage.path(folder) / str(step)).delete()


def half_deleted(folder: os.PathLike) -> list:
  """Returns the folders whose deletion was begun and has not ended."""
  paths = storage.of(folder).half_deleted()
  is_ours = lambda name: folders.is_step(name) or name == REFUSED
  return [path for path in paths if is_ours(path.stem)]


def clean(folder: os.PathLike) -> None:
  """Deletes the remains of a kill: uncommitted and half-deleted steps.

  A folder that Orbax did not write stays, even if its name is a number.
  """
  uncommitted = [
    path
    for path in (folder.iterdir() if folder.is_dir() else ())
    if folders.is_step(path.name)
    and (path / storage.BEGUN).exists()
    and not (path / folders.COMMIT).exists()
  ]
  for path in uncommitted + half_deleted(folder):
    storage.of(path).delete()
