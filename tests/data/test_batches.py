"""Batches: each row once an epoch, on any number of hosts, without state."""

import dataclasses
import fractions
import itertools

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from texts import BOS, BYTE, EOS, small

from experiments.data import batches
from mla_moe.config import DataConfig


def slow_span(config, steps):
  """Yields the spans by their definition, step by step, in exact arithmetic."""
  micro, first = config.micro_batch or config.batch_size, 0
  for _ in range(steps):
    size = config.batch_size
    if config.batch_start:
      seen = fractions.Fraction(first * config.seq_len)
      done = min(1, seen / fractions.Fraction(config.ramp_tokens))
      grow = config.batch_size - config.batch_start
      size = int(config.batch_start + grow * done) // micro * micro
    yield first, size
    first += size


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.example(micro=1, start=1, more=26, seq_len=3, ramp=26)  # a tie
@hypothesis.given(
  micro=st.integers(1, 4),
  start=st.integers(1, 6),
  more=st.integers(0, 30),
  seq_len=st.integers(2, 9),
  ramp=st.integers(1, 3000),
)
def test_spans_follow_the_formula_without_gap_or_step_back(
  micro, start, more, seq_len, ramp
):
  config = small(
    seq_len=seq_len,
    micro_batch=micro,
    batch_start=start * micro,
    batch_size=(start + more) * micro,
    ramp_tokens=float(ramp),
  )
  spans = [batches.span(config, step) for step in range(80)]
  for first, size in spans:
    seen = fractions.Fraction(first * seq_len, ramp)
    exact = micro * start + micro * more * min(1, seen)
    # Whole when the formula gives a whole number: rounding may miss it.
    tie = fractions.Fraction(1, 10**9)
    assert size in {int(exact + d) // micro * micro for d in (-tie, 0, tie)}
  sizes = [size for _, size in spans]
  assert sizes == sorted(sizes) and sizes[0] == config.batch_start
  for (first, size), (following, _) in itertools.pairwise(spans):
    assert first + size == following


def test_the_ramp_of_deepseek_v3():
  config = DataConfig(batch_start=3072, ramp_tokens=469e9, micro_batch=512)
  expected = list(slow_span(config, 16000))
  for step in (0, 1, 999, 15638, 15639, 15640, 15999):
    assert batches.span(config, step) == expected[step]
  first, size = batches.span(config, 10**6)
  assert size == 15360
  assert first == expected[-1][0] + (10**6 - 15999) * 15360


def test_the_ramp_fills_up_with_empty_micro_batches(text):
  config = small(micro_batch=2, batch_start=2, batch_size=6, ramp_tokens=100.0)
  counts = []
  for step in range(12):
    batch = batches.batch_at(text.train, config, step, BOS)
    assert batch.tokens.shape == (3, 2, 8)
    counts.append(int(batch.count))
    assert not batch.tokens[batch.count :].any()
    assert (batch.targets[batch.count :] == -1).all()
    assert (batch.targets[: batch.count] >= 0).all()
  assert counts == sorted(counts) and {1, 2, 3} == set(counts)


@pytest.mark.parametrize('rows', [1, 2, 3, 4, 5, 7, 16, 17, 63, 64, 65, 1000])
def test_each_key_permutes_all_rows(rows):
  index = np.arange(rows)
  orders = [batches.permute(index, rows, key) for key in range(8)]
  for order in orders:
    np.testing.assert_array_equal(np.sort(order), index)
  if rows > 60:  # fewer may agree by chance
    for a, b in itertools.combinations([index, *orders], 2):
      assert (a == b).mean() < 0.2
      assert (np.diff(a) == np.diff(b)).mean() < 0.2


def test_the_order_of_a_run_is_that_of_older_versions():
  """A run that resumes goes on in the order in which it began."""
  order = lambda size, key: batches.permute(np.arange(size), size, key).tolist()
  assert order(10, 0) == [1, 9, 2, 8, 5, 3, 0, 7, 4, 6]
  assert order(10, 7 << 20) == [5, 0, 1, 9, 7, 8, 2, 4, 3, 6]
  assert order(1000, 3)[:5] == [754, 353, 831, 900, 532]


def test_permutations_spread_evenly():
  """Row 0's place, and row 1's distance from it, are uniform over the keys."""
  rows, keys, bins = 1001, 3000, 20
  place = np.array(
    [batches.permute(np.arange(2), rows, k) for k in range(keys)]
  )
  gap = (place[:, 1] - place[:, 0]) % rows - 1  # 0..999
  for values in (place[place[:, 0] < 1000, 0], gap):
    counts = np.bincount(values // (1000 // bins), minlength=bins)
    expected = len(values) / bins
    # The 0.9999 quantile of chi-square with 19 degrees of freedom is 50.8.
    assert ((counts - expected) ** 2 / expected).sum() < 50.8


def test_an_epoch_predicts_every_token_once_and_the_next_is_another_order(text):
  stream = text.train[: 8 * 24 + 1]
  config = small()
  steps = [batches.batch_at(stream, config, step, BOS) for step in range(8)]
  pairs = lambda steps: sorted(
    (row.tolist(), target.tolist())
    for batch in steps
    for row, target in zip(batch.tokens[0], batch.targets[0], strict=True)
  )
  rows = stream[:-1].reshape(24, 8).tolist()
  nexts = stream[1:].reshape(24, 8).tolist()
  expected = sorted(zip(rows, nexts, strict=True))
  assert pairs(steps[:4]) == expected == pairs(steps[4:])
  first, second = (
    np.concatenate([b.tokens for b in s]) for s in (steps[:4], steps[4:])
  )
  assert (first != second).any()


def test_a_batch_may_reach_into_the_next_epoch(text):
  stream = text.train[: 8 * 10 + 1]
  rows = [
    row.tolist()
    for step in range(5)
    for row in batches.batch_at(stream, small(), step, BOS).tokens[0]
  ]
  epoch_rows = sorted(stream[:-1].reshape(10, 8).tolist())
  for epoch in range(3):
    assert sorted(rows[epoch * 10 : epoch * 10 + 10]) == epoch_rows


@pytest.mark.parametrize('packing', ['joined', 'separate'])
@pytest.mark.parametrize('hosts', [2, 3, 6])
def test_row19_hosts_share_the_batch_of_one(hosts, packing, text):
  config = small(batch_size=12, micro_batch=6, packing=packing)
  for step, host in itertools.product((0, 3, 11), range(hosts)):
    full = batches.batch_at(text.train, config, step, BOS)
    neighbours = np.split(np.arange(6), hosts)[host]
    for rows in (neighbours, np.arange(host, 6, hosts)):
      part = batches.batch_at(text.train, config, step, BOS, rows)
      for ours, whole in zip(part[:4], full[:4], strict=True):
        np.testing.assert_array_equal(ours, whole[:, rows])
      assert part.count == full.count


def test_the_order_depends_on_the_seed_alone(text):
  steps = lambda seed: [
    batches.batch_at(text.train, small(seed=seed), step, BOS).tokens
    for step in (0, 5)
  ]
  np.testing.assert_array_equal(steps(3), steps(3))
  assert (np.array(steps(3)) != np.array(steps(4))).any()


def test_separate_documents_have_their_own_positions_and_no_shared_targets():
  document = lambda *ids: [BOS, *ids, EOS]
  stream = [7, 8, EOS, *document(1, 2), *document(3), *document(4, 5, 6), 9, 9]
  stream = np.array(stream[:13], np.uint16)
  config = small(seq_len=12, batch_size=1, packing='separate')
  batch = batches.batch_at(stream, config, 0, BOS)
  tokens, targets, segments, positions = (x[0, 0] for x in batch[:4])
  np.testing.assert_array_equal(tokens, stream[:12])
  # A target is the next token unless that begins another document.
  slow_targets, slow_segments, slow_positions = [], [], []
  segment, position = 0, 0
  for here, following in itertools.pairwise(stream.tolist()):
    if here == BOS:
      segment, position = segment + 1, 0
    slow_targets.append(-1 if following == BOS else following)
    slow_segments.append(segment)
    slow_positions.append(position)
    position += 1
  np.testing.assert_array_equal(targets, slow_targets)
  np.testing.assert_array_equal(segments, slow_segments)
  np.testing.assert_array_equal(positions, slow_positions)
  joined = dataclasses.replace(config, packing='joined')
  batch = batches.batch_at(stream, joined, 0, BOS)
  np.testing.assert_array_equal(batch.targets[0, 0], stream[1:])
  np.testing.assert_array_equal(batch.positions[0, 0], np.arange(12))
  assert not batch.segments.any()


def test_evaluation_is_the_same_every_time_and_reads_no_row_twice(text):
  config = small(micro_batch=3)
  rows = (len(text.heldout) - 1) // 8
  for count in (1, 2, 1000):
    first = batches.eval_batches(text.heldout, config, BOS, count)
    again = batches.eval_batches(text.heldout, config, BOS, count)
    assert len(first) == min(count, -(-rows // 3))
    assert all(int(batch.count) == 1 for batch in first)
    for a, b in zip(first, again, strict=True):
      np.testing.assert_array_equal(a.targets, b.targets)
    real = sum(int((batch.targets >= 0).sum()) for batch in first)
    assert real == min(rows, count * 3) * 8
  predicted = np.concatenate([b.targets[b.targets >= 0] for b in first])
  np.testing.assert_array_equal(predicted, text.heldout[1 : rows * 8 + 1])


def test_bits_per_byte_of_a_uniform_guess_is_eight_bits_and_the_specials():
  """Guessing a byte costs 8 bits; each special costs too, but has no bytes."""
  ids = np.concatenate([[BOS], BYTE.encode('héllo'), [EOS]])
  size = int(BYTE.byte_lengths()[ids[1:]].sum())
  assert size == 6
  nll = np.log(256) * (len(ids) - 1)
  np.testing.assert_allclose(batches.bits_per_byte(nll, size), 8 * 7 / 6)


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(
  total=st.integers(1, 400), block=st.integers(1, 40), seed=st.integers(0, 3)
)
def test_blocks_of_rows_are_read_together_and_each_row_once(total, block, seed):
  """At most 17 blocks in any 16 blocks of places; epochs differ."""
  data = small(block_rows=block, seed=seed)
  order = batches.shuffled(np.arange(2 * total), total, data)
  for epoch in (order[:total], order[total:]):
    assert sorted(epoch) == list(range(total))
    whole, size = total // block * block, 16 * block
    for start in range(0, whole, size):
      rows = epoch[start : min(start + size, whole)]
      blocks, counts = np.unique(rows // block, return_counts=True)
      assert (counts == block).all() and len(blocks) <= 16
    assert sorted(epoch[whole:]) == list(range(whole, total))
  # Any of the places by themselves, as hosts ask for them.
  some = np.arange(2 * total).reshape(2, -1)[:, ::3]
  np.testing.assert_array_equal(
    batches.shuffled(some, total, data), order.reshape(2, -1)[:, ::3]
  )


def test_blocks_come_in_another_order_in_each_epoch_and_are_mixed():
  order = batches.shuffled(np.arange(1280), 640, small(block_rows=10))
  first, second = order[:640] // 10, order[640:] // 10
  assert set(first[:160]) != set(second[:160])
  assert set(first[:160]) not in ({*range(16)}, set(first[160:320]))
  assert (np.diff(order) == 1).mean() < 0.05  # neighbours are apart


def test_a_stream_that_knows_its_beginnings_needs_no_bos():
  """Segments, positions and targets as if each document began with bos."""
  ids = np.arange(1, 90, dtype=np.uint16)
  starts = np.isin(np.arange(89) % 11, (0, 4, 5))

  class Stream:
    def __len__(self):
      return len(ids)

    def __getitem__(self, place):
      return ids[place]

    def begins(self, place):
      return starts[place]

  data = small(packing='separate')
  ours = batches.batch_at(Stream(), data, 0, BOS)
  marked = np.where(starts, BOS, ids)
  right = batches.batch_at(marked, data, 0, BOS)
  for name in ('segments', 'positions', 'count'):
    np.testing.assert_array_equal(getattr(ours, name), getattr(right, name))
  assert len({*ours.segments.flat}) > 2 and not (ours.tokens == BOS).any()
  np.testing.assert_array_equal(ours.targets < 0, right.targets < 0)
  known = ours.targets >= 0
  np.testing.assert_array_equal(ours.targets[known], ours.tokens[known] + 1)
