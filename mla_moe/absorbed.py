"""MLA over a latent cache: absorbed for few new tokens, decompressed for many.

The up-projections of keys and values need not be applied to the cache. A
head's query goes through its key projection instead, scores and sums latents,
and the sum goes through its value projection (V2 appendix C): attention of N
heads over one key of C + R numbers. That saves the expansion of the whole
prefix at every step but makes each score dearer, so that beyond about 128 new
tokens a row (C (H + U) / (2C - H - U), whatever the prefix) expanding the
prefix, a block at a time, is cheaper again. All forms read the same weights
(`weights`) and give the same numbers; `mla.Attention` is their oracle.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from mla_moe import attention, cache, layers, rope, sharding
from mla_moe import config as config_lib
from mla_moe.kernels import latent_gpu, latent_tpu
from mla_moe.types import Array, Float, PyTree

ABSORBED = 128  # new tokens a row up to which the absorbed form is cheaper

_KERNEL_ROWS = 512  # queries of a row, heads times tokens, in on-chip memory
_MASKED = -0.7 * float(np.finfo(np.float32).max)


def weights(params: PyTree, dtype: str) -> PyTree:
  """One layer's attention parameters as decoding multiplies by them.

  What reads one input is one matrix, and a head's up-projections are
  contiguous: the layouts in which a single row is fast on every backend.
  """
  wide = lambda name: params[name].astype(dtype)
  flat = lambda w: w.reshape(w.shape[0], -1)
  down = [wide('w_kv_down'), wide('w_k_rope')]
  found = {
    'kv_norm': params['kv_norm']['scale'],
    'w_k_up': wide('w_k_up').transpose(1, 2, 0),
    'w_v_up': wide('w_v_up').transpose(1, 0, 2),
    'w_out': wide('w_out').reshape(-1, params['w_out'].shape[-1]),
  }
  if 'w_q' in params:
    found['w_q'] = flat(wide('w_q'))
  else:
    down.insert(0, wide('w_q_down'))
    found['q_norm'] = params['q_norm']['scale']
    found['w_q'] = flat(wide('w_q_up'))
  return found | {'w_down': jnp.concatenate(down, axis=-1)}


def attend(
  w: PyTree,
  x: Float[Array, 'B T D'],
  turn: tuple[Array, Array],
  pages: cache.Pages,
  held: cache.Cache,
  valid: Array | None,
  mla: config_lib.MLAConfig,
  form: str,
) -> tuple[Float[Array, 'B T D'], cache.Pages]:
  """Attention of new tokens, and the pool with their latents in it.

  Args:
    w: `weights` of the layer.
    turn: cosine and sine of the new tokens' positions.
    held: table and lengths of the rows, without the new tokens.
    valid: [B] how many of the T tokens a row really has; None is all.
    form: 'absorbed', 'decompressed', or 'fresh' for rows that hold nothing,
      whose new tokens attend among themselves.
  """
  b, t, _ = x.shape
  down = x @ w['w_down']
  q, rest = down[..., : -(mla.kv_rank + mla.rope_dim)], mla.kv_rank
  latent, k_rope = jnp.split(down[..., q.shape[-1] :], [rest], axis=-1)
  if mla.query_rank:
    q = layers.normalize(q, w['q_norm'], mla.norm_eps)
  else:
    q = x
  q = (q @ w['w_q']).reshape(b, t, mla.heads, -1)
  q = sharding.constrain(q, 'batch', None, 'heads', None)
  q_nope, q_rope = jnp.split(q, [mla.nope_dim], axis=-1)
  q_rope = rope.rotate(q_rope, *turn)
  latent = layers.normalize(latent, w['kv_norm'], mla.norm_eps)
  k_rope = rope.rotate(k_rope, *turn)
  core = {
    'absorbed': functools.partial(_absorbed, impl=held.impl),
    'decompressed': _decompressed,
    'fresh': _fresh,
  }[form]
  valid = jnp.full((b,), t, jnp.int32) if valid is None else valid
  run = _by_shard(functools.partial(_core, core=core, mla=mla), b)
  out, pages = run(
    q_nope, q_rope, latent, k_rope, (w['w_k_up'], w['w_v_up']), pages,
    held.table, held.lengths, valid,
  )  # fmt: skip
  return out.reshape(b, t, -1) @ w['w_out'], pages


def _core(
  q_nope, q_rope, latent, k_rope, up, pages, table, lengths, valid, *, core, mla
):
  """Writes the new latents, then attends; what each device does alone."""
  # A shard's rows own its pages: its ids modulo its pool are local.
  table = table % pages.values.shape[0]
  held = cache.Cache((pages,), table, lengths)
  to = cache.places(held, latent.shape[1], valid)
  pages = cache.write(pages, to, latent, k_rope)
  scale = rope.softmax_scale(mla)
  new = latent, k_rope
  out = core(q_nope, q_rope, new, up, pages, table, lengths, valid, scale)
  return out, pages


def _by_shard(run, batch: int):
  """`run` on each device's rows and heads, with no communication at all.

  Rows that the devices cannot share evenly are everybody's.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return run
  rows = sharding.spec(('batch',))[0]
  rows = None if batch % sharding.count(rows) else rows
  heads = sharding.spec(('heads',))[0]
  spec = PartitionSpec
  q, new = spec(rows, None, heads, None), spec(rows)
  return jax.shard_map(
    run,
    mesh=mesh,
    in_specs=(q, q, new, new, spec(heads), new, new, new, new),
    out_specs=(q, new),
    check_vma=False,
  )


def _fresh(q_nope, q_rope, new, up, pages, table, lengths, valid, scale):
  latent, k_rope = new
  k_nope, v = _expand(latent, up)
  shape = (*k_nope.shape[:3], k_rope.shape[-1])
  shared = jnp.broadcast_to(k_rope[:, :, None], shape)
  return attention.attend(
    jnp.concatenate([q_nope, q_rope], axis=-1),
    jnp.concatenate([k_nope, shared], axis=-1),
    v,
    scale=scale,
  )


def _expand(latent, up):
  k_up, v_up = up
  k_nope = jnp.einsum('bsc,nhc->bsnh', latent, k_up)
  return k_nope, jnp.einsum('bsc,ncu->bsnu', latent, v_up)


def _absorbed(
  q_nope, q_rope, new, up, pages, table, lengths, valid, scale, *, impl
):
  k_up, v_up = up
  rank, rope_dim = k_up.shape[-1], q_rope.shape[-1]
  q = jnp.einsum('btnh,nhc->bntc', q_nope, k_up)
  q = jnp.concatenate([q, q_rope.swapaxes(1, 2)], axis=-1) * scale
  wide = cache.width(pages, rope_dim)
  q = jnp.pad(q, [(0, 0)] * 3 + [(0, wide - q.shape[-1])])
  if impl != 'xla' and q.shape[1] * q.shape[2] <= _KERNEL_ROWS:
    out = _by_kernel(q, pages.values, table, lengths, rank, impl)
    return jnp.einsum('bntc,ncu->btnu', out, v_up)

  def block(found):
    # Keys first: then it is the few queries that are transposed.
    logits = layers.dot('bsw,bntw->bsnt', found, q)
    logits = logits.transpose(0, 2, 3, 1)
    # All of the width, though only the latent is wanted: slicing would copy.
    add = lambda probs: layers.dot('bnts,bsw->bntw', probs, found)
    return logits, add

  read = functools.partial(
    cache.read, pages, dtype=q.dtype.name, rope_dim=rope_dim
  )
  out = _sweep(block, read, table, pages.size, lengths, valid, q, wide)
  return jnp.einsum('bntc,ncu->btnu', out[..., :rank].astype(q.dtype), v_up)


def _by_kernel(q, pages, table, lengths, rank, impl):
  """[B, N, T, C] of a Pallas kernel; tokens first, as `heads` divides rows."""
  b, heads, t, width = q.shape
  rows = q.swapaxes(1, 2).reshape(b, t * heads, width).astype(pages.dtype)
  run = {'tpu': latent_tpu.attend, 'gpu': latent_gpu.attend}[impl]
  out = run(rows, pages, table, lengths, heads=heads, rank=rank)
  return out.reshape(b, t, heads, rank).swapaxes(1, 2).astype(q.dtype)


def _decompressed(q_nope, q_rope, new, up, pages, table, lengths, valid, scale):
  rank, rope_dim = up[0].shape[-1], q_rope.shape[-1]
  heads_first = lambda x: x.swapaxes(1, 2)
  q = heads_first(jnp.concatenate([q_nope, q_rope], axis=-1) * scale)

  def block(found):
    k_nope, v = _expand(found[..., :rank], up)
    shared = found[:, :, None, rank : rank + rope_dim]
    shared = jnp.broadcast_to(shared, (*k_nope.shape[:3], rope_dim))
    k = jnp.concatenate([k_nope, shared], axis=-1)
    logits = layers.dot('bnth,bnsh->bnts', q, heads_first(k))
    v = heads_first(v)
    return logits, lambda probs: layers.dot('bnts,bnsu->bntu', probs, v)

  read = functools.partial(
    cache.read, pages, dtype=q.dtype.name, rope_dim=rope_dim
  )
  width = up[1].shape[-1]
  out = _sweep(block, read, table, pages.size, lengths, valid, q, width)
  return heads_first(out).astype(q.dtype)


def _block(wide: int) -> int:
  """Cached tokens that a turn of the loop reads (measured on x86)."""
  return 128 if wide <= 256 else 512


def _sweep(block, read, table, size, lengths, valid, q, width):
  """Softmax over the rows' pages, block by block (Milakov, Gimelshein 2018).

  `block` gives the logits [B, N, T, S] of some cached tokens and how to add up
  their values. It stops after the longest row's last token.
  """
  b, heads, t, wide = q.shape
  count = min(max(_block(wide) // size, 1), table.shape[1])
  span = count * size
  query = lengths[:, None, None, None] + jnp.arange(t)[None, None, :, None]

  def turn(j, carry):
    total, peak, out = carry
    at = jnp.minimum(j * count + jnp.arange(count), table.shape[1] - 1)
    logits, add = block(read(table=table[:, at]))
    key = (j * span + jnp.arange(span))[None, None, None]
    logits = jnp.where(key <= query, logits, _MASKED)
    new = jnp.maximum(peak, logits.max(-1))
    probs = jnp.exp(logits - new[..., None])
    shrink = jnp.exp(peak - new)
    out = out * shrink[..., None] + add(probs.astype(q.dtype))
    return total * shrink + probs.sum(-1), new, out

  zero = jnp.zeros((b, heads, t), jnp.float32)
  carry = zero, zero + _MASKED, jnp.zeros((b, heads, t, width), jnp.float32)
  if count == table.shape[1]:
    total, _, out = turn(0, carry)
  else:
    turns = -(-jnp.max(lengths + valid) // span)
    total, _, out = jax.lax.fori_loop(0, turns, turn, carry)
  return out / total[..., None]
