"""Batches: the rows of any step, on any number of hosts, by arithmetic alone.

The token stream is cut into rows of T+1 tokens that overlap by one token, so
each token is predicted once per epoch. A keyed permutation of the row numbers,
computed and not stored, is the order of an epoch. So `batch_at(step)` needs no
state, a run resumes without reading what came before, and the global batch does
not depend on the hosts that read its rows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from mla_moe.config import DataConfig
from mla_moe.types import Batch

_OPEN_BLOCKS = 16  # whose rows are mixed, so that as many are read at a time


def span(data: DataConfig, step: int) -> tuple[int, int]:
  """Returns (number of sequences before the step, number in the step).

  During the batch ramp the number grows linearly in tokens, rounded down to
  whole micro-batches.
  """
  sizes, before = _ramp(data)
  if step < len(sizes):
    return int(before[step]), int(sizes[step])
  after_ramp = (step - len(sizes)) * data.batch_size
  return int(before[-1]) + after_ramp, data.batch_size


@functools.lru_cache(maxsize=8)
def _ramp(data: DataConfig) -> tuple[np.ndarray, np.ndarray]:
  """Returns (sizes of the ramp's steps, sequences before each and after)."""
  micro = data.micro_batch or data.batch_size
  sizes, sequences = [], 0
  while data.batch_start and sequences * data.seq_len < data.ramp_tokens:
    progress = sequences * data.seq_len / data.ramp_tokens
    size = data.batch_start + (data.batch_size - data.batch_start) * progress
    sizes.append(max(int(size) // micro * micro, micro))
    sequences += sizes[-1]
  return np.array(sizes, np.int64), np.cumsum([0, *sizes], dtype=np.int64)


def batch_at(
  stream: Any,
  data: DataConfig,
  step: int,
  bos_id: int,
  rows: np.ndarray | slice = slice(None),
  left_out: int = 0,
) -> Batch:
  """Returns the batch of a step, or these rows of each micro-batch.

  Args:
    stream: [tokens], the corpus: an array, or a sequence whose slices are.
    bos_id: begins a document, for packing 'separate'.
    rows: numbers of rows of a micro-batch.
    left_out: number of sequences to skip before this step. After a roll-back a
      run continues elsewhere in the text, with its schedules unchanged.
  """
  total = (len(stream) - 1) // data.seq_len
  order = shuffled(sequences_at(data, step, rows, left_out), total, data)
  return with_padding(_rows(stream, data, order, bos_id), data)


def sequences_at(
  data: DataConfig, step: int, rows: np.ndarray | slice, left_out: int
) -> np.ndarray:
  """Returns the numbers [n, B], in the run, of `batch_at`'s rows."""
  micro = data.micro_batch or data.batch_size
  first, size = span(data, step)
  return first + left_out + np.arange(size).reshape(-1, micro)[:, rows]


def shuffled(sequences: np.ndarray, total: int, data: DataConfig) -> np.ndarray:
  """Returns the rows of a stream of `total` that these of its epochs are."""
  epochs, index = np.divmod(sequences, total)
  order = np.zeros_like(index)
  for epoch in np.unique(epochs):
    mask = epochs == epoch
    key = (data.seed << 20) + int(epoch)
    order[mask] = _order(index[mask], total, key, data.block_rows)
  return order


def _order(index: np.ndarray, total: int, key: int, block: int) -> np.ndarray:
  """Returns the rows at places `index` of an epoch, a permutation.

  With blocks of rows the blocks are permuted, and then the rows of each
  `_OPEN_BLOCKS` of them in turn. Rows after the last whole block come last.
  """
  whole = total // block * block if block else 0
  if not whole:
    return permute(index, total, key)
  size = _OPEN_BLOCKS * block
  starts = np.where(index < whole, index // size * size, whole)
  order = np.zeros_like(index)
  for start in np.unique(starts).tolist():
    mask, rest = starts == start, (whole if start < whole else total) - start
    own = (key + 1 << 40) + start
    order[mask] = start + permute(index[mask] - start, min(rest, size), own)
  number, place = np.divmod(order, block)
  inside = order < whole
  number[inside] = permute(number[inside], whole // block, key)
  return number * block + place


def with_padding(batch: Batch, data: DataConfig) -> Batch:
  """Returns the batch with the micro-batches that a ramp leaves empty."""
  micro = data.micro_batch or data.batch_size
  padding = data.batch_size // micro - len(batch.tokens)
  if not padding:
    return batch
  width = (0, padding), (0, 0), (0, 0)
  pad = lambda x, fill: np.pad(x, width, constant_values=fill)
  fills = (0, -1, 0, 0)
  padded = (pad(x, fill) for x, fill in zip(batch[:-1], fills, strict=True))
  return Batch(*padded, batch.count)


def eval_batches(
  stream: Any, data: DataConfig, bos_id: int, count: int
) -> list[Batch]:
  """Returns the same `count` micro-batches every time, spread over the stream.

  A stream with fewer rows gives fewer: no row is read twice. Rows that fill up
  the last batch have no targets.
  """
  micro = data.micro_batch or data.batch_size
  rows = (len(stream) - 1) // data.seq_len
  used = min(rows, count * micro)
  order = np.arange(used) * rows // used
  evaluated = []
  for i in range(0, used, micro):
    part = order[i : i + micro]
    padded = np.pad(part, (0, micro - len(part)), mode='edge')
    batch = _rows(stream, data, padded[None], bos_id)
    batch.targets[:, len(part) :] = -1
    evaluated.append(batch)
  return evaluated


def bits_per_byte(nll: float, tokens_bytes: int) -> float:
  """Returns nats summed over tokens as bits per byte of the tokens' text."""
  return nll / math.log(2) / tokens_bytes


def _rows(stream, data, order, bos_id) -> Batch:
  """Returns rows `order` [n, B] of the stream."""
  pieces = (row_at(stream, i, data, bos_id) for i in order.ravel().tolist())
  return gathered(pieces, order.shape, data)


def row_at(
  stream: Any, i: int, data: DataConfig, bos_id: int
) -> tuple[np.ndarray, np.ndarray | bool]:
  """Returns (T+1 tokens, whether each begins a document) of a row.

  A stream may know the beginnings; those of others are their `bos_id`.
  """
  place = slice(i * data.seq_len, (i + 1) * data.seq_len + 1)
  tokens = stream[place]
  if data.packing != 'separate':
    return tokens, False
  begins = getattr(stream, 'begins', None)
  return tokens, tokens == bos_id if begins is None else begins(place)


def gathered(
  pieces: Iterable[tuple[np.ndarray, np.ndarray | bool]],
  shape: tuple,
  data: DataConfig,
) -> Batch:
  """Returns the batch of rows [n, B], each a piece of `row_at`."""
  t = data.seq_len
  both = np.empty((*shape, t + 1), np.int32)
  starts = np.empty(both.shape, bool)
  rows = zip(both.reshape(-1, t + 1), starts.reshape(-1, t + 1), strict=True)
  for (row, start), (tokens, begins) in zip(rows, pieces, strict=True):
    row[:], start[:] = tokens, begins
  tokens, targets = both[..., :-1], both[..., 1:]
  positions = np.broadcast_to(np.arange(t, dtype=np.int32), tokens.shape)
  segments = np.zeros(tokens.shape, np.int32)
  if data.packing == 'separate':
    ids = np.cumsum(starts, axis=-1, dtype=np.int32)
    segments = ids[..., :-1]
    begins = np.where(starts[..., :-1], positions, 0)
    positions = positions - np.maximum.accumulate(begins, axis=-1)
    targets = np.where(ids[..., 1:] == segments, targets, -1)
  arrays = (tokens, targets, segments, positions)
  arrays = (np.ascontiguousarray(x) for x in arrays)
  return Batch(*arrays, np.int32(shape[0]))


def permute(index: np.ndarray, size: int, key: int) -> np.ndarray:
  """Returns the images of `index` under a permutation of 0..size-1.

  The permutation is a Feistel network over the next even number of bits: each
  of four rounds maps the halves (left, right) to (right, left xor mix(right)),
  which is one to one. A value that falls outside 0..size-1 goes through the
  network again until it is inside (cycle walking).
  """
  half = max(1, math.ceil(math.log2(max(size, 2)) / 2))
  low = np.uint64((1 << half) - 1)
  out = index.astype(np.uint64)
  outside = np.ones(out.shape, bool)
  while outside.any():
    left, right = out[outside] >> np.uint64(half), out[outside] & low
    for i in range(4):
      left, right = right, left ^ (mix(right, key * 4 + i) & low)
    out[outside] = left << np.uint64(half) | right
    outside = out >= size
  return out.astype(np.int64)


def mix(x: np.ndarray, key: int) -> np.ndarray:
  """Returns splitmix64's finaliser of x, uint64, and the key."""
  mask = (1 << 64) - 1
  x = x + np.uint64((key * 0x9E3779B97F4A7C15 + 0x1234567) & mask)
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))
