"""Cross-entropy in vocabulary blocks, on one device and on a mesh.

The logits of a 128K vocabulary would be the largest array of a training step.
So `token_nll` computes them block by block: forward with a running logsumexp,
and again in the backward pass. A vocabulary that fits one block keeps its
logits instead, which saves that product. The gradients are written by hand:
autodiff would run the backward products of a bfloat16 model in float32, and
round the head's gradient to bfloat16 on its way to the float32 master.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from mla_moe import sharding
from mla_moe.model.products import dot
from mla_moe.types import Array, Float, Int

BLOCK = 8192


def token_nll(
  hidden: Float[Array, 'M D'],
  head: Float[Array, 'D V'],
  targets: Int[Array, ' M'],
  block: int = BLOCK,
) -> tuple[Float[Array, ' M'], Float[Array, ' M']]:
  """Returns -log p(target) in nats and the logits' logsumexp, both float32.

  A target of -1 costs 0 and has no gradient; one beyond the vocabulary gives
  NaN. `head` is cast to the dtype of `hidden`, block by block; sums and the
  head's gradient are float32. Both results can be differentiated (the z-loss is
  the square of the second). Temporary memory is a few times M * block numbers.
  """
  picked, lse = picked_and_lse(hidden, head, targets, block)
  return jnp.where(targets >= 0, lse - picked, 0.0), lse


def sharded_token_nll(
  hidden: Float[Array, 'S B T D'],
  head: Float[Array, 'D V'],
  targets: Int[Array, 'S B T'],
) -> tuple[Float[Array, 'S B T'], Float[Array, 'S B T']]:
  """Returns `token_nll` of S hidden states for each token, on any mesh.

  On a mesh, each device computes the logits of its tokens and its columns of
  the head. The devices then exchange two numbers a token: the target's logit
  and the logsumexp (Shoeybi et al. 2019). The states of the main model and of
  the MTP modules come in one call, because they share the head: its gradient
  is the largest array of a step, and S calls would hold it S times.
  """
  axes = sharding.auto_axes()
  if not axes:
    flat = hidden.reshape(-1, hidden.shape[-1]), head, targets.reshape(-1)
    nll, lse = token_nll(*flat)
    return nll.reshape(targets.shape), lse.reshape(targets.shape)
  stream = sharding.array_spec((None, 'batch', 'length', 'stream'), hidden)
  part = sharding.array_spec((None, 'batch', 'part'), targets)
  rows, length = sharding.mesh_axes(('batch', 'part'), targets.shape[1:])
  split = 'tensor' in sharding.mesh_axes(('length',), hidden.shape[2:3])[0]
  fsdp, columns = sharding.mesh_axes(('embed', 'vocab'), head.shape)
  equal = tuple(a for a in axes if a not in rows + length + ('tensor',))
  vocab = head.shape[1]

  def local(hidden, head, targets):
    head = sharding.pvary(head)  # so that its gradient's shards are summed
    if split:
      hidden = jax.lax.all_gather(hidden, 'tensor', axis=2, tiled=True)
    if fsdp:
      head = jax.lax.all_gather(head, fsdp, axis=0, tiled=True)
    hidden = sharding.pvary(hidden)
    flat, ids = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    first = 0
    if columns:
      first = jax.lax.axis_index('tensor') * head.shape[1]
    here = (ids >= first) & (ids < first + head.shape[1])
    local_ids = sharding.pvary(jnp.where(here, ids - first, -1))
    picked, lse = picked_and_lse(flat, head, local_ids, BLOCK)
    picked = jnp.where(here, picked, 0.0)
    if columns:
      peak = jax.lax.pmax(jax.lax.stop_gradient(lse), columns)
      lse = peak + jnp.log(jax.lax.psum(jnp.exp(lse - peak), columns))
      picked = jax.lax.psum(picked, columns)
    else:
      picked, lse = jax.lax.pmean((picked, lse), 'tensor')
    picked = jnp.where(ids >= vocab, jnp.nan, picked)
    nll = jnp.where(ids >= 0, lse - picked, 0.0)
    out = nll.reshape(targets.shape), lse.reshape(targets.shape)
    return sharding.pmean(out, equal)

  specs = stream, sharding.array_spec(('embed', 'vocab'), head), part
  return sharding.shard_map(local, specs, (part, part))(hidden, head, targets)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def picked_and_lse(
  hidden: Float[Array, 'M D'],
  head: Float[Array, 'D V'],
  targets: Int[Array, ' M'],
  block: int,
) -> tuple[Float[Array, ' M'], Float[Array, ' M']]:
  """Returns the target's logit and the logsumexp, both float32.

  The logit for a target of -1 is arbitrary; the caller masks it.
  """
  return _forward(hidden, head, targets, block)[0]


def _forward(hidden, head, targets, block):
  if head.shape[1] <= block:
    logits = dot('md,dv->mv', hidden, head.astype(hidden.dtype))
    lse = jax.nn.logsumexp(logits, axis=-1)
    picked = _logit(logits, jnp.maximum(targets, 0))
    return (picked, lse), (hidden, head, targets, lse, logits)
  width, blocks = _blocks(head.shape[1], block)

  def step(carry, bounds):
    peak, total, picked = carry
    start, fresh = bounds
    _, logits = _block_logits(hidden, head, start, fresh, width)
    higher = jnp.maximum(peak, logits.max(-1))
    total = total * jnp.exp(peak - higher)
    total = total + jnp.exp(logits - higher[:, None]).sum(-1)
    here = (targets >= fresh) & (targets < start + width)
    value = _logit(logits, jnp.clip(targets - start, 0, width - 1))
    return (higher, total, jnp.where(here, value, picked)), None

  lowest = jnp.full(targets.shape, jnp.finfo(jnp.float32).min)
  # The logit of a target beyond the vocabulary stays NaN: no block has it.
  unseen = jnp.where(targets < 0, 0.0, jnp.nan)
  first = sharding.pvary((lowest, jnp.zeros(targets.shape), unseen))
  (peak, total, picked), _ = jax.lax.scan(step, first, blocks)
  lse = peak + jnp.log(total)
  return (picked, lse), (hidden, head, targets, lse, None)


def _backward(block, residuals, cotangents):
  hidden, head, targets, lse, logits = residuals
  dpicked, dlse = (g[:, None] for g in cotangents)

  def block_grads(logits, part, start, fresh):
    """Returns the gradients of hidden [M, D] and of the block [D, width]."""
    column = (start + jnp.arange(part.shape[1], dtype=jnp.int32))[None]
    hit = (column == targets[:, None]) & (column >= fresh)
    dlogits = jnp.exp(logits - lse[:, None]) * dlse
    dlogits = (dlogits + jnp.where(hit, dpicked, 0)).astype(hidden.dtype)
    dhidden = dot('mv,dv->md', dlogits, part)
    return dhidden, dot('md,mv->dv', hidden, dlogits)

  if logits is not None:
    part = head.astype(hidden.dtype)
    dhidden, dhead = block_grads(logits, part, 0, 0)
    return dhidden.astype(hidden.dtype), dhead.astype(head.dtype), None

  width, blocks = _blocks(head.shape[1], block)

  def step(carry, bounds):
    dhidden, dhead = carry
    start, fresh = bounds
    part, logits = _block_logits(hidden, head, start, fresh, width)
    of_block, dpart = block_grads(logits, part, start, fresh)
    dhead = jax.lax.dynamic_update_slice_in_dim(dhead, dpart, start, 1)
    return (dhidden + of_block, dhead), None

  # The last block goes first: where it overlaps its neighbour it writes zeros,
  # which the neighbour then overwrites.
  zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (hidden, head))
  zeros = sharding.pvary(zeros)
  (dhidden, dhead), _ = jax.lax.scan(step, zeros, blocks, reverse=True)
  return dhidden.astype(hidden.dtype), dhead.astype(head.dtype), None


picked_and_lse.defvjp(_forward, _backward)


def _blocks(vocab: int, block: int) -> tuple[int, tuple[Array, Array]]:
  """Returns the blocks' width, and for each its start and its first new id.

  There are as few blocks as fit, of one width (a multiple of 128 where they
  are that wide). The last one is moved back to end with the vocabulary, so
  that nothing is padded; the ids that it repeats are masked.
  """
  width = -(-vocab // -(-vocab // block))
  width = min(block, -(-width // 128) * 128)
  fresh = jnp.arange(0, vocab, width, dtype=jnp.int32)
  return width, (jnp.minimum(fresh, vocab - width), fresh)


def _block_logits(hidden, head, start, fresh, width):
  """Returns a block of the head, in the dtype of `hidden`, and its logits."""
  part = jax.lax.dynamic_slice_in_dim(head, start, width, axis=1)
  part = part.astype(hidden.dtype)
  is_new = (start + jnp.arange(width, dtype=jnp.int32) >= fresh)[None]
  return part, jnp.where(is_new, dot('md,dv->mv', hidden, part), -jnp.inf)


def _logit(logits: Float[Array, 'M V'], ids: Int[Array, ' M']) -> Array:
  return jnp.take_along_axis(logits, ids[:, None], axis=-1)[:, 0]
