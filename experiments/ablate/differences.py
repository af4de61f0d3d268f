"""The statistics of paired runs: intervals, pairs that would tell, speed-ups.

Two runs of one seed read the same text in the same order, and are judged on the
same held-out text. What a seed does to both leaves their difference, and the
chance of single runs remains: any rounding sends two runs apart. The difference
of n pairs is therefore a sample of n independent numbers, and Student's t gives
its interval, also where n is 2 or 3 and their spread is estimated, too.

A speed-up says a difference of losses in compute: the better run reaches the
best loss of the worse one after a part of its own budget. Its rate has not
fallen there, so the number is a lower bound (Hoffmann et al. 2022, section
3.1: losses before the end of a schedule are too high). A ladder of sizes has no
such bias: there the last losses of one arm are compared with a curve through
the last losses of the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LEVEL = 0.95  # of an interval
POWER = 0.8  # chance that so many pairs tell a difference as large as measured

# Points (compute, loss), compute rising.
Curve = Sequence[tuple[float, float]]


class Interval(NamedTuple):
  """A mean of independent numbers, and the half width of its interval.

  `half` is infinite for one number, whose spread is unknown.
  """

  mean: float
  half: float
  count: int

  @property
  def low(self) -> float:
    return self.mean - self.half

  @property
  def high(self) -> float:
    return self.mean + self.half


def mean(values) -> tuple[float, float]:
  """Returns the mean of independent values and its standard error."""
  values = np.asarray(values, np.float64)
  error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0
  return float(values.mean()), float(error)


def interval(values) -> Interval:
  """Returns Student's 95 % interval of the mean of independent values."""
  from scipy import stats  # which jax needs, too

  (average, error), n = mean(values), len(values)
  if n < 2:
    return Interval(average, math.inf, n)
  width = stats.t.ppf((1 + LEVEL) / 2, n - 1) * error
  return Interval(average, float(width), n)


def pairs_to_tell(values) -> int:
  """Returns the pairs that tell a difference such as the mean of `values`.

  With so many, the interval of a fresh experiment leaves 0 out with the chance
  `POWER`, if mean and spread are those of the values. 0: no number would.
  """
  from scipy import stats

  average, error = mean(values)
  if len(values) < 2 or not average:
    return 0
  ratio = error * len(values) ** 0.5 / abs(average)
  need = lambda n: sum(stats.t.ppf(p, n - 1) for p in ((1 + LEVEL) / 2, POWER))
  pairs = max(2, math.ceil((2.8 * ratio) ** 2))  # of a normal distribution
  while pairs < (need(pairs) * ratio) ** 2:
    pairs += max(1, pairs // 100)
  return pairs


def reached(curve: Curve, loss: float) -> float | None:
  """Returns the compute at which a curve reaches `loss`; None: nowhere.

  The curve is the best loss so far, straight between points over the logarithm
  of the compute. One that begins below `loss` reaches it at its first point.
  """
  compute, losses = np.array(curve, np.float64).T
  best = np.minimum.accumulate(losses)
  if best[-1] > loss:
    return None
  i = int(np.argmax(best <= loss))
  if i == 0 or best[i] == loss:
    return float(compute[i])
  part = (best[i - 1] - loss) / (best[i - 1] - best[i])
  x = np.log(compute[i - 1 : i + 1])
  return float(np.exp(x[0] + part * (x[1] - x[0])))


def speedup(reference: Curve, other: Curve) -> float:
  """Returns the factor of compute that `other` saves beside `reference`.

  It is the ratio of the compute at which each reaches the lowest loss that both
  of them reach. 2 means: `other` does so with half of the reference's compute.
  """
  loss = max(min(value for _, value in curve) for curve in (reference, other))
  return reached(reference, loss) / reached(other, loss)


def ladder_speedup(reference: Curve, compute: float, loss: float):
  """Returns the speed-up of one size beside the reference's whole ladder.

  `reference` has a point for each size, its budget and its last loss. A loss
  outside of theirs gives None: no line is drawn beyond the ladder.
  """
  points = sorted(reference)
  losses = [value for _, value in points]
  if len(points) < 2 or not min(losses) <= loss <= max(losses):
    return None
  return reached(points, loss) / compute
