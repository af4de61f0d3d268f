"""Scores of answers: the log-probabilities that an update compares with.

Three models may read a rollout's answers before its updates: the policy, whose
log-probabilities are the old ones of a ratio; the reference, of the KL penalty;
and teachers, whose divergence from the pupil becomes advantage. All are
computed in the update's own shapes, so the first minibatch's ratio is exactly
1: where an update is `fresh`, the step itself knows the old policy and nothing
is computed here.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mla_moe.config import Config
from mla_moe.types import PyTree

from ..training import program
from . import advantages, episodes, objective, teachers


def score(
  setup: Any,
  updates: Sequence[episodes.Episodes],
  variables: PyTree,
  reference: PyTree | None,
  tutors: Sequence[teachers.Teacher],
  shares: Sequence[list[np.ndarray]],
) -> tuple[list[episodes.Episodes], dict[str, float]]:
  """Returns the updates with log-probabilities, and numbers for the row.

  With `rl.replay='train'` they have the trainer's routes in the place of the
  rollout's. The reference is another model, whose routers choose themselves.

  Args:
    setup: the program of the run.
    updates: of a rollout.
    variables: the policy's.
    reference: the reference's variables, if the objective has a KL penalty.
    tutors: the teachers; they read the updates, too.
    shares: of each update, each teacher's part of its tokens' advantages.
  """
  scorer = _scorer(program.of_devices(setup.config), setup.mesh)
  run = lambda weights, batch: scorer(weights, setup.place(batch))
  read = lambda *scored: np.asarray(run(*scored)[0])
  scored, flips, divergence = [], [], []
  for i, update in enumerate(updates):
    free = update
    if update.routes is not None:
      free = update._replace(routes=np.full_like(update.routes, -1))
    if setup.config.rl.replay == 'train':
      old, routes = map(np.asarray, run(variables, free))
      differ = objective.flips(*map(jnp.asarray, (routes, update.routes)))
      flips.append(np.asarray(differ)[update.targets >= 0])
      update = update._replace(old=old, routes=routes)
    elif tutors or not update.fresh:
      # Else the old policy is the update's own.
      update = update._replace(old=read(variables, update))
    if reference:
      update = update._replace(reference=read(reference, free))
    if tutors:
      update, gap = _taught(setup, update, free, tutors, shares[i])
      divergence.append(gap)
    scored.append(update)
  row = {}
  if flips:
    row['route_flips'] = float(np.concatenate(flips).mean())
  if divergence and np.concatenate(divergence).size:
    row['teacher_kl'] = float(np.concatenate(divergence).mean())
  return scored, row


@functools.lru_cache(maxsize=16)
def _scorer(config: Config, mesh):
  """Returns the jitted `objective.log_probs` of the config."""
  places = {}
  if mesh:
    replicated = jax.sharding.PartitionSpec()
    places['out_shardings'] = jax.sharding.NamedSharding(mesh, replicated)
  return jax.jit(
    functools.partial(objective.log_probs, config=config), **places
  )


def _taught(
  setup, update, free, tutors, shares
) -> tuple[episodes.Episodes, np.ndarray]:
  """Returns the update with its teachers' advantages, and divergences.

  `free` is the update without replay: with its routes, a teacher of the
  policy's shapes is computed by the very program of the policy. A teacher
  without a question in the update does not read it.
  """
  read, config = [], setup.config
  for teacher, share in zip(tutors, shares, strict=True):
    if not share.any():
      continue
    same = teacher.model == config.model
    batch = free if same else free._replace(routes=None)
    theirs = dataclasses.replace(config, model=teacher.model)
    scorer = _scorer(program.of_devices(theirs), setup.mesh)
    log_probs, _ = scorer(teacher.variables, setup.place(batch))
    read.append((share, np.asarray(log_probs)))
  if not read:
    return update, np.zeros(0)
  advantage, gap = advantages.taught(update.advantage, update.old, read)
  inside = update.targets >= 0
  advantage = np.where(inside, advantage, 0.0).astype(np.float32)
  has_teacher = inside & (sum(shares) > 0)
  return update._replace(advantage=advantage), gap[has_teacher]
