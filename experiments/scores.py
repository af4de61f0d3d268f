"""The results of an evaluation, task by task, in a file that a rerun completes.

A benchmark takes hours, and its last task may fail. So each task's results are
written when it ends, and the same command runs only the tasks without results.
The file also names everything that its numbers depend on: results of another
model, tokenizer or number of examples are never mixed with these.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import string

from mla_moe import files
from mla_moe.config import ConfigError

from . import opened, workdir
from .checkpointing import fingerprint

_PROBE = f'{string.printable} äöü Привет 東京 <｜User｜>'


def settings(model: opened.TextModel, include: str, **options) -> dict:
  """Returns everything that the results depend on: numbers and digests.

  Args:
    model: its weights count, not its place.
    include: a folder of task files, or ''.
    **options: numbers and names that change the results.
  """
  weights, _ = fingerprint.read(fingerprint.of(model.variables))
  ids = [int(i) for i in model.tokenizer.encode(_PROBE)]
  tasks = sorted(pathlib.Path(include).rglob('*.yaml')) if include else []
  return {
    'model': _digest(repr(model.config), sorted(weights.items())),
    'tokenizer': _digest(ids, model.stop_ids),
    'cache': model.cache.dtype,
    'task_files': _digest(*(path.read_bytes() for path in tasks)),
    **options,
  }


def _digest(*parts) -> str:
  return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def read(path: pathlib.Path, now: dict) -> dict[str, dict]:
  """Returns {task of the command line: {task: {metric: value}}} of a file.

  Raises:
    ConfigError: the file is none of results, or has results of other settings
      than `now`.
  """
  if not path.exists():
    return {}
  values = files.read_json(path)
  then = values.get('settings')
  if not isinstance(then, dict) or not isinstance(values.get('tasks'), dict):
    raise ConfigError(f'--out={path}: is no file of results; name another file')
  names = sorted(name for name in now if now[name] != then.get(name))
  if names:
    name = names[0]
    raise ConfigError(
      f'--out={path}: has results with {name}={then.get(name)!r}, not '
      f'{now[name]!r}; name another file'
    )
  return values['tasks']


def write(path: pathlib.Path, now: dict, tasks: dict[str, dict]) -> None:
  """Writes the results so far; a kill leaves these or those before.

  Raises:
    ConfigError: the file cannot be written.
  """
  text = json.dumps({'settings': now, 'tasks': tasks}, indent=1)
  try:
    workdir.write(path, f'{text}\n')
  except OSError as error:
    raise ConfigError(
      f'--out={path}: cannot be written ({error.strerror})'
    ) from None


def has_results(rows: dict) -> bool:
  """Returns whether a task of the command line has ended without an error."""
  return bool(rows) and not any('error' in row for row in rows.values())
