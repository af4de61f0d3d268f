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
from jax.sharding import PartitionSpec

from mla_moe import kernels, sharding
from mla_moe.config import MLAConfig
from mla_moe.decode import latent_cache
from mla_moe.model import attention, layers, products, rope
from mla_moe.types import Array, Float, PyTree

ABSORBED = 128  # new tokens a row up to which the absorbed form is cheaper

# What a turn of the loop reads of a row (measured on x86): what is dead in the
# last block costs, and so does every turn.
_SMALL = 128  # tokens
_LARGE = 5 * 2**16  # latents' and logits' numbers, 1.25 MiB
_KERNEL_ROWS = 512  # queries of a row, heads times tokens, in on-chip memory


def weights(params: PyTree, dtype: str) -> PyTree:
  """One layer's attention parameters as decoding multiplies by them.

  What reads one input is one matrix, and matrices lie as
  `products.matmul_transposed` reads them; a head's up-projections are
  contiguous.
  """
  wide = lambda name: params[name].astype(dtype)
  turn = lambda w: w.reshape(w.shape[0], -1).T
  down = [turn(wide('w_kv_down')), turn(wide('w_k_rope'))]
  found = {
    'kv_norm': params['kv_norm']['scale'],
    'w_k_up': wide('w_k_up').transpose(1, 2, 0),
    'w_v_up': wide('w_v_up').transpose(1, 0, 2),
    'w_out': wide('w_out').reshape(-1, params['w_out'].shape[-1]).T,
  }
  if 'w_q' in params:
    found['w_q'] = turn(wide('w_q'))
  else:
    down.insert(0, turn(wide('w_q_down')))
    found['q_norm'] = params['q_norm']['scale']
    found['w_q'] = turn(wide('w_q_up'))
  return found | {'w_down': jnp.concatenate(down)}


def attend(
  w: PyTree,
  x: Float[Array, 'B T D'],
  turn: tuple[Array, Array],
  pages: latent_cache.Pages,
  cache: latent_cache.Cache,
  valid: Array | None,
  mla: MLAConfig,
  form: str,
) -> tuple[Float[Array, 'B T D'], latent_cache.Pages]:
  """Attention of new tokens, and the pool with their latents in it.

  Args:
    w: `weights` of the layer.
    turn: cosine and sine of the new tokens' positions.
    cache: table and lengths of the rows, without the new tokens.
    valid: [B] how many of the T tokens a row really has; None is all.
    form: 'absorbed', 'decompressed', or 'fresh' for rows that hold nothing,
      whose new tokens attend among themselves.
  """
  b, t, _ = x.shape
  down = products.matmul_transposed(x, w['w_down'])
  q, rest = down[..., : -(mla.kv_rank + mla.rope_dim)], mla.kv_rank
  latent, k_rope = jnp.split(down[..., q.shape[-1] :], [rest], axis=-1)
  if mla.query_rank:
    q = layers.normalize(q, w['q_norm'], mla.norm_eps)
  else:
    q = x
  q = products.matmul_transposed(q, w['w_q']).reshape(b, t, mla.heads, -1)
  q = sharding.constrain(q, 'batch', None, 'heads', None)
  q_nope, q_rope = jnp.split(q, [mla.nope_dim], axis=-1)
  q_rope = rope.rotate(q_rope, *turn)
  latent = layers.normalize(latent, w['kv_norm'], mla.norm_eps)
  k_rope = rope.rotate(k_rope, *turn)
  core = {
    'absorbed': functools.partial(_absorbed, impl=cache.impl),
    'decompressed': _decompressed,
    'fresh': _fresh,
  }[form]
  valid = jnp.full((b,), t, jnp.int32) if valid is None else valid
  run = _by_shard(functools.partial(_core, core=core, mla=mla), b)
  out, pages = run(
    q_nope, q_rope, latent, k_rope, (w['w_k_up'], w['w_v_up']), pages,
    cache.table, cache.lengths, valid,
  )  # fmt: skip
  return products.matmul_transposed(out.reshape(b, t, -1), w['w_out']), pages


def _core(
  q_nope, q_rope, latent, k_rope, up, pages, table, lengths, valid, *, core, mla
):
  """Writes the new latents, then attends; what each device does alone."""
  # A shard's rows own its pages: its ids modulo its pool are local.
  table = table % pages.values.shape[0]
  held = latent_cache.Cache((pages,), table, lengths)
  to = latent_cache.places(held, latent.shape[1], valid)
  pages = latent_cache.write(pages, to, latent, k_rope)
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
  rows = None if batch % sharding.axis_size(rows) else rows
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
  b, t, heads, rope_dim = q_rope.shape
  rank, wide = k_up.shape[-1], latent_cache.width(pages, rope_dim)
  # Heads first: XLA's CPU backend wants the axis that both operands have there.
  q = jnp.einsum('btnh,nhc->nbtc', q_nope, k_up)
  q = jnp.concatenate([q, q_rope.transpose(2, 0, 1, 3)], axis=-1) * scale
  q = jnp.pad(q, [(0, 0)] * 3 + [(0, wide - q.shape[-1])])
  if impl != 'xla' and heads * t <= _KERNEL_ROWS:
    q = q.transpose(1, 0, 2, 3)
    out = _by_kernel(q, pages.values, table, lengths, rank, impl)
    return jnp.einsum('bntc,ncu->btnu', out, v_up)

  def block(found):
    # Keys first: the cache is the long operand, and nothing is turned.
    logits = products.dot('bsw,bqw->bsq', found, q)
    # All of the width, though only the latent is wanted: slicing would copy.
    add = lambda probs: products.dot(
      'bsq,bsw->bqw', probs.astype(q.dtype), found
    )
    return logits, add

  q = q.transpose(1, 0, 2, 3).reshape(b, heads * t, wide)
  query = jnp.tile(_places(lengths, t), heads)
  read = functools.partial(
    latent_cache.read, pages, dtype=q.dtype.name, rope_dim=rope_dim
  )
  longest = jnp.max(lengths + valid)
  out = _sweep(block, read, table, pages.size, query, longest, wide, axis=1)
  out = out.reshape(b, heads, t, wide)[..., :rank].astype(q_nope.dtype)
  out = jnp.einsum('bntc,ncu->nbtu', out, v_up)
  return out.transpose(1, 2, 0, 3)


def _by_kernel(q, pages, table, lengths, rank, impl):
  """[B, N, T, C] of a Pallas kernel; tokens first, as `heads` divides rows.

  Pallas is imported only where it runs: it is half of this package's import.
  """
  if impl == 'gpu':
    from mla_moe.kernels import latent_gpu as kernels
  else:
    from mla_moe.kernels import latent_tpu as kernels
  b, heads, t, width = q.shape
  rows = q.swapaxes(1, 2).reshape(b, t * heads, width).astype(pages.dtype)
  out = kernels.attend(rows, pages, table, lengths, heads=heads, rank=rank)
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
    logits = products.dot('bnth,bnsh->bnts', q, heads_first(k))
    v = heads_first(v)
    add = lambda probs: products.dot(
      'bnts,bnsu->bntu', probs.astype(q.dtype), v
    )
    return logits, add

  read = functools.partial(
    latent_cache.read, pages, dtype=q.dtype.name, rope_dim=rope_dim
  )
  query = _places(lengths, q.shape[2])[:, None]
  query = jnp.broadcast_to(query, q.shape[:3])
  width, longest = up[1].shape[-1], jnp.max(lengths + valid)
  out = _sweep(block, read, table, pages.size, query, longest, width, axis=3)
  return heads_first(out).astype(q.dtype)


def _places(lengths, t):
  """[B, T]: where new tokens stand."""
  return lengths[:, None] + jnp.arange(t)[None]


def _sweep(block, read, table, size, query, longest, width, *, axis):
  """Softmax over the rows' pages, block by block (Milakov, Gimelshein 2018).

  `block` gives the logits of some cached tokens, with keys at `axis`, and how
  to add up their values; `query` are the places of the queries, in the shape of
  the logits of one key. Large blocks take what fills them, small ones the rest,
  up to the `longest` row's last token.
  """
  pages = table.shape[1]
  few, many = _blocks(size, width + query[0].size)

  def turn(j, carry, count):
    total, peak, out = carry
    at = jnp.minimum(j * count + jnp.arange(count), pages - 1)
    logits, add = block(read(table=table[:, at]))
    key = (j * count * size + jnp.arange(count * size)).reshape(
      [-1 if i == axis else 1 for i in range(logits.ndim)]
    )
    seen = key <= jnp.expand_dims(query, axis)
    logits = jnp.where(seen, logits, kernels.MASKED)
    new = jnp.maximum(peak, logits.max(axis))
    probs = jnp.exp(logits - jnp.expand_dims(new, axis))
    shrink = jnp.exp(peak - new)
    out = out * shrink[..., None] + add(probs)
    return total * shrink + probs.sum(axis), new, out

  def turns(start, stop, count, carry):
    one = functools.partial(turn, count=count)
    return jax.lax.fori_loop(start, stop, one, carry)

  zero = jnp.zeros(query.shape, jnp.float32)
  out = jnp.zeros((*query.shape, width), jnp.float32)
  carry, begun = (zero, zero + kernels.MASKED, out), 0
  if few < many <= pages:
    full = longest // (many * size)
    carry, begun = turns(0, full, many, carry), full * (many // few)
  total, _, out = turns(begun, -(-longest // (few * size)), few, carry)
  return out / total[..., None]


def _blocks(size: int, numbers: int) -> tuple[int, int]:
  """Pages in a small and in a large block, of `numbers` a token and row."""
  few = max(_SMALL // size, 1)
  fit = _LARGE // (numbers * few * size)
  return few, few * 2 ** max(fit.bit_length() - 1, 0)
