"""A run of ours as a contender: its source waits for a line before each step.

The loop is the program's own, with its records. A line of the standard input
begins a step; its answer has the processor's seconds, in all and of the parts.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable

_WARM_UP = 3  # steps


def pin() -> None:
  """Gives this process one thread on one core; before jax is imported."""
  os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
  flags = os.environ.get('XLA_FLAGS', '')
  os.environ['XLA_FLAGS'] = f'{flags} --xla_cpu_multi_thread_eigen=false'


class Turns:
  """The seconds of a run's steps, between two lines of the standard input.

  `about` is the answer to the job; `parts` are the names of parts.
  """

  def __init__(self, about: str, parts: tuple[str, ...]):
    self._out, self._about, self._parts = sys.stdout, about, parts
    self._began, self._steps = 0.0, 0
    self._seconds = collections.Counter()

  def timed(self, name: str, function: Callable) -> Callable:
    """Returns the function, whose seconds are added to the part `name`."""
    import jax

    @functools.wraps(function)
    def call(*args, **options):
      began = time.process_time()
      out = jax.block_until_ready(function(*args, **options))
      self._seconds[name] += time.process_time() - began
      return out

    return call

  def run(self, config, open_source: Callable, init: str = '') -> None:
    """Runs the config until the standard input ends."""
    from .. import train
    from ..training import steps

    def opened(*args):
      source = open_source(*args)
      batch = source.batch

      def waiting(*args):
        self._wait()
        return batch(*args)

      source.batch = waiting
      return source

    steps.take = self.timed('update', steps.take)
    with (
      contextlib.redirect_stdout(sys.stderr),
      tempfile.TemporaryDirectory() as folder,
    ):
      train.run(config, f'{folder}/run', train.Options(init=init), opened)

  def _wait(self) -> None:
    """Answers with the seconds of a step, and waits for the next line."""
    step = time.process_time() - self._began
    self._steps += 1
    if self._steps > _WARM_UP:
      answer = self._about
      if self._steps > _WARM_UP + 1:
        answer = {name: self._seconds[name] for name in self._parts}
        answer |= {'rest': step - sum(answer.values()), 'step': step}
      print(json.dumps(answer), file=self._out, flush=True)
      if not sys.stdin.readline():
        sys.exit()
    self._seconds.clear()
    self._began = time.process_time()
