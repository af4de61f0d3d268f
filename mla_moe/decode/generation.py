"""Text generation: prompts in, tokens out.

`generate` and `rollout` run the whole loop (`loop.start`, then `loop.advance`
until every row has stopped) as one compiled program, and nothing comes back to
the host before its end, or before half of many rows have ended. `stream` runs
the same steps one by one and yields the tokens of each. Lengths are rounded up
to a multiple, so that a prompt of another length seldom compiles again.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mla_moe import sharding
from mla_moe.config import CacheConfig, ConfigError, ModelConfig
from mla_moe.decode import forward, latent_cache, loop, sampling
from mla_moe.types import Array, Int, PyTree


class Rollout(NamedTuple):
  """Continuations of a batch of prompts; numpy arrays.

  tokens [B, new] int32: the first `counts` [B] of each row are real, the last
  of them may be a stop id, and eos_id fills the rest. log_probs [B, new]
  float32: the model's own, before every knob; 0 for the rest. drawn [B, new]:
  likewise, at the row's temperature. ended [B]: rows with a stop id. passes:
  passes of the main model, summed over rows, without the prompts'. accepted:
  drafts accepted, of one a pass. routes [B, T + new - 1, L, K] int16: the
  experts of each token that was read, the last one was not; -1 for the rest;
  None where the cache notes none.
  """

  tokens: np.ndarray
  counts: np.ndarray
  log_probs: np.ndarray
  drawn: np.ndarray
  ended: np.ndarray
  passes: int
  accepted: int
  routes: np.ndarray | None = None


class Step(NamedTuple):
  """One step of `stream`: an array of new tokens for each row, and the passes
  and accepted drafts of `Rollout` so far."""

  tokens: list
  passes: int
  accepted: int


def generate(
  config: ModelConfig,
  variables: PyTree,
  prompt: Array | Sequence,
  max_new_tokens: int = 64,
  temperature: float | Sequence | Array = 0.0,
  speculative: bool = False,
  **options,
) -> Int[np.ndarray, 'B _']:
  """Returns the prompts [B, T] with `max_new_tokens` columns after them, int32.

  `options` are `rollout`'s. Without stop ids no row ends early.
  """
  options |= dict(temperature=temperature, speculative=speculative)
  out = rollout(config, variables, prompt, max_new_tokens, **options)
  return np.concatenate([np.asarray(prompt, np.int32), out.tokens], axis=1)


def rollout(
  config: ModelConfig,
  variables: PyTree,
  prompt: Array | Sequence,
  max_new_tokens: int = 64,
  *,
  lengths: Array | Sequence | None = None,
  speculative: bool = False,
  stop_ids: Sequence[int] = (),
  cache: CacheConfig = CacheConfig(),
  samples: int = 1,
  multiple: int = 64,
  fewest: int = 0,
  **knobs,
) -> Rollout:
  """Continues every row until a stop id or `max_new_tokens`.

  Args:
    config: of the model.
    variables: {'params', 'router'}, or the weights that `forward.unstack` makes
      of them.
    prompt: token ids [B, T], padded on the right where `lengths` says so.
    max_new_tokens: of each row; with 0, or without rows, nothing is computed.
    lengths: tokens of each prompt; None: all T.
    speculative: draft with the MTP module. Greedy tokens are the same as
      without; sampled ones have the same distribution.
    stop_ids: a row ends with the first of them.
    cache: type and page size of the latent cache, and whether it notes routes.
    samples: rows of each prompt, one after the other; the model reads a prompt
      once.
    multiple: lengths are rounded up to it; small ones compute less padding, and
      compile for more lengths.
    fewest: when half of the rows have ended they leave the others, which a
      program of half as many rows continues, down to so many; 0 or a mesh: no.
    **knobs: of `sampling.make_knobs`; one value, or one a row.

  Raises:
    ConfigError: input that cannot be continued.
    FloatingPointError: logits that are not finite; names the step.
  """
  args, sizes = (config, prompt, max_new_tokens, lengths), (samples, multiple)
  prompts, job = _prepare(*args, speculative, stop_ids, cache, knobs, *sizes)
  if not job.output_length or not len(job.knobs.seed):
    return _nothing(len(job.knobs.seed), max_new_tokens)
  out, broken = _run(variables, prompts, job, fewest)
  _check_finite(broken)
  real = np.arange(max_new_tokens)[None] < out.counts[:, None]
  tokens = np.where(real, out.tokens[:, :max_new_tokens], config.eos_id)
  last = tokens[np.arange(len(tokens)), out.counts - 1]
  if out.routes is not None:
    width = np.shape(prompt)[1] + max_new_tokens - 1
    out = out._replace(routes=out.routes[:, :width])
  return out._replace(
    tokens=tokens.astype(np.int32),
    log_probs=np.where(real, out.log_probs[:, :max_new_tokens], 0.0),
    drawn=np.where(real, out.drawn[:, :max_new_tokens], 0.0),
    ended=np.isin(last, np.asarray(stop_ids, np.int32)),
    passes=int(out.passes),
    accepted=int(out.accepted),
  )


def _run(variables, prompts, job, fewest):
  """Returns the result of `_rollout`; rows leave when half have ended."""
  all_stay = not fewest or len(job.knobs.seed) < 2 * fewest
  if all_stay or sharding.auto_axes():
    return jax.device_get(_rollout(variables, *prompts, job))
  weights = forward.layer_weights(job.config, variables)
  state, whole = _start(weights, *prompts, job), None
  rows = np.arange(len(job.knobs.seed))
  while True:
    half = len(rows) // 2 if len(rows) >= 2 * fewest else 0
    state = _until(weights, state, job, np.int32(half))
    out, broken = jax.device_get((_result(state), state.broken))
    whole = whole or jax.tree.map(np.array, out)
    for field, part in zip(whole, out, strict=True):
      if np.ndim(field):
        field[rows] = part
    whole = whole._replace(passes=out.passes, accepted=out.accepted)
    if broken >= 0 or out.ended.all():
      return whole, broken
    # Those that go on, and ended ones in the places that are left.
    chosen = np.argsort(out.ended, kind='stable')[:half]
    rows, (state, knobs) = rows[chosen], _take(state, job.knobs, chosen)
    job = dataclasses.replace(job, knobs=knobs)


def _nothing(rows: int, width: int) -> Rollout:
  """Returns the result of no row, or of rows without a token."""
  floats, counts = np.zeros((rows, width), np.float32), np.zeros(rows, np.int32)
  tokens, ended = floats.astype(np.int32), counts > 0
  return Rollout(tokens, counts, floats, floats, ended, 0, 0)


def stream(
  config: ModelConfig,
  variables: PyTree,
  prompt: Array | Sequence,
  max_new_tokens: int = 64,
  *,
  lengths: Array | Sequence | None = None,
  speculative: bool = False,
  stop_ids: Sequence[int] = (),
  cache: CacheConfig = CacheConfig(),
  **knobs,
) -> Iterator[Step]:
  """Yields the tokens of `rollout`, step by step; its arguments are the same.

  Raises:
    ConfigError, FloatingPointError: as `rollout`.
  """
  prompts, job = _prepare(
    config, prompt, max_new_tokens, lengths, speculative, stop_ids, cache, knobs
  )
  if not job.output_length or not len(job.knobs.seed):
    return
  weights = forward.layer_weights(config, variables)
  state = _start(weights, *prompts, job)
  before = np.zeros(len(job.knobs.seed), np.int32)
  while True:
    passes, accepted, broken = state.passes, state.accepted, state.broken
    arrays = state.tokens, state.counts, state.done, broken, passes, accepted
    arrays = jax.device_get(arrays)
    tokens, counts, done, broken, passes, accepted = arrays
    _check_finite(broken)
    rows = zip(tokens, before, counts, strict=True)
    pieces = [row[start:stop] for row, start, stop in rows]
    yield Step(pieces, int(passes), int(accepted))
    if done.all():
      return
    before = counts
    state = _advance(weights, state, job)


def _prepare(
  config, prompt, max_new_tokens, lengths, speculative, stop_ids, cache, knobs,
  samples=1, multiple=64,
):  # fmt: skip
  """Returns ((padded prompts, their lengths), job), checked; numpy arrays."""
  prompt = np.asarray(prompt)
  lengths = _check_prompt(config, prompt, max_new_tokens, lengths)
  if speculative and not config.mtp.depth:
    raise ConfigError('speculative=True: the model has no MTP module (depth 0)')
  for stop in stop_ids:
    if not 0 <= stop < config.vocab:
      raise ConfigError(f'stop_ids: {stop} is not below vocab={config.vocab}')
  stops = np.full(-(-max(len(stop_ids), 1) // 4) * 4, -1, np.int32)
  stops[: len(stop_ids)] = stop_ids
  for name, value in {'samples': samples, 'multiple': multiple}.items():
    if value < 1:
      raise ConfigError(f'{name}={value}: must be at least 1')
  batch, t = prompt.shape
  round_up = lambda n: -(-n // multiple) * multiple
  padded = np.zeros((batch, round_up(t)), np.int32)
  padded[:, :t] = prompt
  job = loop.Job(
    limit=np.int32(max_new_tokens),
    stop_ids=stops,
    knobs=sampling.make_knobs(batch * samples, **knobs),
    config=config,
    cache_config=cache,
    output_length=round_up(max_new_tokens),
    speculative=bool(speculative),
    samples=samples,
  )
  return (padded, lengths.astype(np.int32)), job


def _check_prompt(config, prompt, limit, lengths) -> np.ndarray:
  """Returns the rows' lengths; limit: new tokens of each row.

  Raises:
    ConfigError: a prompt, a limit or lengths that the model cannot continue.
  """
  if prompt.ndim != 2 or not np.issubdtype(prompt.dtype, np.integer):
    raise ConfigError(
      f'prompt: must be token ids [B, T], not {prompt.dtype} {prompt.shape}'
    )
  batch, t = prompt.shape
  if batch and not t:
    raise ConfigError('prompt: is empty; begin it with bos_id at least')
  low, high = int(prompt.min(initial=0)), int(prompt.max(initial=0))
  if low < 0 or high >= config.vocab:
    wrong = low if low < 0 else high
    raise ConfigError(
      f'prompt: token {wrong} is not below vocab={config.vocab}'
    )
  whole = isinstance(limit, (int, np.integer)) and not isinstance(limit, bool)
  if not whole or limit < 0:
    raise ConfigError(f'max_new_tokens={limit!r}: must be a number from 0 on')
  lengths = np.full(batch, t) if lengths is None else np.asarray(lengths)
  if lengths.shape != (batch,) or ((lengths < 1) | (lengths > t)).any():
    raise ConfigError(
      f'lengths={lengths.tolist()}: must be from 1 to {t}, one for each of '
      f'{batch} rows'
    )
  if t + limit > config.max_positions:
    raise ConfigError(
      f'max_new_tokens={limit}: with a prompt of {t} tokens more than the '
      f'max_positions={config.max_positions} of the model'
    )
  return lengths


def _check_finite(broken):
  if broken >= 0:
    raise FloatingPointError(
      f'the logits of step {int(broken)} of the generation are not '
      'finite: are the parameters?'
    )


@jax.jit
def _rollout(variables, tokens, valid, job):
  """Returns a Rollout and `State.broken`, after all steps."""
  weights = variables
  if 'layers' not in weights:
    weights = forward.unstack(job.config, variables)
  state = _until(weights, loop.start(weights, tokens, valid, job), job, 0)
  return _result(state), state.broken


@functools.partial(jax.jit, donate_argnums=1)
def _until(weights, state, job, most):
  """Returns the state when at most so many rows go on, or logits are broken."""
  return jax.lax.while_loop(
    lambda state: (jnp.sum(~state.done) > most) & (state.broken < 0),
    lambda state: loop.advance(weights, state, job),
    state,
  )


def _result(state) -> Rollout:
  """Returns the rows' arrays of a state, and its sums."""
  return Rollout(
    tokens=state.tokens,
    counts=state.counts,
    log_probs=state.log_probs,
    drawn=state.drawn,
    ended=state.done,
    passes=state.passes,
    accepted=state.accepted,
    routes=latent_cache.routes(state.cache),
  )


@jax.jit
def _take(state, knobs, rows):
  """Returns the state and the knobs of some rows."""
  count = len(state.done)

  def take(x):
    if isinstance(x, latent_cache.Cache):
      return latent_cache.taken(x, rows)
    return x[rows] if jnp.ndim(x) and len(x) == count else x

  is_cache = lambda x: isinstance(x, latent_cache.Cache)
  return jax.tree.map(take, (state, knobs), is_leaf=is_cache)


_start = jax.jit(loop.start)
_advance = jax.jit(loop.advance, donate_argnums=1)
