"""The routed experts' computation, dropless, by platform behind one function.

`experts` computes sum_k weight_k * FFN_{chosen_k}(x) for every token, exactly,
for any routing. What surprises is how much the platform decides:
`lax.ragged_dot` is a native grouped product on TPU, but on CPU and CUDA it is
computed densely, for every expert. So the CPU has one loop over blocks of rows
that share an expert (`loop`: only live blocks are visited, tokens are gathered
and scattered inside, weights' gradients accumulate in the loop's carry), GPUs
have a batched product over padded groups (`padded`, whose overflow goes
through the loop: nothing is dropped), and `dense` is the oracle.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from mla_moe import fp8, sharding
from mla_moe.config import ModelConfig
from mla_moe.model import dispatch, exchange, layers, products, router, weights
from mla_moe.types import Array, Float, Int

SAVED = (*router.SAVED, *dispatch.SAVED)


class Stats(NamedTuple):
  """What an MoE layer reports of all its tokens, wherever they are.

  load [E] int32, balance [], entropy []; overflow [] int32, rows that were
  exchanged in a second round (`expert_parallel`).
  """

  load: Array
  balance: Array
  entropy: Array
  overflow: Array


class MoE(nn.Module):
  """Shared expert plus routed experts of one layer (V3 section 2.1.2)."""

  config: ModelConfig

  @nn.compact
  def __call__(
    self, x: Float[Array, 'B T D'], mask: Float[Array, 'B T'] | None
  ) -> tuple[Float[Array, 'B T D'], Stats]:
    moe, std = self.config.moe, self.config.init_std
    dim, e, width = x.shape[-1], moe.experts, moe.width
    axes = ('embed', None)
    w_router = weights.param(self, 'w_router', (dim, e), axes, std)
    axes = _GATE_UP
    how = (std, products.recipe(self.config))
    w_gate_up = weights.weight(
      self, 'w_gate_up', (e, dim, 2, width), axes, *how
    )
    axes = _DOWN
    w_down = weights.weight(self, 'w_down', (e, width, dim), axes, *how)
    bias = None
    if moe.method == 'noaux_tc':
      zeros = nn.with_logical_partitioning(nn.initializers.zeros, ('norm',))
      make = lambda: zeros(None, (e,), jnp.float32)
      bias = self.variable('router', 'bias', make).value

    # Outside the exchange, so that it can be computed while tokens travel.
    shared = None
    if moe.shared:
      shared = layers.FeedForward(moe.shared * width, *how, name='shared')(x)
    ws = w_gate_up, w_down
    out, stats = routed(
      x, mask, w_router, bias, ws, self.config, how[1], shared
    )
    return out if shared is None else out + shared, stats


_GATE_UP = ('experts', 'embed', 'gate_up', 'mlp')
_PACKED = ('experts', 'embed', 'mlp')
_DOWN = ('experts', 'mlp', 'embed')


def packed(w: Float[Array, 'E D two F']) -> Float[Array, 'E D GF']:
  """Gate and up in one axis: on each device, what it has of both.

  A grouped product wants them so. A TPU lays out the last two axes in tiles:
  weights that end in [2, F] are copied for it, all experts' in every step.
  """
  apart = sharding.array_spec(_GATE_UP, w)
  joined = sharding.array_spec(_PACKED, w[:, :, 0])
  return sharding.shard_map(_flat, (apart,), joined)(w)


def _flat(w):
  return w.reshape(*w.shape[:2], -1)


def routed(
  x: Float[Array, 'B T D'],
  mask: Float[Array, 'B T'] | None,
  w_router: Float[Array, 'D E'],
  bias: Float[Array, ' E'] | None,
  ws: tuple,
  config: ModelConfig,
  recipe: fp8.Recipe,
  meanwhile: Float[Array, 'B T D'] | None = None,
) -> tuple[Float[Array, 'B T D'], Stats]:
  """The routed experts' sum; on a mesh, each device routes its own tokens.

  `ws` are the experts' weights, gate and up [E, D, 2, F] (or `packed`) and down
  [E, F, D]; `meanwhile` is a result that can be computed while tokens travel.
  """
  names = ('batch', 'length', 'stream')
  split = exchange.split(x.shape, names)
  axes = (_GATE_UP if ws[0].ndim == 4 else _PACKED), _DOWN
  shards = tuple(map(weights.fsdp_split, ws, axes))
  moe, impl = config.moe, config.compute.experts
  compute = functools.partial(experts, impl=impl, recipe=recipe)

  def local(x, mask, w_router, bias, ws, meanwhile):
    b, t, dim = x.shape
    flat, flat_mask = x.reshape(b * t, dim), None
    if mask is not None:
      flat_mask = mask.reshape(-1)
    with jax.named_scope('route'):
      routing = router.route(flat, w_router, bias, moe)
    pairs = zip(ws, shards, strict=True)
    ws = tuple(weights.gather(w, s, x.dtype) for w, s in pairs)
    with jax.named_scope('experts'):
      args = flat, routing.weights, routing.chosen, ws, compute
      out, overflow = exchange.exchange(*args, split, config, recipe, meanwhile)
    scores = routing.scores.reshape(b, t, -1)
    balance = router.balance(scores, moe.top_k, mask, split.length)
    load = router.count(routing.chosen, moe.experts, flat_mask)
    stats = Stats(
      load=sharding.psum(load, split.tokens),
      balance=sharding.psum(balance, split.rows)
      / sharding.axis_size(split.rows),
      entropy=router.entropy(routing.scores, flat_mask, split.tokens),
      overflow=overflow,
    )
    return out.reshape(b, t, dim), stats

  one = sharding.array_spec
  specs = (
    one(names, x),
    one(names[:2], mask),
    one((None, None), w_router),
    one((None,), bias),
    tuple(map(weights.specs, ws, axes)),
    one(names, meanwhile),
  )
  run = sharding.shard_map(local, specs, (specs[0], sharding.PartitionSpec()))
  return run(x, mask, w_router, bias, ws, meanwhile)


def experts(
  x: Float[Array, 'M D'],
  weights: Float[Array, 'M K'],
  chosen: Int[Array, 'M K'],
  w_gate_up: Float[Array, 'E D *two_F'] | fp8.Weight,
  w_down: Float[Array, 'E F D'] | fp8.Weight,
  *,
  impl: str = 'auto',
  recipe: fp8.Recipe = products.NO_FP8,
  expected: int = 0,
) -> Float[Array, 'M D']:
  """The weighted sum of each token's chosen experts, in x's dtype.

  Gate and up are [E, D, 2, F], or `packed` where they are not FP8.
  `impl` 'auto' is ragged on TPU, padded on GPU, loop on CPU; all are exact.
  FP8 experts are ragged on GPU, too, and cannot be padded or dense. The id E
  stands for an expert that is not here, which adds nothing; `expected` says
  how many of the M * K are likely to be (0: all).
  """
  expected = expected or chosen.size
  if impl == 'auto':
    platform = sharding.target_platform()
    impl = {'tpu': 'ragged', 'gpu': 'padded'}.get(platform, 'loop')
    if recipe.precision != 'bf16' and impl == 'padded':
      impl = 'ragged'
  if recipe.precision == 'bf16':
    w_gate_up, w_down = w_gate_up.astype(x.dtype), w_down.astype(x.dtype)
  args = x, weights, chosen, w_gate_up, w_down
  if impl == 'loop':
    out = _loop(*args, expected, recipe)
  elif impl == 'ragged':
    out = _ragged(*args, expected, recipe)
  else:
    out = _padded(*args, expected) if impl == 'padded' else _dense(*args)
  return out.astype(x.dtype)


def _dense(x, weights, chosen, w_gate_up, w_down):
  """Every expert on every token: the oracle."""
  picked = chosen[:, :, None] == jnp.arange(len(w_down))[None, None]
  share = jnp.einsum('mke,mk->me', picked.astype(weights.dtype), weights)
  both = products.dot('md,edf->mef', x, _flat(w_gate_up))
  hidden = _gated(both).astype(x.dtype)
  return jnp.einsum(
    'med,me->md', products.dot('mef,efd->med', hidden, w_down), share
  )


def _gated(both):
  """`layers.glu` of gate and up side by side."""
  return layers.glu(both.reshape(*both.shape[:-1], 2, -1))


# ---------------------------------------------------------------- loop (CPU)


class _Blocks(NamedTuple):
  """Rows in blocks of one expert each; only the first `live` blocks count."""

  expert: Array  # [n]
  slots: Array  # [n, block] assignments
  valid: Array  # [n, block]
  place: Array  # [A] block row of each assignment
  taken: Array  # [A] whether the blocks hold it
  live: Array  # []


def _cut(chosen, order: dispatch.Order, block: int, skip) -> _Blocks:
  """Blocks of every expert's rows after its first `skip` (of all or [E])."""
  total, count = order.slots.size, order.sizes.size
  sizes = jnp.maximum(order.sizes - skip, 0)
  starts = order.starts + jnp.minimum(order.sizes, skip)
  blocks = -(-sizes // block)
  ends = jnp.cumsum(blocks)
  n = -(-(total + count * (block - 1)) // block)  # the worst case
  n += -n % _together(block)
  index = jnp.arange(n, dtype=jnp.int32)
  expert = jnp.searchsorted(ends, index, side='right', method='compare_all')
  expert = jnp.minimum(expert, count - 1).astype(jnp.int32)
  first = (index - (ends - blocks)[expert]) * block
  row = first[:, None] + jnp.arange(block, dtype=jnp.int32)[None]
  valid = (row < sizes[expert][:, None]) & (index < ends[-1])[:, None]
  slots = order.slots[jnp.where(valid, starts[expert][:, None] + row, 0)]
  flat = chosen.reshape(-1)
  rank = order.places - starts[flat]
  taken = (rank >= 0) & (flat < count)
  place = jnp.where(taken, (ends - blocks)[flat] * block + rank, 0)
  return _Blocks(expert, slots, valid, place, taken, ends[-1])


def _loop(
  x, weights, chosen, w_gate_up, w_down, expected, recipe=products.NO_FP8
):
  order = dispatch.sort(chosen, w_down.shape[0])
  # Blocks follow the load, or half of each would be padding (decoding).
  mean = max(expected // w_down.shape[0], 1)
  block = min(max(1 << (mean - 1).bit_length(), 8), 128)
  cut = _cut(chosen, order, block, 0)
  return _over_rows(x, weights, w_gate_up, w_down, cut, recipe)[0]


def _over_rows(x, weights, w_gate_up, w_down, cut, recipe):
  """The sum over the blocks of `cut`, and the weights for all other rows.

  Those are the same weights, but whoever multiplies by them hands the blocks
  a gradient to add to: two of all experts, and a third to sum them, would be
  a layer's largest arrays.
  """
  copies = None
  if recipe.precision != 'bf16':
    copies = w_gate_up.copies, w_down.copies
    w_gate_up, w_down = w_gate_up.master, w_down.master
  args = x, weights, w_gate_up, w_down, copies, cut
  out, *ws = _run_blocks(*args, fp8.Rounding(recipe))
  return out, *(ws if copies is None else map(fp8.Weight, ws, copies))


def _row_weights(weights, cut):
  return jnp.where(cut.valid, weights.reshape(-1)[cut.slots], 0)


def _up(rows, w_gate_up):  # [R, D] x [D, 2 F] -> [R, 2, F]
  w_gate_up = w_gate_up.reshape(rows.shape[1], -1)
  both = products.dot('rd,df->rf', rows, w_gate_up)
  return both.astype(rows.dtype).reshape(len(rows), 2, -1)


def _together(block: int) -> int:
  """Blocks that one turn of the loop takes.

  Their products are independent, so that cores share them better than they
  share the small product of one block (measured on x86, like the bound).
  """
  return 4 if block >= 128 else 1


def _over_blocks(one, carry, cut: _Blocks):
  """`one(i, carry)` of every live block; those after them weigh nothing."""
  some = _together(cut.slots.shape[1])

  def turn(i, carry):
    for j in range(some):
      carry = one(some * i + j, carry)
    return carry

  return jax.lax.fori_loop(0, -(-cut.live // some), turn, carry)


def _operands(w, copies, dtype):
  """A weight for the products forward and backward: itself, or its copies."""
  if copies is None:
    return w, w
  wide = [fp8.dequantize(q, dtype) for q in copies]
  return wide[0], wide[-1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _run_blocks(x, weights, w_gate_up, w_down, copies, cut, how):
  return _blocks_forward(x, weights, w_gate_up, w_down, copies, cut, how)[0]


def _blocks_forward(x, weights, w_gate_up, w_down, copies, cut, how):
  share = _row_weights(weights, cut)
  k = weights.shape[1]
  for_up, for_down = copies or (None, None)
  up, _ = _operands(w_gate_up, for_up, x.dtype)
  down, _ = _operands(w_down, for_down, x.dtype)
  every = how.rows(x)

  def one(i, out):
    e, tokens = cut.expert[i], cut.slots[i] // k
    both = _up(every[tokens], up[e])
    rows = products.dot('rf,fd->rd', how.rows(layers.glu(both)), down[e])
    return out.at[tokens].add(rows * share[i][:, None])

  start = sharding.pvary(jnp.zeros(x.shape, jnp.float32))
  out = _over_blocks(one, start, cut)
  residuals = x, weights, w_gate_up, w_down, copies, cut
  return (out, w_gate_up, w_down), residuals


def _blocks_backward(how, residuals, cotangents):
  """Makes gate and up again: cheaper than keeping them (A rows of 2 F).

  The weights' gradients begin with what other rows have given them.
  """
  x, weights, w_gate_up, w_down, copies, cut = residuals
  g, *others = cotangents
  share = _row_weights(weights, cut)
  k = weights.shape[1]
  g = g.astype(x.dtype)
  for_up, for_down = copies or (None, None)
  up, up_back = _operands(w_gate_up, for_up, x.dtype)
  _, down = _operands(w_down, for_down, x.dtype)
  inputs, every = how.rows(x), how.rows(g)

  def one(i, carry):
    dx, dshare, d_gate_up, d_down = carry
    e, tokens = cut.expert[i], cut.slots[i] // k
    weight, valid = share[i][:, None], cut.valid[i]
    rows = how.columns(x[tokens], valid=valid)
    grads = how.columns(g[tokens], valid=valid)
    hidden, pull = jax.vjp(layers.glu, _up(inputs[tokens], up[e]))
    dhidden = products.dot('rd,fd->rf', every[tokens], down[e])
    # The gate's gradient from the hidden side: no expert output is kept.
    dshare = dshare.at[i].set((hidden.astype(jnp.float32) * dhidden).sum(-1))
    (dboth,) = pull((dhidden * weight).astype(hidden.dtype))
    weighted = how.columns((hidden * weight).astype(hidden.dtype))
    d_down = d_down.at[e].add(products.dot('rf,rd->fd', weighted, grads))
    flat = lambda dboth: dboth.reshape(len(dboth), -1)
    d_up = products.dot('rd,rf->df', rows, flat(how.columns(dboth, 2)))
    d_gate_up = d_gate_up.at[e].add(d_up.reshape(w_gate_up.shape[1:]))
    both = up_back[e].reshape(x.shape[1], -1)
    drows = products.dot('rf,df->rd', flat(how.rows(dboth, 2)), both)
    return dx.at[tokens].add(drows), dshare, d_gate_up, d_down

  zeros = [jnp.zeros(a.shape, jnp.float32) for a in (x, cut.slots)]
  others = (d.astype(jnp.float32) for d in others)
  start = *sharding.pvary(zeros), *others
  dx, dshare, d_gate_up, d_down = _over_blocks(one, start, cut)
  dweights = jnp.where(cut.taken, dshare.reshape(-1)[cut.place], 0)
  return (
    dx.astype(x.dtype),
    dweights.reshape(weights.shape).astype(weights.dtype),
    d_gate_up.astype(w_gate_up.dtype),
    d_down.astype(w_down.dtype),
    None,
    None,
  )


_run_blocks.defvjp(_blocks_forward, _blocks_backward)


# ------------------------------------------------- ragged (TPU), padded (GPU)


def _ragged(x, weights, chosen, w_gate_up, w_down, expected, recipe):
  """Sort, two grouped products, combine.

  Where only some rows are expected to be of these experts, room is made for
  half as many again; what is beyond goes through the loop.
  """
  e, total = w_down.shape[0], chosen.size
  order = dispatch.sort(chosen, e)
  room = total
  if expected < total:
    room = min(total, dispatch.room(expected, 128))
  fit = lambda at: jnp.minimum(at, room)
  sizes = fit(order.starts + order.sizes) - fit(order.starts)
  slots, places = order.slots[:room], order.places
  held = (chosen.reshape(-1) < e) & (places < room)
  valid = jnp.arange(room) < sizes.sum()
  places = jnp.where(held, places, 0)
  rest = None
  if room < total:
    cut = _cut(chosen, order, 128, sizes)
    args = x, weights, w_gate_up, w_down, cut, recipe
    rest, w_gate_up, w_down = _over_rows(*args)
  rows = dispatch.spread(x, slots, places, held)
  multiply = functools.partial(
    fp8.ragged_dot,
    group_sizes=sizes,
    precision=recipe.precision,
    impl=recipe.impl,
  )
  both = multiply(rows, w_gate_up).reshape(room, 2, -1)
  out = multiply(layers.glu(both), w_down)
  out = dispatch.combine(out, weights, slots, valid, places, held)
  return out if rest is None else out + rest


def _padded(x, weights, chosen, w_gate_up, w_down, expected):
  """The first `room` rows of each expert batched; the others through the loop.

  `room` is half again the mean load: balanced, the loop has no iterations.
  """
  e, dim = w_gate_up.shape[:2]
  room = min(chosen.size, dispatch.room(expected, 8 * e) // e + 8)
  order = dispatch.sort(chosen, e)
  at = jnp.arange(room, dtype=jnp.int32)[None]
  valid = at < order.sizes[:, None]
  source = jnp.where(valid, order.starts[:, None] + at, 0)
  slots = order.slots[source].reshape(-1)
  flat = chosen.reshape(-1)
  rank = order.places - order.starts[flat]
  held = (rank < room) & (flat < e)
  places = jnp.where(held, flat * room + rank, 0)
  rows = dispatch.spread(x, slots, places, held).reshape(e, room, dim)
  cut = _cut(chosen, order, 128, room)
  args = x, weights, w_gate_up, w_down, cut, products.NO_FP8
  rest, w_gate_up, w_down = _over_rows(*args)
  both = jnp.einsum('erd,edf->erf', rows, _flat(w_gate_up))
  out = jnp.einsum('erf,efd->erd', _gated(both), w_down).reshape(-1, dim)
  valid = valid.reshape(-1)
  return dispatch.combine(out, weights, slots, valid, places, held) + rest
