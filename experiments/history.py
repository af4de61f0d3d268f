"""A run's folder as its reports read it: rows that can be drawn, its starts.

A file of rows may have been cut, edited or mixed with another. A row that
cannot be drawn beside the others is left out, and one line counts those.
"""

from __future__ import annotations

import collections
import json
import math
import pathlib
from typing import Any, NamedTuple

from mla_moe import files
from mla_moe.config import ConfigError

from . import workdir

# Numbers that each row of a kind must have.
_STEP = ('tokens', 'loss', 'main_loss', 'mtp_loss', 'lr', 'grad_norm')
_NUMBERS = {
  'loss': (*_STEP, 'memory_mib'),
  'bits_per_byte': ('bits_per_byte',),
  'pass_at_1': ('pass_at_1',),
}
# Values that a row may have, with their dimensions; all four of MaxVio or none.
_VIO = {'max_vio': 0, 'max_vio_running': 0}
_VIO |= {'max_vio_layers': 1, 'max_vio_running_layers': 1}
_OPTIONAL = {'tokens_per_s': 0, 'mfu': 0, 'entropy': 1, 'bias_norm': 1}
_OPTIONAL |= {'index_kl': 1, 'index_mass': 1, 'index_overlap': 1}
_OPTIONAL |= {'index_grad_norm': 0}
_OPTIONAL |= {'load': 2, 'gzip_bits_per_byte': 0} | _VIO
# The same of an update of reinforcement learning. The numbers of a rollout may
# be in the row of its first update alone; `entropy` is the policy's.
_RL = """reward loss grad_norm lr skipped reward_std completion_length
length_max ended entropy kl kl_old clipped ratio_max zero_right zero_wrong
dropped mismatch_k3 mismatch_max mismatch_extreme grader_errors"""
_RL_OPTIONAL = _OPTIONAL | dict.fromkeys(_RL.split(), 0)
_PARTS = ('rewards', 'seconds')  # numbers by name
_LIMIT = 2**32  # bytes of a file of rows
_MAPPED = 200  # at most so many columns of a heat map


class History(NamedTuple):
  """The rows of a run, and the values of its config.json.

  steps, evaluations, fp8, passes: rows of metrics.jsonl. starts: rows of
  starts.jsonl, which older runs lack. is_rl: it is reinforcement learning; some
  of the steps then have a reward, and `passes` are the evaluations.
  """

  folder: pathlib.Path
  config: dict
  steps: list[dict]
  evaluations: list[dict]
  fp8: list[dict]
  passes: list[dict]
  starts: list[dict]
  is_rl: bool

  @property
  def name(self) -> str:
    return self.folder.resolve().name


def read(folder: pathlib.Path) -> History:
  """Returns the history of the run in a folder; prints how much is left out.

  Raises:
    ConfigError: the folder holds no run with a logged step, or no config.
  """
  rows, bad = _rows(folder / 'metrics.jsonl')
  is_rl = any('reward' in row for row in rows)
  kinds = {'reward' if is_rl else 'loss': list(filter(_is_step, rows))}
  for kind in ('bits_per_byte', 'fp8_layers', 'pass_at_1'):
    kinds[kind] = [row for row in rows if kind in row]
  for kind, of_kind in kinds.items():
    kinds[kind] = drawable(of_kind, kind)
    bad += len(of_kind) - len(kinds[kind])
  if bad:
    print(f'{folder}/metrics.jsonl: left out {bad} bad rows.')
  steps, *others = kinds.values()
  if not steps:
    raise ConfigError(
      f'{str(folder)!r}: holds no metrics.jsonl of a run with a logged step'
    )
  config = files.read_json(folder / 'config.json')
  model = config.get('model')
  sizes = model if isinstance(model, dict) else {}
  if any(type(sizes.get(n)) is not int for n in ('layers', 'dense_layers')):
    raise ConfigError(f'{folder}/config.json: describes no model')
  starts = [row for row in _rows(folder / 'starts.jsonl')[0] if 'date' in row]
  return History(folder, config, steps, *others, starts, is_rl)


def _is_step(row: dict) -> bool:
  return 'loss' in row or 'reward' in row


def loads(folder: pathlib.Path) -> list[dict]:
  """Returns rows of load.jsonl, evenly spaced; prints how many are bad."""
  rows = workdir.rows(folder / 'load.jsonl', _MAPPED)
  good = drawable([row for row in rows if 'load' in row], 'load')
  if len(good) < len(rows):
    print(f'{folder}/load.jsonl: left out {len(rows) - len(good)} bad rows.')
  return good


def facts(run: History) -> dict[str, str]:
  """Returns the date, versions, mesh and device of a run's latest start."""
  start = run.starts[-1] if run.starts else {}
  get = lambda name: str(start.get(name, '?'))
  mesh = run.config.get('mesh')
  axes = mesh.items() if isinstance(mesh, dict) else ()
  sizes = [f'{axis}={n}' for axis, n in axes if type(n) is int and n > 1]
  return {
    'date': f'{get("date")} UTC',
    'versions': f'jax {get("jax")}, flax {get("flax")}, Python '
    f'{get("python")}, commit {get("commit")}',
    'mesh': ', '.join(sizes) or 'one device',
    'device': f'{get("devices")} x {get("device")}',
  }


def drawable(rows: list[dict], kind: str) -> list[dict]:
  """Returns the rows with all numbers of a kind and the commonest shapes.

  Numbers that are not finite are NaN in them, and leave gaps in a curve. The
  step and the count of tokens must be finite.
  """
  cleaned = [clean(row) for row in rows]
  if kind == 'reward':  # the routers' entropies have the name of the policy's
    cleaned = [_without_routers(row) for row in cleaned]
  shapes = [_shapes(row, kind) for row in cleaned]
  counts = collections.Counter(shape for shape in shapes if shape)
  if not counts:
    return []
  commonest = counts.most_common(1)[0][0]
  pairs = zip(cleaned, shapes, strict=True)
  return [row for row, shape in pairs if shape == commonest]


def _without_routers(row: dict) -> dict:
  is_policy = not isinstance(row.get('entropy'), list)
  return {name: row[name] for name in row if name != 'entropy' or is_policy}


def _rows(path: pathlib.Path) -> tuple[list[dict], int]:
  """Returns the rows of a file that have a step, and the number of others."""
  rows, bad = [], 0
  if path.exists():
    text = files.read_bytes(path, _LIMIT).decode('utf-8', 'replace')
    for line in filter(str.strip, text.split('\n')):
      try:
        row = json.loads(line)
      except (ValueError, RecursionError):
        row = None
      if isinstance(row, dict) and type(row.get('step')) is int:
        rows.append(row)
      else:
        bad += 1
  return rows, bad


def clean(value: Any) -> Any:
  """Returns the value with NaN for null and for numbers that are not finite."""
  if isinstance(value, dict):
    return {name: clean(item) for name, item in value.items()}
  if isinstance(value, list):
    return [clean(item) for item in value]
  if value is None or type(value) in (int, float):
    return value if value is not None and abs(value) < 1e300 else math.nan
  return value


def _shapes(row: dict, kind: str) -> tuple | None:
  """Returns the shapes of a row's lists, or None if it cannot be drawn."""
  step, tokens = row.get('step'), row.get('tokens', 0)
  if type(step) is not int or not 0 <= step < 2**53:
    return None
  if _shape(tokens) != () or not tokens >= 0:
    return None
  if any(_shape(row.get(name)) != () for name in _NUMBERS.get(kind, ())):
    return None
  if any(name in row for name in _VIO) and not all(n in row for n in _VIO):
    return None
  optional = _RL_OPTIONAL if kind == 'reward' else _OPTIONAL
  shapes = {name: _shape(row[name]) for name in optional if name in row}
  if kind == 'reward' and not all(_are_numbers(row, name) for name in _PARTS):
    return None
  if kind == 'fp8_layers':
    layers = row[kind] if isinstance(row[kind], dict) else {'': None}
    curves = {f'{kind}.{name}': _shape(layers[name]) for name in layers}
  else:
    curves = {}
  for name, shape in [*shapes.items(), *curves.items()]:
    if shape is None or len(shape) != optional.get(name, 1):
      return None
  lists = {name: shape for name, shape in shapes.items() if shape}
  return (kind, *sorted((lists | curves).items()))


def _are_numbers(row: dict, name: str) -> bool:
  parts = row.get(name, {})
  if not isinstance(parts, dict):
    return False
  return all(type(value) in (int, float) for value in parts.values())


def _shape(value: Any) -> tuple | None:
  """Returns (sizes) of nested lists of numbers, or None of anything else."""
  if type(value) in (int, float):
    return ()
  if not isinstance(value, list) or not value:
    return None
  shapes = {_shape(item) for item in value}
  (first, *others) = shapes
  return None if others or first is None else (len(value), *first)
