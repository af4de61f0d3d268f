"""Losses: cross-entropy in vocabulary blocks, the sequence-wise balance loss.

The logits of a 128K vocabulary are the largest array of a training step, so
`token_nll` never makes them whole: a running logsumexp over blocks of the
vocabulary goes forward, and the backward pass makes each block again. A
vocabulary that fits one block is left to autodiff, which keeps the logits and
saves that product.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from mla_moe.types import Array, Float, Int

BLOCK = 8192


def token_nll(
  hidden: Float[Array, 'M D'],
  head: Float[Array, 'D V'],
  targets: Int[Array, ' M'],
  block: int = BLOCK,
) -> tuple[Float[Array, ' M'], Float[Array, ' M']]:
  """-log p(target) in nats and logsumexp of the logits, both float32.

  A target of -1 costs 0 and has no gradient. `head` is cast to the dtype of
  `hidden`; sums are float32. Both results may be differentiated, with any
  cotangent per token (z-loss is the square of the second).
  """
  head = head.astype(hidden.dtype)
  if head.shape[1] <= block:
    logits = _dot('md,dv->mv', hidden, head)
    lse = jax.nn.logsumexp(logits, axis=-1)
    at = jnp.maximum(targets, 0)[:, None]
    picked = jnp.take_along_axis(logits, at, axis=-1)[:, 0]
  else:
    picked, lse = _blocked(hidden, head, targets, block)
  return jnp.where(targets >= 0, lse - picked, 0.0), lse


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _blocked(hidden, head, targets, block):
  """The target's logit and the logsumexp, [M] each."""
  return _blocked_forward(hidden, head, targets, block)[0]


def _slices(vocab: int, block: int) -> tuple[Array, Array]:
  """Start of each block, and from which id on it is new.

  The last block is moved back to end with the vocabulary, so that all have one
  size and nothing is padded; the ids that it repeats are masked.
  """
  fresh = jnp.arange(0, vocab, block, dtype=jnp.int32)
  return jnp.minimum(fresh, vocab - block), fresh


def _block_logits(hidden, head, start, fresh, block):
  part = jax.lax.dynamic_slice_in_dim(head, start, block, axis=1)
  logits = _dot('md,dv->mv', hidden, part)
  new = (start + jnp.arange(block) >= fresh)[None]
  return part, jnp.where(new, logits, -jnp.inf)


def _blocked_forward(hidden, head, targets, block):
  def step(carry, at):
    peak, total, picked = carry
    start, fresh = at
    _, logits = _block_logits(hidden, head, start, fresh, block)
    new = jnp.maximum(peak, logits.max(-1))
    total = total * jnp.exp(peak - new)
    total = total + jnp.exp(logits - new[:, None]).sum(-1)
    here = (targets >= fresh) & (targets < start + block)
    inside = jnp.clip(targets - start, 0, block - 1)[:, None]
    value = jnp.take_along_axis(logits, inside, axis=-1)[:, 0]
    return (new, total, jnp.where(here, value, picked)), None

  m = hidden.shape[0]
  zero = jnp.zeros(m, jnp.float32)
  first = (jnp.full(m, jnp.finfo(jnp.float32).min), zero, zero)
  blocks = _slices(head.shape[1], block)
  (peak, total, picked), _ = jax.lax.scan(step, first, blocks)
  lse = peak + jnp.log(total)
  return (picked, lse), (hidden, head, targets, lse)


def _blocked_backward(block, residuals, cotangents):
  hidden, head, targets, lse = residuals
  dpicked, dlse = cotangents

  def step(carry, at):
    dhidden, dhead = carry
    start, fresh = at
    part, logits = _block_logits(hidden, head, start, fresh, block)
    probs = jnp.exp(logits - lse[:, None])
    column = (start + jnp.arange(block))[None]
    hit = (column == targets[:, None]) & (column >= fresh)
    dlogits = probs * dlse[:, None] + hit * dpicked[:, None]
    dlogits = dlogits.astype(hidden.dtype)
    dhidden = dhidden + _dot('mv,dv->md', dlogits, part)
    dpart = _dot('md,mv->dv', hidden, dlogits)
    old = jax.lax.dynamic_slice_in_dim(dhead, start, block, axis=1)
    dhead = jax.lax.dynamic_update_slice_in_dim(dhead, old + dpart, start, 1)
    return (dhidden, dhead), None

  start = tuple(jnp.zeros(x.shape, jnp.float32) for x in (hidden, head))
  blocks = _slices(head.shape[1], block)
  (dhidden, dhead), _ = jax.lax.scan(step, start, blocks)
  return dhidden.astype(hidden.dtype), dhead.astype(head.dtype), None


_blocked.defvjp(_blocked_forward, _blocked_backward)


def _dot(equation: str, a: Array, b: Array) -> Array:
  """Einsum into float32; a CPU widens first (see `layers.dot`)."""
  run = functools.partial(
    jnp.einsum, equation, preferred_element_type=jnp.float32
  )
  if a.dtype == jnp.float32:
    return run(a, b)
  widened = lambda a, b: run(a.astype(jnp.float32), b.astype(jnp.float32))
  return jax.lax.platform_dependent(a, b, cpu=widened, default=run)


def balance(
  scores: Float[Array, 'B T E'],
  top_k: int,
  mask: Float[Array, 'B T'] | None = None,
) -> Float[Array, '']:
  """V3's sequence-wise balance loss, equations 17 to 20, without alpha.

  sum_i f_i P_i of each sequence, averaged: f counts the top_k of the raw
  scores (no bias, no groups, no gradient), P is the mean normalised score.
  Perfect balance is 1. `mask` 0 leaves a token out.
  """
  experts = scores.shape[-1]
  if mask is None:
    mask = jnp.ones(scores.shape[:2], jnp.float32)
  tokens = jnp.maximum(mask.sum(1), 1.0)
  chosen = jax.lax.top_k(jax.lax.stop_gradient(scores), top_k)[1]
  add = lambda chosen, mask: (
    jnp.zeros(experts).at[chosen].add(jnp.broadcast_to(mask, chosen.shape))
  )
  counts = jax.vmap(add)(chosen, mask[:, :, None])
  frequency = counts * (experts / top_k) / tokens[:, None]
  share = scores / (scores.sum(-1, keepdims=True) + 1e-20)
  mean = (share * mask[:, :, None]).sum(1) / tokens[:, None]
  return (frequency * mean).sum(-1).mean()
