"""Causal attention whose keys and values differ in width, in O(T) memory.

`attend` computes softmax(scale * q k^T) v for the decompressed form of MLA
(192-wide queries and keys, 128-wide values in V3). What surprises: most
library kernels insist on equal widths, so the portable one is written here in
plain XLA operations, a flash attention (Dao et al. 2022) whose backward pass
is given by hand. That is not only for memory: the blocks above the diagonal
are then never visited, in either direction.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from mla_moe import layers
from mla_moe.types import Array, Float, Int

# What a policy keeps so that going backward needs no second forward pass: the
# output, and the logsumexp of the logits where a core hands it out.
SAVED = ('attention_out', 'attention_lse')

# Finite, so that a masked row cannot turn into NaN in either direction.
_MASKED = -0.7 * float(np.finfo(np.float32).max)


def attend(
  q: Float[Array, 'B T N qk'],
  k: Float[Array, 'B T N qk'],
  v: Float[Array, 'B T N U'],
  *,
  scale: float,
  segments: Int[Array, 'B T'] | None = None,
  impl: str = 'auto',
) -> Float[Array, 'B T N U']:
  """Causal attention in v's dtype; tokens of other `segments` are not seen.

  `impl`: 'reference' is the quadratic oracle, 'xla' runs anywhere, 'splash' is
  jax's TPU kernel, 'cudnn' NVIDIA's (Hopper or newer, bfloat16, no segments),
  'tokamax' that library's. 'auto' is splash on TPU, cudnn on a GPU that has it,
  and xla elsewhere.
  """
  impl = _automatic(q, segments) if impl == 'auto' else impl
  cores = {
    'reference': _reference,
    'xla': _flash,
    'splash': _splash,
    'cudnn': _cudnn,
    'tokamax': _tokamax,
  }
  return cores[impl](q, k, v, segments, scale)


def _automatic(q: Array, segments: Array | None) -> str:
  platform = jax.default_backend()
  if platform == 'tpu' and q.shape[1] % 128 == 0:
    return 'splash'
  if platform == 'gpu' and segments is None and q.dtype == jnp.bfloat16:
    device = jax.devices()[0]
    if float(getattr(device, 'compute_capability', '0')) >= 9.0:
      return 'cudnn'
  return 'xla'


def _reference(q, k, v, segments, scale):
  logits = layers.dot('btnh,bsnh->bnts', q, k) * scale
  at = jnp.arange(q.shape[1])
  seen = (at[:, None] >= at[None, :])[None, None]
  if segments is not None:
    seen = seen & (segments[:, None, :, None] == segments[:, None, None, :])
  probs = jax.nn.softmax(jnp.where(seen, logits, _MASKED), axis=-1)
  out = layers.dot('bnts,bsnu->btnu', probs.astype(v.dtype), v)
  return checkpoint_name(out.astype(v.dtype), SAVED[0])


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _flash(q, k, v, segments, scale):
  """Tiles of queries x keys going forward, of keys x queries going backward.

  So no product contracts the leading axes of both its operands, a form that
  XLA's CPU backend has no fast code for.
  """
  return _flash_forward(q, k, v, segments, scale)[0]


def _blocks(x, block, fill=0):
  """[B, T, N, d] -> [n, B, N, block, d], padded; [B, T] -> [n, B, block]."""
  b, t = x.shape[:2]
  n = -(-t // block)
  pad = [(0, 0), (0, n * block - t)] + [(0, 0)] * (x.ndim - 2)
  x = jnp.pad(x, pad, constant_values=fill)
  x = x.reshape(b, n, block, *x.shape[2:])
  return x.transpose((1, 0, 3, 2, 4) if x.ndim == 5 else (1, 0, 2))


def _unblock(x, length):
  """[n, B, N, block, d] -> [B, T, N, d]."""
  n, b, heads, block, d = x.shape
  x = x.transpose(1, 0, 3, 2, 4).reshape(b, n * block, heads, d)
  return x[:, :length]


def _block_size(q) -> int:
  """A tile of logits should stay in a core's cache (measured on x86)."""
  b, t, heads = q.shape[:3]
  return min(128 if b * heads >= 32 else 256, t)


def _tiles(n: int):
  """Indices (i, j) of the tiles on or under the diagonal, i outer."""
  return tuple(jnp.asarray(x, jnp.int32) for x in np.tril_indices(n))


def _mask(logits, ids, i, j, turned=False):
  """Logits of query block i and key block j; [.., t, s], or `turned` [.., s, t].

  Only the diagonal's tile compares positions, so its mask is a constant that
  is added: cheaper than a comparison in every tile.
  """
  at = np.arange(logits.shape[-1])
  hidden = np.where(at[:, None] < at[None, :], _MASKED, 0.0)
  hidden = hidden.T if turned else hidden
  bias = jnp.asarray(np.stack([np.zeros_like(hidden), hidden]), jnp.float32)
  logits = logits + bias[(i == j).astype(jnp.int32)][None, None]
  if ids is None:
    return logits
  rows, columns = (j, i) if turned else (i, j)
  seen = ids[rows][:, None, :, None] == ids[columns][:, None, None, :]
  return jnp.where(seen, logits, _MASKED)


def _flash_forward(q, k, v, segments, scale):
  block, length = _block_size(q), q.shape[1]
  # Padding follows every real position, so causality alone hides it.
  cut = functools.partial(_blocks, block=block)
  queries, keys, values = cut(q), cut(k), cut(v)
  ids = None if segments is None else cut(segments, fill=-1)
  tiles = _tiles(len(keys))

  def step(carry, tile):
    out, peak, total = carry
    i, j = tile
    logits = layers.dot('bnth,bnsh->bnts', queries[i], keys[j]) * scale
    logits = _mask(logits, ids, i, j)
    new = jnp.maximum(peak[i], logits.max(-1))
    probs = jnp.exp(logits - new[..., None])
    shrink = jnp.exp(peak[i] - new)
    part = layers.dot('bnts,bnsu->bntu', probs.astype(v.dtype), values[j])
    out = out.at[i].set(out[i] * shrink[..., None] + part)
    total = total.at[i].set(total[i] * shrink + probs.sum(-1))
    return (out, peak.at[i].set(new), total), None

  start = (
    jnp.zeros(values.shape, jnp.float32),
    jnp.full(queries.shape[:-1], _MASKED, jnp.float32),
    jnp.zeros(queries.shape[:-1], jnp.float32),
  )
  (out, peak, total), _ = jax.lax.scan(step, start, tiles)
  out = _unblock(out / total[..., None], length).astype(v.dtype)
  # Named here and not outside, so that a policy which keeps both spares the
  # backward pass this whole function.
  out = checkpoint_name(out, SAVED[0])
  lse = checkpoint_name(peak + jnp.log(total), SAVED[1])
  return out, (q, k, v, segments, out, lse)


def _flash_backward(scale, residuals, g):
  q, k, v, segments, out, lse = residuals
  block, length = _block_size(q), q.shape[1]
  # d logits = p * (dp - delta), delta = <g, out> (Dao et al. 2022, section 3)
  delta = jnp.sum(g.astype(jnp.float32) * out.astype(jnp.float32), -1)
  cut = functools.partial(_blocks, block=block)
  queries, keys, values, grads = cut(q), cut(k), cut(v), cut(g)
  keys_turned = keys.swapaxes(-1, -2)
  delta = cut(delta[..., None])[..., 0]
  ids = None if segments is None else cut(segments, fill=-1)

  def step(carry, tile):
    dq, dk, dv = carry
    i, j = tile
    logits = layers.dot('bnsh,bnth->bnst', keys[j], queries[i]) * scale
    logits = _mask(logits, ids, i, j, turned=True)
    probs = jnp.exp(logits - lse[i][..., None, :])
    dp = layers.dot('bnsu,bntu->bnst', values[j], grads[i])
    ds = (probs * (dp - delta[i][..., None, :])).astype(q.dtype)
    probs = probs.astype(g.dtype)
    dv = dv.at[j].add(layers.dot('bnst,bntu->bnsu', probs, grads[i]))
    dk = dk.at[j].add(layers.dot('bnst,bnth->bnsh', ds, queries[i]))
    dq = dq.at[i].add(layers.dot('bnhs,bnst->bnht', keys_turned[j], ds))
    return (dq, dk, dv), None

  zeros = lambda x: jnp.zeros(x.shape, jnp.float32)
  start = zeros(queries.swapaxes(-1, -2)), zeros(keys), zeros(values)
  (dq, dk, dv), _ = jax.lax.scan(step, start, _tiles(len(keys)))
  back = lambda x, like: _unblock(x, length).astype(like.dtype)
  none = None
  if segments is not None:
    none = np.zeros(segments.shape, jax.dtypes.float0)
  dq = back(dq.swapaxes(-1, -2) * scale, q)
  return dq, back(dk * scale, k), back(dv, v), none


_flash.defvjp(_flash_forward, _flash_backward)


def _splash(q, k, v, segments, scale):
  """jax's TPU kernel, one call per row of the batch."""
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernel,
  )
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
  )

  t, heads = q.shape[1:3]
  names = ('block_q', 'block_kv', 'block_kv_compute', 'block_q_dkv')
  names += ('block_kv_dkv', 'block_kv_dkv_compute', 'block_q_dq', 'block_kv_dq')
  block = next(size for size in (512, 256, 128, t) if t % size == 0)
  sizes = kernel.BlockSizes(**dict.fromkeys(names, block))
  mask = masks.MultiHeadMask([masks.CausalMask((t, t))] * heads)
  run = kernel.make_splash_mha_single_device(
    mask=mask,
    block_sizes=sizes,
    residual_checkpoint_name=SAVED[0],
    interpret=jax.default_backend() == 'cpu',
  )
  heads_first = lambda x: x.swapaxes(1, 2)
  args = heads_first(q * scale), heads_first(k), heads_first(v)
  if segments is None:
    out = jax.vmap(run)(*args)
  else:
    ids = kernel.SegmentIds(q=segments, kv=segments)
    out = jax.vmap(lambda q, k, v, s: run(q, k, v, segment_ids=s))(*args, ids)
  return heads_first(out).astype(v.dtype)


def _cudnn(q, k, v, segments, scale):
  """NVIDIA's fused kernel. The public wrapper in jax.nn refuses v narrower
  than k, the function under it does not (cuDNN 9.13 on Hopper or newer)."""
  from jax._src.cudnn import fused_attention_stablehlo as fused

  if segments is not None:
    raise ValueError("impl='cudnn' sees every token of a row; use impl='xla'")
  causal = fused.MaskType.CAUSAL
  out = fused.dot_product_attention(
    q, k, v, scale=scale, mask_type=causal, qkv_layout='BTNH'
  )
  return checkpoint_name(out, SAVED[0])


def _tokamax(q, k, v, segments, scale):
  """The tokamax library's choice of kernel (`pip install tokamax`)."""
  import tokamax

  mask = None
  if segments is not None:
    mask = segments[:, None, :, None] == segments[:, None, None, :]
  out = tokamax.dot_product_attention(
    q, k, v, scale=scale, mask=mask, is_causal=True
  )
  return checkpoint_name(out, SAVED[0])
