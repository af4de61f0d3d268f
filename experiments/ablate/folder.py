"""The folder of an ablation: its plan, its results, and runs under way.

  ablation.json   the plan; once a run has begun, another is refused
  texts.json      the fingerprint of each text
  speeds.json     seconds of a step, of a budget in seconds
  results.jsonl   a row for each finished run, with its curve
  starts.jsonl    dates, versions and devices
  running/        the state of each run that is under way
  report.html     the page

An ablation begins with its first chunk: the plan of a command that was refused
before does not bind the next one. A chunk ends with the state in a file that
replaces the one before, so a kill loses the chunk that was computed and nothing
else. A run's row is written before its state goes: a kill between the two
leaves a state that no one needs.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from typing import Any

import jax
from flax import serialization

from mla_moe import files
from mla_moe.config import ConfigError, freeze

from .. import workdir
from . import plan as plans

RESULTS = 'results.jsonl'
_OTHER = 'name another --workdir'


def begun(path: pathlib.Path) -> bool:
  """Whether a chunk of a run is there: a result, or a state under way."""
  running = path / 'running'
  states = running.is_dir() and any(running.iterdir())
  return states or bool(results(path))


def bind(path: pathlib.Path, plan: plans.Plan) -> None:
  """Writes the plan into its folder; refuses that of another ablation.

  Sizes and arms that the folder lacks are added to it.

  Raises:
    ConfigError: as `merged`.
  """
  values = merged(path, plan)
  if not begun(path):  # texts and speeds are of the plan before
    for name in ('texts.json', 'speeds.json'):
      (path / name).unlink(missing_ok=True)
  workdir.write(_plan_of(path), json.dumps(values, indent=1))


def merged(path: pathlib.Path, plan: plans.Plan) -> dict:
  """Returns the plan's values, with sizes and arms that the folder has more.

  A config field that the folder's version did not have counts as its default.

  Raises:
    ConfigError: the folder's runs are of another ablation; names the first
      value that differs.
  """
  ours, file = json.loads(json.dumps(plans.described(plan))), _plan_of(path)
  if not begun(path) or not file.exists():
    return ours
  theirs = {**ours, **_read(file)}
  configs = {}
  for name, values in theirs['configs'].items():
    try:
      config = dataclasses.asdict(freeze(values))
    except ConfigError as error:
      raise ConfigError(f'{file}: {name}: {error}; {_OTHER}') from None
    configs[name] = json.loads(json.dumps(config))
  theirs['configs'] = configs
  for name in ('steps', 'code', 'configs'):  # which a folder may have more of
    ours[name] = {**theirs[name], **ours[name]}
    theirs[name] = {**ours[name], **theirs[name]}
  difference = next(_differences(ours, theirs, ''), '')
  if difference:
    raise ConfigError(
      f'workdir={str(path)!r}: holds another ablation ({difference}); {_OTHER}'
    )
  return ours


def _plan_of(path: pathlib.Path) -> pathlib.Path:
  return path / 'ablation.json'


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
    raise ConfigError(f'{file}: is damaged; {_OTHER}') from None


def texts(path: pathlib.Path) -> dict[str, str]:
  """Returns {`plans.of_text`: fingerprint} of the texts read so far."""
  file = path / 'texts.json'
  return _read(file) if file.exists() else {}


def add_text(path: pathlib.Path, text: str, fingerprint: str) -> None:
  """Records the fingerprint of a text."""
  values = texts(path) | {text: fingerprint}
  workdir.write(path / 'texts.json', json.dumps(values, indent=1))


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
  drop(path, row['size'], row['arm'], row['seed'])


def drop(path: pathlib.Path, size: str, arm: str, seed: int) -> None:
  """Removes the state of a finished run, if a kill left it there."""
  _state(path, size, arm, seed).unlink(missing_ok=True)


def save(path: pathlib.Path, size: str, arm: str, seed: int, run: Any) -> None:
  """Replaces a `turns.Run` under way: its state, its curve, its steps."""
  target = _state(path, size, arm, seed)
  target.parent.mkdir(exist_ok=True)
  facts = {'steps': run.recipe.config.run.steps, 'curve': run.curve}
  values = {'state': jax.device_get(run.state), 'facts': json.dumps(facts)}
  scratch = path / 'state.new'
  with open(scratch, 'wb') as file:
    file.write(serialization.to_bytes(values))
    file.flush()
    os.fsync(file.fileno())
  os.replace(scratch, target)


def load(
  path: pathlib.Path, size: str, arm: str, seed: int, like: Any, steps: int
) -> tuple[Any, list] | None:
  """Returns the state and the curve of a run under way, or None.

  `steps` are those that the budget pays for.

  Raises:
    ConfigError: the file is damaged, of a state of another form, or of a run of
      other steps, whose schedule is another.
  """
  target = _state(path, size, arm, seed)
  if not target.exists():
    return None
  try:
    values = {'state': like, 'facts': ''}
    values = serialization.from_bytes(values, target.read_bytes())
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    if shapes(values['state']) != shapes(like):
      raise ValueError('another shape')
    facts = json.loads(values['facts'])
    begun_with, curve = facts['steps'], facts['curve']
  except Exception as error:  # msgpack and flax raise many types
    raise ConfigError(
      f'{target}: cannot be read ({type(error).__name__}); remove it, and this '
      'run begins again'
    ) from None
  if begun_with != steps:
    raise ConfigError(
      f'{target}: is of a run of {begun_with} steps, and the budget pays for '
      f'{steps}; {_OTHER}'
    )
  return jax.device_put(values['state']), curve


def _state(path: pathlib.Path, size: str, arm: str, seed: int) -> pathlib.Path:
  return path / 'running' / f'{size}-{arm}-{seed}'
