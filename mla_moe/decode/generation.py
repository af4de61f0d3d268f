"""Continuations of prompts: prefill, then rounds of one pass over every row.

A round emits one token a row, or up to two where the MTP module drafts
(`speculative`). `generate` and `rollout` run all rounds in one compiled loop
that ends when every row has stopped; `stream` runs the same rounds one by one
and hands out tokens as they come. Lengths are rounded up to a few sizes, so
that other prompts seldom compile anew.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mla_moe.config import CacheConfig, ConfigError, ModelConfig
from mla_moe.decode import forward, loop, sampling
from mla_moe.types import Array, Int, PyTree

_ROUND = 64  # prompts and outputs are padded to multiples of this


class Rollout(NamedTuple):
  """What rows were continued with; numpy arrays.

  tokens [B, new] int32, of which `counts` [B] are real and the last of those
  may be a stop id (eos_id after them); log_probs [B, new] float32, the model's
  own, 0 after them. passes counts the main model's passes over a row without
  the prompts', accepted the drafts that stood, of one a pass.
  """

  tokens: np.ndarray
  counts: np.ndarray
  log_probs: np.ndarray
  passes: int
  accepted: int


class Round(NamedTuple):
  """What one round of `stream` emitted: tokens, an array for each row, and the
  counts of `Rollout` so far."""

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
  **more,
) -> Int[np.ndarray, 'B _']:
  """The prompts [B, T], then `max_new_tokens` columns of what follows, int32.

  `more` is `rollout`'s; without stop ids every row is continued to the end.
  """
  found = rollout(
    config,
    variables,
    prompt,
    max_new_tokens,
    temperature=temperature,
    speculative=speculative,
    **more,
  )
  return np.concatenate([np.asarray(prompt, np.int32), found.tokens], axis=1)


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
  **knobs,
) -> Rollout:
  """Continues every row until a stop id or `max_new_tokens`.

  Args:
    config: the model's.
    variables: {'params', 'router'}, or what `decode.unstack` made of them.
    prompt: token ids [B, T], padded on the right where `lengths` says so.
    max_new_tokens: of each row, at least 1.
    lengths: tokens of each prompt; None is all T.
    speculative: draft with the MTP module; the result is the same (greedy), or
      has the same distribution.
    stop_ids: a row ends with the first of them.
    cache: how the latents are kept.
    **knobs: see `sampling.knobs`; one value, or one a row.

  Raises:
    ConfigError: input that cannot be continued.
    FloatingPointError: logits that are not finite; says at which step.
  """
  job = _job(
    config, variables, prompt, max_new_tokens, lengths, speculative, stop_ids,
    knobs,
  )  # fmt: skip
  state = _whole(*job.arrays, config=config, kept=cache, **job.static)
  state = jax.device_get(
    dataclasses.replace(
      state, cache=None, mtp_cache=None, recent=None, seen=None
    )
  )
  _check(state.broken)
  new = max_new_tokens
  real = np.arange(new)[None] < state.counts[:, None]
  return Rollout(
    tokens=np.where(real, state.tokens[:, :new], config.eos_id).astype(
      np.int32
    ),
    counts=state.counts,
    log_probs=np.where(real, state.log_probs[:, :new], 0.0),
    passes=int(state.passes),
    accepted=int(state.accepted),
  )


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
) -> Iterator[Round]:
  """As `rollout`, round by round: the new tokens of each row, as they come.

  Raises:
    ConfigError, FloatingPointError: as `rollout`.
  """
  job = _job(
    config, variables, prompt, max_new_tokens, lengths, speculative, stop_ids,
    knobs,
  )  # fmt: skip
  weights, tokens, valid, limit, stops, how = job.arrays
  if 'layers' not in weights:
    weights = jax.jit(functools.partial(forward.unstack, config))(weights)
  state = _begin(
    weights, tokens, valid, limit, stops, how, config=config, kept=cache,
    **job.static,
  )  # fmt: skip
  shown = np.zeros(len(valid), np.int32)
  while True:
    tokens, counts, done, broken, *sums = jax.device_get(
      (
        state.tokens,
        state.counts,
        state.done,
        state.broken,
        state.passes,
        state.accepted,
      )
    )
    _check(broken)
    new = zip(tokens, shown, counts, strict=True)
    yield Round([x[before:after] for x, before, after in new], *map(int, sums))
    shown = counts
    if done.all():
      return
    state = _next(weights, state, limit, stops, how, config=config)


class _Job(NamedTuple):
  arrays: tuple
  static: dict


def _job(
  config, variables, prompt, new, lengths, speculative, stop_ids, knobs
) -> _Job:
  """Checked and padded arguments of the compiled functions."""
  prompt = np.asarray(prompt)
  if prompt.ndim != 2 or not np.issubdtype(prompt.dtype, np.integer):
    raise ConfigError(
      f'prompt: must be token ids [B, T], not {prompt.dtype} {prompt.shape}'
    )
  batch, t = prompt.shape
  if not prompt.size:
    raise ConfigError('prompt: is empty; begin it with bos_id at least')
  low, high = int(prompt.min()), int(prompt.max())
  if low < 0 or high >= config.vocab:
    wrong = low if low < 0 else high
    raise ConfigError(
      f'prompt: token {wrong} is not below vocab={config.vocab}'
    )
  if isinstance(new, bool) or not isinstance(new, (int, np.integer)) or new < 1:
    raise ConfigError(f'max_new_tokens={new!r}: must be at least 1')
  valid = np.full(batch, t) if lengths is None else np.asarray(lengths)
  if valid.shape != (batch,) or valid.min() < 1 or valid.max() > t:
    raise ConfigError(
      f'lengths={valid.tolist()}: must be from 1 to {t}, one for each of '
      f'{batch} rows'
    )
  if t + new > config.max_positions:
    raise ConfigError(
      f'max_new_tokens={new}: with a prompt of {t} tokens more than the '
      f'max_positions={config.max_positions} of the model'
    )
  if speculative and not config.mtp.depth:
    raise ConfigError('speculative=True: the model has no MTP module (depth 0)')
  for stop in stop_ids:
    if not 0 <= stop < config.vocab:
      raise ConfigError(f'stop_ids: {stop} is not below vocab={config.vocab}')
  stops = np.full(-(-max(len(stop_ids), 1) // 4) * 4, -1, np.int32)
  stops[: len(stop_ids)] = stop_ids
  padded = np.zeros((batch, _up(t)), np.int32)
  padded[:, :t] = prompt
  arrays = (
    variables,
    padded,
    valid.astype(np.int32),
    np.int32(new),
    stops,
    sampling.knobs(batch, **knobs),
  )
  return _Job(arrays, dict(room=_up(new), speculative=bool(speculative)))


def _up(n: int) -> int:
  return -(-n // _ROUND) * _ROUND


def _check(broken):
  if broken >= 0:
    raise FloatingPointError(
      f'the logits of step {int(broken)} of the generation are not '
      'finite: are the parameters?'
    )


@functools.partial(
  jax.jit, static_argnames=('config', 'kept', 'room', 'speculative')
)
def _whole(
  variables, tokens, valid, limit, stops, how, *, config, kept, room,
  speculative,
):  # fmt: skip
  """Prefill and all rounds."""
  weights = variables
  if 'layers' not in weights:
    weights = forward.unstack(config, variables)
  state = loop.start(
    weights, tokens, valid, limit, stops, how, config, kept, room, speculative
  )
  return jax.lax.while_loop(
    lambda state: ~jnp.all(state.done) & (state.broken < 0),
    lambda state: loop.advance(weights, state, limit, stops, how, config),
    state,
  )


@functools.partial(
  jax.jit, static_argnames=('config', 'kept', 'room', 'speculative')
)
def _begin(
  weights, tokens, valid, limit, stops, how, *, config, kept, room,
  speculative,
):  # fmt: skip
  return loop.start(
    weights, tokens, valid, limit, stops, how, config, kept, room,
    speculative,
  )  # fmt: skip


@functools.partial(jax.jit, static_argnames='config', donate_argnums=1)
def _next(weights, state, limit, stops, how, *, config):
  return loop.advance(weights, state, limit, stops, how, config)
