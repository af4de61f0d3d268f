"""The routed experts' sum on one device, in four exact forms.

`feed_forward` computes sum_k gate_k * FFN_{chosen_k}(x) for every token (V3
equation 12), whatever the routing: no form drops a token. Which form is fast
depends on the platform. `ragged`, for TPUs, is grouped products of rows sorted
by expert (`lax.ragged_dot`). On GPUs and CPUs XLA computes those densely, every
expert on every row. So GPUs take `padded`, batched products of equally many
rows for each expert, and CPUs `loop`, over blocks of rows (`expert_loop`). Rows
that exceed a buffer of the first two go through that loop, too. `dense` is the
oracle of the tests.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp

from mla_moe import fp8, sharding
from mla_moe.model import dispatch, expert_loop, layers, products, weights
from mla_moe.types import Array, Float, Int


def feed_forward(
  x: Float[Array, 'M D'],
  gates: Float[Array, 'M K'],
  chosen: Int[Array, 'M K'],
  w_gate_up: Float[Array, 'E D *two_F'] | fp8.Weight | fp8.OwnWeight,
  w_down: Float[Array, 'E F D'] | fp8.Weight | fp8.OwnWeight,
  *,
  impl: str = 'auto',
  recipe: fp8.Recipe = products.NO_FP8,
  expected: int = 0,
) -> Float[Array, 'M D']:
  """Returns the sum of each token's experts times their gates, in x's dtype.

  Args:
    x: the tokens.
    gates: of the chosen experts.
    chosen: ids of experts; E stands for one of another device, which adds 0.
    w_gate_up: [E, D, 2, F], or [E, D, 2 F] (`packed`) where it is not FP8.
    w_down: of the same experts.
    impl: loop, ragged, padded, dense or auto. FP8 has only loop and ragged.
    recipe: precision of the products.
    expected: about how many of the M * K ids are below E; 0 stands for all.
  """
  expected = expected or chosen.size
  if isinstance(w_down, fp8.OwnWeight):
    return w_down.feed_forward(x, gates, chosen, w_gate_up, impl, expected)
  if impl == 'auto':
    platform = sharding.target_platform()
    impl = {'tpu': 'ragged', 'gpu': 'padded'}.get(platform, 'loop')
    if recipe.precision != 'bf16' and impl == 'padded':
      impl = 'ragged'
  if recipe.precision == 'bf16':
    w_gate_up = weights.packed(w_gate_up).astype(x.dtype)
    w_down = w_down.astype(x.dtype)
  args = x, gates, chosen, w_gate_up, w_down
  if impl == 'loop':
    out = expert_loop.feed_forward(*args, expected, recipe)
  elif impl == 'ragged':
    out = _ragged(*args, expected, recipe)
  elif impl == 'padded':
    out = _padded(*args, expected)
  else:
    out = _dense(*args)
  return out.astype(x.dtype)


def _dense(x, gates, chosen, w_gate_up, w_down):
  """Returns the sum over all experts; those that are not chosen have gate 0."""
  is_chosen = chosen[:, :, None] == jnp.arange(len(w_down))[None, None]
  gates = jnp.einsum('mke,mk->me', is_chosen.astype(gates.dtype), gates)
  gate_up = products.dot('md,edf->mef', x, w_gate_up)
  hidden = layers.glu(gate_up, -1).astype(x.dtype)
  out = products.dot('mef,efd->med', hidden, w_down)
  return jnp.einsum('med,me->md', out, gates)


def _ragged(x, gates, chosen, w_gate_up, w_down, expected, recipe):
  """Returns the sum by grouped products of the sorted rows.

  On a mesh, a device has a part of the experts, and about `expected` rows are
  for them. The buffer then has 1.5 times as many, and the loop takes the rest.
  """
  e, total = w_down.shape[0], chosen.size
  order = dispatch.sort(chosen, e)
  capacity = min(total, dispatch.capacity(expected, 128))
  # Each expert's rows that fit the buffer; the loop skips them.
  sizes = jnp.clip(capacity - order.starts, 0, order.sizes)
  assignments = order.assignments[:capacity]
  present = (chosen.reshape(-1) < e) & (order.positions < capacity)
  valid = jnp.arange(capacity) < sizes.sum()
  rows = jnp.where(present, order.positions, 0)
  layout = dispatch.Layout(assignments, valid, rows, present)
  rest = None
  if capacity < total:
    blocks = expert_loop.cut(chosen, order, 128, sizes)
    args = x, gates, w_gate_up, w_down, blocks, recipe
    rest, w_gate_up, w_down = expert_loop.over_blocks(*args)
  options = dict(precision=recipe.precision, impl=recipe.impl)
  multiply = functools.partial(fp8.ragged_dot, group_sizes=sizes, **options)
  gate_up = multiply(dispatch.permute(x, layout), w_gate_up)
  hidden = layers.glu(gate_up, 1 - gate_up.ndim)  # FP8 may have them apart
  out = multiply(dispatch.weigh(hidden, gates, layout), w_down)
  out = dispatch.unpermute(out, layout, gates.shape[1])
  return out if rest is None else out + rest


def _padded(x, gates, chosen, w_gate_up, w_down, expected):
  """Returns the sum by batched products of equally many rows for each expert.

  An expert's buffer has 1.5 times the mean load of rows. The loop takes the
  rows beyond it; with balanced load there are none.
  """
  e, dim = w_gate_up.shape[:2]
  capacity = min(chosen.size, dispatch.capacity(expected, 8 * e) // e + 8)
  order = dispatch.sort(chosen, e)
  index = jnp.arange(capacity, dtype=jnp.int32)[None]
  valid = index < order.sizes[:, None]
  position = jnp.where(valid, order.starts[:, None] + index, 0)
  assignments = order.assignments[position].reshape(-1)
  flat = chosen.reshape(-1)
  rank = order.positions - order.starts[flat]
  present = (rank < capacity) & (flat < e)
  rows = jnp.where(present, flat * capacity + rank, 0)
  layout = dispatch.Layout(assignments, valid.reshape(-1), rows, present)
  rows = dispatch.permute(x, layout).reshape(e, capacity, dim)
  blocks = expert_loop.cut(chosen, order, 128, capacity)
  args = x, gates, w_gate_up, w_down, blocks, products.NO_FP8
  rest, w_gate_up, w_down = expert_loop.over_blocks(*args)
  gate_up = jnp.einsum('erd,edf->erf', rows, w_gate_up)
  hidden = layers.glu(gate_up, -1).reshape(e * capacity, -1)
  hidden = dispatch.weigh(hidden, gates, layout).reshape(e, capacity, -1)
  out = jnp.einsum('erf,efd->erd', hidden, w_down).reshape(-1, dim)
  return dispatch.unpermute(out, layout, gates.shape[1]) + rest
