"""Processes that write the units of a text, and the progress that they make.

Processes take the next unit that is not done, each as it becomes free. One that
fails ends the others. A process ends with its parent: it looks between groups
of documents whether that lives.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence

from mla_moe.config import ConfigError

from .. import cli, workdir
from . import encoders, units
from .units import Job, Unit

Say = Callable[[str], None]

_EVERY = 10.0  # seconds between lines
_POLL = 0.5


class Progress:
  """Lines about the bytes done, their speed and the time left, now and then."""

  def __init__(self, whole: Sequence[Unit], rest: Sequence[Unit], say: Say):
    self._total = max(sum(unit.size for unit in whole), 1)
    self._before = self._total - sum(unit.size for unit in rest)
    self._say, self._done = say, 0
    self._began = self._last = time.monotonic()

  def unit(self, unit: Unit) -> None:
    """Counts a unit that is done."""
    self._done += unit.size
    self.tell(0)

  def tell(self, size: int) -> None:
    """Prints a line if the last is old; `size` is done of the next unit."""
    clock = time.monotonic()
    if clock - self._last < _EVERY:
      return
    self._last = clock
    done = self._done + size
    speed = done / (clock - self._began)
    left = self._total - self._before - done
    part = min((self._before + done) / self._total, 1)
    if not done:
      self._say(f'  {part:.1%}: no more is done since the start')
      return
    minutes = max(left, 0) / speed / 60
    self._say(f'  {part:.1%}: {speed / 1e6:.1f} MB/s, {minutes:.0f} min left')


def write(job: Job, whole: Sequence[Unit], count: int, say: Say) -> None:
  """Writes those of the units that are not done, by `count` processes.

  Raises:
    ConfigError: as `documents.read`; a process ended without a word.
  """
  rest = [unit for unit in whole if not units.is_done(job.folder, unit)]
  progress = Progress(whole, rest, say)
  if len(rest) < len(whole):
    say(f'{len(whole) - len(rest)} of {len(whole)} units were done before.')
  count = min(count, len(rest))
  if count > 1:
    _in_processes(job, rest, count, progress, say)
    return
  encode = encoders.Encoder(job.tokenizer)
  for unit in rest:
    encode.next_unit()
    tell = lambda size, unit=unit: progress.tell(min(size, unit.size))
    units.write(job, unit, encode, tell)
    progress.unit(unit)
  if rest and encode.line:
    say(f'{encode.line}.')


def _in_processes(job, rest, count, progress, say) -> None:
  context = multiprocessing.get_context('spawn')
  place = context.Value('q', 0)
  pipes, processes = [], []
  try:
    for _ in range(count):
      ours, theirs = context.Pipe()
      args = (theirs, place, max(1, (os.cpu_count() or 1) // count))
      process = context.Process(target=_work, args=args, daemon=True)
      processes.append(process)
      process.start()
      theirs.close()
      pipes.append(ours)
    for pipe in pipes:  # what is large waits for no process to have started
      with contextlib.suppress(OSError):  # it has ended: `_follow` says so
        pipe.send((job, rest))
    _follow(pipes, processes, rest, progress, say)
  finally:
    begun = [process for process in processes if process.pid]
    for process in begun:
      process.terminate()
    for process in begun:
      process.join()


def _follow(pipes, processes, rest, progress, say) -> None:
  """Waits for the processes, and passes on what they tell."""
  lines, pipes = set(), list(pipes)
  while pipes:
    for pipe in multiprocessing.connection.wait(pipes, _POLL):
      try:
        kind, value = pipe.recv()
      except (EOFError, OSError):
        pipes.remove(pipe)
        continue
      if kind == 'error':
        raise ConfigError(value)
      if kind == 'disk':
        raise cli.Stopped(value)
      if kind == 'line' and value and value not in lines:
        lines.add(value)
        say(f'{value}.')
      if kind == 'unit':
        progress.unit(rest[value])
    progress.tell(0)
  for process in processes:
    process.join()
    if process.exitcode:
      raise ConfigError(
        f'a process that tokenised ended with {process.exitcode}; start again: '
        'units that are done are kept, and fewer --processes need less memory'
      )


def _work(pipe, place, cores: int) -> None:
  """Writes the next unit until there is none."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
  os.environ['RAYON_NUM_THREADS'] = str(cores)
  try:
    job, rest = pipe.recv()
  except EOFError:  # the parent has ended
    sys.exit(1)

  def tell(size: int) -> None:
    if not multiprocessing.parent_process().is_alive():
      sys.exit(1)

  encode = encoders.Encoder(job.tokenizer)
  try:
    while True:
      with place.get_lock():
        number, place.value = place.value, place.value + 1
      if number >= len(rest):
        break
      encode.next_unit()
      units.write(job, rest[number], encode, tell)
      pipe.send(('unit', number))
    pipe.send(('line', encode.line))
  except ConfigError as error:
    pipe.send(('error', str(error)))
  except OSError as error:
    pipe.send(('disk', workdir.trouble(job.folder, error)))
