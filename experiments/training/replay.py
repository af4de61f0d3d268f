"""A step computed again: the cheapest check for silent data corruption.

The step starts from the last sealed checkpoint before it. On the same mesh and
versions its result is the same bit for bit; so if a fingerprint of the state
differs from the one that the run recorded, one of the two computations was
wrong.
"""

from __future__ import annotations

import contextlib
import pathlib
from typing import Any

from mla_moe.config import ConfigError

from .. import cli, distributed, workdir
from . import progress, skips


def replay(
  folder: pathlib.Path,
  number: int,
  *,
  allow_unsealed: bool = False,
  open_source: Any = None,
) -> None:
  """Computes step `number` of the run again, and compares.

  `open_source` is that of `preparation.prepare`.

  Raises:
    ConfigError: the run recorded no fingerprints of the step, or has no
      checkpoint from before it.
    cli.Stopped: the state after the step differs from the recorded one.
  """
  import jax

  from ..checkpointing import fingerprint
  from . import preparation, source, steps

  config = workdir.read_config(folder)
  recorded, left_out = _recorded(folder, number)
  open_source = open_source or source.open_text
  setup = preparation.prepare(config, folder, open_source)
  setup.source.writes = False
  with contextlib.ExitStack() as stack:
    stack.callback(setup.source.close)
    if setup.mesh:
      stack.enter_context(jax.set_mesh(setup.mesh))
    start = progress.resume(setup, before=number, allow_unsealed=allow_unsealed)
    if start is None:
      raise ConfigError(
        f'--replay={number}: {folder} has no checkpoint from before it'
      )
    first, state, counts = start
    del start  # the steps reuse its buffers
    if left_out is None:
      left_out = counts.left_out
    for i in range(first + 1, number + 1):
      batch = setup.source.batch(setup, i, state, left_out)
      state, _ = steps.take(setup, state, batch, steps.rates(config, i))
    computed, apart = fingerprint.read(fingerprint.of(state))
  wrong = sorted(x for x in computed if computed[x] != recorded.get(x))
  devices = ', '.join(str(d) for d in jax.local_devices())
  if wrong or apart:
    raise cli.Stopped(
      f'step {number}, computed again from step {first} on {devices}: '
      f'{len(wrong)} of {len(computed)} arrays differ from what the run wrote '
      f'down, first {(wrong or apart)[0]}; one of the two is wrong'
    )
  if distributed.first():
    print(
      f'Step {number}, computed again from step {first} on {devices}: all '
      f'{len(computed)} arrays are the same.'
    )


def _recorded(
  folder: pathlib.Path, number: int
) -> tuple[dict[str, int], int | None]:
  """Returns the fingerprints of the state after a step, and its `left_out`.

  They are in fingerprints.jsonl, or in the seal of the step's checkpoint.
  """
  from ..checkpointing import folders, store

  rows = workdir.rows(folder / 'fingerprints.jsonl')
  for row in rows:
    if row['step'] == number:
      left_out = row.get('left_out', row.get('passed'))  # the older name
      return _renamed(row['leaves']), left_out
  checkpoints = workdir.checkpoints(folder)
  if number in folders.steps(checkpoints):
    sealed = store.check(checkpoints, number)
    if sealed:
      left_out = skips.read(sealed['facts']).left_out
      return _renamed(sealed['fingerprints']), left_out
  known = sorted({*(row['step'] for row in rows), *folders.steps(checkpoints)})
  near = sorted(known, key=lambda step: abs(step - number))[:3]
  raise ConfigError(
    f'--replay={number}: no fingerprints of this step were kept; near it are '
    f'those of {", ".join(map(str, sorted(near))) or "none"}'
  )


def _renamed(leaves: dict[str, int]) -> dict[str, int]:
  """Returns the fingerprints under today's names of the state's fields."""
  from mla_moe.train.state import RENAMED

  parts = {name: name.partition('.') for name in leaves}
  return {
    RENAMED.get(field, field) + dot + rest: leaves[name]
    for name, (field, dot, rest) in parts.items()
  }
