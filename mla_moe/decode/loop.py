"""What generation repeats: one pass over every row, and what it emits.

A state holds a row's newest token, which is emitted but not yet in the cache,
and, where the MTP module drafts, what the module reads next. `start` prefills
and emits the first token of each row; `advance` emits one more, or up to two.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import struct

from mla_moe.config import CacheConfig, ModelConfig
from mla_moe.decode import forward, latent_cache, sampling, speculative
from mla_moe.types import Array, Bool, Int, PyTree


@struct.dataclass
class Recent:
  """What the MTP module has not read of each row: the hidden states [B, 2, D]
  of the last pass, the tokens [B, 2] after them, and how many [B] stand."""

  hidden: PyTree
  tokens: PyTree
  taken: PyTree


class Attempt(NamedTuple):
  """One pass with drafts: the verdict, the main model's logits [B, 2, V] and
  hidden states [B, 2, D], its cache and the module's. The main one's lengths
  are still without the pass's tokens: who calls knows how many are wanted."""

  verdict: speculative.Verdict
  logits: Array
  hidden: Array
  main: latent_cache.Cache
  mtp: latent_cache.Cache


@struct.dataclass
class State:
  """Between rounds: `newest` [B] is emitted but not yet in the cache."""

  cache: PyTree
  mtp_cache: PyTree
  newest: PyTree
  recent: PyTree  # or None: no drafts
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
  config: ModelConfig,
  kept: CacheConfig,
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
  whole = latent_cache.empty(config, batch, t + room + 2, kept)
  cache, mtp_cache = forward.split(whole, config)
  x, cache = forward.prefill(weights, cache, tokens, valid, config)
  logits = forward.logits(weights, forward.last(x, valid))
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
    recent=None,
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
  # The module reads, at each position, the token after it; the last one's is
  # read with the first draft.
  after = jnp.roll(tokens, -1, axis=1)
  _, mtp_cache = forward.draft(
    weights, mtp_cache, x, after, config, valid=valid - 1, form='fresh'
  )
  last = forward.last(x, valid)
  recent = Recent(
    hidden=jnp.stack([last, last], axis=1),
    tokens=jnp.stack([newest, newest], axis=1),
    taken=jnp.ones(batch, jnp.int32),
  )
  return dataclasses.replace(state, mtp_cache=mtp_cache, recent=recent)


def attempt(
  weights: PyTree,
  main: latent_cache.Cache,
  mtp: latent_cache.Cache,
  recent: Recent,
  seen: Bool[Array, 'B V'],
  how: sampling.Knobs,
  alive: Bool[Array, ' B'],
  config: ModelConfig,
) -> Attempt:
  """Drafts a token of each row that is alive, and checks it in one pass.

  Args:
    weights: of `decode.unstack`.
    main: the cache of the main model, without the rows' newest tokens.
    mtp: the module's, without what is `recent`.
    recent: at least one token of each row that is alive.
    seen: tokens of the row so far.
    how: of the sampler.
    alive: rows that are to go on; nothing is written of others.
    config: the model's.
  """
  taken = jnp.where(alive, recent.taken, 0)
  y, mtp = forward.draft(
    weights, mtp, recent.hidden, recent.tokens, config, valid=taken
  )
  guess = forward.logits(weights, forward.last(y, taken))
  start = main.lengths
  drafts, drawn_from = speculative.propose(guess, seen, how, start + 1)
  at = jnp.maximum(taken - 1, 0)[:, None]
  newest = jnp.take_along_axis(recent.tokens, at, axis=1)[:, 0]
  both = jnp.stack([newest, drafts], axis=1)
  x, main = forward.hidden(
    weights, main, both, config, valid=2 * alive.astype(jnp.int32)
  )
  logits = forward.logits(weights, x)
  verdict = speculative.verify(logits, drafts, drawn_from, seen, how, start + 1)
  main = dataclasses.replace(main, lengths=start)
  return Attempt(verdict, logits, x, main, mtp)


def advance(
  weights: PyTree,
  state: State,
  limit: Int[Array, ''] | np.int32,
  stops: Int[Array, ' S'],
  how: sampling.Knobs,
  config: ModelConfig,
) -> State:
  """One pass of the main model over each row that is not done."""
  if state.recent is None:
    run = _plain_round
  else:
    run = _speculative_round
  return run(weights, state, limit, stops, how, config)


def _plain_round(weights, state, limit, stops, how, config):
  alive = ~state.done
  logits, cache = forward.decode_step(
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
  found = attempt(
    weights, state.cache, state.mtp_cache, state.recent, state.seen, how,
    alive, config,
  )  # fmt: skip
  tokens, accepted = found.verdict
  state = dataclasses.replace(
    state,
    mtp_cache=found.mtp,
    broken=_broken(found.logits, alive[:, None], state.round + 1),
    round=state.round + 1,
    passes=state.passes + alive.sum(),
    accepted=state.accepted + (alive & accepted).sum(),
  )
  logits = found.logits
  state = _emit(state, tokens[:, 0], logits[:, 0], alive, limit, stops)
  more = ~state.done & accepted
  state = _emit(state, tokens[:, 1], logits[:, 1], more, limit, stops)
  # What was checked and not accepted is forgotten: it will be overwritten.
  # Of the type that it had: a weak one would compile the next round again.
  taken = jnp.where(alive, 1 + more, 0).astype(jnp.int32)
  lengths = found.main.lengths + taken
  return dataclasses.replace(
    state,
    cache=dataclasses.replace(found.main, lengths=lengths),
    recent=Recent(found.hidden, tokens, taken),
  )


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
