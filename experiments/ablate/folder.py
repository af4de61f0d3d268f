"""The folder of an ablation: its plan, its results, and runs under way.

  ablation.json   the plan; another ablation is refused
  speeds.json     seconds of a step, of a budget in seconds
  results.jsonl   a row for each finished run, with its curve
  starts.jsonl    dates, versions and devices
  running/        the state of each run that is under way
  report.html     the page

A chunk ends with the state in a file that replaces the one before, so a kill
loses the chunk that was computed and nothing else. A run's row is written
before its state goes: a kill between the two leaves a state that no one needs.
"""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

import jax
from flax import serialization

from mla_moe import files
from mla_moe.config import ConfigError

from .. import workdir
from . import plan as plans

RESULTS = 'results.jsonl'


def bind(path: pathlib.Path, plan: plans.Plan) -> None:
  """Writes the plan into its folder; refuses that of another ablation.

  Sizes and arms that the folder lacks are added to it.

  Raises:
    ConfigError: names the first value that differs.
  """
  ours = json.loads(json.dumps(plans.described(plan)))
  file = path / 'ablation.json'
  if file.exists():
    theirs = _read(file)
    for name in ('steps', 'configs'):  # which a folder may have more of
      ours[name] = {**theirs.get(name, {}), **ours[name]}
      theirs[name] = {**ours[name], **theirs.get(name, {})}
    difference = next(_differences(ours, theirs, ''), '')
    if difference:
      raise ConfigError(
        f'workdir={str(path)!r}: holds another ablation ({difference}); name '
        'another --workdir'
      )
  workdir.write(file, json.dumps(ours, indent=1))


def _differences(ours: Any, theirs: Any, path: str):
  """Yields 'path is ours, there theirs' for each value that differs."""
  if isinstance(ours, dict) and isinstance(theirs, dict):
    for key in dict.fromkeys([*ours, *theirs]):
      below = ours.get(key), theirs.get(key)
      yield from _differences(*below, f'{path}.{key}'.lstrip('.'))
  elif ours != theirs:
    short = lambda value: 'absent' if value is None else str(value)[:60]
    yield f'{path} is {short(ours)}, there {short(theirs)}'


def _read(file: pathlib.Path) -> Any:
  try:
    return files.read_json(file)
  except ConfigError:
    raise ConfigError(f'{file}: is damaged; name another --workdir') from None


def speeds(path: pathlib.Path) -> dict:
  """Returns {size: {arm: seconds of a step}} of the sizes measured so far."""
  file = path / 'speeds.json'
  return _read(file) if file.exists() else {}


def add_speeds(path: pathlib.Path, size: str, seconds: dict) -> None:
  """Records the seconds of a step of each arm at a size."""
  values = speeds(path) | {size: seconds}
  workdir.write(path / 'speeds.json', json.dumps(values, indent=1))


def results(path: pathlib.Path) -> list[dict]:
  """Returns the row of each finished run: size, arm, seed, curve."""
  return workdir.rows(path / RESULTS)


def finish(path: pathlib.Path, row: dict) -> None:
  """Records a finished run, and removes its state."""
  rows = workdir.Rows(path / RESULTS)
  rows.append(row)
  rows.close()
  _state(path, row['size'], row['arm'], row['seed']).unlink(missing_ok=True)


def save(
  path: pathlib.Path, size: str, arm: str, seed: int, state: Any, curve: list
) -> None:
  """Replaces the state of a run under way, and its curve so far."""
  target = _state(path, size, arm, seed)
  target.parent.mkdir(exist_ok=True)
  values = {'state': jax.device_get(state), 'curve': json.dumps(curve)}
  scratch = target.with_suffix('.new')
  with open(scratch, 'wb') as file:
    file.write(serialization.to_bytes(values))
    file.flush()
    os.fsync(file.fileno())
  os.replace(scratch, target)


def load(
  path: pathlib.Path, size: str, arm: str, seed: int, like: Any
) -> tuple[Any, list] | None:
  """Returns the state and the curve of a run under way, or None.

  Raises:
    ConfigError: the file is damaged, or of a state of another form.
  """
  target = _state(path, size, arm, seed)
  if not target.exists():
    return None
  try:
    values = {'state': like, 'curve': ''}
    values = serialization.from_bytes(values, target.read_bytes())
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    if shapes(values['state']) != shapes(like):
      raise ValueError('another shape')
    return jax.device_put(values['state']), json.loads(values['curve'])
  except Exception as error:  # msgpack and flax raise many types
    raise ConfigError(
      f'{target}: cannot be read ({type(error).__name__}); remove it, and this '
      'run begins again'
    ) from None


def _state(path: pathlib.Path, size: str, arm: str, seed: int) -> pathlib.Path:
  return path / 'running' / f'{size}-{arm}-{seed}'
