"""Checkpoints: a state is written in the background, sealed, and read checked.

Writing has three stages. Orbax writes the arrays and then a commit file. Then
`seal.json` records the size and SHA-256 of every file (`seal`) and a number
for every array as it was on the devices (`fingerprint`). Only then are older
steps deleted. So the newest sealed step is complete at every instant, and a
step counts as saved when its seal exists.

Reading begins with the newest step and compares three things: the files with
the seal; tree, shapes and dtypes with those of the run (Orbax by itself casts
silently); the fingerprints of the arrays with those in the seal. A step that
fails is refused in one printed line, and the step before it is tried.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import errno
import importlib.metadata
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from mla_moe.checkpoint import faults, fingerprint, folders, seal
from mla_moe.config import ConfigError
from mla_moe.types import PyTree

Damaged = seal.Damaged
# Orbax writes this key with the facts, before the seal. A step that has it but
# no seal was cut off; a step without it is older than seals.
_MARK = 'to_be_sealed'
_FACTS = ocp.args.JsonRestore()
_LEAST_SECONDS = 1200  # until Orbax gives a save up
_BYTES_PER_SECOND = 50e6  # of each process


class NotSaved(RuntimeError):
  """A step could not be saved; the message is one line with path and reason."""


class Restored(NamedTuple):
  """A checkpoint in memory: its step, its state and its facts."""

  step: int
  state: PyTree
  facts: dict


class Writer:
  """Saves steps of one run into `folder`; use it in a `with` block.

  `save` returns when the arrays have been copied; a thread does the rest, and
  the next call raises its errors. Old steps are deleted after each seal, except
  the newest `keep`, every step that `keep_every` divides, and the `keep_best`
  steps with the lowest `facts[best]`.

  Raises (every method):
    NotSaved: this step, or the one before, could not be written. Sealed steps
      are untouched, and the next save may succeed.
  """

  def __init__(
    self,
    folder: os.PathLike | str,
    keep: int,
    *,
    keep_every: int = 0,
    keep_best: int = 0,
    best: str = 'bits_per_byte',
  ):
    self.folder = pathlib.Path(folder).resolve()
    self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if jax.process_index() == 0:
      with contextlib.suppress(OSError):
        folders.clean(self.folder)
    self._policy = keep, keep_every, keep_best
    self._best = best
    self._seconds = _LEAST_SECONDS
    self._orbax = checkpointer(self._seconds)
    self._notices: list[str] = []
    self._thread = concurrent.futures.ThreadPoolExecutor(1)
    self._running = None
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
      self._thread.shutdown()
      self._orbax.close()

  def save(self, step: int, state: PyTree, facts: dict) -> None:
    """Begins to save `state`, with `facts` as JSON, as `step`."""
    self.wait()
    path = self.folder / str(step)
    if step == self._last and path.exists():
      return
    if (seconds := deadline(state)) > self._seconds:
      self._orbax.close()
      self._orbax, self._seconds = checkpointer(seconds), seconds
    pending = fingerprint.of(state)
    items = ocp.args.Composite(
      state=ocp.args.StandardSave(state),
      facts=ocp.args.JsonSave(facts | {_MARK: seal.FORMAT}),
    )
    try:
      faults.reach('before_write', step)
      if not self.folder.is_dir():  # Orbax would make it again, without a lock
        raise FileNotFoundError(errno.ENOENT, 'the folder is gone')
      if path.exists() and jax.process_index() == 0:
        folders.set_aside(self.folder, step)
      self._orbax.save(path, args=items)
    except Exception as error:  # Orbax raises many types
      raise self._failed(path, error) from error
    self._last = step
    self._running = self._thread.submit(
      self._finish, step, path, pending, facts
    )

  def wait(self) -> None:
    """Returns when the last save has been sealed."""
    running, self._running = self._running, None
    if running is None:
      return
    try:
      running.result()
    except Exception as error:
      path = self.folder / str(self._last)
      self._last = None
      raise self._failed(path, error) from error

  def notices(self) -> list[str]:
    """Returns lines about steps that could not be deleted, each once."""
    lines, self._notices = self._notices, []
    return lines

  def _failed(self, path, error) -> NotSaved:
    """Returns the error as one line, after making room for the next save."""
    with contextlib.suppress(Exception):  # it may still be writing
      self._orbax.wait_until_finished()
    if jax.process_index() == 0 and self.folder.is_dir():
      with contextlib.suppress(OSError):
        folders.clean(self.folder)
    try:
      free = f'{shutil.disk_usage(self.folder).free / 2**20:,.0f} MiB are free'
    except OSError:
      free = 'the folder is gone'
    text = _first_line(error)
    return NotSaved(
      f'{path}: could not be saved ({type(error).__name__}: {text}; {free})'
    )

  def _finish(self, step, path, pending, facts):
    """Waits for Orbax, seals the step and deletes old ones (in the thread)."""
    faults.reach('during_write', step)
    self._orbax.wait_until_finished()
    if jax.process_index() != 0:
      return
    fingerprints, _ = fingerprint.read(pending)
    faults.reach('before_seal', step)
    seal.write(
      path,
      {
        'step': step,
        'facts': facts,
        'fingerprints': fingerprints,
        'versions': versions(),
        'processes': jax.process_count(),
      },
    )
    faults.reach('after_seal', step)
    self._prune()

  def _prune(self):
    """Deletes old steps; one that stays is tried again after the next seal."""
    scores = {}
    for step in folders.steps(self.folder):
      try:
        sealed = seal.read(self.folder / str(step))
      except Damaged:
        continue
      if sealed is not None:
        scores[step] = sealed['facts'].get(self._best)
    doomed = scores.keys() - folders.retained(scores, *self._policy)
    for step in sorted(doomed | folders.half_removed(self.folder)):
      try:
        folders.remove(self.folder, step)
      except OSError as error:
        self._notices.append(
          f'{self.folder / str(step)}: could not be deleted ({error.strerror})'
        )


def check(folder: os.PathLike | str, step: int) -> dict | None:
  """Returns the step's seal, after comparing every file with it.

  None if the step has no seal.

  Raises:
    Damaged: one line, which names the file.
  """
  path = pathlib.Path(folder) / str(step)
  try:
    sealed = seal.read(path)
    if sealed is not None:
      seal.check(path, sealed)
  except OSError as error:
    raise Damaged(f'{path}: cannot be read ({error.strerror})') from None
  return sealed


def restore(
  folder: os.PathLike | str,
  like: PyTree,
  *,
  before: int | None = None,
  allow_unsealed: bool = False,
  move_refused: bool = False,
  renamed: Mapping[str, str] | None = None,
  say: Callable[[str], Any] = print,
) -> Restored | None:
  """Returns the newest complete step, or None where no step was ever sealed.

  None therefore also means a run that was killed in its very first save: it
  begins again. Beside a process that saves, a listed step may be deleted before
  it is read; that is no refusal, and the steps are listed again.

  Args:
    like: a state of the wanted tree, shapes, dtypes and shardings. The
      shardings may differ from those that the checkpoint was saved with.
    before: only steps below this one.
    allow_unsealed: take a step without a seal, too, although its bytes cannot
      be checked.
    move_refused: move refused steps, and steps not `before`, into the folder
      `refused`, so that the run can write steps of the same numbers.
    renamed: {name in older checkpoints: field of `like`}, a dataclass.
    say: called with a line for every refusal.

  Raises:
    ConfigError: a step of another tree, shape or dtype (names the first leaf).
    Damaged: every step was refused.
  """
  folder = pathlib.Path(folder).resolve()
  steps = folders.steps(folder)
  wanted = [s for s in reversed(steps) if before is None or s < before]
  refusals, all_unfinished = [], True
  if move_refused and jax.process_index() == 0:
    for step in set(steps) - set(wanted):
      folders.set_aside(folder, step)
  for step in wanted:
    reason, sealed, unfinished = _judge(folder, step, allow_unsealed)
    all_unfinished = all_unfinished and unfinished
    if not reason:
      try:
        return _read(folder / str(step), step, like, sealed, renamed or {})
      except Damaged as error:
        reason = str(error)
    if not (folder / str(step) / folders.COMMIT).exists():  # a newer one exists
      return restore(
        folder,
        like,
        before=before,
        allow_unsealed=allow_unsealed,
        move_refused=move_refused,
        renamed=renamed,
        say=say,
      )
    refusals.append(reason)
    say(f'CHECKPOINT {step} REFUSED. {reason}')
    if move_refused and jax.process_index() == 0:
      place = folders.set_aside(folder, step)
      say(f'It now lies in {place}.')
  if refusals and not all_unfinished:
    raise Damaged(
      f'{folder}: no step can be trusted; the newest: {refusals[0]}'
    )
  return None


def facts(folder: os.PathLike | str, step: int) -> dict:
  """Returns the facts that were saved beside the state.

  Raises:
    Damaged: they cannot be read.
  """
  path = pathlib.Path(folder).resolve() / str(step)
  return _unmarked(_load(path, facts=_FACTS)['facts'])


def deadline(state: PyTree) -> int:
  """Returns the seconds that a save of the state may take."""
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
  seconds = size / jax.process_count() / _BYTES_PER_SECOND
  return max(_LEAST_SECONDS, math.ceil(seconds))


def checkpointer(seconds: int = _LEAST_SECONDS) -> ocp.AsyncCheckpointer:
  """Returns Orbax's reader and writer of one step, with a save's deadline.

  It marks a finished step by a commit file, the sign that `folders.steps` looks
  for. Orbax's other mode marks it by a rename: never mix the two, or a
  half-written step would be listed.
  """
  handler = ocp.CompositeCheckpointHandler(
    state=ocp.StandardCheckpointHandler(), facts=ocp.JsonCheckpointHandler()
  )
  mode = ocp.options.AtomicityMode.COMMIT_FILE
  return ocp.AsyncCheckpointer(
    handler,
    async_options=ocp.options.AsyncOptions(timeout_secs=seconds),
    atomicity_options=ocp.options.AtomicityOptions(mode=mode),
    file_options=ocp.options.FileOptions(path_permission_mode=0o700),
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


class _Verdict(NamedTuple):
  reason: str  # why the step is refused; '' if it is not
  sealed: dict | None
  unfinished: bool  # cut off before its seal, which is no damage


def _judge(folder, step, allow_unsealed) -> _Verdict:
  """Returns process 0's verdict on a step's files, in every process."""
  reason, sealed, unfinished = '', None, False
  if jax.process_index() == 0:
    try:
      sealed = check(folder, step)
      if sealed is None and not allow_unsealed:
        marked = _load(folder / str(step), facts=_FACTS)['facts']
        unfinished = _MARK in marked
        why = 'was written by a version without seals'
        why = 'was cut off before its seal' if unfinished else why
        reason = f'{folder}/{step}: {why}; --allow_unsealed takes it anyhow'
    except Damaged as error:
      reason = str(error)
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    verdict = np.array([bool(reason), unfinished], np.int32)
    verdict = multihost_utils.broadcast_one_to_all(verdict)
    refused, unfinished = map(bool, verdict)
    if jax.process_index() != 0:
      reason = 'process 0 refused it' if refused else ''
      sealed = None if refused else seal.read(folder / str(step))
  return _Verdict(reason, sealed, unfinished)


def _read(path, step, like, sealed, renamed) -> Restored:
  """Returns the step in the shardings of `like`, its fingerprints compared."""
  stored, wanted = _metadata(path), like
  older = {renamed[name]: name for name in renamed if name in stored}
  if older:
    fields = {f.name: getattr(like, f.name) for f in dataclasses.fields(like)}
    wanted = {older.get(name, name): tree for name, tree in fields.items()}
  _compare(_described(stored), _described(wanted), path)
  abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, wanted)
  items = _load(
    path,
    state=ocp.args.StandardRestore(abstract),
    facts=_FACTS,
  )
  if sealed is not None:
    fingerprints, _ = fingerprint.read(fingerprint.of(items['state']))
    for name, value in sealed['fingerprints'].items():
      if fingerprints.get(name) != value:
        raise Damaged(f'{path}: {name} is not, once read, what was saved')
  state = items['state']
  if older:
    state = {renamed.get(name, name): tree for name, tree in state.items()}
    state = dataclasses.replace(like, **state)
  return Restored(step, state, _unmarked(items['facts']))


def _unmarked(facts: dict) -> dict:
  return {name: value for name, value in facts.items() if name != _MARK}


def _metadata(path):
  """Returns the tree of shapes and dtypes that a step's files describe."""
  with _orbax_for(path) as orbax:
    return orbax.metadata(path).item_metadata['state'].tree


def _load(path, **items):
  with _orbax_for(path) as orbax:
    return orbax.restore(path, args=ocp.args.Composite(**items))


@contextlib.contextmanager
def _orbax_for(path):
  """Yields a reader whose errors, of many types in a damaged file, are one."""
  orbax = checkpointer()
  try:
    yield orbax
  except Exception as error:
    text = f'{type(error).__name__}: {_first_line(error)}'
    raise Damaged(f'{path}: cannot be read ({text})') from error
  finally:
    orbax.close()


def _first_line(error: Exception) -> str:
  return (str(error).strip().splitlines() or [''])[0]


def _described(tree: Any) -> dict[str, tuple]:
  """Returns {leaf's name: (shape, dtype)}."""
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {
    fingerprint.name(path): (tuple(leaf.shape), str(leaf.dtype))
    for path, leaf in leaves
  }


def _compare(stored: dict, wanted: dict, path: pathlib.Path):
  for name in sorted(stored.keys() | wanted.keys()):
    if stored.get(name) != wanted.get(name):
      raise ConfigError(
        f'{path}: {name} is {stored.get(name, "absent")} in the checkpoint, '
        f'but {wanted.get(name, "absent")} in this run; use another workdir'
      )
