"""Mixtures: the source of each row of a run, and its number there.

A phase's rows come in blocks of 1024. Up to the end of block b source s gives
floor(w_s 1024 (b + 1)) rows, and the heaviest source the rest: shares are exact
over any blocks. A keyed permutation spreads a block's rows over its sources.
The n-th row of a source in the run is row n of its epochs (`batches.shuffled`),
in whatever phase, so none comes twice in an epoch. All of it follows from the
number of the row: hosts agree, and a run resumes in any phase.
"""

from __future__ import annotations

import fractions
import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mla_moe.config import DataConfig

from . import batches

BLOCK = 1024
# Of S sources the heaviest gives BLOCK / S - S + 1 rows of a block or more: of
# at most 32 (`DataConfig`), one or more.


def batch_at(
  streams: Sequence[Any],
  data: DataConfig,
  step: int,
  bos_id: int,
  rows: np.ndarray | slice = slice(None),
  left_out: int = 0,
) -> batches.Batch:
  """Returns `batches.batch_at` of the streams of `data.sources`."""
  sequences = batches.sequences_at(data, step, rows, left_out)
  source, number = places(data, sequences)
  order = np.zeros_like(number)
  for s, stream in enumerate(streams):
    own = source == s
    total = (len(stream) - 1) // data.seq_len
    order[own] = batches.shuffled(number[own], total, data) if own.any() else 0
  both = zip(source.ravel().tolist(), order.ravel().tolist(), strict=True)
  pieces = (batches.row_at(streams[s], i, data, bos_id) for s, i in both)
  batch = batches.gathered(pieces, order.shape, data)
  return batches.with_padding(batch, data)


def places(
  data: DataConfig, sequences: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Returns (sources, numbers of their rows) of a run's rows, in its shape."""
  source, number = np.zeros_like(sequences), np.zeros_like(sequences)
  for first, last, weights in _phases(data):
    inside = (first <= sequences) & (sequences < last)
    base = rows_before(data, first)
    for b in np.unique((sequences[inside] - first) // BLOCK).tolist():
      start = first + b * BLOCK
      here = inside & (start <= sequences) & (sequences < start + BLOCK)
      sources, numbers = _block(weights, data.seed, b)
      source[here] = sources[sequences[here] - start]
      number[here] = numbers[sequences[here] - start] + base[source[here]]
  return source, number


def rows_before(data: DataConfig, sequences: int) -> np.ndarray:
  """Returns each source's rows among the first `sequences` of a run."""
  counts = np.zeros(len(data.sources), np.int64)
  for first, last, weights in _phases(data):
    if sequences > first:
      blocks, rest = divmod(int(min(last, sequences)) - first, BLOCK)
      part = _block(weights, data.seed, blocks)[0][:rest]
      counts += np.bincount(part, minlength=len(counts))
      counts += _of_blocks(weights, blocks)
  return counts


def epochs(
  data: DataConfig, streams: Sequence[Any], sequences: int
) -> dict[str, float]:
  """Returns how often the first `sequences` of a run read each source.

  The name of the only one is ''.
  """
  names = [name for *_, name in data.sources] or ['']
  counts = rows_before(data, sequences) if data.sources else [sequences]
  totals = [(len(stream) - 1) // data.seq_len for stream in streams]
  parts = zip(names, counts, totals, strict=True)
  return {name: float(count / total) for name, count, total in parts}


def _phases(data: DataConfig) -> list[tuple[int, float, tuple]]:
  """Returns (first row, row after the last, weights) of each phase."""
  weights = tuple(weight for _, weight, _ in data.sources)
  phases = [(0, weights), *data.phases]
  firsts = [math.ceil(tokens / data.seq_len) for tokens, _ in phases]
  lasts = [*firsts[1:], math.inf]
  return list(zip(firsts, lasts, [w for _, w in phases], strict=True))


def _of_blocks(weights: tuple, blocks: int) -> np.ndarray:
  """Returns each source's rows in the first blocks of a phase."""
  shares = [fractions.Fraction(repr(weight)) for weight in weights]
  counts = [blocks * BLOCK * share // sum(shares) for share in shares]
  counts[shares.index(max(shares))] += blocks * BLOCK - sum(counts)
  return np.array(counts, np.int64)


@functools.lru_cache(maxsize=256)
def _block(weights: tuple, seed: int, b: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns the sources of a block's rows, and their numbers in the phase."""
  before = _of_blocks(weights, b)
  counts = _of_blocks(weights, b + 1) - before
  # No epoch's key is negative.
  spread = batches.permute(np.arange(BLOCK), BLOCK, -1 - (seed << 20) - b)
  sources = np.repeat(np.arange(len(weights)), counts)[spread]
  first = before - np.cumsum(counts) + counts
  numbers = np.zeros(BLOCK, np.int64)
  order = np.argsort(sources, kind='stable')
  numbers[order] = np.arange(BLOCK) + np.repeat(first, counts)
  return sources, numbers
