"""Answers in rows: nothing is lost, shifted, or counted twice."""

import numpy as np
import pytest

from experiments.data import packing
from experiments.rl import episodes
from mla_moe.config import ConfigError
from mla_moe.model import flash


def _answer(p, c, start=10):
  ids = np.arange(start, start + p + c)
  return episodes.Answer(
    ids[:p], ids[p:], -np.arange(1.0, c + 1), 0.5 + start, 0.25
  )


def test_one_answer_by_hand():
  """P = 1 and C = 1: the only target is in column P - 1 = 0."""
  out = episodes.pack([_answer(1, 1)], 4, 1)
  assert out.tokens.tolist() == [[[10, 0, 0, 0]]]
  assert out.targets.tolist() == [[[11, -1, -1, -1]]]
  assert out.segments.tolist() == [[[0, -1, -1, -1]]]
  out = episodes.pack([_answer(3, 2)], 5, 1)
  assert out.tokens.tolist() == [[[10, 11, 12, 13, 0]]]
  assert out.targets.tolist() == [[[-1, -1, 13, 14, -1]]]
  assert out.positions.tolist() == [[[0, 1, 2, 3, 0]]]
  assert out.rollout.tolist() == [[[0, 0, -1, -2, 0]]]
  assert out.weight.tolist() == [[[0, 0, 0.25, 0.25, 0]]]
  assert out.advantage.tolist() == [[[0, 0, 10.5, 10.5, 0]]]


def test_all_answers_come_back_out_of_the_rows():
  rng = np.random.default_rng(0)
  answers = [
    _answer(*rng.integers(1, 9, 2), start=100 * i) for i in range(1, 40)
  ]
  out = episodes.pack(answers, 20, 4)
  assert out.tokens.shape == (10, 4, 20)  # as many as if each had a row
  assert out.count < 10
  assert out.routes is None
  flat = [x.reshape(-1, 20) for x in out[:9]]
  assert (flat[2][int(out.count) * 4 :] == -1).all()
  seen = []
  for tokens, targets, segments, *_, weight in zip(*flat, strict=True):
    assert (weight[targets < 0] == 0).all()
    for segment in range(segments.max() + 1):
      place = segments == segment
      seen.append((tokens[place].tolist(), targets[place].tolist()))
  want = []
  for prompt, ids, *_ in answers:
    both = [*prompt.tolist(), *ids.tolist()]
    want.append((both[:-1], [-1] * (len(prompt) - 1) + ids.tolist()))
  assert sorted(seen) == sorted(want)


def test_routes_stand_at_the_tokens_that_are_read():
  answers = [_answer(3, 2), _answer(1, 2, start=20)]
  routes = lambda a: np.repeat(np.r_[a.prompt, a.tokens][:-1], 4).reshape(
    -1, 2, 2
  )
  answers = [a._replace(routes=routes(a).astype(np.int16)) for a in answers]
  out = episodes.pack(answers, 7, 1)
  assert out.tokens[0].tolist() == [[10, 11, 12, 13, 20, 21, 0]]
  want = np.where(out.segments < 0, -1, out.tokens)[..., None, None]
  np.testing.assert_array_equal(
    out.routes, np.broadcast_to(want, (2, 1, 7, 2, 2))
  )
  assert out.routes.dtype == np.int16


def test_a_shared_prompt_by_hand():
  """Its last token begins each answer; the next row has it once more."""
  prompt = np.array([10, 11, 12])
  pairs = [(prompt, ids) for ids in ([20], [30, 31], [40, 41, 42])]
  answers = [
    _answer(len(p), len(ids))._replace(prompt=p, tokens=np.array(ids))
    for p, ids in [*pairs, (np.array([50]), [51, 52])]
  ]
  ids = lambda a: np.r_[a.prompt, a.tokens][:-1, None, None]
  answers = [a._replace(routes=ids(a).astype(np.int16)) for a in answers]
  out = episodes.pack(answers, 6, 1, True, 'shared')
  assert out.count == 2
  read = [[10, 11, 12, 40, 41, 12], [10, 11, 12, 30, 50, 51]]
  assert out.tokens[:2, 0].tolist() == read
  assert out.targets[0, 0].tolist() == [-1, -1, 40, 41, 42, 20]
  assert out.positions[0, 0].tolist() == [0, 1, 2, 3, 4, 2]
  assert out.positions[1, 0].tolist() == [0, 1, 2, 3, 0, 1]
  one, two = 1 << 20, 2 << 20
  assert out.segments[0, 0].tolist() == [0, 0, one, one, one, two]
  assert out.segments[1, 0].tolist() == [0, 0, one, one, two + 1, two + 1]
  assert out.rollout[0, 0].tolist() == [0, 0, -1, -2, -3, -1]
  want = np.where(out.segments < 0, -1, out.tokens)
  np.testing.assert_array_equal(out.routes[..., 0, 0], want)


def test_a_row_has_as_many_answers_as_an_int32_can_number():
  rows = packing.shared([(np.array([1]), [2])] * 2048, 2**13)
  assert [len(row) for row in rows] == [2047, 1]
  assert 2**30 < max(place.segment for place in rows[0]) < 2**31


def test_each_answer_has_one_place_after_a_shared_prompt():
  rng = np.random.default_rng(0)
  answers = [
    _answer(p, c, start=100 * i)._replace(
      prompt=np.arange(100 * q, 100 * q + p)
    )
    for q, p in enumerate(rng.integers(1, 6, 8))
    for i, c in enumerate(rng.integers(1, 9, 6), start=10 * q + 1)
  ]
  out = episodes.pack(answers, 20, 4, True, 'shared')
  seen = []
  for row in zip(*(x.reshape(-1, 20) for x in out[:4]), strict=True):
    tokens, targets, segments, positions = row
    for segment in {*segments[targets >= 0]}:
      mine = segments == segment
      see = flash.visible(segment, segments)
      order = np.argsort(positions[see], kind='stable')
      read = tokens[see][order].tolist()
      assert positions[see][order].tolist() == [*range(len(read))]
      seen.append((read, targets[mine].tolist()))
  want = [
    ([*a.prompt.tolist(), *a.tokens.tolist()][:-1], a.tokens.tolist())
    for a in answers
  ]
  assert sorted(seen) == sorted(want)


def test_an_answer_that_no_row_holds():
  with pytest.raises(ConfigError, match='need 6 columns: more than'):
    episodes.pack([_answer(4, 3)], 5, 1)
