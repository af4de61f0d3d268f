"""Batches: any step, on any host of any number, by arithmetic alone.

The token stream is cut into rows of T+1 tokens that overlap by one, so that
every token is predicted once. Row i of an epoch is a keyed permutation of i,
computed and not stored; so `batch_at(step)` needs no state, resuming needs no
seek, and the global batch does not depend on how many hosts read it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from mla_moe.config import ConfigError, DataConfig


class Batch(NamedTuple):
  """One step's tokens, [n micro-batches, B, T] int32 each, as numpy arrays.

  targets are the next tokens, -1 where nothing is to be predicted; segments
  number the documents of a row and positions count within them (one segment
  when packing is 'joined'). Only the first `count` micro-batches are real.
  """

  tokens: np.ndarray
  targets: np.ndarray
  segments: np.ndarray
  positions: np.ndarray
  count: np.ndarray


def span(data: DataConfig, step: int) -> tuple[int, int]:
  """(sequences before the step, sequences in it), the batch ramp included.

  The ramp is linear in tokens, rounded down to whole micro-batches.
  """
  sizes, before = _ramp(data)
  if step < len(sizes):
    return int(before[step]), int(sizes[step])
  more = (step - len(sizes)) * data.batch_size
  return int(before[-1]) + more, data.batch_size


@functools.lru_cache(maxsize=8)
def _ramp(data: DataConfig) -> tuple[np.ndarray, np.ndarray]:
  micro = data.micro_batch or data.batch_size
  sizes, seen = [], 0
  while data.batch_start and seen * data.seq_len < data.ramp_tokens:
    done = seen * data.seq_len / data.ramp_tokens
    size = data.batch_start + (data.batch_size - data.batch_start) * done
    sizes.append(max(int(size) // micro * micro, micro))
    seen += sizes[-1]
  return np.array(sizes, np.int64), np.cumsum([0, *sizes], dtype=np.int64)


def batch_at(
  stream: np.ndarray,
  data: DataConfig,
  step: int,
  bos_id: int,
  host: int = 0,
  hosts: int = 1,
  left_out: int = 0,
) -> Batch:
  """The batch of `step`, or this host's columns of each micro-batch.

  `left_out` sequences before the step's are left out: where a run that had gone
  astray goes on elsewhere in the text, with its schedules unchanged.

  Raises:
    ConfigError: hosts that do not divide the micro-batch.
  """
  micro = data.micro_batch or data.batch_size
  if micro % hosts:
    raise ConfigError(f'{hosts} hosts: must divide data.micro_batch={micro}')
  first, size = span(data, step)
  most, each = data.batch_size // micro, micro // hosts
  at = first + left_out + np.arange(size).reshape(-1, micro)
  at = at[:, host * each : (host + 1) * each]
  rows = (len(stream) - 1) // data.seq_len
  epoch, index = np.divmod(at, rows)
  order = np.zeros_like(index)
  for one in np.unique(epoch):
    here = epoch == one
    order[here] = permute(index[here], rows, (data.seed << 20) + int(one))
  batch = _rows(stream, data, order, bos_id)
  empty = most - len(at)
  if not empty:
    return batch
  pad = lambda x, fill: np.pad(
    x, ((0, empty), (0, 0), (0, 0)), constant_values=fill
  )
  fills = (0, -1, 0, 0)
  padded = (pad(x, fill) for x, fill in zip(batch[:-1], fills, strict=True))
  return Batch(*padded, batch.count)


def batches(
  stream: np.ndarray,
  data: DataConfig,
  bos_id: int,
  start: int,
  stop: int,
  host: int = 0,
  hosts: int = 1,
  left_out: int = 0,
) -> Iterator[Batch]:
  """Batches of steps start..stop-1, each read when it is asked for."""
  read = functools.partial(
    batch_at,
    stream,
    data,
    bos_id=bos_id,
    host=host,
    hosts=hosts,
    left_out=left_out,
  )
  return map(read, range(start, stop))


def eval_batches(
  stream: np.ndarray, data: DataConfig, bos_id: int, count: int
) -> list[Batch]:
  """The same `count` micro-batches every time, rows spread over the stream.

  Where the stream has fewer rows, fewer: no row is read twice; rows that fill
  up the last batch have no targets.
  """
  micro = data.micro_batch or data.batch_size
  rows = (len(stream) - 1) // data.seq_len
  want = min(rows, count * micro)
  chosen = np.arange(want) * rows // want
  found = []
  for i in range(0, want, micro):
    part = chosen[i : i + micro]
    order = np.pad(part, (0, micro - len(part)), mode='edge')
    batch = _rows(stream, data, order[None], bos_id)
    batch.targets[:, len(part) :] = -1
    found.append(batch)
  return found


def bits_per_byte(nll: float, tokens_bytes: int) -> float:
  """Nats summed over tokens, as bits for each byte that they stand for."""
  return nll / math.log(2) / tokens_bytes


def _rows(stream, data, order, bos_id) -> Batch:
  """Rows `order` [n, B] of the stream."""
  t = data.seq_len
  at = order[..., None] * t + np.arange(t + 1)
  whole = stream[at].astype(np.int32)
  tokens, targets = whole[..., :-1], whole[..., 1:]
  positions = np.broadcast_to(np.arange(t, dtype=np.int32), tokens.shape)
  segments = np.zeros(tokens.shape, np.int32)
  if data.packing == 'separate':
    starts = whole == bos_id
    ids = np.cumsum(starts, axis=-1, dtype=np.int32)
    segments = ids[..., :-1]
    begun = np.where(starts[..., :-1], positions, 0)
    positions = positions - np.maximum.accumulate(begun, axis=-1)
    targets = np.where(ids[..., 1:] == segments, targets, -1)
  arrays = (tokens, targets, segments, positions)
  arrays = (np.ascontiguousarray(x) for x in arrays)
  return Batch(*arrays, np.int32(len(order)))


def permute(index: np.ndarray, size: int, key: int) -> np.ndarray:
  """Where each index of 0..size-1 goes in a permutation chosen by `key`.

  A Feistel network over the next even number of bits; values that fall outside
  go round again until they are inside (cycle walking).
  """
  half = max(1, math.ceil(math.log2(max(size, 2)) / 2))
  low = np.uint64((1 << half) - 1)
  out = index.astype(np.uint64)
  outside = np.ones(out.shape, bool)
  while outside.any():
    left, right = out[outside] >> np.uint64(half), out[outside] & low
    for turn in range(4):
      left, right = right, left ^ (_mix(right, key * 4 + turn) & low)
    out[outside] = left << np.uint64(half) | right
    outside = out >= size
  return out.astype(np.int64)


def _mix(x: np.ndarray, key: int) -> np.ndarray:
  """splitmix64's finaliser over x and the key."""
  mask = (1 << 64) - 1
  x = x + np.uint64((key * 0x9E3779B97F4A7C15 + 0x1234567) & mask)
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))
