"""Cross-entropy in vocabulary blocks, on one device and on a mesh.

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

from mla_moe import sharding
from mla_moe.types import Array, Float, Int

BLOCK = 8192


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


def sharded_token_nll(
  hidden: Float[Array, 'S B T D'],
  head: Float[Array, 'D V'],
  targets: Int[Array, 'S B T'],
) -> tuple[Float[Array, 'S B T'], Float[Array, 'S B T']]:
  """`token_nll` of S hidden states a token, on any mesh.

  On a mesh, each device computes its own tokens' logits of its own columns of
  the head; what is left to exchange are two numbers a token, the target's
  logit and the logsumexp (Shoeybi et al. 2019). The main model's states and
  the MTP modules' come in one pass: they share the head, whose gradient is the
  largest array of a step and would else be there once for each of them.
  """
  every = sharding.auto_axes()
  if not every:
    flat = hidden.reshape(-1, hidden.shape[-1]), head, targets.reshape(-1)
    nll, lse = token_nll(*flat)
    return nll.reshape(targets.shape), lse.reshape(targets.shape)
  stream = sharding.array_spec((None, 'batch', 'length', 'stream'), hidden)
  part = sharding.array_spec((None, 'batch', 'part'), targets)
  rows, length = sharding.mesh_axes(('batch', 'part'), targets.shape[1:])
  across = 'tensor' in sharding.mesh_axes(('length',), hidden.shape[2:3])[0]
  over, columns = sharding.mesh_axes(('embed', 'vocab'), head.shape)
  same = tuple(a for a in every if a not in rows + length + ('tensor',))
  vocab = head.shape[1]

  def local(hidden, head, targets):
    head = sharding.pvary(head)  # so that its gradient's shards are summed
    if across:
      hidden = jax.lax.all_gather(hidden, 'tensor', axis=2, tiled=True)
    if over:
      head = jax.lax.all_gather(head, over, axis=0, tiled=True)
    hidden = sharding.pvary(hidden)
    flat, at = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    first = 0
    if columns:
      first = jax.lax.axis_index('tensor') * head.shape[1]
    here = (at >= first) & (at < first + head.shape[1])
    local_at = sharding.pvary(jnp.where(here, at - first, -1))
    picked, lse = picked_and_lse(flat, head, local_at, BLOCK)
    picked = jnp.where(here, picked, 0.0)
    if columns:
      peak = jax.lax.pmax(jax.lax.stop_gradient(lse), columns)
      lse = peak + jnp.log(jax.lax.psum(jnp.exp(lse - peak), columns))
      picked = jax.lax.psum(picked, columns)
    else:
      picked, lse = jax.lax.pmean((picked, lse), 'tensor')
    picked = jnp.where(at >= vocab, jnp.nan, picked)
    nll = jnp.where(at >= 0, lse - picked, 0.0)
    out = nll.reshape(targets.shape), lse.reshape(targets.shape)
    return jax.lax.pmean(out, same) if same else out

  specs = stream, sharding.array_spec(('embed', 'vocab'), head), part
  return sharding.shard_map(local, specs, (part, part))(hidden, head, targets)


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
  first = sharding.pvary((lowest, jnp.zeros(targets.shape), unseen))
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
  zeros = sharding.pvary(zeros)
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
  """Einsum into float32; a CPU widens first (see `products.dot`)."""
  run = functools.partial(
    jnp.einsum, equation, preferred_element_type=jnp.float32
  )
  if a.dtype == jnp.float32:
    return run(a, b)
  widened = lambda a, b: run(a.astype(jnp.float32), b.astype(jnp.float32))
  return jax.lax.platform_dependent(a, b, cpu=widened, default=run)
