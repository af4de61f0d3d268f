"""The loop of generation: `start` reads the prompts, `advance` makes one step.

`start` prefills the cache and emits the first token of each row; the samples of
one prompt share its pass. A step is one pass of the main model over every row
that is not done: it emits one token a row, or up to two where the MTP module
drafts (`speculative`). Between two steps the last token of a row is emitted but
not yet in the cache: the next pass reads it, and with it the draft.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from flax import struct

from mla_moe.config import CacheConfig, ModelConfig
from mla_moe.decode import forward, latent_cache, sampling, speculative
from mla_moe.types import Array, Bool, Int, PyTree


@struct.dataclass
class Job:
  """How rows are continued. Another value of a static field compiles again.

  limit: most tokens of a row, int32, at most `output_length`; stop_ids [S]
  int32: a row ends with the first of them, -1 is none; knobs: of the sampler.
  Static: the model's config, the cache's, the width of `State.tokens`, whether
  the MTP module drafts, and the rows (samples) that continue each prompt.
  """

  limit: PyTree
  stop_ids: PyTree
  knobs: sampling.Knobs
  config: ModelConfig = struct.field(pytree_node=False)
  cache_config: CacheConfig = struct.field(pytree_node=False)
  output_length: int = struct.field(pytree_node=False)
  speculative: bool = struct.field(pytree_node=False)
  samples: int = struct.field(pytree_node=False, default=1)


@struct.dataclass
class Recent:
  """Results of each row's last pass, which the MTP module has not read.

  hidden [B, 2, D]: states of the main model; tokens [B, 2] int32: the token
  after each state; counts [B] int32: how many of the two are real.
  """

  hidden: PyTree
  tokens: PyTree
  counts: PyTree


@struct.dataclass
class State:
  """The rows between two steps.

  cache: of the main model, without the last token of each row; mtp_cache: of
  the MTP module; last_token [B] int32; recent: input of the next draft;
  seen [B, V]: tokens of each row, prompt included. mtp_cache and recent are
  None without drafts.

  tokens [B, output_length] int32, log_probs and drawn float32 and counts [B]
  int32: the tokens that rows have emitted (see `Rollout`); done [B]. passes and
  accepted: sums over rows, as in `Rollout`; step: steps so far; broken: the
  step whose logits were not finite, or -1.
  """

  cache: PyTree
  mtp_cache: PyTree
  last_token: PyTree
  recent: PyTree
  seen: PyTree
  tokens: PyTree
  log_probs: PyTree
  drawn: PyTree
  counts: PyTree
  done: PyTree
  passes: PyTree
  accepted: PyTree
  step: PyTree
  broken: PyTree


class Attempt(NamedTuple):
  """One pass with drafts.

  logits [B, 2, V] and hidden [B, 2, D] are the main model's. Both tokens of the
  pass are in the cache `main`, but its lengths do not count them: the caller
  knows how many of them remain. mtp is the module's cache.
  """

  verdict: speculative.Verdict
  logits: Array
  hidden: Array
  main: latent_cache.Cache
  mtp: latent_cache.Cache


def start(
  weights: PyTree, tokens: Int[Array, 'B T'], valid: Int[Array, ' B'], job: Job
) -> State:
  """Returns the state after the first token of each row.

  Args:
    weights: of `forward.unstack`.
    tokens: prompts, padded on the right. Rows of the state are the samples of
      the first prompt, then those of the second, and so on.
    valid: tokens of each prompt.
    job: how rows are continued.
  """
  config, knobs, samples = job.config, job.knobs, job.samples
  batch, t = tokens.shape
  rows = batch * samples
  # Two more, for a draft that is checked beyond the limit.
  capacity = t + job.output_length + 2
  cache = latent_cache.empty(
    config, batch, t if samples > 1 else capacity, job.cache_config
  )
  cache, mtp_cache = forward.split(cache, config)
  x, cache = forward.prefill(weights, cache, tokens, valid, config)
  if job.speculative:
    # The module reads the token after each position; the first token that is
    # drawn, which follows the last one, it reads with the first draft.
    after = jnp.roll(tokens, -1, axis=1)
    _, mtp_cache = forward.draft(
      weights, mtp_cache, x, after, config, valid=valid - 1, form='fresh'
    )
  hidden = forward.last(x, valid)
  logits = forward.logits(weights, hidden)
  real = jnp.arange(t)[None] < valid[:, None]
  seen = jnp.zeros((batch, config.vocab), bool)
  seen = seen.at[
    jnp.arange(batch)[:, None], jnp.where(real, tokens, config.vocab)
  ].set(True, mode='drop')
  if samples > 1:
    repeat = lambda x: jnp.repeat(x, samples, axis=0)
    hidden, logits, seen, valid = map(repeat, (hidden, logits, seen, valid))
    cache = latent_cache.repeated(cache, samples, capacity)
    if job.speculative:
      mtp_cache = latent_cache.repeated(mtp_cache, samples, capacity)
  log_probs = sampling.distribution(logits, seen, knobs)
  first = sampling.draw(log_probs, knobs, valid)
  pair = lambda x: jnp.stack([x, x], axis=1)  # of which one counts
  recent = Recent(pair(hidden), pair(first), jnp.ones(rows, jnp.int32))
  state = State(
    cache=cache,
    mtp_cache=mtp_cache if job.speculative else None,
    last_token=first,
    recent=recent if job.speculative else None,
    seen=seen,
    tokens=jnp.zeros((rows, job.output_length), jnp.int32),
    log_probs=jnp.zeros((rows, job.output_length), jnp.float32),
    drawn=jnp.zeros((rows, job.output_length), jnp.float32),
    counts=jnp.zeros(rows, jnp.int32),
    done=jnp.zeros(rows, bool),
    passes=jnp.int32(0),
    accepted=jnp.int32(0),
    step=jnp.int32(0),
    broken=jnp.int32(-1),
  )
  all_rows = jnp.ones(rows, bool)
  state = _emit(state, first, logits, all_rows, job)
  return dataclasses.replace(state, broken=_broken(logits, all_rows, 0))


def advance(weights: PyTree, state: State, job: Job) -> State:
  """Returns the state after one more pass over each row that is not done."""
  step = _speculative_step if job.speculative else _plain_step
  return step(weights, state, job)


def draft_and_verify(
  weights: PyTree,
  main: latent_cache.Cache,
  mtp: latent_cache.Cache,
  recent: Recent,
  seen: Bool[Array, 'B V'],
  knobs: sampling.Knobs,
  alive: Bool[Array, ' B'],
  config: ModelConfig,
) -> Attempt:
  """Returns one pass over the last token of each row and a draft after it.

  Args:
    weights: of `forward.unstack`.
    main: cache of the main model, without the last token of each row.
    mtp: cache of the MTP module, without `recent`.
    recent: at least one state of each row that is alive.
    seen: tokens of each row so far.
    knobs: of the sampler.
    alive: rows that go on; nothing is written for the others.
    config: of the model.
  """
  counts = jnp.where(alive, recent.counts, 0)
  y, mtp = forward.draft(
    weights, mtp, recent.hidden, recent.tokens, config, valid=counts
  )
  guess = forward.logits(weights, forward.last(y, counts))
  start = main.lengths
  drafts, log_q = speculative.propose(guess, seen, knobs, start + 1)
  i = jnp.maximum(counts - 1, 0)[:, None]
  last_token = jnp.take_along_axis(recent.tokens, i, axis=1)[:, 0]
  pair = jnp.stack([last_token, drafts], axis=1)
  x, main = forward.hidden(
    weights, main, pair, config, valid=2 * alive.astype(jnp.int32)
  )
  logits = forward.logits(weights, x)
  verdict = speculative.verify(logits, drafts, log_q, seen, knobs, start + 1)
  main = dataclasses.replace(main, lengths=start)
  return Attempt(verdict, logits, x, main, mtp)


def _plain_step(weights, state, job):
  alive = ~state.done
  args = weights, state.cache, state.last_token, job.config
  valid = alive.astype(jnp.int32)
  logits, cache = forward.decode_step(*args, valid=valid)
  log_probs = sampling.distribution(logits, state.seen, job.knobs)
  tokens = sampling.draw(log_probs, job.knobs, cache.lengths)
  state = dataclasses.replace(
    state,
    cache=cache,
    broken=_broken(logits, alive, state.step + 1),
    step=state.step + 1,
    passes=state.passes + alive.sum(),
  )
  return _emit(state, tokens, logits, alive, job)


def _speculative_step(weights, state, job):
  alive = ~state.done
  context = weights, state.cache, state.mtp_cache, state.recent
  rows = state.seen, job.knobs, alive
  attempt = draft_and_verify(*context, *rows, job.config)
  tokens, accepted = attempt.verdict
  logits = attempt.logits
  state = dataclasses.replace(
    state,
    mtp_cache=attempt.mtp,
    broken=_broken(logits, alive[:, None], state.step + 1),
    step=state.step + 1,
    passes=state.passes + alive.sum(),
    accepted=state.accepted + (alive & accepted).sum(),
  )
  state = _emit(state, tokens[:, 0], logits[:, 0], alive, job)
  second = ~state.done & accepted
  state = _emit(state, tokens[:, 1], logits[:, 1], second, job)
  # The cache forgets a rejected draft: the next pass writes over it. The cast
  # gives the counts the type that they had; a weak type would compile again.
  counts = jnp.where(alive, 1 + second, 0).astype(jnp.int32)
  lengths = attempt.main.lengths + counts
  return dataclasses.replace(
    state,
    cache=dataclasses.replace(attempt.main, lengths=lengths),
    recent=Recent(attempt.hidden, tokens, counts),
  )


def _broken(logits, rows, step):
  """Returns `step` if the logits of any of `rows` are not finite, else -1."""
  wrong = ~jnp.isfinite(logits).all(-1) & rows
  return jnp.where(jnp.any(wrong), step, -1).astype(jnp.int32)


def _emit(state, tokens, logits, rows, job):
  """Returns the state with one more token in each of `rows` (a mask)."""
  all_rows = jnp.arange(len(tokens))
  column = jnp.where(rows, state.counts, state.tokens.shape[1])
  put = lambda x, values: x.at[all_rows, column].set(values, mode='drop')
  counts = state.counts + rows
  log_probs = sampling.log_prob(logits, tokens)
  drawn = sampling.drawn_log_prob(logits, tokens, job.knobs.temperature)
  stops = (tokens[:, None] == job.stop_ids[None]).any(-1)
  ends = stops | (counts >= job.limit)
  return dataclasses.replace(
    state,
    last_token=jnp.where(rows, tokens, state.last_token),
    seen=state.seen.at[all_rows, tokens].max(rows),
    tokens=put(state.tokens, tokens),
    log_probs=put(state.log_probs, log_probs),
    drawn=put(state.drawn, drawn),
    counts=counts,
    done=state.done | (rows & ends),
  )
