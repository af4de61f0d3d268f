"""Losses: cross-entropy in vocabulary blocks, the sequence-wise balance loss.

The logits of a 128K vocabulary are the largest array of a training step, so
`token_nll` never makes them whole: a running logsumexp over blocks of the
vocabulary goes forward, and the backward pass makes each block again. A
vocabulary that fits one block keeps its logits instead, which saves that
product. Both write their gradients out by hand: left to autodiff, the backward
products of a bfloat16 model would run in float32, and the head's gradient
would be rounded to bfloat16 on its way to the float32 master.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mla_moe import sharding
from mla_moe.types import Array, Float, Int

BLOCK = 8192
SAVED = ('balance_counts',)


def token_nll(
  hidden: Float[Array, 'M D'],
  head: Float[Array, 'D V'],
  targets: Int[Array, ' M'],
  block: int = BLOCK,
) -> tuple[Float[Array, ' M'], Float[Array, ' M']]:
  """-log p(target) in nats and logsumexp of the logits, both float32.

  A target of -1 costs 0 and has no gradient; one beyond the vocabulary gives
  NaN. `head` is cast to the dtype of `hidden`, block by block; sums are
  float32, and so is the head's gradient. Both results may be differentiated,
  with any cotangent per token (z-loss is the square of the second). Temporary
  memory is a few times M * block numbers.
  """
  picked, lse = picked_and_lse(hidden, head, targets, block)
  return jnp.where(targets >= 0, lse - picked, 0.0), lse


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def picked_and_lse(
  hidden: Float[Array, 'M D'],
  head: Float[Array, 'D V'],
  targets: Int[Array, ' M'],
  block: int,
) -> tuple[Float[Array, ' M'], Float[Array, ' M']]:
  """The target's logit (of -1: anything) and the logsumexp, float32."""
  return _forward(hidden, head, targets, block)[0]


def _forward(hidden, head, targets, block):
  if head.shape[1] <= block:
    logits = _dot('md,dv->mv', hidden, head.astype(hidden.dtype))
    lse = jax.nn.logsumexp(logits, axis=-1)
    picked = _at(logits, jnp.maximum(targets, 0))
    return (picked, lse), (hidden, head, targets, lse, logits)
  width, blocks = _blocks(head.shape[1], block)

  def step(carry, at):
    peak, total, picked = carry
    start, fresh = at
    _, logits = _block_logits(hidden, head, start, fresh, width)
    new = jnp.maximum(peak, logits.max(-1))
    total = total * jnp.exp(peak - new)
    total = total + jnp.exp(logits - new[:, None]).sum(-1)
    here = (targets >= fresh) & (targets < start + width)
    value = _at(logits, jnp.clip(targets - start, 0, width - 1))
    return (new, total, jnp.where(here, value, picked)), None

  lowest = jnp.full(targets.shape, jnp.finfo(jnp.float32).min)
  unseen = jnp.where(targets < 0, 0.0, jnp.nan)
  first = sharding.varying((lowest, jnp.zeros(targets.shape), unseen))
  (peak, total, picked), _ = jax.lax.scan(step, first, blocks)
  lse = peak + jnp.log(total)
  return (picked, lse), (hidden, head, targets, lse, None)


def _backward(block, residuals, cotangents):
  hidden, head, targets, lse, logits = residuals
  dpicked, dlse = (g[:, None] for g in cotangents)

  def products(logits, part, start, fresh):
    """Gradients of hidden [M, D] and of the block [D, width], float32."""
    column = (start + jnp.arange(part.shape[1], dtype=jnp.int32))[None]
    hit = (column == targets[:, None]) & (column >= fresh)
    dlogits = jnp.exp(logits - lse[:, None]) * dlse
    dlogits = (dlogits + jnp.where(hit, dpicked, 0)).astype(hidden.dtype)
    dhidden = _dot('mv,dv->md', dlogits, part)
    return dhidden, _dot('md,mv->dv', hidden, dlogits)

  if logits is not None:
    part = head.astype(hidden.dtype)
    dhidden, dhead = products(logits, part, 0, 0)
    return dhidden.astype(hidden.dtype), dhead.astype(head.dtype), None

  width, blocks = _blocks(head.shape[1], block)

  def step(carry, at):
    dhidden, dhead = carry
    part, logits = _block_logits(hidden, head, *at, width)
    more, dpart = products(logits, part, *at)
    dhead = jax.lax.dynamic_update_slice_in_dim(dhead, dpart, at[0], 1)
    return (dhidden + more, dhead), None

  # The last block goes first: where it overlaps its neighbour it writes zeros,
  # which the neighbour then overwrites.
  zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (hidden, head))
  zeros = sharding.varying(zeros)
  (dhidden, dhead), _ = jax.lax.scan(step, zeros, blocks, reverse=True)
  return dhidden.astype(hidden.dtype), dhead.astype(head.dtype), None


picked_and_lse.defvjp(_forward, _backward)


def _blocks(vocab: int, block: int) -> tuple[int, tuple[Array, Array]]:
  """Width of the blocks; start of each, and from which id on it is new.

  As few blocks as fit, of one width (whole lanes of 128 where they are that
  wide). The last one is moved back to end with the vocabulary, so that nothing
  is padded; the ids that it repeats are masked.
  """
  width = -(-vocab // -(-vocab // block))
  width = min(block, -(-width // 128) * 128)
  fresh = jnp.arange(0, vocab, width, dtype=jnp.int32)
  return width, (jnp.minimum(fresh, vocab - width), fresh)


def _block_logits(hidden, head, start, fresh, width):
  """The block of the head in the dtype of `hidden`, and its masked logits."""
  part = jax.lax.dynamic_slice_in_dim(head, start, width, axis=1)
  part = part.astype(hidden.dtype)
  new = (start + jnp.arange(width, dtype=jnp.int32) >= fresh)[None]
  return part, jnp.where(new, _dot('md,dv->mv', hidden, part), -jnp.inf)


def _at(logits: Array, ids: Array) -> Array:
  return jnp.take_along_axis(logits, ids[:, None], axis=-1)[:, 0]


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
  axes: tuple[str, ...] = (),
) -> Float[Array, '']:
  """V3's sequence-wise balance loss, equations 17 to 20, without alpha.

  sum_i f_i P_i of each sequence, averaged: f counts the top_k of the raw
  scores (no bias, no groups, no gradient), P is the mean normalised score.
  Perfect balance is 1. `mask` 0 leaves a token out. Sequences whose length is
  split over the mesh's `axes` are summed over them before the product.
  """
  experts = scores.shape[-1]
  total = lambda x: sharding.total(x, axes)
  if mask is None:
    mask = jnp.ones(scores.shape[:2], jnp.float32)
  tokens = jnp.maximum(total(mask.sum(1)), 1.0)
  chosen = jax.lax.top_k(jax.lax.stop_gradient(scores), top_k)[1]
  add = lambda chosen, mask: (
    jnp.zeros(experts).at[chosen].add(jnp.broadcast_to(mask, chosen.shape))
  )
  counts = total(jax.vmap(add)(chosen, mask[:, :, None]))
  counts = checkpoint_name(counts, SAVED[0])
  frequency = counts * (experts / top_k) / tokens[:, None]
  share = scores / (scores.sum(-1, keepdims=True) + 1e-20)
  mean = total((share * mask[:, :, None]).sum(1)) / tokens[:, None]
  return (frequency * mean).sum(-1).mean()
