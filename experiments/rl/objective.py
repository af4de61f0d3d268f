"""GRPO's loss and its relatives, one token at a time.

With the ratio r_t = policy / old of a token and its answer's advantage A,

  loss_t = -min(r_t A, clip(r_t, 1 - low, 1 + high) A) + beta D_t
  D_t    = exp(reference - policy) - (reference - policy) - 1      (k3)

(DeepSeekMath, equations 3 and 4). The loss is the sum of weight * loss_t, where
`advantages.token_weights` made the weights: nothing is divided here. All arrays
stand at the place of a token's prediction, so answer token j of a prompt of P
tokens is in column P + j - 1.

The reference's divergence k3 is R1's. Its gradient is that of the forward KL
divergence; V3.2 multiplies it by the ratio, which gives the reverse one.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mla_moe.config import Config, MTPConfig
from mla_moe.model import sequence
from mla_moe.rl_config import RLConfig
from mla_moe.train import step
from mla_moe.types import Array, Bool, Float, Int, PyTree


class Episodes(NamedTuple):
  """The rows of one update in n micro-batches, as `types.Batch`.

  tokens, targets (-1: none), segments (-1: padding) and positions are [n, B, T]
  int32; rollout, old, reference, advantage and weight [n, B, T] float32, 0
  where there is no target. count: the number of real micro-batches. fresh: 1
  where no update has followed the rollout yet, so that the old policy is the
  policy, and `old` is not read. routes [n, B, T, L, K] int16: the rollout's
  experts, or the trainer's (`RLConfig.replay`), -1 in padding; None: no record.
  """

  tokens: np.ndarray
  targets: np.ndarray
  segments: np.ndarray
  positions: np.ndarray
  rollout: np.ndarray
  old: np.ndarray
  reference: np.ndarray
  advantage: np.ndarray
  weight: np.ndarray
  count: np.ndarray
  fresh: np.ndarray
  routes: np.ndarray | None = None


def grpo(
  out: step.Predictions, micro: Episodes, whole: step.Whole, config: Config
) -> tuple[Array, dict[str, Array]]:
  """Returns the loss of a micro-batch, and metrics: an objective of a step.

  The MTP modules, the balance loss and the z-loss have no part in it. Means are
  over the tokens of the step's answers: kl (from the reference), kl_old (k3,
  from the policy before the updates), clipped, dropped; mismatch_k3 and
  mismatch_extreme (the part of ratios outside 1/2 to 2) compare the trainer's
  likelihoods with the rollout's. ratio_max is the largest ratio, mismatch_max
  the largest difference in nats. With a record of the rollout's routes,
  route_flips is the part of (token, layer) whose router here, in the update,
  would take another set of experts.
  """
  log_probs, inside = -out.nll[0], out.targets[0] >= 0
  place = lambda name: sequence.arrange(getattr(micro, name))
  rollout = place('rollout')
  current = jax.lax.stop_gradient(log_probs)
  old = jnp.where(micro.fresh > 0, current, place('old'))
  answers = place('segments')
  if config.rl.prompt == 'shared':
    answers = answers >> 20  # see flash.visible
  answers = jnp.where(inside, answers, -1)
  args = log_probs, old, rollout, place('reference'), place('advantage')
  loss, arrays = token_loss(*args, answers, config.rl)
  mean = lambda x: jnp.where(inside, x, 0.0).sum() / whole.tokens
  k3 = lambda gap: jnp.exp(gap) - gap - 1
  gap = jnp.where(inside, old - rollout, 0.0)  # two programs, one policy
  metrics = {name: mean(arrays[name]) for name in ('kl', 'clipped', 'dropped')}
  metrics |= {
    'kl_old': mean(k3(old - current)),
    'mismatch_k3': mean(k3(gap)),
    'mismatch_extreme': mean((jnp.abs(gap) > jnp.log(2.0)) * 1.0),
    'ratio_max': arrays['ratio'].max(),
    'mismatch_max': jnp.abs(gap).max(),
  }
  if out.routes is not None and config.rl.replay != 'train':
    differ = flips(out.routes, micro.routes).mean(-1)
    metrics['route_flips'] = mean(sequence.arrange(differ))
  return (place('weight') * loss).sum(), metrics


def log_probs(
  variables: PyTree, batch: Episodes, *, config: Config
) -> tuple[Float[Array, 'n B T'], Int[Array, 'n B T L K'] | None]:
  """Returns the log-probabilities of the targets; 0 where there is none.

  Only real micro-batches are computed; the results of the others are 0.
  Routes in the batch are replayed; the routers' own choices are the second
  result, None where the batch has none.
  """
  main = dataclasses.replace(config.model, mtp=MTPConfig(depth=0))
  config = dataclasses.replace(config, model=main)

  def one(i):
    micro = jax.tree.map(lambda x: x[i] if jnp.ndim(x) else x, batch)
    params, router = variables['params'], variables['router']
    out = step.predictions(params, router, micro, config)
    return -sequence.restore(out.nll[0]), out.routes

  def add(i, results):
    return jax.tree.map(lambda all_, x: all_.at[i].set(x), results, one(i))

  count = len(batch.tokens)
  start = jax.tree.map(
    lambda x: jnp.zeros((count, *x.shape), x.dtype), jax.eval_shape(one, 0)
  )
  return jax.lax.fori_loop(0, batch.count, add, start)


def token_loss(
  log_probs: Float[Array, 'B T'],
  old: Float[Array, 'B T'],
  rollout: Float[Array, 'B T'],
  reference: Float[Array, 'B T'],
  advantage: Float[Array, 'B T'],
  answers: Int[Array, 'B T'],
  rl: RLConfig,
) -> tuple[Float[Array, 'B T'], dict[str, Array]]:
  """Returns the loss of each token, and arrays [B, T] about it.

  Args:
    log_probs: the policy's, of the tokens drawn, at the rollout's temperature;
      the only argument that the loss is differentiated by.
    old, rollout, reference: likewise, of the policy before the update by the
      trainer's program and by the rollout's, and of the reference.
    advantage: of the token's answer.
    answers: the number of the token's answer in its row, from 0, below T; -1
      for tokens of no answer, whose loss is 0.
    rl: chooses the variant.

  The arrays: ratio, kl, clipped (the clip stops the gradient), dropped (by
  `off_policy` or `correct`); float32.
  """
  inside = answers >= 0
  zero = lambda x: jnp.where(inside, x, 0.0)
  log_ratio = zero(log_probs - (old if rl.old == 'train' else rollout))
  exponent = log_ratio
  if rl.ratio == 'sequence':
    exponent = _answer_mean(log_ratio, answers)
  ratio = jnp.exp(exponent)
  loss, clipped = _surrogate(ratio, log_probs, advantage, rl)
  weight = jnp.ones_like(ratio)
  if rl.correct != 'none':
    weight = jnp.exp(zero(jax.lax.stop_gradient(old - rollout)))
    beyond = weight > rl.correct_limit
    limit = rl.correct_limit if rl.correct == 'truncate' else 0.0
    weight = jnp.where(beyond, limit, weight)
  if rl.off_policy:
    drop = _answer_mean(zero(rollout - log_probs), answers)
    stale = (advantage < 0) & (drop > rl.off_policy)
    weight = jnp.where(stale, 0.0, weight)
  divergence = jnp.zeros_like(loss)
  if rl.beta:
    divergence = zero(_divergence(log_probs, reference, log_ratio, rl.kl_form))
  loss = zero(jax.lax.stop_gradient(weight) * loss) + rl.beta * divergence
  arrays = {
    'ratio': jnp.where(inside, ratio, 1.0),
    'kl': divergence,
    'clipped': zero(clipped.astype(jnp.float32)),
    'dropped': zero((weight == 0).astype(jnp.float32)),
  }
  return loss, jax.lax.stop_gradient(arrays)


def _surrogate(ratio, log_probs, advantage, rl):
  """Returns the policy's loss of each token, and where it has no gradient."""
  if rl.surrogate == 'cispo':
    capped = jax.lax.stop_gradient(jnp.minimum(ratio, rl.clip_high))
    return -capped * advantage * log_probs, ratio > rl.clip_high
  low, high = 1 - rl.clip_low, 1 + rl.clip_high
  free = ratio * advantage
  bounded = jnp.clip(ratio, low, high) * advantage
  return -jnp.minimum(free, bounded), bounded < free


def _divergence(log_probs, reference, log_ratio, form):
  """Returns the KL divergence of each token from the reference, >= 0."""
  gap = reference - log_probs
  k3 = jnp.exp(gap) - gap - 1
  return jnp.exp(log_ratio) * k3 if form == 'unbiased' else k3


def _answer_mean(
  values: Float[Array, 'B T'], answers: Int[Array, 'B T']
) -> Float[Array, 'B T']:
  """Returns, for each token, the mean of `values` over its answer."""
  length = values.shape[1]

  def of_row(values, ids):
    ids = jnp.where(ids >= 0, ids, length)  # a place of its own for no answer
    total = jax.ops.segment_sum(values, ids, length + 1)
    count = jax.ops.segment_sum(jnp.ones_like(values), ids, length + 1)
    return (total / jnp.maximum(count, 1))[ids]

  return jax.vmap(of_row)(values, answers)


def flips(
  one: Int[Array, '*b K'], two: Int[Array, '*b K']
) -> Bool[Array, '*b']:
  """Whether two choices of a token in a layer differ as sets of experts.

  A choice of -1 equals any.
  """
  differ = (jnp.sort(one, axis=-1) != jnp.sort(two, axis=-1)).any(-1)
  return differ & (one[..., 0] >= 0) & (two[..., 0] >= 0)
