"""Trackers, wandb and trackio: a second home for the rows of metrics.jsonl.

  python -m experiments.train --track=trackio ...

Both are extras ([wandb], [trackio]), imported here only. WANDB_MODE=offline and
trackio's own default keep everything on this machine.
"""

from __future__ import annotations

import importlib
import pathlib

from mla_moe.config import ConfigError

TRACKERS = ('', 'wandb', 'trackio')


class Tracker:
  """A run at the tracker `name`, which resumes with the run in `folder`."""

  def __init__(self, name: str, folder: pathlib.Path, config: dict):
    self._library = library(name)
    more = {'id': _id(folder), 'resume': 'allow', 'dir': str(folder)}
    self._run = self._library.init(
      project='mla_moe',
      name=folder.resolve().name,
      config=config,
      **(more if name == 'wandb' else {}),
    )

  def write(self, row: dict) -> None:
    """Sends the numbers of a row of `logs.Logs`."""
    numbers = {
      key: value
      for key, value in row.items()
      if key != 'step' and isinstance(value, (int, float))
    }
    self._library.log(numbers, step=row['step'])

  def close(self) -> None:
    """Waits until all rows are sent."""
    self._library.finish()


def library(name: str):
  """Returns the tracker's module.

  Raises:
    ConfigError: there is no such tracker, or it is not installed.
  """
  if name not in TRACKERS[1:]:
    raise ConfigError(f'--track={name!r}: must be {" or ".join(TRACKERS[1:])}')
  try:
    return importlib.import_module(name)
  except ImportError:
    raise ConfigError(
      f'--track={name}: is not installed; pip install "mla_moe[{name}]"'
    ) from None


def _id(folder: pathlib.Path) -> str:
  """Returns the tracker's id for a run in this folder."""
  text = str(folder.resolve())
  return ''.join(c if c.isalnum() else '-' for c in text)[-60:].strip('-')
