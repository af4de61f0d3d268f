"""Where a run is, and how a checkpoint brings it back."""

from __future__ import annotations

from typing import Any, NamedTuple

from experiments import workdir
from experiments.training import skips
from mla_moe.config import ConfigError


class Course(NamedTuple):
  """Where a run is: its state after `number` steps, and its guard's counts."""

  number: int
  state: Any
  guard: skips.Guard


def resume(
  ready,
  like,
  *,
  before: int | None = None,
  unsealed: bool = False,
  aside: bool = False,
) -> Course | None:
  """The course at the last checkpoint that is whole, or None.

  Raises:
    ConfigError: it is of another text, or of another config.
  """
  from mla_moe.checkpoint import store
  from mla_moe.train.state import RENAMED

  restored = store.restore(
    ready.path / 'checkpoints',
    like,
    before=before,
    allow_unsealed=unsealed,
    move_refused=aside,
    renamed=RENAMED,
  )
  if restored is None:
    return None
  number, state, facts = restored
  # '' is a released checkpoint, which has seen no text of ours.
  if facts['corpus'] not in ('', ready.text.fingerprint):
    raise ConfigError(
      f'data.source={ready.config.data.source!r}: the text has changed since '
      f'step {number}; restore it, or start in another workdir'
    )
  if workdir.of_another(ready.config, facts.get('config', '')):
    raise ConfigError(
      f'{ready.path}/checkpoints/{number}: was saved by a run of another '
      'config than config.json says; put back the one that belongs to it'
    )
  return Course(number, state, skips.Guard(**facts.get('guard', {})))


def shape(x):
  """What stands for an array where its memory is not wanted."""
  import jax

  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
