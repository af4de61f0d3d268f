"""Continuous batching: requests come into free rows while others decode.

Shapes are fixed, so that nothing compiles after the start: a step is a chunk of
the first waiting prompt and one token of every row. Rows have pages of a common
pool; samples of one prompt share the pages that it fills, and each copies the
last, half-filled one. All pages that a row may come to need are its own before
it starts, so no row ever waits or is put off, and only one prompt holds pages
without a row: whatever comes, the rows that run end, and make room.

A row's tokens do not depend on the rows beside it. With `speculative` the MTP
module drafts: a step then gives a row one token or two. What the module keeps
of a prompt's last token depends on the token after it, so that samples share
the pages before that one only.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.serving import programs
from mla_moe.config import CacheConfig, ConfigError, ModelConfig
from mla_moe.decode import forward, latent_cache, sampling


class Full(Exception):
  """As many requests wait as may."""


class Event(NamedTuple):
  """A token of a sample. `reason` is '' while it goes on, else 'stop', 'length'
  or 'broken' (its logits are not finite; the token means nothing)."""

  ticket: int
  token: int
  log_prob: float
  reason: str


@dataclasses.dataclass
class _Group:
  """Samples of one prompt, until each has a row."""

  ids: np.ndarray
  new: int
  stops: frozenset
  tickets: collections.deque
  knobs: dict
  seeds: dict
  pages: list = dataclasses.field(default_factory=list)
  filled: int = 0
  logits: object = None
  hidden: object = None


@dataclasses.dataclass
class _Row:
  ticket: int
  pages: list
  left: int
  stops: frozenset


class Scheduler:
  """The rows of a model; not safe for threads.

  Args:
    config: the model's.
    variables: {'params', 'router'}, or what `decode.unstack` made of them.
    rows: how many samples decode at once.
    length: of prompt and answer together, at most.
    cache: how the latents are kept.
    pages: of the pool; 0 is what all rows need at full length.
    chunk: prompt tokens of one step.
    waiting: requests that may wait; more are refused with `Full`.
    speculative: draft with the MTP module.

  `passes` counts the steps of rows after their first token, and `accepted` the
  drafts that stood.

  Raises:
    ConfigError: `speculative`, and the model has no MTP module.
  """

  def __init__(
    self,
    config: ModelConfig,
    variables,
    *,
    rows: int = 8,
    length: int = 1024,
    cache: CacheConfig = CacheConfig(),
    pages: int = 0,
    chunk: int = 256,
    waiting: int = 64,
    speculative: bool = False,
  ):
    if speculative and not config.mtp.depth:
      raise ConfigError(
        'speculative=True: the model has no MTP module (depth 0)'
      )
    self.passes = self.accepted = 0
    self.config, self._chunk, self._room = config, chunk, waiting
    self._page, self._impl = cache.page, latent_cache.kernel(cache)
    self.length = min(length, config.max_positions)
    each = -(-self.length // cache.page)
    # Page 0 stays empty: rows without a request read it.
    self._total = (pages or rows * each) + 1
    self._free = list(range(self._total - 1, 0, -1))
    self._shared = np.zeros(self._total, np.int32)
    self._spoilt = set()
    self._table = np.zeros((rows, each), np.int32)
    self._lengths = np.zeros(rows, np.int32)
    self._recent = np.zeros((rows, 2), np.int32)
    self._taken = np.zeros(rows, np.int32)
    self._rows: list[_Row | None] = [None] * rows
    self._knobs = jax.tree.map(np.array, sampling.knobs(rows))
    self._queue = collections.deque()
    self._tickets = itertools.count()
    make = functools.partial(latent_cache.pools, config, self._total, cache)
    self._drafts = int(speculative)
    self._pools = jax.jit(make)()[: config.layers + self._drafts]
    self._seen = jnp.zeros((rows, config.vocab), bool)
    self._hidden = jnp.zeros((rows, 2, config.dim), config.dtype)
    if 'layers' not in variables:
      unstack = jax.jit(functools.partial(forward.unstack, config))
      variables = unstack(variables)
    self._weights = variables

  @property
  def busy(self) -> bool:
    """Whether `step` has anything to do."""
    return bool(self._queue) or any(self._rows)

  @property
  def free_pages(self) -> int:
    return len(self._free)

  def submit(
    self,
    ids: Sequence[int],
    max_new_tokens: int,
    *,
    samples: int = 1,
    stop_ids: Sequence[int] = (),
    seed: int = 0,
    **knobs,
  ) -> list[int]:
    """Queues a prompt; a ticket for each sample, of which the i-th draws with
    `seed + i`. `knobs` are `sampling.knobs`'s.

    Raises:
      ConfigError: a request that can never be served.
      Full: one that cannot be now.
    """
    ids = np.asarray(ids, np.int32).reshape(-1)
    if not ids.size:
      raise ConfigError('prompt: is empty; begin it with bos_id at least')
    wrong = ids[(ids < 0) | (ids >= self.config.vocab)]
    if wrong.size:
      raise ConfigError(
        f'prompt: token {wrong[0]} is not below vocab={self.config.vocab}'
      )
    if max_new_tokens < 1:
      raise ConfigError(f'max_new_tokens={max_new_tokens}: must be at least 1')
    if not 1 <= samples <= 1024:
      raise ConfigError(f'samples={samples}: must be from 1 to 1024')
    whole = len(ids) + max_new_tokens
    if whole > self.length or self._needs(whole) >= self._total:
      limit = min(self.length, (self._total - 1) * self._page)
      raise ConfigError(
        f'max_new_tokens={max_new_tokens}: with a prompt of {len(ids)} tokens '
        f'more than the {limit} tokens of a row'
      )
    sampling.knobs(samples, seed=seed, **knobs)
    if len(self._queue) >= self._room:
      raise Full(f'{self._room} requests wait already')
    tickets = [next(self._tickets) for _ in range(samples)]
    seeds = {ticket: seed + i for i, ticket in enumerate(tickets)}
    stops = frozenset(stop_ids)
    waiting = collections.deque(tickets)
    self._queue.append(
      _Group(ids, max_new_tokens, stops, waiting, knobs, seeds)
    )
    return tickets

  def cancel(self, ticket: int) -> None:
    """Forgets a sample and frees what it held; one that ended is ignored."""
    for i, row in enumerate(self._rows):
      if row and row.ticket == ticket:
        self._end(i)
    for group in list(self._queue):
      if ticket in group.tickets:
        group.tickets.remove(ticket)
        if not group.tickets:
          self._release(group.pages)
          self._queue.remove(group)

  def step(self) -> list[Event]:
    """A chunk of a prompt, and a token or two of every row."""
    events = []
    self._fill()
    while self._queue and self._queue[0].logits is not None:
      row = next((i for i, r in enumerate(self._rows) if r is None), None)
      if row is None or not self._admit(self._queue[0], row, events):
        break
      if not self._queue[0].tickets:
        self._release(self._queue.popleft().pages)
    if any(self._rows):
      self._decode(events)
    return events

  # ------------------------------------------------------------------ private

  def _needs(self, tokens: int) -> int:
    return -(-tokens // self._page)

  def _take(self, count: int) -> list[int]:
    taken = [self._free.pop() for _ in range(count)]
    self._shared[taken] = 1
    return taken

  def _release(self, pages: list[int]) -> None:
    for page in pages:
      self._shared[page] -= 1
      if self._shared[page]:
        continue
      if page in self._spoilt:  # zero times NaN would spoil the next row
        self._spoilt.remove(page)
        self._pools = programs.copy(self._pools, np.int32(0), np.int32(page))
      self._free.append(page)

  def _fill(self) -> None:
    """One chunk of the first prompt, if a row and pages are free for it."""
    if not self._queue or self._queue[0].logits is not None:
      return
    group = self._queue[0]
    if not group.pages:
      if all(self._rows):
        return
      if self._needs(len(group.ids) + group.new) > len(self._free):
        return
      group.pages = self._take(self._needs(len(group.ids)))
    part = group.ids[group.filled : group.filled + self._chunk]
    after = group.ids[group.filled + 1 :][: self._chunk]
    tokens, nexts = np.zeros((2, 1, self._chunk), np.int32)
    tokens[0, : len(part)], nexts[0, : len(after)] = part, after
    table = np.zeros((1, self._table.shape[1]), np.int32)
    table[0, : len(group.pages)] = group.pages
    logits, hidden, self._pools = programs.prompt(
      self._weights,
      self._pools,
      table,
      np.array([group.filled], np.int32),
      tokens,
      nexts,
      np.array([len(part)], np.int32),
      np.array([len(after)], np.int32),
      config=self.config,
      impl=self._impl,
    )
    group.filled += len(part)
    if group.filled == len(group.ids):
      group.logits, group.hidden = logits, hidden

  def _admit(self, group: _Group, at: int, events: list) -> bool:
    """Gives the group's next sample a row, and its first token."""
    shared = (len(group.ids) - self._drafts) // self._page
    need = self._needs(len(group.ids) + group.new)
    last = len(group.tickets) == 1
    own = need - (len(group.pages) if last else shared)
    if own > len(self._free):
      return False
    pages = group.pages[:shared]
    self._shared[pages] += 1
    if last:
      pages = pages + group.pages[shared:]
      self._shared[group.pages[shared:]] += 1
    pages = pages + self._take(own)
    if shared < len(group.pages) and not last:
      source, target = group.pages[shared], pages[shared]
      self._pools = programs.copy(
        self._pools, np.int32(source), np.int32(target)
      )
    ticket = group.tickets.popleft()
    one = sampling.knobs(1, seed=[group.seeds[ticket]], **group.knobs)
    for whole, part in zip(
      jax.tree.leaves(self._knobs), jax.tree.leaves(one), strict=True
    ):
      whole[at] = part[0]
    prompt = np.full(self.length, self.config.vocab, np.int32)
    prompt[: len(group.ids)] = group.ids
    length = np.array([len(group.ids)], np.int32)
    token, log_prob, fine, self._seen, self._hidden = programs.first(
      group.logits,
      group.hidden,
      self._seen,
      self._hidden,
      np.int32(at),
      prompt,
      length,
      one,
    )
    self._rows[at] = _Row(ticket, pages, group.new, group.stops)
    self._table[at] = 0
    self._table[at, : len(pages)] = pages
    self._lengths[at], self._taken[at] = length[0], 1
    self._recent[at] = token
    self._tell(events, at, token, log_prob, fine)
    return True

  def _decode(self, events: list) -> None:
    alive = np.flatnonzero(self._taken)
    found, self._pools, self._seen, self._hidden = programs.tokens(
      self._weights,
      self._pools,
      self._table.copy(),
      self._lengths.copy(),
      self._recent.copy(),
      self._taken.copy(),
      self._seen,
      self._hidden,
      jax.tree.map(np.array, self._knobs),
      config=self.config,
      impl=self._impl,
    )
    found = jax.device_get(found)
    self.passes += len(alive)
    self.accepted += int((found.counts[alive] - 1).sum())
    for at in alive:
      count = found.counts[at]
      self._lengths[at] += count
      self._taken[at] = count
      self._recent[at, : found.tokens.shape[1]] = found.tokens[at]
      for i in range(count):
        if self._rows[at]:
          one = found.tokens[at, i], found.log_probs[at, i], found.fine[at, i]
          self._tell(events, at, *one)

  def _tell(self, events, at, token, log_prob, fine) -> None:
    row, token = self._rows[at], int(token)
    row.left -= 1
    reason = 'length' if row.left == 0 else ''
    reason = 'stop' if token in row.stops else reason
    if not fine:
      reason = 'broken'
      self._spoilt.update(row.pages)
    events.append(Event(row.ticket, token, float(log_prob), reason))
    if reason:
      self._end(at)

  def _end(self, at: int) -> None:
    self._release(self._rows[at].pages)
    self._rows[at] = None
    self._table[at] = 0
    self._lengths[at] = self._taken[at] = 0
    self._knobs.temperature[at] = 0.0
