"""The outcome of an ablation: each arm beside the reference, size by size.

A difference is relative: the arm's held-out bits per byte over the reference's
of the same seed, less 1. Below 0 the arm is better. The verdict is one of
three: better, worse, or it cannot be told; then it says how many pairs would
tell. Each interval stands alone: of twenty arms without any effect one is
called better or worse by chance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from . import differences
from .differences import Interval

# The field of a curve's points that a budget counts, and its unit.
ABSCISSA = {
  'steps': ('step', 'steps'),
  'tokens': ('tokens', 'tokens'),
  'flops': ('flops', 'training FLOPs'),
  'seconds': ('seconds', 'seconds'),
}


class Comparison(NamedTuple):
  """An arm beside the reference at one size, over the seeds that both have.

  bits: held out, a byte, means of (reference, arm). change: relative
  differences. log_speedup: logarithms of `differences.speedup`. ladder:
  `differences.ladder_speedup`. seconds: measured, the arm's over the
  reference's. diverged: pairs with a loss that is not finite, left out.
  """

  size: str
  arm: str
  bits: tuple[float, float]
  changes: list[float]
  change: Interval
  log_speedup: Interval
  ladder: float | None
  seconds: Interval
  diverged: int

  @property
  def verdict(self) -> str:
    return verdict(self.changes, self.diverged)


def verdict(changes: Sequence[float], diverged: int = 0) -> str:
  """Returns the words for relative differences, one of each pair."""
  end = f'; {diverged} diverged' if diverged else ''
  if not len(changes):
    return f'no pair is finished{end}'
  if not np.any(changes):
    return f'the same to the last digit{end}'
  if len(changes) < 2:
    return f'one pair has no interval{end}'
  change = differences.interval(changes)
  if change.low > 0 or change.high < 0:
    word = 'worse' if change.mean > 0 else 'better'
    return f'{word} by {abs(change.mean):.2%}{end}'
  pairs = differences.pairs_to_tell(changes)
  return (
    f'cannot be told from {len(changes)} pairs; about {pairs:,} would tell '
    f'{abs(change.mean):.2%}{end}'
  )


def compared(
  rows: list[dict], sizes: list[str], arms: list[str], equal: str
) -> list[Comparison]:
  """Returns a comparison for each size and each arm but the first.

  `rows` are those of `folder.results`; `equal` is the budget.
  """
  runs = {(row['size'], row['arm'], row['seed']): row['curve'] for row in rows}
  return [
    _compared(runs, size, arms[0], arm, equal, sizes)
    for size in sizes
    for arm in arms[1:]
  ]


def pairs_of(
  runs: dict, size: str, first: str, arm: str
) -> list[tuple[list, list]]:
  """Returns (reference's curve, arm's curve) of each seed that both have."""
  seeds = [s for z, a, s in runs if (z, a) == (size, arm)]
  both = [s for s in sorted(seeds) if (size, first, s) in runs]
  return [(runs[size, first, s], runs[size, arm, s]) for s in both]


def _compared(runs, size, first, arm, equal, sizes) -> Comparison:
  both = pairs_of(runs, size, first, arm)
  good = [pair for pair in both if all(map(_is_finite, pair))]
  last = lambda name: [(a[-1][name], b[-1][name]) for a, b in good]
  changes = [b / a - 1 for a, b in last('bits')]
  nothing = Interval(math.nan, math.inf, 0)
  if not good:
    empty = (math.nan, math.nan), [], nothing, nothing, None, nothing
    return Comparison(size, arm, *empty, len(both))
  speedups = [
    differences.speedup(points(a, equal), points(b, equal)) for a, b in good
  ]
  bits = tuple(np.mean(last('bits'), axis=0).tolist())
  spent = np.mean([points(b, equal)[-1][0] for _, b in good])
  return Comparison(
    size,
    arm,
    bits,
    changes,
    differences.interval(changes),
    differences.interval(np.log(speedups)),
    differences.ladder_speedup(
      ladder(runs, sizes, first, equal), float(spent), bits[1]
    ),
    differences.interval([b / a for a, b in last('seconds')]),
    len(both) - len(good),
  )


def points(curve: list[dict], equal: str) -> list[tuple[float, float]]:
  """Returns (spent, bits) of a run's points, in the budget's unit."""
  name, _ = ABSCISSA[equal]
  return [(point[name], point['bits']) for point in curve]


def ladder(runs: dict, sizes: list[str], arm: str, equal: str) -> list:
  """Returns (mean spent, mean last bits) of an arm, a point for each size."""
  rungs = []
  for size in sizes:
    of_size = [c for (z, a, _), c in runs.items() if (z, a) == (size, arm)]
    ends = [points(c, equal)[-1] for c in of_size if _is_finite(c)]
    if ends:
      rungs.append(tuple(np.mean(ends, axis=0).tolist()))
  return rungs


def _is_finite(curve: list[dict]) -> bool:
  return all(
    isinstance(point['bits'], float) and math.isfinite(point['bits'])
    for point in curve
  )


# ----------------------------------------------------------------------- words

HEAD = (
  'size', 'arm', 'pairs', 'bits per byte', 'beside', 'difference, 95 %',
  'speed-up, 95 %', 'by the ladder', 'verdict',
)  # fmt: skip


def table(comparisons: list[Comparison]) -> list[tuple[str, ...]]:
  """Returns a row of words, under HEAD, for each comparison."""
  return [
    (
      c.size,
      c.arm,
      str(len(c.changes)),
      f'{c.bits[1]:.4f}',
      f'{c.bits[0]:.4f}',
      in_words(c.change),
      speedup_in_words(c.log_speedup),
      '-' if c.ladder is None else f'{c.ladder:.2f} x',
      c.verdict,
    )
    for c in comparisons
  ]


def in_words(change: Interval) -> str:
  """Returns a relative difference with its interval, in per cent."""
  if not change.count:
    return '-'
  if change.count < 2:
    return f'{change.mean:+.2%}'
  return f'{change.mean:+.2%} ({change.low:+.2%} to {change.high:+.2%})'


def speedup_in_words(log: Interval) -> str:
  """Returns the speed-up of a logarithm's interval."""
  if not log.count:
    return '-'
  if log.count < 2:
    return f'{math.exp(log.mean):.2f} x'
  low, mean, high = map(math.exp, (log.low, log.mean, log.high))
  return f'{mean:.2f} x ({low:.2f} to {high:.2f})'


def clock(comparisons: list[Comparison], equal: str) -> list[str]:
  """Returns a line for each arm whose measured time is not as planned."""
  if equal != 'seconds':
    return []
  return [
    f"{c.arm} at {c.size} took {c.seconds.mean:.3f} of the reference's time, "
    'not the same: its verdict is of unequal time.'
    for c in comparisons
    if c.seconds.count and abs(c.seconds.mean - 1) > 0.05
  ]
