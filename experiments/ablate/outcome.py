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
  `differences.ladder_speedup`, in training FLOPs. seconds: measured, the arm's
  over the reference's. diverged: pairs of which a run diverged, left out.
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
  if not pairs:
    return f'cannot be told from {len(changes)} pairs: their mean is 0{end}'
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
  good = [pair for pair in both if not any(map(diverged, pair))]
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
  return Comparison(
    size,
    arm,
    bits,
    changes,
    differences.interval(changes),
    differences.interval(np.log(speedups)),
    by_the_ladder(runs, sizes, size, first, arm),
    differences.interval([b / a for a, b in last('seconds')]),
    len(both) - len(good),
  )


def points(curve: list[dict], equal: str) -> list[tuple[float, float]]:
  """Returns (spent, bits) of a run's points, in the budget's unit."""
  name, _ = ABSCISSA[equal]
  return [(point[name], point['bits']) for point in curve]


def by_the_ladder(
  runs: dict, sizes: list[str], size: str, first: str, arm: str
) -> float | None:
  """Returns `differences.ladder_speedup` of an arm at a size, or None.

  The abscissa is training FLOPs whatever is equal: a token of a larger size
  costs more. All means are of one set of seeds, those that the arm and each
  size of the reference have.
  """
  good = lambda z, a: {
    s for (y, b, s), c in runs.items() if (y, b) == (z, a) and not diverged(c)
  }
  rungs = [z for z in sizes if good(z, first)]
  seeds = set.intersection(good(size, arm), *(good(z, first) for z in rungs))
  if not seeds:
    return None
  end = lambda z, a: np.mean(
    [(runs[z, a, s][-1]['flops'], runs[z, a, s][-1]['bits']) for s in seeds], 0
  )
  ladder = [tuple(end(z, first).tolist()) for z in rungs]
  return differences.ladder_speedup(ladder, *end(size, arm).tolist())


def diverged(curve: list[dict]) -> bool:
  """Whether a run's curve is no measurement of its arm.

  A held-out loss of it is not finite, or its last chunk trained nothing. A step
  whose loss or gradient is not finite changes no weight, so the held-out loss
  of a run that broke stays finite, and says nothing of the arm.
  """
  last, before = curve[-1], curve[-2] if curve[1:] else {}
  count = lambda name: last.get(name, 0) - before.get(name, 0)
  is_frozen = 0 < count('step') == count('skipped')
  losses = [point['bits'] for point in curve] + [last['loss']]
  return is_frozen or not all(map(math.isfinite, losses))


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
