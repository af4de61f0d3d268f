"""The compiled programs of the scheduler; each has one shape and compiles once.

The scheduler keeps its rows as numpy arrays on the host (`Rows`) and sends them
with every call: a few integers a row. On the device stay, and are donated: the
`pools` of pages, `seen` [B, V] (tokens of each row so far) and `hidden`
[B, 2, D] (states of each row's last pass). Where the MTP module drafts, its
pool is the last one, with the same pages. It lacks the tokens of a row's last
pass: the module reads them with the next draft.

Alternatives of a token, and the log-probabilities of a prompt, are computed
only in steps in which a row or a chunk wants them. A condition in the program
decides it, so that no other program is compiled. A prompt's logits exist for 32
of its tokens at a time, and leave the device as TOP numbers a token.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from mla_moe.config import ModelConfig
from mla_moe.decode import (
  forward,
  latent_attention,
  latent_cache,
  loop,
  sampling,
)
from mla_moe.types import Array, Float, Int, PyTree

TOP = 20  # alternatives of a token, as many as OpenAI's protocol has
_BLOCK = 32  # tokens of a prompt whose logits exist at once


@struct.dataclass
class Rows:
  """The rows, int32; one without a sample has length 0 and count 0.

  table [B, n]: pages of each row; lengths [B]: tokens in the main model's
  cache; tokens [B, 2]: emitted by the row's last pass, and the last of them not
  in the cache; counts [B]: how many of the two are real; alternatives [B] bool:
  whether the row wants them; knobs: of the sampler.
  """

  table: PyTree
  lengths: PyTree
  tokens: PyTree
  counts: PyTree
  alternatives: PyTree
  knobs: sampling.Knobs


@struct.dataclass
class Chunk:
  """A part of one row's prompt, int32.

  table [1, n]: pages of the row; start [1]: tokens before the part; tokens
  [1, T] of which `valid` [1] are real; after [1, T]: the token after each, of
  which the first `paired` [1] are in the prompt; scored []: whether `Scores` of
  the tokens after are wanted.
  """

  table: PyTree
  start: PyTree
  tokens: PyTree
  valid: PyTree
  after: PyTree
  paired: PyTree
  scored: PyTree


class Top(NamedTuple):
  """The likeliest tokens of some positions, [..., TOP], the likeliest first."""

  tokens: Array
  log_probs: Array


class Scores(NamedTuple):
  """Tokens of a text under the model, each [T].

  log_probs: of the token; ranks: 1 is the likeliest; top: of its position.
  """

  log_probs: Array
  ranks: Array
  top: Top


class Emitted(NamedTuple):
  """Tokens of one pass, [B, 1], or [B, 2] with drafts.

  log_probs: the model's, and drawn at the rows' temperatures; finite: whether
  the logits were; counts [B]: how many tokens of each row are real; top: their
  alternatives, zeros if no row wants them.
  """

  tokens: Array
  log_probs: Array
  drawn: Array
  finite: Array
  counts: Array
  top: Top


@functools.partial(
  jax.jit, static_argnames=('config', 'impl'), donate_argnames='pools'
)
def prefill(
  weights: PyTree, pools: tuple, chunk: Chunk, *, config: ModelConfig, impl: str
) -> tuple[Array, Array, Scores, tuple]:
  """Returns logits [1, V] and hidden state [1, D] after a chunk, the scores of
  the tokens after its own (zeros if not wanted), and pools."""
  cache = latent_cache.Cache(pools, chunk.table, chunk.start, impl)
  main, mtp = forward.split(cache, config)
  few = chunk.tokens.shape[1] <= latent_attention.ABSORBED
  form = 'absorbed' if few else 'decompressed'
  x, main = forward.hidden(
    weights, main, chunk.tokens, config, valid=chunk.valid, form=form
  )
  if mtp.layers:
    _, mtp = forward.draft(
      weights, mtp, x, chunk.after, config, valid=chunk.paired, form=form
    )
  last = forward.last(x, chunk.valid)
  score = functools.partial(_scores, weights, x[0], chunk.after[0])
  scores = _if(chunk.scored, score)
  pools = (*main.layers, *mtp.layers)
  return forward.logits(weights, last), last, scores, pools


@functools.partial(jax.jit, donate_argnames=('seen', 'hidden'))
def first_token(
  logits: Array,
  last: Array,
  seen: Array,
  hidden: Array,
  row: Array,
  prompt: Array,
  length: Array,
  alternatives: Array,
  knobs: sampling.Knobs,
) -> tuple[Emitted, Array, Array]:
  """Returns the token after a prompt, and `seen` and `hidden` with its row.

  Args:
    logits: [1, V] of `prefill`.
    last: [1, D] of `prefill`.
    seen: donated.
    hidden: donated.
    row: the row that the sample gets.
    prompt: its ids, padded with ids beyond the vocabulary.
    length: [1] tokens of the prompt.
    alternatives: [] whether the sample wants them.
    knobs: of this sample.
  """
  marks = jnp.zeros(seen.shape[1], bool).at[prompt].set(True, mode='drop')
  log_probs = sampling.distribution(logits, marks[None], knobs)
  token = sampling.draw(log_probs, knobs, length)
  log_prob = sampling.log_prob(logits, token)
  finite = jnp.isfinite(logits).all(-1)
  drawn = sampling.drawn_log_prob(logits, token, knobs.temperature)
  columns = (x[:, None] for x in (token, log_prob, drawn, finite))
  top = _if(alternatives, functools.partial(_top, logits[:, None]))
  emitted = Emitted(*columns, jnp.ones_like(length), top)
  return emitted, seen.at[row].set(marks), hidden.at[row].set(last)


@functools.partial(
  jax.jit,
  static_argnames=('config', 'impl'),
  donate_argnames=('pools', 'seen', 'hidden'),
)
def decode(
  weights: PyTree,
  pools: tuple,
  seen: Array,
  hidden: Array,
  rows: Rows,
  *,
  config: ModelConfig,
  impl: str,
) -> tuple[Emitted, tuple, Array, Array]:
  """Returns one token of every row, or up to two with drafts, and the arrays
  that stay on the device."""
  counts, alive = rows.counts, rows.counts > 0
  real = jnp.arange(2)[None] < counts[:, None]
  seen = seen.at[jnp.arange(len(counts))[:, None], rows.tokens].max(real)
  cache = latent_cache.Cache(pools, rows.table, rows.lengths, impl)
  main, mtp = forward.split(cache, config)
  if mtp.layers:
    mtp = mtp.replace(lengths=rows.lengths - counts)
    recent = loop.Recent(hidden, rows.tokens, counts)
    attempt = loop.draft_and_verify(
      weights, main, mtp, recent, seen, rows.knobs, alive, config
    )
    pools = (*attempt.main.layers, *attempt.mtp.layers)
    logits, hidden = attempt.logits, attempt.hidden
    tokens, accepted = attempt.verdict
    counts = 1 + accepted
  else:
    logits, main = forward.decode_step(
      weights, main, rows.tokens[:, 0], config, valid=alive.astype(jnp.int32)
    )
    log_probs = sampling.distribution(logits, seen, rows.knobs)
    tokens = sampling.draw(log_probs, rows.knobs, rows.lengths + 1)[:, None]
    logits, pools = logits[:, None], main.layers
    counts = jnp.ones_like(counts)
  log_probs = jax.vmap(sampling.log_prob, (1, 1), 1)(logits, tokens)
  at_temperature = functools.partial(
    sampling.drawn_log_prob, temperature=rows.knobs.temperature
  )
  drawn = jax.vmap(at_temperature, (1, 1), 1)(logits, tokens)
  finite = jnp.isfinite(logits).all(-1)
  top = _if(jnp.any(rows.alternatives), functools.partial(_top, logits))
  emitted = Emitted(tokens, log_probs, drawn, finite, counts, top)
  return emitted, pools, seen, hidden


@jax.jit
def routes(pools: tuple, table: Array, lengths: Array) -> Array | None:
  """Returns the experts of rows' tokens (`latent_cache.routes`)."""
  return latent_cache.routes(latent_cache.Cache(pools, table, lengths))


@functools.partial(jax.jit, donate_argnums=0)
def copy_page(pools: tuple, source: Array, target: Array) -> tuple:
  """Returns the pools with page `source` written over page `target`."""
  return jax.tree.map(lambda x: x.at[target].set(x[source]), pools)


def _if(wanted: Array, compute) -> PyTree:
  """Returns `compute()` where it is wanted, zeros of its shape elsewhere."""
  shapes = jax.eval_shape(compute)
  zeros = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  return jax.lax.cond(wanted, compute, zeros)


def _top(logits: Float[Array, '*b V']) -> Top:
  values, tokens = jax.lax.top_k(logits, min(TOP, logits.shape[-1]))
  log_total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
  return Top(tokens, values - log_total)


def _scores(
  weights: PyTree, x: Float[Array, 'T D'], tokens: Int[Array, ' T']
) -> Scores:
  """Returns the scores of `tokens` after the hidden states `x`."""
  block = math.gcd(len(tokens), _BLOCK)

  def score(part):
    states, tokens = part
    logits = forward.logits(weights, states)
    log_probs = sampling.log_prob(logits, tokens)
    own = jnp.take_along_axis(logits, tokens[:, None], axis=-1)
    return Scores(log_probs, 1 + (logits > own).sum(-1), _top(logits))

  parts = x.reshape(-1, block, x.shape[-1]), tokens.reshape(-1, block)
  scores = jax.lax.map(score, parts)
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), scores)
