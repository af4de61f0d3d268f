"""The compiled programs of the scheduler: each has one shape, ever.

Rows that stand still have length 0 and write nothing. `pools` are the main
model's alone, or have the MTP module's last where it drafts: it follows the
main model over the same pages, `taken` tokens behind.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mla_moe.config import ModelConfig
from mla_moe.decode import forward, latent_cache, loop, sampling
from mla_moe.types import Array, PyTree


class Found(NamedTuple):
  """What a pass gives each row: tokens, log-probabilities, whether the logits
  were finite, [B, 1] or [B, 2] with drafts, and how many [B] of them count."""

  tokens: Array
  log_probs: Array
  fine: Array
  counts: Array


@functools.partial(
  jax.jit, static_argnames=('config', 'impl'), donate_argnames='pools'
)
def prompt(
  weights: PyTree,
  pools: tuple,
  table: Array,
  lengths: Array,
  tokens: Array,
  after: Array,
  valid: Array,
  paired: Array,
  *,
  config: ModelConfig,
  impl: str,
) -> tuple[Array, Array, tuple]:
  """Logits and hidden state after a chunk of one row's prompt, and the pools.

  `after` [1, T] are the tokens after the chunk's, of which `paired` [1] are
  known; the MTP module reads those, where there is a pool for it.
  """
  held = latent_cache.Cache(pools, table, lengths, impl)
  main, mtp = forward.split(held, config)
  x, main = forward.extend(weights, main, tokens, config, valid=valid)
  if mtp.layers:
    form = forward.form(tokens.shape[1])
    _, mtp = forward.draft(
      weights, mtp, x, after, config, valid=paired, form=form
    )
  last = forward.last(x, valid)
  return forward.logits(weights, last), last, (*main.layers, *mtp.layers)


@functools.partial(jax.jit, donate_argnames=('seen', 'hidden'))
def first(
  logits: Array,
  last: Array,
  seen: Array,
  hidden: Array,
  row: Array,
  ids: Array,
  length: Array,
  knobs: sampling.Knobs,
) -> tuple[Array, Array, Array, Array, Array]:
  """The token after a prompt, its log-probability and whether all was finite;
  and `seen` and `hidden` with the prompt in its row."""
  marks = jnp.zeros(seen.shape[1], bool).at[ids].set(True, mode='drop')
  drawn_from = sampling.distribution(logits, marks[None], knobs)
  token = sampling.draw(drawn_from, knobs, length)
  log_prob = sampling.log_prob(logits, token)
  fine = jnp.isfinite(logits).all()
  seen, hidden = seen.at[row].set(marks), hidden.at[row].set(last)
  return token[0], log_prob[0], fine, seen, hidden


@functools.partial(
  jax.jit,
  static_argnames=('config', 'impl'),
  donate_argnames=('pools', 'seen', 'hidden'),
)
def tokens(
  weights: PyTree,
  pools: tuple,
  table: Array,
  lengths: Array,
  recent: Array,
  taken: Array,
  seen: Array,
  hidden: Array,
  knobs: sampling.Knobs,
  *,
  config: ModelConfig,
  impl: str,
) -> tuple[Found, tuple, Array, Array]:
  """The next token of every row, or up to two where the MTP module drafts.

  `recent` [B, 2] are the tokens that a row's last pass gave, of which `taken`
  [B] were taken (0: no row); `hidden` [B, 2, D] is what it gave them from.
  """
  alive, rows = taken > 0, jnp.arange(len(taken))[:, None]
  new = jnp.arange(2)[None] < taken[:, None]
  seen = seen.at[rows, recent].max(new)
  held = latent_cache.Cache(pools, table, lengths, impl)
  main, mtp = forward.split(held, config)
  if mtp.layers:
    mtp = mtp.replace(lengths=lengths - taken)
    last = loop.Recent(hidden, recent, taken)
    one = loop.attempt(weights, main, mtp, last, seen, knobs, alive, config)
    pools, logits = (*one.main.layers, *one.mtp.layers), one.logits
    drawn, hidden = one.verdict.tokens, one.hidden
    counts = 1 + one.verdict.accepted
  else:
    logits, main = forward.decode_step(
      weights, main, recent[:, 0], config, valid=alive.astype(jnp.int32)
    )
    drawn_from = sampling.distribution(logits, seen, knobs)
    drawn = sampling.draw(drawn_from, knobs, lengths + 1)[:, None]
    logits, pools = logits[:, None], main.layers
    counts = jnp.ones_like(taken)
  log_prob = jax.vmap(sampling.log_prob, (1, 1), 1)
  fine = jnp.isfinite(logits).all(-1)
  found = Found(drawn, log_prob(logits, drawn), fine, counts)
  return found, pools, seen, hidden


@functools.partial(jax.jit, donate_argnums=0)
def copy(pools: tuple, source: Array, target: Array) -> tuple:
  """The pools with one page written over another."""
  return jax.tree.map(lambda x: x.at[target].set(x[source]), pools)
