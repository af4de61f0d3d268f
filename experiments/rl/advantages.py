"""Advantages of answers, and the weight of each of their tokens; numpy.

G answers to one question have the rewards r_i, and the advantage of answer i is
(r_i - mean r) / std r (GRPO; DeepSeekMath, section 4.1). No value network
exists: the group is the baseline. The standard deviation is that of a sample
(divisor G - 1). A group whose rewards are all equal has nothing to say: its
advantages are exactly 0, and not a rounding error over a small number.

A mean over tokens, answers or questions becomes a weight of each token, from
counts that the host knows. The device only ever adds weight * loss, so that
micro-batches, packing and shards cannot change the result.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mla_moe.types import Bool, Float, Int


def advantages(
  rewards: Float[np.ndarray, 'Q G'], scale: str
) -> tuple[Float[np.ndarray, 'Q G'], Bool[np.ndarray, ' Q']]:
  """Returns the advantages, float64, and which groups have no spread.

  `scale` is 'std' (divided by the spread of the group), 'batch' (of all rewards
  at once, less their groups' means) or 'none' (Dr. GRPO, V3.2).
  """
  rewards = np.asarray(rewards, np.float64)
  flat = rewards.max(axis=1) == rewards.min(axis=1)
  centred = rewards - rewards.mean(axis=1, keepdims=True)
  centred[flat] = 0.0
  if scale == 'none' or flat.all():
    return centred, flat
  if scale == 'batch':
    return centred / rewards.std(ddof=1), flat
  spread = rewards.std(axis=1, ddof=1, keepdims=True)
  return centred / np.where(flat[:, None], 1.0, spread), flat


def taught(
  advantage: Float[np.ndarray, '*b'],
  old: Float[np.ndarray, '*b'],
  teachers: Sequence[tuple[Float[np.ndarray, '*b'], Float[np.ndarray, '*b']]],
) -> tuple[Float[np.ndarray, '*b'], Float[np.ndarray, '*b']]:
  """Returns the advantage of each token by teachers, and their divergence.

  The gradient of KL(policy | teacher) is the mean of (log policy - log teacher)
  times that of log policy, over the policy's own tokens: so the advantage of a
  token is log teacher - log policy (on-policy distillation). Teachers are
  (weight, log-probabilities); the rest of their weights, up to 1, is that of
  the rewards' `advantage`. `old` has the policy's log-probabilities. The
  divergence is the weighted mean of log policy - log teacher, 0 without one.
  """
  total = sum(weight for weight, _ in teachers)
  gap = sum(weight * (log_probs - old) for weight, log_probs in teachers)
  rest = np.maximum(1.0 - total, 0.0)
  return rest * advantage + gap, -gap / np.where(total, total, 1.0)


def without_errors(
  rewards: Float[np.ndarray, 'Q G'],
) -> Float[np.ndarray, 'Q G']:
  """Returns the rewards with each NaN replaced by the mean of its group.

  Such an answer, which no grader could judge, has the advantage 0. A group
  without any reward has zeros.
  """
  known = ~np.isnan(rewards)
  first = np.take_along_axis(rewards, known.argmax(axis=1)[:, None], axis=1)
  gap = np.where(known, rewards - first, 0.0)  # 0 exactly where all are equal
  mean = gap.sum(axis=1) / np.maximum(known.sum(axis=1), 1)
  return np.where(known, rewards, np.nan_to_num(first + mean[:, None]))


def token_weights(
  counts: Int[np.ndarray, ' N'],
  used: Bool[np.ndarray, ' N'],
  aggregate: str,
  longest: int,
) -> Float[np.ndarray, ' N']:
  """Returns the weight of each token of every answer, float64.

  `counts` are the answers' tokens, `longest` the most that one may have. An
  answer that is not `used` weighs 0, and is in no denominator.
  """
  counts = np.asarray(counts, np.float64)
  number = max(int(used.sum()), 1)
  if aggregate == 'token':
    weight = np.full(counts.shape, 1.0 / max(counts[used].sum(), 1.0))
  elif aggregate == 'sequence':
    weight = 1.0 / (number * counts)
  else:
    weight = np.full(counts.shape, 1.0 / (number * longest))
  return np.where(used, weight, 0.0)


def overlong_penalty(
  counts: Int[np.ndarray, ' N'], longest: int, ramp: int
) -> Float[np.ndarray, ' N']:
  """Returns DAPO's soft penalty of length in tokens, from 0 to -1.

  It is 0 up to `longest - ramp` tokens and falls to -1 at `longest`.
  """
  if not ramp:
    return np.zeros(len(counts))
  return np.clip((longest - ramp - np.asarray(counts)) / ramp, -1.0, 0.0)
