"""How far a run has come, and how a checkpoint brings it back there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from mla_moe.config import ConfigError

from .. import workdir
from ..adapters import base as frozen_base
from . import skips


class Progress(NamedTuple):
  """A run after `number` steps: its state, and its counts of skipped steps."""

  number: int
  state: Any
  counts: skips.Counts


def resume(
  setup,
  *,
  before: int | None = None,
  allow_unsealed: bool = False,
  set_aside: Callable[[Any, int], Any] | None = None,
) -> Progress | None:
  """Returns the progress at the newest complete checkpoint, or None.

  The arguments are `store.restore`'s.

  Raises:
    ConfigError: the checkpoint is of another text or another config.
  """
  from mla_moe.train.state import RENAMED

  from ..checkpointing import store
  from . import program

  restored = store.restore(
    workdir.checkpoints(setup.path),
    program.state_shapes(setup.config, setup.mesh),
    before=before,
    allow_unsealed=allow_unsealed,
    set_aside=set_aside,
    renamed=RENAMED,
  )
  if restored is None:
    return None
  number, state, facts = restored
  # '' is a converted release: it has seen no text of ours.
  if facts['corpus'] not in ('', setup.source.fingerprint):
    config = setup.config
    name = f'rl.task={config.rl.task!r}'
    if not config.rl.task:
      name = f'data.source={config.data.source!r}'
    raise ConfigError(
      f'{name}: the text has changed since '
      f'step {number}; restore it, or start anew from its weights in another '
      f'--workdir: --init={setup.path}'
    )
  frozen_base.compare(setup.base, facts, setup.config, number)
  config = workdir.with_paths(setup.path)
  if workdir.of_another(config, facts.get('config', '')):
    raise ConfigError(
      f'{setup.path}/checkpoints/{number}: was saved by a run of another '
      'config than config.json says; put back the one that belongs to it, or '
      f'start anew from its weights in another --workdir: --init={setup.path}'
    )
  return Progress(number, state, skips.read(facts))
