"""Programs that take turns on one machine, so that their ratios mean something.

A contender is a process that reads one line with its job (a shape and a mode),
warms up, answers with its versions, and then answers each line with the seconds
of one measurement. All contenders wait while one computes, each in a process of
its own, so every ratio comes from the same minutes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import subprocess
import time

from .. import commands
from . import models


class Contender:
  """A running contender; `seconds` collects the answers of its steps.

  `versions` is None where it did not start.
  """

  def __init__(self, command: list[str], shape: models.Shape, mode: str):
    self.seconds = []
    self._process = subprocess.Popen(
      command,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      text=True,
    )
    job = {'shape': dataclasses.asdict(shape), 'mode': mode}
    self.versions = self._answer(json.dumps(job))
    if self.versions is None:
      self.stop()

  def _answer(self, line: str):
    try:
      self._process.stdin.write(line + '\n')
      self._process.stdin.flush()
      answer = self._process.stdout.readline()
    except BrokenPipeError:
      answer = ''
    return json.loads(answer) if answer else None

  def step(self) -> None:
    """Measures once more."""
    self.seconds.append(self._answer('step'))

  def stop(self) -> None:
    """Ends the process, which ends with its input."""
    with contextlib.suppress(BrokenPipeError):
      self._process.communicate(timeout=60)


def ours(program: str, shape: models.Shape, mode: str) -> Contender:
  """Starts the program `program` of this folder at a shape."""
  return Contender(commands.program(f'bench.{program}'), shape, mode)


def peer(
  python: str, program: str, shape: models.Shape, mode: str
) -> Contender:
  """Starts a peer's program, a file beside this one, under another Python."""
  file = pathlib.Path(__file__).parent / f'{program}.py'
  return Contender([python, str(file)], shape, mode)


def started(contenders: dict) -> dict:
  """Returns the contenders that have started; prints the others' names."""
  for name, contender in contenders.items():
    if not contender.versions:
      print(f'  left out: {name} (did not start; needs torch, transformers)')
  return {name: c for name, c in contenders.items() if c.versions}


def take_turns(contenders: dict, rounds: int) -> None:
  """Steps each contender once in each of `rounds`; then all end.

  The pause is for threads that spin for a while after their last work, as
  OpenMP's do: they would take the next contender's cores.
  """
  for _ in range(rounds):
    for contender in contenders.values():
      time.sleep(0.5)
      contender.step()
  for contender in contenders.values():
    contender.stop()
