"""A child process that answers a line of JSON with a line of JSON.

Chat templates and formulas come from strangers, and may compute for ever. So
each runs in a process of its own, whose kernel limits it sets itself, and which
its parent kills at a deadline. An answer belongs to the request before it: a
parent that is interrupted while it waits kills the child, or the next request
would get this one's answer.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time


class ChildError(Exception):
  """No answer: the child was late, or has ended."""


class Child:
  """A Python file that runs as a program, from the first request on.

  start: seconds for a first line, which a program with `start` prints once it
  is ready; None: it prints none.
  """

  def __init__(self, program: str, start: float | None = None):
    self._program = program
    self._start = start
    self._process: subprocess.Popen | None = None
    self._rest = b''

  def ask(self, request: dict, seconds: float) -> dict:
    """Returns the answer to a request; it comes within `seconds`.

    Raises:
      ChildError: no answer. The next request starts another process.
    """
    try:
      if self._process is None or self._process.poll() is not None:
        self._begin()
      line = json.dumps(request).encode() + b'\n'
      with contextlib.suppress(BrokenPipeError):  # `_answer` says it has ended
        self._process.stdin.write(line)
        self._process.stdin.flush()
      return self._answer(seconds)
    except BaseException:
      self.close()
      raise

  def _begin(self) -> None:
    self.close()
    try:
      self._process = subprocess.Popen(
        [sys.executable, '-P', self._program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for the parent
      )
    except OSError as error:
      raise ChildError(f'its process did not start ({error})') from None
    if self._start is not None:
      self._answer(self._start)

  def _answer(self, seconds: float) -> dict:
    end = time.monotonic() + seconds
    file = self._process.stdout.fileno()
    while b'\n' not in self._rest:
      left = end - time.monotonic()
      if left <= 0 or not select.select([file], [], [], left)[0]:
        raise ChildError(f'no answer in {seconds:g} s')
      part = os.read(file, 2**16)
      if not part:
        raise ChildError('its process has ended')
      self._rest += part
    line, _, self._rest = self._rest.partition(b'\n')
    return json.loads(line)

  def close(self) -> None:
    """Kills the process, if there is one."""
    process, self._process, self._rest = self._process, None, b''
    if process is not None:
      process.kill()
      for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # a broken pipe is flushed
          pipe.close()
      process.wait()
