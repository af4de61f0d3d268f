"""Trackers, wandb and trackio: a second home for the rows of metrics.jsonl.

  python -m experiments.train --track=trackio ...

Both are extras ([wandb], [trackio]), imported here only. WANDB_MODE=offline and
trackio's own default keep everything on this machine.
"""

from __future__ import annotations

import importlib
import pathlib
import re
import secrets

from mla_moe.config import ConfigError

from .. import workdir

TRACKERS = ('', 'wandb', 'trackio')


class Tracker:
  """A run at the tracker `name`, which resumes with the run in `folder`."""

  def __init__(self, name: str, folder: pathlib.Path, config: dict):
    self._library = library(name)
    more = {}
    if name == 'wandb':
      more = {'id': identity(folder), 'resume': 'allow', 'dir': str(folder)}
    self._run = self._library.init(
      project='mla_moe', name=folder.resolve().name, config=config, **more
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


def identity(folder: pathlib.Path) -> str:
  """Returns the tracker's id of the run in this folder, which is made once.

  It lies in the folder: runs of equal paths on two machines, or a run begun
  anew in the place of another, are different runs.
  """
  path = folder / 'tracker_id'
  text = path.read_text(encoding='utf-8').strip() if path.exists() else ''
  if not re.fullmatch('[0-9a-f]{16}', text):
    text = secrets.token_hex(8)
    workdir.write(path, text)
  return text
