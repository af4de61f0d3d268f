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

from mla_moe import sharding
from mla_moe.model import products
from mla_moe.model.sequence import Part
from mla_moe.types import Array, Float

# What a policy keeps so that going backward needs no second forward pass: the
# output, and the logsumexp of the logits where a core hands it out.
SAVED = ('attention_out', 'attention_lse')

# Finite, so that a masked row cannot turn into NaN in either direction.
_MASKED = -0.7 * float(np.finfo(np.float32).max)


def attend(
  q: Float[Array, 'B T N qk'],
  k: Float[Array, 'B S N qk'],
  v: Float[Array, 'B S N U'],
  *,
  scale: float,
  segments: tuple | None = None,
  part: Part = Part(),
  impl: str = 'auto',
) -> Float[Array, 'B T N U']:
  """Causal attention in v's dtype; tokens of other `segments` are not seen.

  `segments` are those of the queries [B, T] and of the keys [B, S], int32; the
  queries are a `part` of the sequence, the keys are all of it.

  `impl`: 'reference' is the quadratic oracle, 'xla' runs anywhere, 'splash' is
  jax's TPU kernel, 'cudnn' NVIDIA's (Hopper or newer, bfloat16, no segments),
  'auto' is splash on TPU, cudnn on a GPU that has it,
  and xla elsewhere and for a part of a sequence, which the others cannot do.
  """
  impl = chosen(impl, q, segments, part.count)
  if impl in ('reference', 'xla'):
    core = {'reference': _reference, 'xla': _flash}[impl]
    return core(q, k, v, segments, part.index, scale, part.count)
  if part.count > 1:
    raise ValueError(f'{impl=} does not attend from a part of a sequence')
  core = {'splash': _splash, 'cudnn': _cudnn}[impl]
  return core(q, k, v, None if segments is None else segments[0], scale)


def chosen(
  impl: str, q: Array, segments: tuple | Array | None, parts: int
) -> str:
  """The core that `attend` takes: `impl`, or what 'auto' stands for here."""
  if impl != 'auto':
    return impl
  platform = sharding.target_platform()
  if parts > 1:
    return 'xla'
  if platform == 'tpu' and q.shape[1] % 128 == 0:
    return 'splash'
  if platform == 'gpu' and segments is None and q.dtype == jnp.bfloat16:
    device = jax.devices()[0]
    if float(getattr(device, 'compute_capability', '0')) >= 9.0:
      return 'cudnn'
  return 'xla'


def _reference(q, k, v, segments, index, scale, count):
  logits = products.dot('btnh,bsnh->bnts', q, k) * scale
  pieces = Part(index, count).pieces()
  length = q.shape[1] // len(pieces)
  at = jnp.concatenate([p * length + jnp.arange(length) for p in pieces])
  seen = (at[:, None] >= jnp.arange(k.shape[1])[None, :])[None, None]
  if segments is not None:
    ours, theirs = segments
    seen = seen & (ours[:, None, :, None] == theirs[:, None, None, :])
  probs = jax.nn.softmax(jnp.where(seen, logits, _MASKED), axis=-1)
  out = products.dot('bnts,bsnu->btnu', probs.astype(v.dtype), v)
  return checkpoint_name(out.astype(v.dtype), SAVED[0])


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _flash(q, k, v, segments, index, scale, count):
  """Tiles of queries x keys going forward, of keys x queries going backward.

  So no product contracts the leading axes of both its operands, a form that
  XLA's CPU backend has no fast code for. Nor does it share one batched product
  of small matrices among cores: there rows and heads are cut into lots, whose
  products in one tile are independent and so run side by side.
  """
  return _flash_forward(q, k, v, segments, index, scale, count)[0]


def _block_size(q, count) -> int:
  """A tile of logits should stay in a core's cache (measured on x86).

  A piece of a sequence is a whole number of blocks.
  """
  b, t, heads = q.shape[:3]
  most = 128 if b * heads >= 32 else 256
  if count == 1:
    return min(most, t)
  piece = t // 2
  return next(n for n in range(min(most, piece), 0, -1) if piece % n == 0)


def _lots(q) -> int:
  """How many independent products a tile's is cut into."""
  b, _, heads = q.shape[:3]
  wide = b * heads % 4 == 0 and b * heads * _block_size(q, 1) ** 2 >= 1 << 18
  return 4 if wide and _alone() and jax.default_backend() == 'cpu' else 1


def _alone() -> bool:
  """No mesh: rows and heads can be one axis, and a CPU's cores are ours."""
  return jax.sharding.get_abstract_mesh().empty


def _cut(x, block, lots):
  """[B, T, N, d] -> lots of [n, B, N, block, d], padded.

  Where nothing can be split over devices, B and N are one axis, for which
  XLA's CPU backend has faster products.
  """
  b, t, heads, d = x.shape
  n = -(-t // block)
  x = jnp.pad(x, [(0, 0), (0, n * block - t), (0, 0), (0, 0)])
  x = x.reshape(b, n, block, heads, d).transpose(1, 0, 3, 2, 4)
  lead = (b * heads,) if _alone() else (b, heads)
  return jnp.split(x.reshape(n, *lead, block, d), lots, axis=-3)


def _join(cut, length, heads):
  """Lots of [n, B, N, block, d] -> [B, length, N, d] of that many `heads`."""
  x = jnp.concatenate(cut, axis=-3)
  n, *_, block, d = x.shape
  x = x.reshape(n, -1, heads, block, d).transpose(1, 0, 3, 2, 4)
  return x.reshape(x.shape[0], n * block, heads, d)[:, :length]


def _cut_segments(segments, heads, block, lots):
  """Each lot's segments of queries and keys, [n, B, N, block]; or None."""
  if segments is None:
    return [None] * lots
  wide = lambda x: jnp.broadcast_to(x[:, :, None, None], (*x.shape, heads, 1))
  ours, theirs = (_cut(wide(x), block, lots) for x in segments)
  return [(a[..., 0], b[..., 0]) for a, b in zip(ours, theirs, strict=True)]


def _tiles(blocks, index, count):
  """(query block, key block, whether on the diagonal) of every visible tile.

  The first counts this part's blocks. All parts have equally many tiles, and
  so one program.
  """
  table = []
  for one in range(count):
    pieces = Part(one, count).pieces()
    each = blocks // len(pieces)
    ours = [p * each + i for p in pieces for i in range(each)]
    tiles = [(i, j, g == j) for i, g in enumerate(ours) for j in range(g + 1)]
    table.append(np.array(tiles, np.int32))
  if count == 1:
    return tuple(jnp.asarray(x) for x in table[0].T)
  mine = jnp.asarray(np.stack(table))[index]
  return tuple(mine[:, i] for i in range(3))


def _scan_tiles(tile, lots, start, at):
  """`tile(lot, carry, i, j, diagonal)` of each lot, over tiles `at`."""

  def step(carries, at):
    moved = (tile(p, c, *at) for p, c in zip(lots, carries, strict=True))
    return tuple(moved), None

  return jax.lax.scan(step, sharding.pvary(tuple(start)), at)[0]


def _mask(logits, ids, i, j, diagonal, turned=False):
  """Logits of query block i and key block j, [.., t, s] or `turned` [.., s, t].

  Padding follows every real position, so causality hides it. Only the
  diagonal's tile compares positions: its mask is a constant that is added,
  which is cheaper than a comparison in every tile.
  """
  at = np.arange(logits.shape[-1])
  hidden = np.where(at[:, None] < at[None, :], _MASKED, 0.0)
  hidden = hidden.T if turned else hidden
  bias = jnp.asarray(np.stack([np.zeros_like(hidden), hidden]), jnp.float32)
  logits = logits + jnp.expand_dims(
    bias[diagonal], tuple(range(logits.ndim - 2))
  )
  if ids is None:
    return logits
  rows, columns = ids[0][i], ids[1][j]
  rows, columns = (columns, rows) if turned else (rows, columns)
  return jnp.where(rows[..., :, None] == columns[..., None, :], logits, _MASKED)


def _flash_forward(q, k, v, segments, index, scale, count):
  block, lots = _block_size(q, count), _lots(q)
  cut = functools.partial(_cut, block=block, lots=lots)
  ids = _cut_segments(segments, q.shape[2], block, lots)
  parts = list(zip(cut(q), cut(k), cut(v), ids, strict=True))

  def tile(part, carry, i, j, diagonal):
    queries, keys, values, ids = part
    out, peak, total = carry
    logits = products.dot('...th,...sh->...ts', queries[i], keys[j]) * scale
    logits = _mask(logits, ids, i, j, diagonal)
    new = jnp.maximum(peak[i], logits.max(-1))
    probs = jnp.exp(logits - new[..., None])
    shrink = jnp.exp(peak[i] - new)
    fresh = products.dot('...ts,...su->...tu', probs.astype(v.dtype), values[j])
    out = out.at[i].set(out[i] * shrink[..., None] + fresh)
    total = total.at[i].set(total[i] * shrink + probs.sum(-1))
    return out, peak.at[i].set(new), total

  def start(queries, keys, values, ids):
    zero = jnp.zeros(queries.shape[:-1], jnp.float32)
    wide = (*queries.shape[:-1], values.shape[-1])
    return jnp.zeros(wide, jnp.float32), zero + _MASKED, zero

  at = _tiles(len(parts[0][0]), index, count)
  done = _scan_tiles(tile, parts, (start(*p) for p in parts), at)
  out = [out / total[..., None] for out, _, total in done]
  out = _join(out, *q.shape[1:3])
  # Named here and not outside, so that a policy which keeps both spares the
  # backward pass this whole function.
  out = checkpoint_name(out.astype(v.dtype), SAVED[0])
  lse = [checkpoint_name(p + jnp.log(t), SAVED[1]) for _, p, t in done]
  return out, (parts, lse, out, segments, index)


def _flash_backward(scale, count, residuals, g):
  parts, lse, out, segments, index = residuals
  block, dtype, lots = parts[0][0].shape[-2], parts[0][0].dtype, _lots(out)
  cut = functools.partial(_cut, block=block, lots=lots)
  # d logits = p * (dp - delta), delta = <g, out> (Dao et al. 2022, section 3)
  delta = jnp.sum(g.astype(jnp.float32) * out.astype(jnp.float32), -1)
  turned = [keys.swapaxes(-1, -2) for _, keys, *_ in parts]
  more = zip(turned, cut(g), cut(delta[..., None]), lse, strict=True)
  parts = [(*a, *b) for a, b in zip(parts, more, strict=True)]

  def tile(part, carry, i, j, diagonal):
    queries, keys, values, ids, turned, grads, delta, lse = part
    dq, dk, dv = carry
    logits = products.dot('...sh,...th->...st', keys[j], queries[i]) * scale
    logits = _mask(logits, ids, i, j, diagonal, turned=True)
    probs = jnp.exp(logits - lse[i][..., None, :])
    dp = products.dot('...su,...tu->...st', values[j], grads[i])
    ds = (probs * (dp - delta[i].swapaxes(-1, -2))).astype(dtype)
    probs = probs.astype(g.dtype)
    dv = dv.at[j].add(products.dot('...st,...tu->...su', probs, grads[i]))
    dk = dk.at[j].add(products.dot('...st,...th->...sh', ds, queries[i]))
    dq = dq.at[i].add(products.dot('...hs,...st->...ht', turned[j], ds))
    return dq, dk, dv

  def start(queries, keys, values, *_):
    like = (queries.swapaxes(-1, -2), keys, values)
    return tuple(jnp.zeros(x.shape, jnp.float32) for x in like)

  at = _tiles(len(parts[0][0]), index, count)
  done = _scan_tiles(tile, parts, (start(*p) for p in parts), at)
  dq, dk, dv = zip(*done, strict=True)
  dq = [x.swapaxes(-1, -2) * scale for x in dq]
  dk = [x * scale for x in dk]
  t, heads = out.shape[1:3]
  each = ((dq, t), (dk, t * count), (dv, t * count))
  grads = (_join(x, length, heads).astype(dtype) for x, length in each)
  return *grads, None, None


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
    interpret=sharding.target_platform() == 'cpu',
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
