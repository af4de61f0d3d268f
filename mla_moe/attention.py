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
  XLA's CPU backend has no fast code for. Nor does it share one batched product
  of small matrices among cores: there the heads are cut into parts, whose
  products in one tile are independent and so run side by side.
  """
  return _flash_forward(q, k, v, segments, scale)[0]


def _block_size(q) -> int:
  """A tile of logits should stay in a core's cache (measured on x86)."""
  b, t, heads = q.shape[:3]
  return min(128 if b * heads >= 32 else 256, t)


def _parts(q) -> int:
  b, _, heads = q.shape[:3]
  wide = b * heads % 4 == 0 and b * heads * _block_size(q) ** 2 >= 1 << 18
  return 4 if wide and jax.default_backend() == 'cpu' else 1


def _cut(x, block, parts):
  """[B, T, N, d] -> parts of [n, G, block, d], G heads each, padded."""
  b, t, heads, d = x.shape
  n = -(-t // block)
  x = jnp.pad(x, [(0, 0), (0, n * block - t), (0, 0), (0, 0)])
  x = x.reshape(b, n, block, heads, d).transpose(1, 0, 3, 2, 4)
  return jnp.split(x.reshape(n, b * heads, block, d), parts, axis=1)


def _join(parts, like):
  """Parts of [n, G, block, d] -> [B, T, N, d] with the B, T, N of `like`."""
  b, t, heads = like.shape[:3]
  x = jnp.concatenate(parts, axis=1)
  n, _, block, d = x.shape
  x = x.reshape(n, b, heads, block, d).transpose(1, 0, 3, 2, 4)
  return x.reshape(b, n * block, heads, d)[:, :t]


def _cut_segments(segments, q, block, parts):
  """[B, T] -> parts of [n, G, block]; None for each where there are none."""
  if segments is None:
    return [None] * parts
  ids = jnp.broadcast_to(segments[:, :, None, None], (*q.shape[:3], 1))
  return [x[..., 0] for x in _cut(ids, block, parts)]


def _scan_tiles(tile, parts, start, n):
  """`tile(part, carry, i, j)` of each part, over tiles up to the diagonal."""

  def step(carries, at):
    moved = (tile(p, c, *at) for p, c in zip(parts, carries, strict=True))
    return tuple(moved), None

  at = tuple(jnp.asarray(x, jnp.int32) for x in np.tril_indices(n))
  return jax.lax.scan(step, tuple(start), at)[0]


def _mask(logits, ids, i, j, turned=False):
  """Logits of query block i and key block j, [G, t, s] or `turned` [G, s, t].

  Padding follows every real position, so causality hides it. Only the
  diagonal's tile compares positions: its mask is a constant that is added,
  which is cheaper than a comparison in every tile.
  """
  at = np.arange(logits.shape[-1])
  hidden = np.where(at[:, None] < at[None, :], _MASKED, 0.0)
  hidden = hidden.T if turned else hidden
  bias = jnp.asarray(np.stack([np.zeros_like(hidden), hidden]), jnp.float32)
  logits = logits + bias[(i == j).astype(jnp.int32)][None]
  if ids is None:
    return logits
  rows, columns = (j, i) if turned else (i, j)
  return jnp.where(
    ids[rows][:, :, None] == ids[columns][:, None, :], logits, _MASKED
  )


def _flash_forward(q, k, v, segments, scale):
  cut = functools.partial(_cut, block=_block_size(q), parts=_parts(q))
  ids = _cut_segments(segments, q, _block_size(q), _parts(q))
  parts = list(zip(cut(q), cut(k), cut(v), ids, strict=True))

  def tile(part, carry, i, j):
    queries, keys, values, ids = part
    out, peak, total = carry
    logits = layers.dot('gth,gsh->gts', queries[i], keys[j]) * scale
    logits = _mask(logits, ids, i, j)
    new = jnp.maximum(peak[i], logits.max(-1))
    probs = jnp.exp(logits - new[..., None])
    shrink = jnp.exp(peak[i] - new)
    fresh = layers.dot('gts,gsu->gtu', probs.astype(v.dtype), values[j])
    out = out.at[i].set(out[i] * shrink[..., None] + fresh)
    total = total.at[i].set(total[i] * shrink + probs.sum(-1))
    return out, peak.at[i].set(new), total

  def start(queries, keys, values, ids):
    zero = jnp.zeros(queries.shape[:-1], jnp.float32)
    return jnp.zeros(values.shape, jnp.float32), zero + _MASKED, zero

  blocks = len(parts[0][0])
  done = _scan_tiles(tile, parts, (start(*p) for p in parts), blocks)
  out = _join([out / total[..., None] for out, _, total in done], q)
  # Named here and not outside, so that a policy which keeps both spares the
  # backward pass this whole function.
  out = checkpoint_name(out.astype(v.dtype), SAVED[0])
  lse = [checkpoint_name(p + jnp.log(t), SAVED[1]) for _, p, t in done]
  return out, (parts, lse, out)


def _flash_backward(scale, residuals, g):
  parts, lse, out = residuals
  block, dtype = parts[0][0].shape[-2], parts[0][0].dtype
  cut = functools.partial(_cut, block=block, parts=len(parts))
  # d logits = p * (dp - delta), delta = <g, out> (Dao et al. 2022, section 3)
  delta = jnp.sum(g.astype(jnp.float32) * out.astype(jnp.float32), -1)
  turned = [keys.swapaxes(-1, -2) for _, keys, *_ in parts]
  more = zip(turned, cut(g), cut(delta[..., None]), lse, strict=True)
  parts = [(*a, *b) for a, b in zip(parts, more, strict=True)]

  def tile(part, carry, i, j):
    queries, keys, values, ids, turned, grads, delta, lse = part
    dq, dk, dv = carry
    logits = layers.dot('gsh,gth->gst', keys[j], queries[i]) * scale
    logits = _mask(logits, ids, i, j, turned=True)
    probs = jnp.exp(logits - lse[i][:, None])
    dp = layers.dot('gsu,gtu->gst', values[j], grads[i])
    ds = (probs * (dp - delta[i].swapaxes(-1, -2))).astype(dtype)
    probs = probs.astype(g.dtype)
    dv = dv.at[j].add(layers.dot('gst,gtu->gsu', probs, grads[i]))
    dk = dk.at[j].add(layers.dot('gst,gth->gsh', ds, queries[i]))
    dq = dq.at[i].add(layers.dot('ghs,gst->ght', turned[j], ds))
    return dq, dk, dv

  def start(queries, keys, values, ids, turned, *_):
    return tuple(
      jnp.zeros(x.shape, jnp.float32) for x in (turned, keys, values)
    )

  blocks = len(parts[0][0])
  done = _scan_tiles(tile, parts, (start(*p) for p in parts), blocks)
  dq, dk, dv = zip(*done, strict=True)
  dq = [x.swapaxes(-1, -2) * scale for x in dq]
  dk = [x * scale for x in dk]
  dq, dk, dv = (_join(x, out).astype(dtype) for x in (dq, dk, dv))
  unsegmented = parts[0][3] is None
  zero = None if unsegmented else np.zeros(out.shape[:2], jax.dtypes.float0)
  return dq, dk, dv, zero


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
