"""Checkpoints: the whole state, written behind training's back, then sealed.

A folder of checkpoints has one folder a step. Orbax writes the arrays and, when
all of them are there, a commit file; then `seal.json` is written (see `seal`),
and only then may older steps go. So at every instant the newest sealed step is
whole, and a step counts as saved when its seal is there. Reading goes from the
newest step down: it compares the files with the seal, the tree, shapes and
dtypes with those wanted (Orbax by itself casts without a word), and the
fingerprints of what has been read with those of what was saved; a damaged step
is refused in a loud line, and the one before it is taken.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import importlib.metadata
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from mla_moe.checkpoint import faults, fingerprint, seal
from mla_moe.config import ConfigError
from mla_moe.types import PyTree

Damaged = seal.Damaged
_COMMIT = 'commit_success.txt'
# Among the facts that Orbax writes: a seal was to follow. Without it a step is
# of a version that had none.
_MARK = 'to_be_sealed'
_REFUSED = 'refused'
_REMOVED = '.removed'
_FACTS = ocp.args.JsonRestore()


class NotSaved(RuntimeError):
  """A step could not be saved; one line says where and why."""


class Restored(NamedTuple):
  """A checkpoint that has been read."""

  step: int
  state: PyTree
  facts: dict


class Writer:
  """Saves steps of one run into `folder`; use it in a `with` block.

  A save returns when the arrays have been copied; the rest happens in a thread,
  whose errors the next call raises. Kept are the newest `keep` sealed steps,
  every step that `keep_every` divides, and the `keep_best` ones of the lowest
  `facts[best]`.

  Raises (every method):
    NotSaved: this step, or the one before, could not be written. What was
      sealed is as it was, and the next save may succeed.
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
      _clean(self.folder)
    self._policy = keep, keep_every, keep_best
    self._best = best
    self._orbax = checkpointer()
    self._thread = concurrent.futures.ThreadPoolExecutor(1)
    self._running = None
    self._last = None

  def __enter__(self) -> Writer:
    return self

  def __exit__(self, kind, *_) -> None:
    try:
      self.wait()
    except Exception:
      if kind is None:  # never instead of the error that ends the block
        raise
    finally:
      self._thread.shutdown()
      self._orbax.close()

  def save(self, step: int, state: PyTree, facts: dict) -> None:
    """Begins to save `state`, and `facts` as JSON, as `step`."""
    self.wait()
    path = self.folder / str(step)
    if step == self._last and path.exists():
      return
    pending = fingerprint.of(state)
    items = ocp.args.Composite(
      state=ocp.args.StandardSave(state),
      facts=ocp.args.JsonSave(facts | {_MARK: seal.FORMAT}),
    )
    try:
      faults.reach('before_write', step)
      if not self.folder.is_dir():  # Orbax would make it anew, without a lock
        raise FileNotFoundError(errno.ENOENT, 'the folder is gone')
      if path.exists() and jax.process_index() == 0:
        set_aside(self.folder, step)
      self._orbax.save(path, args=items)
    except Exception as error:  # Orbax's are of many types
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

  def _failed(self, path, error) -> NotSaved:
    """The error in a line, after making room for the next save."""
    with contextlib.suppress(Exception):  # it may still be writing
      self._orbax.wait_until_finished()
    if jax.process_index() == 0 and self.folder.is_dir():
      _clean(self.folder)
    try:
      free = f'{shutil.disk_usage(self.folder).free / 2**20:,.0f} MiB are free'
    except OSError:
      free = 'the folder is gone'
    text = (str(error).strip().splitlines() or [''])[0]
    return NotSaved(
      f'{path}: could not be saved ({type(error).__name__}: {text}; {free})'
    )

  def _finish(self, step, path, pending, facts):
    faults.reach('during_write', step)
    self._orbax.wait_until_finished()
    if jax.process_index() != 0:
      return
    prints, _ = fingerprint.read(pending)
    faults.reach('before_seal', step)
    seal.write(
      path,
      {
        'step': step,
        'facts': facts,
        'fingerprints': prints,
        'versions': versions(),
        'processes': jax.process_count(),
      },
    )
    faults.reach('after_seal', step)
    self._prune()

  def _prune(self):
    scores = {}
    for step in steps(self.folder):
      try:
        sealed = seal.read(self.folder / str(step))
      except Damaged:
        continue
      if sealed is not None:
        scores[step] = sealed['facts'].get(self._best)
    for step in scores.keys() - retained(scores, *self._policy):
      remove(self.folder, step)


def retained(
  scores: dict[int, float | None], keep: int, every: int = 0, best: int = 0
) -> set[int]:
  """The steps that the policy keeps, of those with their scores (or None)."""
  newest = sorted(scores)[-keep:]
  spaced = [step for step in scores if every and step % every == 0]
  scored = [step for step, score in scores.items() if score is not None]
  ranked = sorted(scored, key=lambda step: (scores[step], -step))[:best]
  return {*newest, *spaced, *ranked}


def steps(folder: os.PathLike | str) -> list[int]:
  """Committed steps, ascending; nothing else in the folder counts as one."""
  path = pathlib.Path(folder)
  if not path.is_dir():
    return []
  return sorted(
    int(child.name)
    for child in path.iterdir()
    if _is_step(child.name) and (child / _COMMIT).is_file()
  )


def check(folder: os.PathLike | str, step: int) -> dict | None:
  """The step's seal, after comparing every file with it; None: it has none.

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
  unsealed: bool = False,
  aside: bool = False,
  say: Callable[[str], Any] = print,
) -> Restored | None:
  """The newest step that is whole, or None where no step was ever sealed.

  A run that was killed in its very first save has a step without its seal, and
  begins again.

  Args:
    like: a state of the wanted tree, shapes, dtypes and shardings, which need
      not be those that the checkpoint was saved with.
    before: only steps below this one.
    unsealed: take a step without a seal, too: nothing vouches for its bytes.
    aside: move refused steps, and those not `before`, into the folder
      `refused`, out of the way of those that the run will write.
    say: told every refusal.

  Raises:
    ConfigError: a step holds something else (names the first leaf), or every
      step was refused (Damaged).
  """
  folder = pathlib.Path(folder).resolve()
  found = steps(folder)
  wanted = [s for s in reversed(found) if before is None or s < before]
  refusals, begun = [], True
  if aside and jax.process_index() == 0:
    for step in set(found) - set(wanted):
      set_aside(folder, step)
  for step in wanted:
    reason, sealed, cut = _judge(folder, step, unsealed)
    begun = begun and cut
    if not reason:
      try:
        return _read(folder / str(step), step, like, sealed)
      except Damaged as error:
        reason = str(error)
    refusals.append(reason)
    say(f'CHECKPOINT {step} REFUSED. {reason}')
    if aside and jax.process_index() == 0:
      place = set_aside(folder, step)
      say(f'It now lies in {place}.')
  if refusals and not begun:
    raise Damaged(
      f'{folder}: no step can be trusted; the newest: {refusals[0]}'
    )
  return None


def facts(folder: os.PathLike | str, step: int) -> dict:
  """What was saved beside the state.

  Raises:
    Damaged: it cannot be read.
  """
  path = pathlib.Path(folder).resolve() / str(step)
  return _unmarked(_load(path, facts=_FACTS)['facts'])


def set_aside(folder: os.PathLike | str, step: int) -> pathlib.Path:
  """Moves the step into `refused`, where nothing reads it; says where to."""
  folder = pathlib.Path(folder)
  place = folder / _REFUSED
  place.mkdir(exist_ok=True, mode=0o700)
  number = 0
  while (target := place / f'{step}-{number}').exists():
    number += 1
  os.rename(folder / str(step), target)
  return target


def remove(folder: os.PathLike | str, step: int) -> None:
  """Deletes a step; killed half-way, what is left is known as a leftover."""
  path = pathlib.Path(folder) / str(step)
  gone = path.with_suffix(_REMOVED)
  if gone.exists():
    shutil.rmtree(gone)
  os.rename(path, gone)
  shutil.rmtree(gone)


def checkpointer() -> ocp.AsyncCheckpointer:
  """Orbax's part of saving and reading a step.

  Steps are folders with a commit file, which is what `steps` looks for;
  Orbax's other mode would list a half-written step: never mix the two.
  """
  handler = ocp.CompositeCheckpointHandler(
    state=ocp.StandardCheckpointHandler(), facts=ocp.JsonCheckpointHandler()
  )
  mode = ocp.options.AtomicityMode.COMMIT_FILE
  return ocp.AsyncCheckpointer(
    handler,
    atomicity_options=ocp.options.AtomicityOptions(mode=mode),
    file_options=ocp.options.FileOptions(path_permission_mode=0o700),
  )


def versions() -> dict[str, str]:
  """Of the packages that a saved number depends on."""
  found = {}
  for package in ('mla_moe', 'jax', 'jaxlib', 'flax', 'optax'):
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      found[package] = '?'
  return found | {'orbax-checkpoint': ocp.__version__}


def _is_step(name: str) -> bool:
  return name.isascii() and name.isdigit() and name == str(int(name))


def _clean(folder: pathlib.Path):
  """Deletes what a kill left: steps without a commit file, half-deleted ones.

  A folder of somebody else's stays, whatever its name.
  """
  for path in folder.iterdir():
    step = path.name.removesuffix(_REMOVED)
    ours = (path / '_CHECKPOINT_METADATA').exists()
    half = ours and not (path / _COMMIT).exists()
    if _is_step(step) and (half or step != path.name):
      shutil.rmtree(path)


def _judge(folder, step, unsealed) -> tuple[str, dict | None, bool]:
  """(why the step is refused or '', its seal, was it merely cut off?).

  One process reads the files and decides for all.
  """
  reason, sealed, cut = '', None, False
  if jax.process_index() == 0:
    try:
      sealed = check(folder, step)
      if sealed is None and not unsealed:
        cut = _MARK in _load(folder / str(step), facts=_FACTS)['facts']
        why = 'was cut off before its seal'
        why = why if cut else 'was written by a version without seals'
        reason = f'{folder}/{step}: {why}; --allow_unsealed takes it anyhow'
    except Damaged as error:
      reason = str(error)
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    told = np.array([bool(reason), cut], np.int32)
    bad, cut = map(bool, multihost_utils.broadcast_one_to_all(told))
    if jax.process_index() != 0:
      reason = 'process 0 refused it' if bad else ''
      sealed = None if bad else seal.read(folder / str(step))
  return reason, sealed, cut


def _read(path, step, like, sealed) -> Restored:
  saved = _metadata(path)
  _compare(_described(saved), _described(like), path)
  abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
  out = _load(
    path,
    state=ocp.args.StandardRestore(abstract),
    facts=_FACTS,
  )
  if sealed is not None:
    prints, _ = fingerprint.read(fingerprint.of(out['state']))
    for name, value in sealed['fingerprints'].items():
      if prints.get(name) != value:
        raise Damaged(f'{path}: {name} is not, once read, what was saved')
  return Restored(step, out['state'], _unmarked(out['facts']))


def _unmarked(facts: dict) -> dict:
  return {name: value for name, value in facts.items() if name != _MARK}


def _metadata(path):
  reader = checkpointer()
  try:
    return reader.metadata(path).item_metadata['state'].tree
  except Exception as error:  # whatever Orbax meets in a damaged file
    raise _unreadable(path, error) from error
  finally:
    reader.close()


def _load(path, **items):
  reader = checkpointer()
  try:
    return reader.restore(path, args=ocp.args.Composite(**items))
  except Exception as error:  # whatever Orbax meets in a damaged file
    raise _unreadable(path, error) from error
  finally:
    reader.close()


def _unreadable(path, error) -> Damaged:
  text = (str(error).strip().splitlines() or [''])[0]
  return Damaged(f'{path}: cannot be read ({type(error).__name__}: {text})')


def _described(tree: Any) -> dict[str, tuple]:
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {
    fingerprint.name(path): (tuple(leaf.shape), str(leaf.dtype))
    for path, leaf in leaves
  }


def _compare(saved: dict, wanted: dict, where: pathlib.Path):
  for name in sorted(saved.keys() | wanted.keys()):
    if saved.get(name) != wanted.get(name):
      raise ConfigError(
        f'{where}: {name} is {saved.get(name, "absent")} in the checkpoint, '
        f'but {wanted.get(name, "absent")} in this run; use another workdir'
      )
