"""Continuous batching: every sample's tokens are those it has alone."""

import functools
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
import shallow

from experiments.serving import page_pool, programs, scheduler
from mla_moe import CacheConfig, ConfigError, rollout
from mla_moe.decode import forward

ROWS, PAGES = 3, 20


@functools.cache
def golden(case='v2_lite'):
  config, variables = shallow.load(case)
  weights = forward.layer_weights(config, variables)
  tokens = np.load(shallow.GOLDEN / case / 'expected.npz')['tokens']
  if config.mtp.depth:
    # It can say few things, so that what it drafts is often right.
    weights['head'] = weights['head'].at[4:].set(0.0)
  return config, weights, tokens


def make(weights=None, case='v2_lite', **more):
  config, good, _ = golden(case)
  options = dict(
    rows=ROWS,
    length=64,
    pages=PAGES,
    chunk=16,
    cache=CacheConfig(dtype='float32', page=8),
  )
  return scheduler.Scheduler(config, weights or good, **options | more)


def drain(server):
  """Every sample's tokens and last reason, and the number of steps."""
  out, steps = {}, 0
  while server.busy:
    for event in server.step():
      tokens, _ = out.get(event.ticket, ([], ''))
      out[event.ticket] = (tokens + [event.token], event.reason)
    steps += 1
    assert steps < 1000, 'it does not come to an end'
  return out, steps


def alone(ids, limit, case='v2_lite', **options):
  config, weights, _ = golden(case)
  prompt = np.zeros((1, 64), np.int32)  # one shape for all
  prompt[0, : len(ids)] = ids
  out = rollout(config, weights, prompt, limit, lengths=[len(ids)], **options)
  return out.tokens[0, : out.counts[0]].tolist()


def test_requests_beside_each_other_equal_those_alone():
  _, _, tokens = golden()
  server = make()
  # More than the rows, and the pages, hold; lengths beside pages and chunks.
  sizes = [(5, 9), (33, 20), (16, 1), (40, 12), (8, 30), (17, 3), (1, 25)]
  expected = {}
  for i, (length, limit) in enumerate(sizes):
    ids = tokens[i % 2, i : i + length]
    (ticket,) = server.submit(ids, limit)
    expected[ticket] = alone(ids, limit)
  compiled = [f._cache_size() for f in (programs.prefill, programs.decode)]
  out, steps = drain(server)
  after = [f._cache_size() for f in (programs.prefill, programs.decode)]
  assert {t: x for t, (x, _) in out.items()} == expected
  assert {reason for _, reason in out.values()} == {'length'}
  # One program of each, however the requests came.
  assert [b - a for a, b in zip(compiled, after, strict=True)] == [1, 1]
  assert steps < sum(limit for _, limit in sizes)
  assert server.free_pages == PAGES


def test_samples_of_one_prompt_share_its_pages_and_draw_for_themselves():
  _, _, tokens = golden()
  ids = tokens[0, :20]
  server = make()
  knobs = dict(temperature=1.0, top_p=0.9)
  tickets = server.submit(ids, 12, samples=5, seed=7, **knobs)
  early = {}
  for _ in range(2):  # the prompt's two chunks; its first samples start
    for event in server.step():
      early.setdefault(event.ticket, []).append(event.token)
  # 20 tokens are two whole pages, shared, and four on each sample's third.
  assert PAGES - server.free_pages <= 2 + ROWS * 2 + 1
  out = {t: x for t, (x, _) in drain(server)[0].items()}
  for i, ticket in enumerate(tickets):
    assert (
      out[ticket] == alone(ids, 12, seed=7 + i, **knobs)[-len(out[ticket]) :]
    )
  assert server.free_pages == PAGES
  assert len({tuple(x) for x in out.values()}) > 2
  # The second sample's seed is beyond those that a request may name.
  server.submit(ids, 2, samples=2, seed=2**31 - 1, temperature=1.0)
  assert len(drain(server)[0]) == 2


def test_drafts_change_no_token_of_any_row():
  _, _, tokens = golden('v3_release')
  server = make(case='v3_release', speculative=True)
  # Prompts that end a page, begin one, are one token, and are cut in chunks.
  sizes = [(8, 20), (17, 9), (1, 25), (40, 24), (16, 1), (23, 2), (24, 17)]
  expected = {}
  for i, (length, limit) in enumerate(sizes):
    ids = tokens[i % 2, i : i + length]
    (ticket,) = server.submit(ids, limit)
    # Without drafts, one by one.
    expected[ticket] = alone(ids, limit, 'v3_release')
  out, _ = drain(server)
  assert {t: x for t, (x, _) in out.items()} == expected
  after_first = sum(limit - 1 for _, limit in sizes)
  # A draft that stands saves a pass, unless the row ends before it.
  lost = server.passes + server.accepted - after_first
  assert 0 <= lost <= len(sizes) and 0 < server.accepted < server.passes
  assert server.free_pages == PAGES


@pytest.mark.slow
def test_drafted_samples_of_one_prompt_draw_as_they_do_alone():
  _, _, tokens = golden('v3_release')
  server = make(case='v3_release', speculative=True)
  knobs = dict(temperature=0.9, top_k=20)
  for length in (16, 17):  # the last token ends a page, or begins one
    ids = tokens[0, :length]
    tickets = server.submit(ids, 12, samples=4, seed=7, **knobs)
    out = {t: x for t, (x, _) in drain(server)[0].items()}
    for i, ticket in enumerate(tickets):
      single = alone(
        ids, 12, 'v3_release', seed=7 + i, speculative=True, **knobs
      )
      assert out[ticket] == single
    assert len({tuple(x) for x in out.values()}) > 2
    assert server.free_pages == PAGES
  config, _, _ = golden()
  with pytest.raises(ConfigError, match='MTP'):
    make(speculative=True)


def test_stop_ids_and_cancelling_free_the_row():
  _, _, tokens = golden()
  ids = tokens[1, :10]
  whole = alone(ids, 20)
  server = make()
  (stopped,) = server.submit(ids, 20, stop_ids=[whole[4]])
  (gone,) = server.submit(ids, 40)
  waiting = server.submit(ids, 30, samples=4)
  out = []
  for _ in range(4):
    out += server.step()
  assert any(event.ticket == gone for event in out)
  for ticket in (gone, *waiting):
    server.cancel(ticket)
  server.cancel(12345)
  later = []
  while server.busy:
    later += server.step()
  assert {e.ticket for e in later} <= {stopped}
  out += later
  mine = [e for e in out if e.ticket == stopped]
  assert [e.token for e in mine] == whole[: whole.index(whole[4]) + 1]
  assert mine[-1].reason == 'stop'
  assert server.free_pages == PAGES


def test_a_broken_row_ends_and_spoils_no_other():
  config, weights, tokens = golden()
  ids = tokens[0, :10]
  whole = alone(ids, 12)
  bad = next(t for t in range(config.vocab) if t not in {*ids, *whole})
  spoilt = weights | {'embedding': weights['embedding'].at[bad].set(jnp.nan)}
  server = make(spoilt)
  (broken,) = server.submit([bad, *ids], 12)
  (fine,) = server.submit(ids, 12)
  out, _ = drain(server)
  assert out[broken][1] == 'broken' and len(out[broken][0]) == 1
  assert out[fine] == (whole, 'length')
  # On every page and row, those that the broken one had too.
  expected = {server.submit(ids, n)[0]: alone(ids, n) for n in (46, 46, 38)}
  out, free = {ticket: [] for ticket in expected}, []
  while server.busy:
    for event in server.step():
      out[event.ticket].append(event.token)
    free.append(server.free_pages)
  assert out == expected and min(free) == 0


@pytest.mark.parametrize(
  'program, failing',
  [('prefill', 3), ('first_token', 2), ('copy_page', 1)],
)
def test_an_error_in_one_prompt_s_work_ends_it_alone(
  monkeypatch, capfd, program, failing
):
  """Its program is right but for the call number `failing`."""
  _, _, tokens = golden()
  server, calls = make(), itertools.count(1)
  good = getattr(programs, program)

  def once(*args, **kwargs):
    if next(calls) == failing:
      raise RuntimeError('out of memory')
    return good(*args, **kwargs)

  (first,) = server.submit(tokens[0, :10], 12)  # one chunk
  broken = server.submit(tokens[1, :20], 9, samples=2)  # two of them
  (last,) = server.submit(tokens[0, 3:20], 12)
  monkeypatch.setattr(programs, program, once)
  out, _ = drain(server)
  assert [out.pop(ticket)[1] for ticket in broken] == ['failed'] * 2
  assert out == {
    first: (alone(tokens[0, :10], 12), 'length'),
    last: (alone(tokens[0, 3:20], 12), 'length'),
  }
  assert server.free_pages == PAGES and server.failures == 1
  assert 'out of memory' in capfd.readouterr().err


def test_an_error_of_a_pass_ends_the_rows_and_no_waiting_prompt(
  monkeypatch, capfd
):
  """It has taken the arrays with it."""
  _, _, tokens = golden()
  server, calls = make(), itertools.count(1)
  good = programs.decode

  def third(*args, **kwargs):
    out = good(*args, **kwargs)
    if next(calls) == 3:
      raise RuntimeError('out of memory')
    return out

  rows = server.submit(tokens[0, :10], 12, samples=ROWS)
  waiting = server.submit(tokens[0, 3:20], 12)
  monkeypatch.setattr(programs, 'decode', third)
  out, _ = drain(server)
  for ticket in rows:  # three tokens, and the end
    assert out[ticket][1] == 'failed' and len(out[ticket][0]) == 4
  assert out[waiting[0]] == (alone(tokens[0, 3:20], 12), 'length')
  assert server.free_pages == PAGES and server.failures == 1
  assert 'out of memory' in capfd.readouterr().err


def test_what_cannot_be_served_is_refused():
  server = make(waiting=2)
  for words, args, more in [
    ('empty', ([], 4), {}),
    ('token 259', ([259], 4), {}),
    ('max_new_tokens=-1', ([1], -1), {}),
    ('64 tokens', ([1], 64), {}),
    ('temperature', ([1], 4), dict(temperature=-1.0)),
    ('samples', ([1], 4), dict(samples=0)),
    ('seed', ([1], 4), dict(seed=2**31)),
  ]:
    with pytest.raises(ConfigError, match=words):
      server.submit(*args, **more)
  assert not server.busy
  server.submit([1], 4)
  server.submit([1], 4)
  with pytest.raises(scheduler.Full):
    server.submit([1], 4)


def test_any_waiting_prompt_can_be_cancelled():
  _, _, tokens = golden()
  server = make(rows=1, pages=9)
  server.submit(tokens[0, :3], 30)
  server.step()
  # Of one length and of another, one token long, and equal ones.
  prompts = [[4, 5, 6], [7, 8, 9], [1, 2], [4], [5], [4, 5, 6]]
  tickets = [server.submit(ids, 3)[0] for ids in prompts]
  for i in (1, 4, 5, 2):
    server.cancel(tickets[i])
  assert [list(group.tickets) for group in server._queue] == [
    [tickets[0]],
    [tickets[3]],
  ]
  out = {t: x for t, (x, _) in drain(server)[0].items()}
  assert out[tickets[0]] == alone([4, 5, 6], 3)
  assert out[tickets[3]] == alone([4], 3)
  assert server.free_pages == 9
  # No comparison of two of them looks at an array.
  assert scheduler.Group.__eq__ is scheduler._Sample.__eq__ is object.__eq__


@pytest.mark.parametrize(
  'drafts', [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_a_pool_serves_all_that_it_takes(drafts):
  """At every length beside a page's edge, with the fewest pages that are said
  to be enough; with one less the request is refused."""
  case = 'v3_release' if drafts else 'v2_lite'
  server = make(case=case, rows=1, pages=9, speculative=drafts)
  # Eight tokens fill a page. Drafts write beside the prompt's last token.
  whole = {5: 0, 7: 0, 8: 1 - drafts, 9: 1, 16: 2 - drafts, 17: 2}
  for length, shared in whole.items():
    for total in (length + 1, 24, 25):
      row, prompt = -(-total // 8), -(-length // 8)
      need = {1: row, 2: max(row, prompt + row - shared)}
      for samples in (1, 2):
        server._pages = page_pool.PagePool(need[samples] - 1)
        with pytest.raises(ConfigError, match='samples=|max_new_tokens='):
          server.submit([1] * length, total - length, samples=samples)
        server._pages = page_pool.PagePool(need[samples])
        server.submit([1] * length, total - length, samples=samples)
        out, _ = drain(server)
        assert [len(x) for x, _ in out.values()] == [total - length] * samples
        assert server.free_pages == need[samples]


def test_one_row_serves_several_samples_that_fill_it():
  server = make(rows=1, pages=0)
  assert server.free_pages == 9  # eight of the row, and one for copies
  tickets = server.submit([1, 2, 3, 4, 5], 59, samples=2)
  out = {t: x for t, (x, _) in drain(server)[0].items()}
  assert out == {t: alone([1, 2, 3, 4, 5], 59) for t in tickets}
  assert server.free_pages == 9


def test_a_request_of_more_pages_than_the_pool_is_refused():
  server = make()
  server._pages = page_pool.PagePool(3)
  with pytest.raises(ConfigError, match='24 tokens'):
    server.submit([1] * 8, 17)
  assert not server.busy
  server.submit([1] * 8, 16)
  assert [len(x) for x, _ in drain(server)[0].values()] == [16]


def test_a_step_in_which_nothing_can_move_is_an_error():
  server = make()
  server._pages = page_pool.PagePool(3)
  server._check = lambda *_: None
  server.submit([1] * 8, 24)
  with pytest.raises(RuntimeError, match='1 prompts wait for ever'):
    server.step()


@pytest.mark.parametrize('length, shared', [(15, 1), (16, 1), (17, 2)])
def test_drafts_do_not_share_the_page_of_the_last_token(length, shared):
  """The MTP module's latent of the prompt's last token depends on the sample's
  first one."""
  server = make(case='v3_release', speculative=True, chunk=32)
  server.submit([1] * length, 20, samples=2)
  server.step()
  assert int((server._pages._users > 1).sum()) == shared


def walk(server, draws, steps):
  """Submits, cancels and steps at random; returns the finished samples.

  A sample is (ids, seed, knobs, its tokens). Every step keeps the invariants.
  """
  pages = server._pages
  live, finished = {}, []
  for _ in range(steps):
    if draws.random() < 0.3 and len(server._queue) < 5:
      length = int(draws.choice([1, 7, 8, 9, 15, 16, 17, 33, 40, 63]))
      limit = min(64 - length, int(draws.choice([1, 2, 8, 30])))
      ids = draws.integers(0, 256, length).tolist()
      knobs = dict(temperature=float(draws.choice([0.0, 1.0])))
      samples, seed = int(draws.choice([1, 1, 2, 5])), int(draws.integers(999))
      tickets = server.submit(ids, limit, samples=samples, seed=seed, **knobs)
      for i, ticket in enumerate(tickets):
        live[ticket] = (ids, seed + i, knobs, limit, [])
    if live and draws.random() < 0.1:
      ticket = int(draws.choice(list(live)))
      server.cancel(ticket)
      del live[ticket]
    for event in server.step():
      *sample, limit, tokens = live[event.ticket]  # none was cancelled
      tokens.append(event.token)
      assert event.reason == ('length' if len(tokens) == limit else '')
      if event.reason:
        finished.append((*sample, tokens))
        del live[event.ticket]
    # Every sample is in a row or in the queue, and no group is empty.
    rows = [sample for sample in server._samples if sample]
    assert all(group.tickets for group in server._queue)
    waiting = [t for group in server._queue for t in group.tickets]
    assert sorted([s.ticket for s in rows] + waiting) == sorted(live)
    # Every page is free or has as many users as rows and groups name it.
    users = np.zeros_like(pages._users)
    for owner in (*rows, *server._queue):
      users[owner.pages] += 1
    np.testing.assert_array_equal(users, pages._users)
    assert sorted(pages._free) == np.flatnonzero(users == 0)[1:].tolist()
    assert not any(group.pages for group in list(server._queue)[1:])
  for ticket in list(live):
    server.cancel(ticket)
  assert not server.busy and server.free_pages == pages.pages
  return finished


@pytest.mark.parametrize(
  'case, drafts',
  [('v2_lite', 0), pytest.param('v3_release', 1, marks=pytest.mark.slow)],
)
def test_a_random_walk_loses_no_page_and_changes_no_token(case, drafts):
  server = make(case=case, speculative=bool(drafts))
  done = walk(server, np.random.default_rng(0), 250)
  assert len(done) > 20
  for ids, seed, knobs, tokens in done:
    out = alone(ids, 30, case, seed=seed, speculative=bool(drafts), **knobs)
    assert tokens == out[: len(tokens)]
