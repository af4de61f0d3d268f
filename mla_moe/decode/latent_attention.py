"""Multi-head latent attention over the latent cache, in three forms.

Of token s the cache has the latent c_s [C] and the key r_s [R] that its heads
share. Head n has the up-projections W_K [H, C] and W_V [U, C], so that its key
is [W_K c_s; r_s] and its value W_V c_s. A query [q; q_r] of that head gets

  p_s = softmax_s(scale (q . W_K c_s + q_r . r_s)),   o = sum_s p_s W_V c_s.

The forms compute these numbers in different orders, from the same weights:

  absorbed      p_s = softmax_s(scale ((W_K^T q) . c_s + q_r . r_s)) and
                o = W_V (sum_s p_s c_s). Query and output are projected, the
                cache is not (V2, appendix C): all heads attend over one key of
                C + R numbers. It suits one new token, or a few.
  decompressed  Keys and values of all heads are computed from the cache, one
                block of tokens at a time. It suits many tokens after a prefix.
  fresh         The rows are empty: new tokens attend to each other alone, as in
                training. It suits the first tokens of a prompt.

For each query and cached token, a head multiplies 2C + R numbers in absorbed
form and H + R + U in decompressed form, which also pays C (H + U) a cached
token for all queries together. So the second is cheaper beyond
C (H + U) / (2C - H - U) new tokens a row, 171 for V3; the length of the prefix
does not matter. The oracle of all three is `model.mla.Attention`. Where a query
attends to a set of keys, `sparse_attention` has two more.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mla_moe import kernels, sharding
from mla_moe.config import ModelConfig
from mla_moe.decode import latent_cache, sparse_attention
from mla_moe.model import attention, gqa, indexer, layers, products, rope
from mla_moe.model.sequence import pad
from mla_moe.types import Array, Float, Int, PyTree

ABSORBED = 128  # most new tokens a row for which the absorbed form is used

# Sizes of the blocks that `_sweep` reads (measured on x86): each block costs
# something, and so do the tokens of the last block that lie beyond the row.
_SMALL = 128  # tokens
_LARGE = 5 * 2**16  # numbers, latents and logits together: 1.25 MiB
_ROWS = 64  # whose block of latents both products find in a CPU's caches
_KERNEL_ROWS = 512  # heads times tokens whose queries fit in on-chip memory


def weights(params: PyTree, dtype: str) -> PyTree:
  """Returns the attention parameters of one layer in the layout of decoding.

  Projections with the same input are one matrix. Matrices have the layout of
  `products.matmul_transposed`, and the up-projections of a head are contiguous.
  """
  if 'w_k' in params:
    return gqa.decoding_weights(params, dtype)
  cast = lambda name: params[name].astype(dtype)
  transposed = lambda w: w.reshape(w.shape[0], -1).T
  down = [transposed(cast('w_kv_down')), transposed(cast('w_k_rope'))]
  w = {
    'kv_norm': params['kv_norm']['scale'],
    'w_k_up': cast('w_k_up').transpose(1, 2, 0),
    'w_v_up': cast('w_v_up').transpose(1, 0, 2),
    'w_out': cast('w_out').reshape(-1, params['w_out'].shape[-1]).T,
  }
  if 'w_q' in params:
    w['w_q'] = transposed(cast('w_q'))
  else:
    down.insert(0, transposed(cast('w_q_down')))
    w['q_norm'] = params['q_norm']['scale']
    w['w_q'] = transposed(cast('w_q_up'))
  if 'indexer' in params:
    index = params['indexer']
    wide = {name: index[name].astype(dtype) for name in ('w_query', 'w_key')}
    w['indexer'] = index | wide
  return w | {'w_down': jnp.concatenate(down)}


def attend(
  w: PyTree,
  x: Float[Array, 'B T D'],
  angles: rope.Angles,
  pages: latent_cache.Pages,
  cache: latent_cache.Cache,
  valid: Int[Array, ' B'] | None,
  config: ModelConfig,
  form: str,
  selected: Array | None = None,
) -> tuple[Float[Array, 'B T D'], latent_cache.Pages, Array | None]:
  """Returns attention of new tokens, the pool with their latents, their sets.

  Args:
    w: the layer's `weights`.
    x: the new tokens, normed; `angles` are of their positions.
    pages: the layer's pool.
    cache: table and lengths of the rows, without the new tokens.
    valid: new tokens of each row; the others are padding. None: all T.
    config: of the model.
    form: 'absorbed', 'decompressed' or 'fresh' (rows without a token only).
    selected: sets of the last layer with an indexer (`sparse_attention`), for a
      layer without one; None where attention is dense.
  """
  (b, t, _), index = x.shape, None
  if config.attention == 'gqa':
    q, kv, up = gqa.project(w, x, angles, config)
  else:
    q, kv, up, index = _project(w, x, angles, config)
  valid = jnp.full((b,), t, jnp.int32) if valid is None else valid
  run = _by_shard(functools.partial(_write_and_attend, form, config), b)
  cache = cache.replace(layers=(pages,))
  out, pages, selected = run(q, kv, up, cache, valid, index, selected)
  out = products.matmul_transposed(out.reshape(b, t, -1), w['w_out'])
  return out, pages, selected


def _project(w, x, angles, config):
  """Returns queries, latents and shared keys, up-projections, and the index."""
  (b, t, _), mla = x.shape, config.mla
  down = products.matmul_transposed(x, w['w_down'])
  ends = [mla.query_rank, mla.query_rank + mla.kv_rank]
  q, latent, k_rope = jnp.split(down, ends, axis=-1)
  if mla.query_rank:
    q = layers.normalize(q, w['q_norm'], mla.norm_eps)
  else:
    q = x
  index = None
  if 'indexer' in w and latent_cache.is_sparse(config):
    index = indexer.project(w['indexer'], x, q, angles, config)
  q = products.matmul_transposed(q, w['w_q']).reshape(b, t, mla.heads, -1)
  q = sharding.constrain(q, 'batch', None, 'heads', None)
  q = rope.queries(q, mla.nope_dim, angles)
  latent = layers.normalize(latent, w['kv_norm'], mla.norm_eps)
  kv = latent, rope.rotate(k_rope, angles)
  return tuple(q), kv, (w['w_k_up'], w['w_v_up']), index


def _write_and_attend(form, config, q, kv, up, cache, valid, index, selected):
  """Returns attention [B, T, N, U], the pool with the new latents, the sets.

  q: queries (without, with rotation); kv: latents and shared keys of the new
  tokens; up: up-projections of keys and values; cache: of this layer alone.
  """
  (pages,) = cache.layers
  # The pages of a device's rows are its own; modulo its pool, ids are local.
  cache = cache.replace(table=cache.table % pages.values.shape[0])
  slots = latent_cache.next_slots(cache, kv[0].shape[1], valid)
  pages = latent_cache.write(pages, slots, *kv, index and index.k)
  cache = cache.replace(layers=(pages,))
  cores = dict(absorbed=_absorbed, decompressed=_decompressed, fresh=_fresh)
  core = cores[form]
  if config.attention == 'gqa':
    core = functools.partial(gqa.attend_rows, _over_cache, form, config)
  reach, t = cache.capacity, kv[0].shape[1]
  if form == 'fresh':
    reach, last = t, -(-t // pages.page_size)
    cache = cache.replace(table=cache.table[:, :last])
  args = q, kv, up, cache, valid, rope.softmax_scale(config.mla)
  sparse_form = sparse_attention.form_of(form, reach, config)
  if sparse_form == form:
    return core(*args), pages, None
  topk, longest = config.dsa.topk, jnp.max(cache.lengths + valid)
  if index is not None:
    select = lambda: sparse_attention.select(
      index, cache, longest, topk, sparse_form
    )
    selected = _if(longest > topk, select, sparse_form == 'masked')
  if sparse_form == 'masked':
    return _decompressed(*args, selected), pages, selected
  own = lambda: _gathered(*args, selected, config.mla)
  out = jax.lax.cond(longest > topk, own, lambda: core(*args))
  return out, pages, selected


def _if(wanted, compute, otherwise):
  """Returns `compute()` where it is wanted, else its shape of one value."""
  shape = jax.eval_shape(compute)
  other = lambda: jnp.full(shape.shape, otherwise, shape.dtype)
  return jax.lax.cond(wanted, compute, other)


def _by_shard(run, batch: int):
  """Returns `run` for the rows and heads of each device; nothing is sent.

  Where the devices do not divide the batch, each has all rows.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return run
  rows = sharding.spec(('batch',))[0]
  rows = None if batch % sharding.axis_size(rows) else rows
  heads = sharding.spec(('heads',))[0]
  spec = PartitionSpec
  of_q, of_rows = spec(rows, None, heads, None), spec(rows)
  return jax.shard_map(
    run,
    mesh=mesh,
    in_specs=(of_q, of_rows, spec(heads), *[of_rows] * 4),
    out_specs=(of_q, of_rows, of_rows),
    check_vma=False,
  )


def _fresh(q, kv, up, cache, valid, scale):
  q, (k, v) = jnp.concatenate(q, axis=-1), _expand(*kv, up)
  return attention.attend(q, k, v, scale=scale)


def _expand(latent, k_rope, up):
  """Returns all heads' keys [B, S, N, H + R] and values [B, S, N, U]."""
  k_up, v_up = up
  k = jnp.einsum('bsc,nhc->bsnh', latent, k_up)
  v = jnp.einsum('bsc,ncu->bsnu', latent, v_up)
  shape = (*k.shape[:3], k_rope.shape[-1])
  shared = jnp.broadcast_to(k_rope[:, :, None], shape)
  return jnp.concatenate([k, shared], axis=-1), v


def _absorbed(q, kv, up, cache, valid, scale):
  (b, t, heads, rope_dim), (k_up, v_up), (pages,) = q[1].shape, up, cache.layers
  rank, q = k_up.shape[-1], _fold(q, k_up, pages, scale)
  width = q.shape[-1]
  if cache.impl != 'xla' and heads * t <= _KERNEL_ROWS:
    out = _by_kernel(q, cache, rank)
    return jnp.einsum('bntc,ncu->btnu', out, v_up)

  def rows(q, table, lengths, valid):
    def block(table):
      tokens = latent_cache.read(pages, table, q.dtype.name, rope_dim)
      # Keys first: the cache is the long operand, and nothing is turned.
      logits = products.dot('bsw,bqw->bsq', tokens, q)
      # The whole width, though only the latent is needed: slicing would copy.
      add = lambda p: products.dot('bsq,bsw->bqw', p.astype(q.dtype), tokens)
      return logits, add

    part = cache.replace(table=table, lengths=lengths)
    positions = jnp.tile(_positions(part, t), heads)
    return _sweep(block, part, valid, positions, width, axis=1)

  q = q.reshape(b, heads * t, width)
  out = _by_rows(rows, (q, cache.table, cache.lengths, valid))
  return _unfold(out.reshape(b, heads, t, width), v_up, q.dtype)


def _gathered(q, kv, up, cache, valid, scale, selected, mla):
  (pages,) = cache.layers
  q = _fold(q, up[0], pages, scale)
  out = sparse_attention.attend(q, selected, cache, mla)
  return _unfold(out, up[1], q.dtype)


def _fold(q, k_up, pages, scale):
  """Returns the queries for cached tokens, [B, N, T, W]."""
  q_nope, q_rope = q
  # Heads first: XLA's CPU backend wants the axis that both operands have there.
  q = jnp.einsum('btnh,nhc->nbtc', q_nope, k_up)
  q = jnp.concatenate([q, q_rope.transpose(2, 0, 1, 3)], axis=-1) * scale
  width = latent_cache.width(pages, q_rope.shape[-1])
  q = pad(q, width, 3)
  return q.transpose(1, 0, 2, 3)


def _unfold(out, v_up, dtype):
  """Returns the output [B, T, N, U] of sums of tokens [B, N, T, W]."""
  out = out[..., : v_up.shape[1]].astype(dtype)
  out = jnp.einsum('bntc,ncu->nbtu', out, v_up)
  return out.transpose(1, 2, 0, 3)


def _by_rows(function, args):
  """Returns `function(*args)`; on a CPU, of as many rows as its caches hold."""
  few = math.gcd(len(args[0]), _ROWS)
  if few in (len(args[0]), 1, 2, 4, 8) or sharding.target_platform() != 'cpu':
    return function(*args)
  cut = lambda x: x.reshape(-1, few, *x.shape[1:])
  out = jax.lax.map(lambda part: function(*part), tuple(map(cut, args)))
  return out.reshape(-1, *out.shape[2:])


def _by_kernel(q, cache, rank):
  """Returns the heads' sums of latents [B, N, T, C], by a Pallas kernel.

  Pallas is imported only where it runs: it is half of this package's import.
  """
  if cache.impl == 'gpu':
    from mla_moe.kernels import latent_gpu as kernel
  else:
    from mla_moe.kernels import latent_tpu as kernel
  (pages,) = cache.layers
  b, heads, t, width = q.shape
  # Tokens before heads: the kernel finds a row's position by dividing by heads.
  rows = q.swapaxes(1, 2).reshape(b, t * heads, width)
  rows = rows.astype(pages.values.dtype)
  args = rows, pages.values, cache.table, cache.lengths
  out = kernel.attend(*args, heads=heads, rank=rank)
  return out.reshape(b, t, heads, rank).swapaxes(1, 2).astype(q.dtype)


def _decompressed(q, kv, up, cache, valid, scale, selected=None):
  rank, rope_dim = up[0].shape[-1], q[1].shape[-1]

  def expand(tokens):
    latent, k_rope, _ = jnp.split(tokens, [rank, rank + rope_dim], axis=-1)
    return _expand(latent, k_rope, up)

  q, width = jnp.concatenate(q, axis=-1) * scale, up[1].shape[-1]
  return _over_cache(expand, q, rope_dim, cache, valid, width, 1, selected)


def _over_cache(expand, q, rope_dim, cache, valid, width, times, selected=None):
  """Returns attention over keys and values that `expand` makes of tokens.

  q: [B, times * T, heads, key], a head's queries of the T tokens one after the
  other; `valid`, `width`, `selected`: as in `_sweep`.
  """
  (pages,) = cache.layers
  heads_first = lambda x: x.swapaxes(1, 2)
  q = heads_first(q)

  def block(table):
    tokens = latent_cache.read(pages, table, q.dtype.name, rope_dim)
    k, v = expand(tokens)
    logits = products.dot('bnth,bnsh->bnts', q, heads_first(k))
    v = heads_first(v)
    add = lambda p: products.dot('bnts,bnsu->bntu', p.astype(q.dtype), v)
    return logits, add

  positions = jnp.tile(_positions(cache, q.shape[2] // times), times)
  positions = jnp.broadcast_to(positions[:, None], q.shape[:3])
  out = _sweep(block, cache, valid, positions, width, selected, axis=3)
  return heads_first(out).astype(q.dtype)


def _positions(cache, t):
  """Returns the positions of the new tokens, [B, T]."""
  return cache.lengths[:, None] + jnp.arange(t)[None]


def _sweep(block, cache, valid, positions, width, selected=None, *, axis):
  """Returns attention over the cached tokens, computed block by block.

  Softmax needs one pass: each block shrinks the sums of the earlier ones to the
  new maximum (Milakov and Gimelshein 2018). Large blocks come first, and small
  ones finish the longest row.

  Args:
    block: (pages of each row) -> (logits of their tokens, and a function from
      the tokens' weights to the weighted sum of their values).
    cache: of this layer.
    valid: new tokens of each row.
    positions: of the queries, in the shape of the logits without `axis`.
    width: numbers of a value.
    selected: [B, T, S], the keys that each query may see; None: all before it.
    axis: of the logits, along which the cached tokens lie.
  """
  table, size = cache.table, cache.layers[0].page_size
  longest = jnp.max(cache.lengths + valid)
  small, large = _blocks(size, width + positions[0].size)
  if selected is not None:  # the last block may reach beyond the row
    most = (table.shape[1] + large) * size
    selected = pad(selected, max(most, selected.shape[2]), 2)

  def step(j, carry, count):
    total, peak, out = carry
    column = jnp.minimum(j * count + jnp.arange(count), table.shape[1] - 1)
    logits, add = block(table[:, column])
    key = (j * count * size + jnp.arange(count * size)).reshape(
      [-1 if i == axis else 1 for i in range(logits.ndim)]
    )
    visible = key <= jnp.expand_dims(positions, axis)
    if selected is not None:
      start = j * count * size
      chosen = jax.lax.dynamic_slice_in_dim(selected, start, count * size, 2)
      visible = visible & chosen[:, None]
    logits = jnp.where(visible, logits, kernels.MASKED)
    higher = jnp.maximum(peak, logits.max(axis))
    probs = jnp.exp(logits - jnp.expand_dims(higher, axis))
    shrink = jnp.exp(peak - higher)
    out = out * shrink[..., None] + add(probs)
    return total * shrink + probs.sum(axis), higher, out

  def steps(start, stop, count, carry):
    one = functools.partial(step, count=count)
    return jax.lax.fori_loop(start, stop, one, carry)

  zero = jnp.zeros(positions.shape, jnp.float32)
  out = jnp.zeros((*positions.shape, width), jnp.float32)
  carry, start = (zero, zero + kernels.MASKED, out), 0
  if small < large <= table.shape[1]:
    full = longest // (large * size)
    carry, start = steps(0, full, large, carry), full * (large // small)
  total, _, out = steps(start, -(-longest // (small * size)), small, carry)
  return out / total[..., None]


def _blocks(size: int, numbers: int) -> tuple[int, int]:
  """Returns the pages of a small and of a large block.

  A cached token costs `numbers` numbers in each row of a block.
  """
  small = max(_SMALL // size, 1)
  times = _LARGE // (numbers * small * size)
  return small, small * 2 ** max(times.bit_length() - 1, 0)
