"""What generation repeats: one pass over every row, and what it emits.

A state holds a row's newest token, which is emitted but not yet in the cache,
and, where the MTP module drafts, the draft after it. `start` prefills and emits
the first token of each row; `advance` emits one more, or up to two.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import struct

from mla_moe import cache as cache_lib
from mla_moe import config as config_lib
from mla_moe import decode, sampling, speculative
from mla_moe.types import Array, Int, PyTree


@struct.dataclass
class State:
  """Between rounds: `newest` [B] is emitted but not yet in the cache."""

  cache: PyTree
  mtp_cache: PyTree
  newest: PyTree
  draft: PyTree  # (tokens [B], log-probabilities [B, V]) or None
  seen: PyTree
  tokens: PyTree
  log_probs: PyTree
  counts: PyTree
  done: PyTree
  passes: PyTree
  accepted: PyTree
  round: PyTree
  broken: PyTree


def start(
  weights: PyTree,
  tokens: Int[Array, 'B T'],
  valid: Int[Array, ' B'],
  limit: Int[Array, ''] | np.int32,
  stops: Int[Array, ' S'],
  how: sampling.Knobs,
  config: config_lib.ModelConfig,
  kept: config_lib.CacheConfig,
  room: int,
  speculative: bool,
) -> State:
  """Prefills, and emits the first token of each row.

  Args:
    weights: of `decode.unstack`.
    tokens: prompts, of which `valid` tokens of each row are real.
    limit: tokens that a row may emit, at most `room`.
    stops: ids that end a row; -1 is none.
    how: of the sampler.
    config: the model's.
    kept: how the latents are.
    room: what the state has place for.
    speculative: whether the MTP module drafts.
  """
  batch, t = tokens.shape
  # Two more, for a draft that is checked but not wanted.
  whole = cache_lib.empty(config, batch, t + room + 2, kept)
  cache, mtp_cache = decode.split(whole, config)
  x, cache = decode.prefill(weights, cache, tokens, valid, config)
  logits = decode.logits(weights, decode.last(x, valid))
  rows = jnp.arange(batch)[:, None]
  real = jnp.arange(t)[None] < valid[:, None]
  seen = jnp.zeros((batch, config.vocab), bool)
  seen = seen.at[rows, jnp.where(real, tokens, config.vocab)].set(
    True, mode='drop'
  )
  newest = sampling.draw(sampling.distribution(logits, seen, how), how, valid)
  zero = jnp.zeros(batch, jnp.int32)
  state = State(
    cache=cache,
    mtp_cache=None,
    newest=newest,
    draft=None,
    seen=seen,
    tokens=jnp.zeros((batch, room), jnp.int32),
    log_probs=jnp.zeros((batch, room), jnp.float32),
    counts=zero,
    done=jnp.zeros(batch, bool),
    passes=jnp.int32(0),
    accepted=jnp.int32(0),
    round=jnp.int32(0),
    broken=jnp.int32(-1),
  )
  emit = jnp.ones(batch, bool)
  state = _emit(state, newest, logits, emit, limit, stops)
  state = dataclasses.replace(state, broken=_broken(logits, emit, 0))
  if not speculative:
    return state
  # The module reads, at each position, the token after it.
  after = jnp.roll(tokens, -1, axis=1)
  after = after.at[jnp.arange(batch), valid - 1].set(newest)
  y, mtp_cache = decode.draft(
    weights, mtp_cache, x, after, config, valid=valid, form='fresh'
  )
  return _with_draft(weights, state, mtp_cache, y, valid, how)


def advance(
  weights: PyTree,
  state: State,
  limit: Int[Array, ''] | np.int32,
  stops: Int[Array, ' S'],
  how: sampling.Knobs,
  config: config_lib.ModelConfig,
) -> State:
  """One pass of the main model over each row that is not done."""
  if state.draft is None:
    run = _plain_round
  else:
    run = _speculative_round
  return run(weights, state, limit, stops, how, config)


def _plain_round(weights, state, limit, stops, how, config):
  alive = ~state.done
  logits, cache = decode.decode_step(
    weights, state.cache, state.newest, config, valid=alive.astype(jnp.int32)
  )
  drawn_from = sampling.distribution(logits, state.seen, how)
  newest = sampling.draw(drawn_from, how, cache.lengths)
  state = dataclasses.replace(
    state,
    cache=cache,
    broken=_broken(logits, alive, state.round + 1),
    round=state.round + 1,
    passes=state.passes + alive.sum(),
  )
  return _emit(state, newest, logits, alive, limit, stops)


def _speculative_round(weights, state, limit, stops, how, config):
  alive = ~state.done
  drafts, drawn_from = state.draft
  start = state.cache.lengths
  both = jnp.stack([state.newest, drafts], axis=1)
  x, cache = decode.hidden(
    weights, state.cache, both, config, valid=2 * alive.astype(jnp.int32)
  )
  logits = decode.logits(weights, x)
  verdict = speculative.verify(
    logits, drafts, drawn_from, state.seen, how, start + 1
  )
  before = state.done
  state = dataclasses.replace(
    state,
    broken=_broken(logits, alive[:, None], state.round + 1),
    round=state.round + 1,
    passes=state.passes + alive.sum(),
    accepted=state.accepted + (alive & verdict.accepted).sum(),
  )
  first, second = verdict.tokens[:, 0], verdict.tokens[:, 1]
  state = _emit(state, first, logits[:, 0], alive, limit, stops)
  more = ~state.done & verdict.accepted
  state = _emit(state, second, logits[:, 1], more, limit, stops)
  # What was checked and not accepted is forgotten: it will be overwritten.
  taken = jnp.where(before, 0, 1 + more)
  cache = dataclasses.replace(cache, lengths=start + taken)
  state = dataclasses.replace(state, cache=cache)
  y, mtp_cache = decode.draft(
    weights, state.mtp_cache, x, verdict.tokens, config, valid=taken
  )
  return _with_draft(weights, state, mtp_cache, y, taken, how)


def _with_draft(weights, state, mtp_cache, y, valid, how):
  logits = decode.logits(weights, decode.last(y, valid))
  draft = speculative.propose(logits, state.seen, how, mtp_cache.lengths + 1)
  return dataclasses.replace(state, mtp_cache=mtp_cache, draft=draft)


def _broken(logits, rows, step):
  """The step, if a row's logits are not finite; else -1."""
  wrong = ~jnp.isfinite(logits).all(-1) & rows
  return jnp.where(jnp.any(wrong), step, -1).astype(jnp.int32)


def _emit(state, tokens, logits, rows, limit, stops):
  """`tokens` as the next of `rows`; those that end are done."""
  all_rows = jnp.arange(len(tokens))
  at = jnp.where(rows, state.counts, state.tokens.shape[1])
  put = lambda x, new: x.at[all_rows, at].set(new, mode='drop')
  counts = state.counts + rows
  ends = (tokens[:, None] == stops[None]).any(-1) | (counts >= limit)
  return dataclasses.replace(
    state,
    newest=jnp.where(rows, tokens, state.newest),
    seen=state.seen.at[all_rows, tokens].max(rows),
    tokens=put(state.tokens, tokens),
    log_probs=put(state.log_probs, sampling.log_prob(logits, tokens)),
    counts=counts,
    done=state.done | (rows & ends),
  )
