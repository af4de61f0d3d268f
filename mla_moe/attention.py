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

from mla_moe import layers
from mla_moe.types import Array, Float, Int

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
  return layers.dot('bnts,bsnu->btnu', probs.astype(v.dtype), v).astype(v.dtype)


def _flash(q, k, v, segments, scale):
  """Blocks, heads before positions; positions padded up to whole blocks."""
  b, t = q.shape[:2]
  # A tile of logits should stay in a core's cache (measured on x86).
  block = min(128 if b * q.shape[2] >= 32 else 256, t)
  n = -(-t // block)
  if segments is None:
    segments = jnp.zeros((b, t), jnp.int32)

  def blocks(x, fill=0):  # [B, T, ...] -> [n, B, ..., block, (d)]
    pad = [(0, 0), (0, n * block - t)] + [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, pad, constant_values=fill)
    x = x.reshape(b, n, block, *x.shape[2:])
    order = (1, 0, 3, 2, 4) if x.ndim == 5 else (1, 0, 2)
    return x.transpose(order)

  # Padding follows every real position, so causality alone hides it.
  out = _blocked(blocks(q), blocks(k), blocks(v), blocks(segments, -1), scale)
  out = out.transpose(1, 0, 3, 2, 4).reshape(b, n * block, *v.shape[2:])
  return out[:, :t]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _blocked(q, k, v, segments, scale):
  """q, k [n, B, N, block, d], v [..., U], segments [n, B, block]."""
  return _blocked_forward(q, k, v, segments, scale)[0]


def _pairs(n: int) -> tuple[Array, Array]:
  """Every (query block, key block) on or under the diagonal, queries outer."""
  rows, columns = np.tril_indices(n)
  return jnp.asarray(rows, jnp.int32), jnp.asarray(columns, jnp.int32)


def _logits(q, k, segments, i, j, scale):
  """Masked float32 logits of query block i against key block j."""
  at = jnp.arange(q.shape[-2])
  seen = (i * at.size + at)[:, None] >= (j * at.size + at)[None, :]
  seen = seen[None, None] & (
    segments[i][:, None, :, None] == segments[j][:, None, None, :]
  )
  logits = layers.dot('bnth,bnsh->bnts', q[i], k[j]) * scale
  return jnp.where(seen, logits, _MASKED)


def _blocked_forward(q, k, v, segments, scale):
  rows, columns = _pairs(len(q))

  def step(carry, pair):
    out, peak, total = carry
    i, j = pair
    logits = _logits(q, k, segments, i, j, scale)
    new = jnp.maximum(peak[i], logits.max(-1))
    probs = jnp.exp(logits - new[..., None])
    shrink = jnp.exp(peak[i] - new)
    part = layers.dot('bnts,bnsu->bntu', probs.astype(v.dtype), v[j])
    out = out.at[i].set(out[i] * shrink[..., None] + part)
    total = total.at[i].set(total[i] * shrink + probs.sum(-1))
    return (out, peak.at[i].set(new), total), None

  start = (
    jnp.zeros(v.shape, jnp.float32),
    jnp.full(q.shape[:-1], _MASKED, jnp.float32),
    jnp.zeros(q.shape[:-1], jnp.float32),
  )
  (out, peak, total), _ = jax.lax.scan(step, start, (rows, columns))
  out = (out / total[..., None]).astype(v.dtype)
  return out, (q, k, v, segments, out, peak + jnp.log(total))


def _blocked_backward(scale, residuals, g):
  q, k, v, segments, out, lse = residuals
  # d logits = p * (dp - delta), delta = <g, out> (Dao et al. 2022, section 3)
  delta = jnp.sum(g.astype(jnp.float32) * out.astype(jnp.float32), -1)

  def step(carry, pair):
    dq, dk, dv = carry
    i, j = pair
    probs = jnp.exp(_logits(q, k, segments, i, j, scale) - lse[i][..., None])
    dp = layers.dot('bntu,bnsu->bnts', g[i], v[j])
    ds = (probs * (dp - delta[i][..., None]) * scale).astype(q.dtype)
    dv = dv.at[j].add(
      layers.dot('bnts,bntu->bnsu', probs.astype(g.dtype), g[i])
    )
    dk = dk.at[j].add(layers.dot('bnts,bnth->bnsh', ds, q[i]))
    dq = dq.at[i].add(layers.dot('bnts,bnsh->bnth', ds, k[j]))
    return (dq, dk, dv), None

  start = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
  (dq, dk, dv), _ = jax.lax.scan(step, start, _pairs(len(q)))
  none = np.zeros(segments.shape, jax.dtypes.float0)
  return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), none


_blocked.defvjp(_blocked_forward, _blocked_backward)


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
  return fused.dot_product_attention(
    q, k, v, scale=scale, mask_type=causal, qkv_layout='BTNH'
  )


def _tokamax(q, k, v, segments, scale):
  """The tokamax library's choice of kernel (`pip install tokamax`)."""
  import tokamax

  mask = None
  if segments is not None:
    mask = segments[:, None, :, None] == segments[:, None, None, :]
  return tokamax.dot_product_attention(
    q, k, v, scale=scale, mask=mask, is_causal=True
  )
