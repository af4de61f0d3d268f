"""Checkpoints are written in the background, then sealed.

Writing has three stages. Orbax writes the arrays and then a commit file. Then
`seal.json` records the size and hash of every file (`seal`) and a number for
every array as it was on the devices (`fingerprint`). Only then are older steps
deleted. So the newest sealed step is complete at every instant, and a step
counts as saved when its seal exists.

A step is hashed while the next one is written: each process hashes its own
files, and process 0 joins the records. `store` reads.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import errno
import importlib.metadata
import json
import math
import os
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp

from mla_moe.types import PyTree

from .. import faults
from . import (
  agreement,
  fingerprint,
  retention,
  seal,
  storage,
  store,
)

_LEAST_SECONDS = 1200  # until Orbax gives a save up
_BYTES_PER_SECOND = 50e6  # of each process


class NotSaved(RuntimeError):
  """`step` could not be saved; the message is one line with path and reason."""

  def __init__(self, step: int, text: str):
    super().__init__(text)
    self.step = step


class Writer:
  """Saves steps of one run into `folder`; use it in a `with` block.

  `save` returns when the arrays have been copied; threads do the rest, and a
  later call raises their errors. Old steps are deleted after each seal, except
  the newest `keep`, every step that `keep_every` divides, and the `keep_best`
  steps with the lowest `facts[best]`. Process 0 calls `before_seal` when all
  else is written.

  Raises (every method):
    NotSaved: this step, or one before, could not be written. Sealed steps are
      untouched, and the next save may succeed.
  """

  def __init__(
    self,
    folder: os.PathLike | str,
    keep: int,
    *,
    keep_every: int = 0,
    keep_best: int = 0,
    best: str = 'bits_per_byte',
    before_seal: Callable[[], Any] = lambda: None,
  ):
    self._place = storage.of(folder)
    self.folder = self._place.path
    self._place.make()
    if jax.process_index() == 0:
      with contextlib.suppress(Exception):  # a bucket's are of many types
        retention.clean(self.folder)
    self._policy = keep, keep_every, keep_best
    self._best, self._before_seal = best, before_seal
    self._seconds = _LEAST_SECONDS
    self._orbax = checkpointer(self.folder, self._seconds)
    self._notices: list[str] = []
    self._writing = concurrent.futures.ThreadPoolExecutor(1)
    self._sealing = concurrent.futures.ThreadPoolExecutor(1)
    self._seals: collections.deque = collections.deque()  # (step, future)
    self._completion = None
    self._last = None

  def __enter__(self) -> Writer:
    return self

  def __exit__(self, kind, *_) -> None:
    try:
      self.wait()
    except Exception:
      if kind is None:  # never hide the error that ends the block
        raise
    finally:
      self._writing.shutdown()
      self._sealing.shutdown()
      self._orbax.close()

  def save(self, step: int, state: PyTree, facts: dict) -> None:
    """Begins to save `state`, with `facts` as JSON, as `step`."""
    self.ready()
    path = self.folder / str(step)
    if step == self._last and path.exists():
      return
    if (seconds := deadline(state)) > self._seconds:
      self._orbax.close()
      self._orbax = checkpointer(self.folder, seconds)
      self._seconds = seconds
    turn = next(agreement.turns)  # drawn by all, whichever of them fails
    pending = fingerprint.of(state)
    items = ocp.args.Composite(
      state=ocp.args.StandardSave(state),
      facts=ocp.args.JsonSave(facts | {store.MARK: seal.FORMAT}),
    )
    try:
      faults.reach('before_write', step)
      if not self._place.exists():  # Orbax would make it again, without a lock
        raise FileNotFoundError(errno.ENOENT, 'the folder is gone')
      if path.exists() and jax.process_index() == 0:
        retention.set_aside(self.folder, step)
      self._orbax.save(path, args=items)
    except Exception as error:  # Orbax raises many types
      failed = concurrent.futures.Future()
      failed.set_exception(error)  # the other processes hear of it
      self._sealing.submit(self._seal, step, failed, turn, pending, facts)
      raise self._failed(step, error) from error
    self._last = step
    completion = self._completion = self._writing.submit(self._write, step)
    sealed = self._sealing.submit(
      self._seal, step, completion, turn, pending, facts
    )
    self._seals.append((step, sealed))

  def ready(self) -> None:
    """Returns when the next save can begin, beside the seal of the last one.

    The last step is written, and all steps before it are sealed.
    """
    completion, self._completion = self._completion, None
    try:
      if completion is not None:
        completion.result()
    except Exception as error:
      step, _ = self._seals.pop()
      raise self._failed(step, error) from error
    while len(self._seals) > 1:
      self._take_seal()

  def wait(self) -> None:
    """Returns when all steps have been sealed."""
    self.ready()
    while self._seals:
      self._take_seal()

  def _take_seal(self):
    """Waits for the oldest seal."""
    step, sealed = self._seals.popleft()
    try:
      sealed.result()
    except Exception as error:
      raise self._failed(step, error) from error

  def notices(self) -> list[str]:
    """Returns lines about steps that could not be deleted, each once."""
    lines, self._notices = self._notices, []
    return lines

  def _failed(self, step, error) -> NotSaved:
    """Returns the error as one line, after making room for the next save."""
    self._last = None if step == self._last else self._last
    with contextlib.suppress(Exception):  # it may still be writing
      self._orbax.wait_until_finished()
    if jax.process_index() == 0 and self._place.exists():
      with contextlib.suppress(Exception):
        retention.clean(self.folder)
    text = f'{type(error).__name__}: {store.first_line(error)}'
    return NotSaved(
      step,
      f'{self.folder / str(step)}: could not be saved '
      f'({text}{self._place.free()})',
    )

  def _write(self, step):
    """Waits until Orbax has written the step (in a thread)."""
    faults.reach('during_write', step)
    self._orbax.wait_until_finished()

  def _seal(self, step, completion, turn, pending, facts):
    """Seals the step, with all processes, and prunes (in another thread)."""
    path, records, mine, errors = self.folder / str(step), {}, '', []
    try:
      completion.result()
      if jax.process_index() == 0:
        faults.reach('before_seal', step)
      me, processes = jax.process_index(), jax.process_count()
      mine = json.dumps(seal.records(path, me, processes))
    except Exception as error:
      errors.append(error)

    def join(texts: list[str]) -> str:
      try:
        if errors:
          raise errors[0]
        for process, text in enumerate(texts):
          if not text:
            raise RuntimeError(f'process {process} could not write its part')
          records.update(json.loads(text))
        fingerprints, _ = fingerprint.read(pending)
        sealed = {'step': step, 'facts': facts, 'fingerprints': fingerprints}
        sealed |= {'versions': versions(), 'processes': len(texts)}
        self._before_seal()
        seal.write(path, records, sealed)
      except Exception as error:
        errors.append(error)
        return f'process 0: {type(error).__name__}: {store.first_line(error)}'
      return ''

    refusal = agreement.agree(turn, mine, join)
    if errors:
      raise errors[0]
    if refusal:
      raise RuntimeError(refusal)
    if jax.process_index() == 0:
      faults.reach('after_seal', step)
      try:
        lines = retention.prune(self.folder, self._policy, self._best)
      except Exception as error:  # the step is sealed all the same
        text = f'{type(error).__name__}: {store.first_line(error)}'
        lines = [f'{self.folder}: old steps could not be deleted ({text})']
      self._notices += lines


def deadline(state: PyTree) -> int:
  """Returns the seconds that a save of the state may take."""
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
  seconds = size / jax.process_count() / _BYTES_PER_SECOND
  return max(_LEAST_SECONDS, math.ceil(seconds))


def checkpointer(
  folder: os.PathLike | str, seconds: int = _LEAST_SECONDS
) -> ocp.AsyncCheckpointer:
  """Returns Orbax's writer of steps, with a save's deadline in seconds.

  It marks a finished step by a commit file, the sign that `folders.steps` looks
  for. Orbax's other mode marks it by a rename: never mix the two, or a
  half-written step would be listed.
  """
  mode = ocp.options.AtomicityMode.COMMIT_FILE
  return ocp.AsyncCheckpointer(
    store.handler(),
    async_options=ocp.options.AsyncOptions(timeout_secs=seconds),
    atomicity_options=ocp.options.AtomicityOptions(mode=mode),
    file_options=ocp.options.FileOptions(
      path_permission_mode=storage.of(folder).mode
    ),
  )


def versions() -> dict[str, str]:
  """Returns the versions of the packages that a saved number depends on."""
  numbers = {}
  for package in ('mla_moe', 'jax', 'jaxlib', 'flax', 'optax'):
    try:
      numbers[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      numbers[package] = '?'
  return numbers | {'orbax-checkpoint': ocp.__version__}
