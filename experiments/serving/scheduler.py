"""Continuous batching: samples enter free rows while others decode.

Every step prefills one chunk of the first waiting prompt and decodes one token
of every row, so shapes are fixed and nothing compiles after the start. Rows
have pages of one pool (`page_pool`). Samples of one prompt share the pages that
it fills. Each copies the last, half-filled page, except the last sample, which
takes the prompt's own. A sample starts when all pages that it may need are its
own, and only the first prompt of the queue holds pages without a row: so no row
waits for memory, and rows that end make room for the next. A prompt is refused
at once if its first sample would need more pages than the whole pool has: every
other one starts sooner or later.

A row's tokens do not depend on the rows beside it. With `speculative` the MTP
module drafts, and a step gives a row one token or two. The module's latent of a
prompt's last token depends on the token after it, so samples share only the
pages before that one.

An error in the work of one prompt ends its samples alone, and one in a pass
over the rows those in the rows: events say so, with the reason 'failed', and
`step` goes on. Programs take the arrays of the rows for themselves, so that an
error in one may destroy them: they are made again.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import traceback
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mla_moe.config import CacheConfig, ConfigError, ModelConfig
from mla_moe.decode import sampling

from . import arrays, page_pool, programs
from .group import Group


class Full(Exception):
  """As many prompts wait as may wait."""


class Event(NamedTuple):
  """A token of a sample.

  reason: '' while it goes on, else 'stop', 'length', 'broken' (its logits are
  not finite) or 'failed' (an error ended it). With the last two, and for a
  sample of no tokens, `token` is -1. alternatives: (token, log-probability) of
  the likeliest ones, where the request wants them; scores: of the prompt, with
  its sample's first event. log_prob is the model's, drawn that at the sample's
  temperature; routes [S, L, K]: of the sample, with its last event, if the
  cache notes them.
  """

  ticket: int
  token: int
  log_prob: float
  reason: str
  alternatives: tuple = ()
  scores: programs.Scores | None = None
  drawn: float = 0.0
  routes: np.ndarray | None = None


@dataclasses.dataclass(eq=False)
class _Sample:
  """A sample in its row; it may emit `left` more tokens."""

  ticket: int
  pages: list
  left: int
  stop_ids: frozenset
  alternatives: bool


class Scheduler:
  """The rows of a model; not safe for threads.

  `passes` counts the passes over rows after their first token, and `accepted`
  the drafts that were accepted; `failures` counts errors.

  Args:
    config: of the model.
    variables: {'params', 'router'}, or the weights that `forward.unstack` makes
      of them.
    rows: samples that decode at once.
    length: most tokens of a row, prompt and answer together.
    cache: type and page size of the latent cache.
    pages: of the pool; 0: as many as all rows need at full length, and one
      more for the last page of a prompt while its samples copy it.
    chunk: prompt tokens of one step.
    waiting: with as many prompts in the queue, a request is refused.
    speculative: draft with the MTP module.

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
    self.passes = self.accepted = self.failures = 0
    self.config, self._chunk, self._waiting = config, chunk, waiting
    self._page_size, self._notes = cache.page, cache.routes
    self._drafts = int(speculative)
    self.length = min(length, config.max_positions)
    row_pages = self._needs(self.length)
    self._shape = rows, row_pages
    self._queue = collections.deque()
    self._tickets = itertools.count()
    self._events = []
    pages = pages or rows * row_pages + 1
    self._arrays = arrays.Arrays(
      config, variables, rows, pages + 1, cache, self._drafts
    )
    self._empty(pages)

  def reload(self, variables) -> None:
    """Takes the weights of another policy, for requests after this one.

    Raises:
      RuntimeError: samples of the policy before have not ended.
    """
    if self.busy:
      raise RuntimeError('reload: samples are in progress')
    self._arrays.load(variables)

  @property
  def busy(self) -> bool:
    """Whether `step` has anything to do."""
    return bool(self._queue) or any(self._samples)

  @property
  def free_pages(self) -> int:
    """Pages of the pool without a user."""
    return self._pages.free

  def submit(
    self,
    ids: Sequence[int],
    max_new_tokens: int,
    *,
    samples: int = 1,
    **options,
  ) -> list[int]:
    """Queues a prompt and returns a ticket for each of its samples.

    Sample i draws with `seed + i`, or with the i-th of a list; `options` are
    others of `submit_all`.

    Raises:
      ConfigError: a request that can never be served.
      Full: a request that cannot be served now.
    """
    return self.submit_all([ids], max_new_tokens, samples=samples, **options)

  def submit_all(
    self,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    samples: int = 1,
    stop_ids: Sequence[int] = (),
    seed: int | Sequence[int] | np.ndarray = 0,
    alternatives: bool = False,
    scored: bool = False,
    **knobs,
  ) -> list[int]:
    """Queues all prompts of a request, or none; returns their tickets.

    Sample i of prompt p has ticket and seed number `p * samples + i`, counted
    from the first ticket and from `seed`.

    Args:
      prompts: ids of each.
      max_new_tokens: of a sample; with 0, its only event has no token.
      samples: of each prompt.
      stop_ids: a sample ends after any of them.
      seed: from 0 to 2**31 - 1; of one prompt, also one a sample.
      alternatives: say the TOP likeliest tokens of each position.
      scored: say the prompt's own log-probabilities.
      **knobs: of `sampling.make_knobs`.

    Raises:
      ConfigError, Full: as `submit`.
    """
    stops, groups = frozenset(stop_ids), []
    for ids in prompts:
      ids = np.asarray(ids, np.int32).reshape(-1)
      self._check(ids, max_new_tokens, samples)
      rows = sampling.make_knobs(samples, seed=seed, **knobs)
      rows = rows.replace(seed=rows.seed + np.uint32(len(groups) * samples))
      groups.append(
        Group(ids, max_new_tokens, stops, rows, {}, alternatives, scored)
      )
    if len(self._queue) >= self._waiting:
      raise Full(f'{self._waiting} prompts wait already')
    for group in groups:
      group.tickets = {next(self._tickets): i for i in range(samples)}
    self._queue.extend(groups)
    return [ticket for group in groups for ticket in group.tickets]

  def cancel(self, ticket: int) -> None:
    """Drops a sample and frees its row and pages; an unknown one is ignored."""
    for row, sample in enumerate(self._samples):
      if sample and sample.ticket == ticket:
        self._end(row)
    for group in list(self._queue):
      if group.tickets.pop(ticket, None) is not None and not group.tickets:
        self._queue.remove(group)
        self._release(group.pages)

  def step(self) -> list[Event]:
    """Prefills one chunk, starts samples, decodes every row once.

    Returns the tokens that samples emitted, and the ends of those that failed.

    Raises:
      RuntimeError: prompts wait, no row decodes, and nothing moves. It would
        stay so for ever; `_check` refuses the prompts that would lead there.
    """
    self._events = []
    has_moved = self._try(self._prefill)
    while self._queue and self._queue[0].logits is not None:
      if not self._try(self._start):
        break
      has_moved = True
    if any(self._samples):
      try:
        self._decode()
      except Exception as error:
        self._note(error)
        self._lose_rows()
    elif self._queue and not has_moved:
      raise RuntimeError(
        f'{len(self._queue)} prompts wait for ever: the first one lacks pages, '
        f'and all {self.free_pages} that are left are free'
      )
    return self._events

  def reset(self) -> None:
    """Drops all samples, and makes everything again but the weights."""
    self._queue.clear()
    self._arrays.clear()
    self._empty(self._pages.pages)

  # ------------------------------------------------------------------ private

  def _empty(self, pages: int) -> None:
    """Makes rows without samples, and a pool of free pages."""
    rows, row_pages = self._shape
    self._pages = page_pool.PagePool(pages)
    self._rows = programs.Rows(
      table=np.zeros((rows, row_pages), np.int32),
      lengths=np.zeros(rows, np.int32),
      tokens=np.zeros((rows, 2), np.int32),
      counts=np.zeros(rows, np.int32),
      alternatives=np.zeros(rows, bool),
      knobs=jax.tree.map(np.array, sampling.make_knobs(rows)),
    )
    self._samples: list[_Sample | None] = [None] * rows

  def _try(self, work: Callable[[Group], bool]) -> bool:
    """Works at the first group; returns whether something has moved.

    An error ends the group, and no sample of another prompt.
    """
    if not self._queue:
      return False
    group = self._queue[0]
    tickets = list(group.tickets)
    try:
      return work(group)
    except Exception as error:
      if self._queue and self._queue[0] is group:
        self._queue.popleft()
      self._end_all(tickets)
      self._note(error)
      if self._arrays.is_lost:
        self._lose_rows()
      else:
        self._release(group.pages)
      return True

  def _end_all(self, tickets: Sequence[int]) -> None:
    self._events += [Event(ticket, -1, 0.0, 'failed') for ticket in tickets]

  def _note(self, error: Exception) -> None:
    self.failures += 1
    traceback.print_exception(error)

  def _lose_rows(self) -> None:
    """Ends all samples in rows; the waiting prompts begin again."""
    self._end_all([sample.ticket for sample in self._samples if sample])
    for group in self._queue:
      group.forget()
    self._arrays.clear()
    self._empty(self._pages.pages)

  def _needs(self, tokens: int) -> int:
    """Returns the number of pages of so many tokens."""
    return -(-tokens // self._page_size)

  def _common(self, length: int, samples: int) -> int:
    """Returns how many pages of a prompt its next sample takes as they are.

    The sample copies the others, since it writes there: the half-filled one,
    or with drafts the one with the prompt's last token. The last of `samples`
    copies none.
    """
    whole = (length - self._drafts) // self._page_size
    return whole if samples > 1 else self._needs(length)

  def _check(self, ids, max_new_tokens, samples) -> None:
    if not ids.size:
      raise ConfigError('prompt: is empty; begin it with bos_id at least')
    wrong = ids[(ids < 0) | (ids >= self.config.vocab)]
    if wrong.size:
      raise ConfigError(
        f'prompt: token {wrong[0]} is not below vocab={self.config.vocab}'
      )
    if max_new_tokens < 0:
      raise ConfigError(f'max_new_tokens={max_new_tokens}: must be at least 0')
    if not 1 <= samples <= 1024:
      raise ConfigError(f'samples={samples}: must be from 1 to 1024')
    limit = min(self.length, self._pages.pages * self._page_size)
    if len(ids) + max_new_tokens > limit:
      raise ConfigError(
        f'max_new_tokens={max_new_tokens}: with a prompt of {len(ids)} tokens '
        f'more than the {limit} tokens of a row'
      )
    if not max_new_tokens:
      return
    # What `_start` asks for, while the prompt alone holds pages.
    need = self._needs(len(ids)) + self._needs(len(ids) + max_new_tokens)
    need -= self._common(len(ids), samples)
    if need > self._pages.pages:
      raise ConfigError(
        f'samples={samples}: with max_new_tokens={max_new_tokens} the first '
        f'one needs {need} pages, and the cache has {self._pages.pages}; ask '
        f'for one sample, or for {self._page_size} tokens less'
      )

  def _release(self, pages: list[int]) -> None:
    for page in self._pages.release(pages):
      self._arrays.copy_page(0, page)

  def _prefill(self, group: Group) -> bool:
    """Prefills one chunk of the prompt, if it could start then.

    Returns whether it did.
    """
    if group.logits is not None:
      return False
    if not group.pages:
      need = self._needs(len(group.ids) + group.max_new_tokens)
      if None not in self._samples or need > self._pages.free:
        return False
      group.pages = self._pages.take(self._needs(len(group.ids)))
    chunk = group.chunk(self._chunk, self._rows.table.shape[1])
    logits, hidden, scores = self._arrays.prefill(chunk)
    if group.scored:
      group.add_scores(scores)
    group.filled += int(chunk.valid[0])
    if group.filled == len(group.ids):
      group.logits, group.hidden = logits, hidden
    return True

  def _start(self, group: Group) -> bool:
    """Gives the group's next sample a free row and its first token.

    Returns whether there were pages for it.
    """
    if not group.max_new_tokens:
      self._end_prompt(group)
      return True
    common = group.pages[: self._common(len(group.ids), len(group.tickets))]
    need = self._needs(len(group.ids) + group.max_new_tokens)
    if None not in self._samples or need - len(common) > self._pages.free:
      return False
    own = self._pages.take(need - len(common))
    pages = self._pages.share(common) + own
    ticket, knobs = group.next_sample()
    row = self._samples.index(None)
    try:
      if len(common) < len(group.pages):
        self._arrays.copy_page(group.pages[len(common)], own[0])
      emitted = self._arrays.first_token(row, group, self.length, knobs)
    except Exception:
      self._pages.release(pages)  # nothing was written that spoils them
      raise
    self._samples[row] = _Sample(
      ticket, pages, group.max_new_tokens, group.stop_ids, group.alternatives
    )
    rows = self._rows
    rows.table[row] = 0
    rows.table[row, : len(pages)] = pages
    rows.lengths[row] = len(group.ids)
    rows.alternatives[row] = group.alternatives
    for field in dataclasses.fields(knobs):
      getattr(rows.knobs, field.name)[row] = getattr(knobs, field.name)[0]
    self._emit(row, emitted, 0, group.prompt_scores())
    if not group.tickets:
      self._queue.popleft()
      self._release(group.pages)
    return True

  def _end_prompt(self, group: Group) -> None:
    """Ends the samples of a prompt that want no token."""
    reason = 'length'
    if not jnp.isfinite(group.logits).all():
      reason = 'broken'
      self._pages.spoil(group.pages)
    scores = group.prompt_scores()
    for ticket in group.tickets:
      self._events.append(Event(ticket, -1, 0.0, reason, (), scores))
    group.tickets = {}
    self._queue.popleft()
    self._release(group.pages)

  def _decode(self) -> None:
    """Decodes every row once."""
    rows = np.flatnonzero(self._rows.counts)
    emitted = self._arrays.decode(self._rows)
    self.passes += len(rows)
    self.accepted += int((emitted.counts[rows] - 1).sum())
    for row in rows:
      self._rows.lengths[row] += emitted.counts[row]
      self._emit(row, emitted, row)

  def _emit(
    self,
    row: int,
    emitted: programs.Emitted,
    i: int,
    scores: programs.Scores | None = None,
  ) -> None:
    """Gives a row the tokens of line `i`; the last one may end its sample."""
    self._rows.tokens[row] = emitted.tokens[i]
    self._rows.counts[row] = emitted.counts[i]
    sample = self._samples[row]
    for column in range(emitted.counts[i]):
      token = int(emitted.tokens[i, column])
      sample.left -= 1
      reason = '' if sample.left else 'length'
      if token in sample.stop_ids:
        reason = 'stop'
      if not emitted.finite[i, column]:
        token, reason = -1, 'broken'
        self._pages.spoil(sample.pages)
      log_prob = float(emitted.log_probs[i, column])
      pairs = ()
      if sample.alternatives:
        top = (x[i, column].tolist() for x in emitted.top)
        pairs = tuple(zip(*top, strict=True))
      drawn, routes = float(emitted.drawn[i, column]), None
      if reason and self._notes:
        routes = self._arrays.routes(self._rows, row)
      self._events.append(
        Event(
          sample.ticket, token, log_prob, reason, pairs, scores, drawn, routes
        )
      )
      if reason:
        return self._end(row)

  def _end(self, row: int) -> None:
    pages, self._samples[row] = self._samples[row].pages, None
    self._rows.table[row] = 0
    self._rows.lengths[row] = self._rows.counts[row] = 0
    self._rows.alternatives[row] = False
    self._rows.knobs.temperature[row] = 0.0
    self._release(pages)
