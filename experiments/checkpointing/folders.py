"""A folder of checkpoints: its steps.

Each step is a folder named by its number. Orbax writes a commit file into it
when all arrays are on the disk, and a folder without that file is no step.
"""

from __future__ import annotations

import os

from . import storage

COMMIT = storage.COMMIT


def steps(folder: os.PathLike | str) -> list[int]:
  """Returns the committed steps, ascending; other names are ignored."""
  path = storage.path(folder)
  if not path.is_dir():
    return []
  return sorted(
    int(child.name)
    for child in path.iterdir()
    if is_step(child.name) and (child / COMMIT).is_file()
  )


def is_step(name: str) -> bool:
  """Whether a folder of this name is a step."""
  return name.isascii() and name.isdigit() and name == str(int(name))
