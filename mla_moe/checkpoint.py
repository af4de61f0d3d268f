"""Checkpoints: the whole state by Orbax, asynchronous, restored strictly.

A step counts only when its commit file is there, for writing and for reading;
the two modes of Orbax must never be mixed, because the other one lists
half-written steps. Restoring compares tree, shapes and dtypes first: Orbax by
itself casts a dtype silently.
"""

from __future__ import annotations

import os
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from mla_moe.config import ConfigError
from mla_moe.types import PyTree


def manager(folder: os.PathLike | str, keep: int) -> ocp.CheckpointManager:
  """The manager of a run's checkpoints; use it in a `with` block.

  Without the block a save that has not finished is lost at exit.
  """
  path = pathlib.Path(folder).resolve()
  path.mkdir(parents=True, exist_ok=True, mode=0o700)
  mode = ocp.options.AtomicityMode.COMMIT_FILE
  options = ocp.CheckpointManagerOptions(
    max_to_keep=keep,
    cleanup_tmp_directories=True,
    atomicity_options=ocp.options.AtomicityOptions(mode=mode),
  )
  handlers = {
    'state': ocp.StandardCheckpointHandler(),
    'facts': ocp.JsonCheckpointHandler(),
  }
  return ocp.CheckpointManager(path, options=options, item_handlers=handlers)


def save(
  checkpoints: ocp.CheckpointManager, step: int, state: PyTree, facts: dict
) -> None:
  """Saves `state`, and `facts` as JSON, as `step` (again, if it is there).

  Returns when the arrays have been copied; they are written meanwhile.
  """
  if step in checkpoints.all_steps():
    return
  items = ocp.args.Composite(
    state=ocp.args.StandardSave(state), facts=ocp.args.JsonSave(facts)
  )
  checkpoints.save(step, args=items, force=True)


def restore(
  checkpoints: ocp.CheckpointManager, like: PyTree
) -> tuple[int, PyTree, dict] | None:
  """(step, state, facts) of the last step, or None where there is none.

  `like` is a state of the wanted tree, shapes, dtypes and shardings.

  Raises:
    ConfigError: the checkpoint holds something else; names the first leaf.
  """
  step = checkpoints.latest_step()
  if step is None:
    return None
  saved = checkpoints.item_metadata(step)['state']
  _compare(
    _described(saved), _described(like), f'{checkpoints.directory}/{step}'
  )
  abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
  items = ocp.args.Composite(
    state=ocp.args.StandardRestore(abstract), facts=ocp.args.JsonRestore()
  )
  out = checkpoints.restore(step, args=items)
  return step, out['state'], out['facts']


def _described(tree: Any) -> dict[str, tuple]:
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  plain = lambda path: '.'.join(
    str(getattr(key, 'key', getattr(key, 'name', getattr(key, 'idx', key))))
    for key in path
  )
  return {
    plain(path): (tuple(leaf.shape), str(leaf.dtype)) for path, leaf in leaves
  }


def _compare(saved: dict, wanted: dict, where: str):
  for name in sorted(saved.keys() | wanted.keys()):
    if saved.get(name) != wanted.get(name):
      raise ConfigError(
        f'{where}: {name} is {saved.get(name, "absent")} in the checkpoint, '
        f'but {wanted.get(name, "absent")} in this run; use another workdir'
      )
