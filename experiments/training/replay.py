"""A step computed again: the cheapest check of silent data corruption.

The step starts from the last sealed checkpoint before it, on the same mesh and
versions, where results are the same bit for bit; so a fingerprint that differs
from what the run wrote down means that one of the two computed it wrongly.
"""

from __future__ import annotations

import contextlib
import pathlib

from experiments import cli, workdir
from experiments.training.course import resume, shape
from mla_moe.config import ConfigError


def replay(folder: pathlib.Path, number: int, *, unsealed: bool) -> None:
  """Computes step `number` of the run again, and compares.

  Raises:
    ConfigError: nothing was written down for the step, or no checkpoint from
      before it is left.
    cli.Stopped: the state after the step is not what it was.
  """
  import jax

  from experiments.training import preparation
  from mla_moe.checkpoint import fingerprint
  from mla_moe.data import batches
  from mla_moe.train import optim
  from mla_moe.train.state import init_state

  config = workdir.read_config(folder)
  told, passed = _told(folder, number)
  ready = preparation.prepare(config, folder)
  with jax.set_mesh(ready.mesh) if ready.mesh else contextlib.nullcontext():
    state = init_state(jax.random.key(0), config, ready.mesh)
    like = jax.tree.map(shape, state)
    del state
    course = resume(ready, like, before=number, unsealed=unsealed)
    if course is None:
      raise ConfigError(
        f'--replay={number}: {folder} has no checkpoint from before it'
      )
    start, state, counts = course
    del course
    stream = batches.batches(
      ready.text.train,
      config.data,
      ready.text.bos_id,
      start,
      number,
      left_out=counts.passed if passed is None else passed,
    )
    for i, batch in enumerate(stream, start):
      seen, _ = batches.span(config.data, i)
      rates = optim.rates(config.optim, i, seen * config.data.seq_len)
      state, _ = ready.train(
        state,
        preparation.place(ready, batch),
        preparation.place(ready, rates),
      )
    found, apart = fingerprint.read(fingerprint.of(state))
  wrong = sorted(name for name in found if found[name] != told.get(name))
  devices = ', '.join(str(d) for d in jax.local_devices())
  if wrong or apart:
    raise cli.Stopped(
      f'step {number}, computed again from step {start} on {devices}: '
      f'{len(wrong)} of {len(found)} arrays differ from what the run wrote '
      f'down, first {(wrong or apart)[0]}; one of the two is wrong'
    )
  print(
    f'Step {number}, computed again from step {start} on {devices}: all '
    f'{len(found)} arrays are the same.'
  )


def _told(folder: pathlib.Path, number: int) -> tuple[dict, int | None]:
  """What was written down of the state after a step, and its text's offset."""
  from mla_moe.checkpoint import folders, store

  rows = workdir.rows(folder / 'fingerprints.jsonl')
  for row in rows:
    if row['step'] == number:
      return row['leaves'], row['passed']
  saved = folder / 'checkpoints'
  if number in folders.steps(saved):
    sealed = store.check(saved, number)
    if sealed:
      return sealed['fingerprints'], sealed['facts']['guard']['passed']
  known = sorted({*(row['step'] for row in rows), *folders.steps(saved)})
  near = sorted(known, key=lambda step: abs(step - number))[:3]
  raise ConfigError(
    f'--replay={number}: no fingerprints of this step were kept; near it are '
    f'those of {", ".join(map(str, sorted(near))) or "none"}'
  )
