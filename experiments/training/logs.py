"""The rows of a run (metrics.jsonl, load.jsonl, TensorBoard) and its bar.

A run may be killed at any instant and goes on from its last checkpoint, so the
files are first cut back to that step; then rows are appended, whole ones only
(`workdir.Rows`).
"""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import pathlib
import sys
import time

import numpy as np

from .. import workdir
from . import metrics

# The running mean of the loads is of so many logged steps: the weight of those
# before would be 0.6 %, and a run that resumes reads no more.
_RECENT = 100


class Logs:
  """Writers of rows and loads, opened after the rows behind `step` are dropped.

  Rows go to metrics.jsonl, and their numbers to TensorBoard if that is
  installed (extra [viz]); loads go to load.jsonl, for the report's heat map.
  """

  def __init__(self, folder: pathlib.Path, step: int):
    workdir.rewind(folder / 'metrics.jsonl', step)
    workdir.rewind(folder / 'load.jsonl', step)
    last = workdir.backwards(folder / 'load.jsonl')
    loads = [row['load'] for _, row in itertools.islice(last, _RECENT)]
    self._recent = collections.deque(map(np.array, loads[::-1]), _RECENT)
    self._metrics = workdir.Rows(folder / 'metrics.jsonl')
    self._load = workdir.Rows(folder / 'load.jsonl')
    self._events = _tensorboard(folder)

  def health(self, step: int, load: np.ndarray) -> dict:
    """Writes a step's loads [L, E]; returns `metrics.health` of them."""
    self._recent.append(np.asarray(load))
    running = functools.reduce(metrics.running_load, self._recent, None)
    self._load.append({'step': step, 'load': np.asarray(load).tolist()})
    return metrics.health(load, running)

  def write(self, row: dict) -> None:
    """Writes a row, which has a 'step'."""
    self._metrics.append(row)
    if self._events:
      from tensorboard.compat.proto import event_pb2, summary_pb2

      values = [
        summary_pb2.Summary.Value(tag=name, simple_value=value)
        for name, value in row.items()
        if name != 'step' and isinstance(value, (int, float))
      ]
      summary = summary_pb2.Summary(value=values)
      event = event_pb2.Event(
        wall_time=time.time(), step=row['step'], summary=summary
      )
      try:
        self._events.add_event(event)
      except OSError as error:
        print(f'WARNING: {error}; no more TensorBoard events.')
        self._events = None

  def close(self) -> None:
    """Writes the rows that wait, and closes every file.

    Raises:
      OSError: rows that cannot be written.
    """
    with contextlib.ExitStack() as stack:
      for file in (self._metrics, self._load, self._events):
        if file:
          stack.callback(file.close)


def fp8_health(values: dict[str, np.ndarray]) -> dict:
  """Returns the row of `fp8_health.measure`: worst values, and each layer's."""
  worst = lambda suffix: max(
    float(v.max()) for name, v in values.items() if name.endswith(suffix)
  )
  rounded = {
    name: [float(f'{x:.4g}') for x in v.tolist()] for name, v in values.items()
  }
  return {
    'fp8_saturated': worst('saturated'),
    'fp8_flushed': worst('flushed'),
    'fp8_range': worst('range'),
    'fp8_error': worst('error'),
    'fp8_layers': rounded,
  }


def _tensorboard(folder: pathlib.Path):
  try:
    from tensorboard.summary.writer.event_file_writer import EventFileWriter
  except ImportError:
    print('No TensorBoard events: pip install "mla_moe[viz]" to have them.')
    return None
  return EventFileWriter(str(folder / 'tensorboard'))


@contextlib.contextmanager
def progress_bar(total: int, done: int):
  """Yields tell(step, text): a bar with the time left, or lines in a file."""
  if not sys.stdout.isatty():
    yield lambda step, text: text and print(f'step {step}/{total}  {text}')
    return
  from rich import progress as bars

  columns = (
    bars.BarColumn(),
    bars.MofNCompleteColumn(),
    bars.TimeRemainingColumn(),
    bars.TextColumn('{task.description}'),
  )
  with bars.Progress(*columns) as bar:
    task = bar.add_task('compiling', total=total, completed=done)

    def tell(step, text):
      more = {'description': text} if text else {}
      bar.update(task, completed=step, **more)

    yield tell
