"""Checkpoints are read checked: a damaged step is refused, never loaded.

A step has the arrays and facts that Orbax wrote, and a seal: the size and hash
of every file (`seal`) and a number for every array as it was on the devices
(`fingerprint`). `saving` writes them.

Reading begins with the newest step and compares three things: the names and
sizes of the files with the seal; tree, shapes and dtypes with those of the run
(Orbax by itself casts silently); the fingerprints of the arrays with those in
the seal. No file is hashed, unless the arrays differ: to name the damaged one.
A step that fails is refused in one printed line, and the step before it is
tried.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from etils import epath

from mla_moe.config import ConfigError
from mla_moe.types import PyTree

from . import agreement, fingerprint, folders, seal, storage

Damaged = seal.Damaged
# Orbax writes this key with the facts, before the seal. A step that has it but
# no seal was cut off; a step without it is older than seals.
MARK = 'to_be_sealed'
_FACTS = ocp.args.JsonRestore()


class Restored(NamedTuple):
  """A checkpoint in memory: its step, its state and its facts."""

  step: int
  state: PyTree
  facts: dict


def check(folder: os.PathLike | str, step: int) -> dict | None:
  """Returns the step's seal, after comparing every file with it.

  None if the step has no seal.

  Raises:
    Damaged: one line, which names the file.
  """
  path = storage.path(folder) / str(step)
  try:
    sealed = seal.read(path)
    if sealed is not None:
      seal.check(path, sealed)
      if text := seal.damage(path, sealed):
        raise Damaged(text)
  except OSError as error:
    raise Damaged(f'{path}: cannot be read ({error.strerror})') from None
  return sealed


def restore(
  folder: os.PathLike | str,
  like: PyTree,
  *,
  before: int | None = None,
  allow_unsealed: bool = False,
  set_aside: Callable[[Any, int], Any] | None = None,
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
    set_aside: called by process 0 with the folder and a refused step, or one
      not `before`: it moves the step, so that the run can write one of the same
      number, and returns the new place.
    renamed: {name in older checkpoints: field of `like`}, a dataclass.
    say: called with a line for every refusal.

  Raises:
    ConfigError: a step of another tree, shape or dtype (names the first leaf).
    Damaged: every step was refused.
  """
  folder = storage.path(folder)
  steps = folders.steps(folder)
  wanted = [s for s in reversed(steps) if before is None or s < before]
  refusals, all_unfinished = [], True
  if set_aside and jax.process_index() == 0:
    for step in set(steps) - set(wanted):
      set_aside(folder, step)
  for step in wanted:
    reason, sealed, unfinished = _judge(folder, step, allow_unsealed)
    all_unfinished = all_unfinished and unfinished
    if not reason:
      path = folder / str(step)
      try:
        return _read(path, step, like, sealed, renamed or {})
      except ConfigError as error:
        reason = _damage(path, sealed)
        if not reason and not isinstance(error, Damaged):
          raise
        reason = reason or str(error)
    if not (folder / str(step) / folders.COMMIT).exists():  # a newer one exists
      return restore(
        folder,
        like,
        before=before,
        allow_unsealed=allow_unsealed,
        set_aside=set_aside,
        renamed=renamed,
        say=say,
      )
    refusals.append(reason)
    say(f'CHECKPOINT {step} REFUSED. {reason}')
    if set_aside and jax.process_index() == 0:
      say(f'It now lies in {set_aside(folder, step)}.')
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
  path = storage.path(folder) / str(step)
  return _unmarked(_load(path, facts=_FACTS)['facts'])


class _Verdict(NamedTuple):
  reason: str  # why the step is refused; '' if it is not
  sealed: dict | None
  unfinished: bool  # cut off before its seal, which is no damage


def _judge(folder, step, allow_unsealed) -> _Verdict:
  """Returns process 0's verdict on a step's names, in every process."""
  path, verdict = folder / str(step), _Verdict('', None, False)
  if jax.process_index() == 0:
    try:
      verdict = _verdict(path, allow_unsealed)
    except OSError as error:
      if storage.of(path).is_service:  # a service that fails damages nothing
        raise
      text = f'{path}: cannot be read ({error.strerror})'
      verdict = verdict._replace(reason=text)
    except Damaged as error:
      verdict = verdict._replace(reason=str(error))
  text = json.dumps(verdict)
  answer = agreement.agree(next(agreement.turns), text, lambda texts: texts[0])
  return _Verdict(*json.loads(answer))


def _verdict(path, allow_unsealed) -> _Verdict:
  sealed = seal.read(path)
  if sealed is not None:
    seal.check(path, sealed)
  if sealed is not None or allow_unsealed:
    return _Verdict('', sealed, False)
  unfinished = MARK in _load(path, facts=_FACTS)['facts']
  why = 'was written by a version without seals'
  why = 'was cut off before its seal' if unfinished else why
  reason = f'{path}: {why}; --allow_unsealed takes it anyhow'
  return _Verdict(reason, None, unfinished)


def _damage(path, sealed) -> str:
  """Returns the line that names a damaged file, or ''; each process looks."""
  text = ''
  if sealed is not None:
    try:
      text = seal.damage(path, sealed, jax.process_index(), jax.process_count())
    except (OSError, Damaged) as error:
      if storage.of(path).is_service and not isinstance(error, Damaged):
        raise
      text = str(error)
    except ConfigError:  # a copy from a bucket
      text = ''
  return _first(text)


def _first(text: str) -> str:
  """Returns the first text of all processes that is not ''."""
  first = lambda texts: next(filter(None, texts), '')
  return agreement.agree(next(agreement.turns), text, first)


def _read(path, step, like, sealed, renamed) -> Restored:
  """Returns the step in the shardings of `like`, its fingerprints compared."""
  items, failure = {}, ''
  try:
    stored, wanted = _metadata(path), like
    older = {renamed[name]: name for name in renamed if name in stored}
    if older:
      fields = {f.name: getattr(like, f.name) for f in dataclasses.fields(like)}
      wanted = {older.get(name, name): tree for name, tree in fields.items()}
    _compare(_described(stored), _described(wanted), path)
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, wanted)
    state = ocp.args.StandardRestore(abstract)
    items = _load(path, state=state, facts=_FACTS)
  except Damaged as error:
    failure = str(error)
  if failure := _first(failure):  # one that reads would wait for the others
    is_whole = sealed and storage.of(path).is_service  # if its listing says so
    raise (ConfigError if is_whole else Damaged)(failure)
  if sealed is not None:
    fingerprints, _ = fingerprint.read(fingerprint.of(items['state']))
    for name, value in sealed['fingerprints'].items():
      if fingerprints.get(name) != value:
        raise Damaged(f'{path}: {name} is not, once read, what was saved')
  state = items['state']
  if older:
    state = {renamed.get(name, name): tree for name, tree in state.items()}
    state = dataclasses.replace(like, **state)
  facts = sealed['facts'] if sealed else _unmarked(items['facts'])
  return Restored(step, state, facts)


def _unmarked(facts: dict) -> dict:
  return {name: value for name, value in facts.items() if name != MARK}


def _metadata(path):
  """Returns the tree of shapes and dtypes that a step's files describe."""
  with _orbax_for(path) as orbax:
    return orbax.metadata(epath.Path(path)).item_metadata['state'].tree


def _load(path, **items):
  """Returns the items; no process waits for another, whose reads may fail."""
  with _orbax_for(path) as orbax:
    return orbax.restore(epath.Path(path), ocp.args.Composite(**items))


@contextlib.contextmanager
def _orbax_for(path):
  """Yields a reader whose errors, of many types in a damaged file, are one."""
  orbax = handler()
  try:
    yield orbax
  except Exception as error:
    text = f'{type(error).__name__}: {first_line(error)}'
    raise Damaged(f'{path}: cannot be read ({text})') from error
  finally:
    orbax.close()


def handler() -> ocp.CompositeCheckpointHandler:
  """Returns Orbax's reader and writer of a step's two parts."""
  return ocp.CompositeCheckpointHandler(
    state=ocp.StandardCheckpointHandler(), facts=ocp.JsonCheckpointHandler()
  )


def first_line(error: Exception) -> str:
  """Returns the first line of an error's text."""
  return (str(error).strip().splitlines() or [''])[0]


def _described(tree: Any) -> dict[str, tuple]:
  """Returns {leaf's name: (shape, dtype)}."""
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {
    fingerprint.name(path): (tuple(leaf.shape), str(leaf.dtype))
    for path, leaf in leaves
  }


def _compare(stored: dict, wanted: dict, path: os.PathLike):
  for name in sorted(stored.keys() | wanted.keys()):
    if stored.get(name) != wanted.get(name):
      raise ConfigError(
        f'{path}: {name} is {stored.get(name, "absent")} in the checkpoint, '
        f'but {wanted.get(name, "absent")} in this run; use another workdir'
      )
