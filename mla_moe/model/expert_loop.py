"""The experts as a loop over blocks of rows, with a gradient written by hand.

On a CPU, XLA computes `lax.ragged_dot` densely: every expert on every row. The
loop multiplies only the rows that an expert has. A block is at most 128 rows of
one expert; one turn gathers their tokens, applies the expert and adds the
outputs, times their gates, to the tokens. The number of blocks depends on the
routing, so the number of turns is a value, and JAX cannot differentiate such a
loop backward. The gradient below is a second loop over the same blocks, in
whose carry the gradients of all experts' weights accumulate in place.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mla_moe import fp8, sharding
from mla_moe.model import dispatch, layers, products
from mla_moe.types import Array, Float, Int


class Blocks(NamedTuple):
  """Blocks of rows of one expert each; only the first `live` have rows."""

  expert: Array  # [n] int32: the expert of each block
  assignments: Array  # [n, block] int32: the assignment of each row
  valid: Array  # [n, block] bool: False for padding
  rows: Array  # [A] int32: the row of each assignment, among n * block
  present: Array  # [A] bool: False where the blocks have no row for it
  live: Array  # [] int32


def cut(
  chosen: Int[Array, 'M K'],
  order: dispatch.Order,
  block: int,
  skip: int | Int[Array, ' E'],
) -> Blocks:
  """Returns blocks of each expert's rows after its first `skip` rows."""
  total, experts = order.assignments.size, order.sizes.size
  sizes = jnp.maximum(order.sizes - skip, 0)
  starts = order.starts + jnp.minimum(order.sizes, skip)
  counts = -(-sizes // block)
  ends = jnp.cumsum(counts)
  # The worst case: every expert's last block has one row.
  n = -(-(total + experts * (block - 1)) // block)
  n += -n % _blocks_in_a_turn(block)
  index = jnp.arange(n, dtype=jnp.int32)
  expert = jnp.searchsorted(ends, index, side='right', method='compare_all')
  expert = jnp.minimum(expert, experts - 1).astype(jnp.int32)
  first = (index - (ends - counts)[expert]) * block
  row = first[:, None] + jnp.arange(block, dtype=jnp.int32)[None]
  valid = (row < sizes[expert][:, None]) & (index < ends[-1])[:, None]
  position = jnp.where(valid, starts[expert][:, None] + row, 0)
  assignments = order.assignments[position]
  flat = chosen.reshape(-1)
  rank = order.positions - starts[flat]
  present = (rank >= 0) & (flat < experts)
  rows = jnp.where(present, (ends - counts)[flat] * block + rank, 0)
  return Blocks(expert, assignments, valid, rows, present, ends[-1])


def feed_forward(
  x: Float[Array, 'M D'],
  gates: Float[Array, 'M K'],
  chosen: Int[Array, 'M K'],
  w_gate_up: Float[Array, 'E D *two_F'] | fp8.Weight,
  w_down: Float[Array, 'E F D'] | fp8.Weight,
  expected: int,
  recipe: fp8.Recipe,
) -> Float[Array, 'M D']:
  """Returns `experts.feed_forward` in float32, with every row in the loop."""
  order = dispatch.sort(chosen, w_down.shape[0])
  # About the mean load: with few rows, as in decoding, larger blocks would be
  # padding for the most part.
  mean = max(expected // w_down.shape[0], 1)
  block = min(max(1 << (mean - 1).bit_length(), 8), 128)
  blocks = cut(chosen, order, block, 0)
  return over_blocks(x, gates, w_gate_up, w_down, blocks, recipe)[0]


def over_blocks(
  x: Float[Array, 'M D'],
  gates: Float[Array, 'M K'],
  w_gate_up: Float[Array, 'E D *two_F'] | fp8.Weight,
  w_down: Float[Array, 'E F D'] | fp8.Weight,
  blocks: Blocks,
  recipe: fp8.Recipe,
) -> tuple[Float[Array, 'M D'], Array | fp8.Weight, Array | fp8.Weight]:
  """Returns the sum over the rows of `blocks` in float32, and both weights.

  Rows outside the blocks must be multiplied by the weights that come back. The
  weights' gradient from those rows is then an input of the backward loop, and
  its carry begins with it. Otherwise two gradients of all experts' weights, and
  their sum, would be a layer's three largest arrays.
  """
  copies = None
  if recipe.precision != 'bf16':
    copies = w_gate_up.copies, w_down.copies
    w_gate_up, w_down = w_gate_up.master, w_down.master
  args = x, gates, w_gate_up, w_down, copies, blocks
  out, *ws = _over_blocks(*args, fp8.Rounding(recipe))
  return out, *(ws if copies is None else map(fp8.Weight, ws, copies))


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _over_blocks(x, gates, w_gate_up, w_down, copies, blocks, rounding):
  args = x, gates, w_gate_up, w_down, copies, blocks
  return _forward(*args, rounding)[0]


def _forward(x, gates, w_gate_up, w_down, copies, blocks, rounding):
  row_gates = _gates_of_rows(gates, blocks)
  k = gates.shape[1]
  up_copies, down_copies = copies or (None, None)
  up, _ = _operands(w_gate_up, up_copies, x.dtype)
  down, _ = _operands(w_down, down_copies, x.dtype)
  x_rounded = rounding.rows(x)

  def add(i, out):
    e, tokens = blocks.expert[i], blocks.assignments[i] // k
    gate_up = _gate_up(x_rounded[tokens], up[e])
    hidden = rounding.rows(layers.glu(gate_up, -2))
    rows = products.dot('rf,fd->rd', hidden, down[e])
    return out.at[tokens].add(rows * row_gates[i][:, None])

  start = sharding.pvary(jnp.zeros(x.shape, jnp.float32))
  out = _for_each_block(add, start, blocks)
  residuals = x, gates, w_gate_up, w_down, copies, blocks
  return (out, w_gate_up, w_down), residuals


def _backward(rounding, residuals, cotangents):
  """Returns gradients of x, gates and weights, from gate and up made again.

  That is cheaper than keeping them: A rows of 2 F. The weights' gradients
  start from their cotangents, the gradients from rows outside the blocks.
  """
  x, gates, w_gate_up, w_down, copies, blocks = residuals
  g, *from_other_rows = cotangents
  row_gates = _gates_of_rows(gates, blocks)
  k = gates.shape[1]
  g = g.astype(x.dtype)
  up_copies, down_copies = copies or (None, None)
  up, up_back = _operands(w_gate_up, up_copies, x.dtype)
  _, down = _operands(w_down, down_copies, x.dtype)
  x_rounded, g_rounded = rounding.rows(x), rounding.rows(g)
  flat = lambda gate_up: gate_up.reshape(len(gate_up), -1)
  glu = lambda gate_up: layers.glu(gate_up, -2)

  def add(i, carry):
    dx, d_gates, d_w_gate_up, d_w_down = carry
    e, tokens = blocks.expert[i], blocks.assignments[i] // k
    gate, valid = row_gates[i][:, None], blocks.valid[i]
    rows = rounding.columns(x[tokens], valid=valid)
    grads = rounding.columns(g[tokens], valid=valid)
    hidden, pull = jax.vjp(glu, _gate_up(x_rounded[tokens], up[e]))
    d_hidden = products.dot('rd,fd->rf', g_rounded[tokens], down[e])
    # g . (hidden W) = hidden . (g W^T): no expert's output is needed.
    d_gate = (hidden.astype(jnp.float32) * d_hidden).sum(-1)
    d_gates = d_gates.at[i].set(d_gate)
    (d_gate_up,) = pull((d_hidden * gate).astype(hidden.dtype))
    weighted = rounding.columns((hidden * gate).astype(hidden.dtype))
    d_w_down = d_w_down.at[e].add(products.dot('rf,rd->fd', weighted, grads))
    columns = flat(rounding.columns(d_gate_up, 2))
    d_w = products.dot('rd,rf->df', rows, columns)
    d_w_gate_up = d_w_gate_up.at[e].add(d_w.reshape(w_gate_up.shape[1:]))
    w_back = up_back[e].reshape(x.shape[1], -1)
    d_gate_up = flat(rounding.rows(d_gate_up, 2))
    d_rows = products.dot('rf,df->rd', d_gate_up, w_back)
    return dx.at[tokens].add(d_rows), d_gates, d_w_gate_up, d_w_down

  zeros = [jnp.zeros(a.shape, jnp.float32) for a in (x, blocks.assignments)]
  d_weights = (d.astype(jnp.float32) for d in from_other_rows)
  start = *sharding.pvary(zeros), *d_weights
  dx, d_gates, d_w_gate_up, d_w_down = _for_each_block(add, start, blocks)
  d_gates = jnp.where(blocks.present, d_gates.reshape(-1)[blocks.rows], 0)
  return (
    dx.astype(x.dtype),
    d_gates.reshape(gates.shape).astype(gates.dtype),
    d_w_gate_up.astype(w_gate_up.dtype),
    d_w_down.astype(w_down.dtype),
    None,
    None,
  )


_over_blocks.defvjp(_forward, _backward)


def _for_each_block(body, carry, blocks: Blocks):
  """Returns `carry` after `body(i, carry)` for every live block.

  The last turn may go past the live blocks, to padding, whose gates are 0.
  """
  step = _blocks_in_a_turn(blocks.assignments.shape[1])

  def turn(i, carry):
    for j in range(step):
      carry = body(step * i + j, carry)
    return carry

  return jax.lax.fori_loop(0, -(-blocks.live // step), turn, carry)


def _blocks_in_a_turn(block: int) -> int:
  """Returns the number of blocks in one turn of the loop.

  Their products are independent, so that cores share them better than they
  share the small product of one block (measured on x86, like the bound).
  """
  return 4 if block >= 128 else 1


def _gates_of_rows(gates, blocks: Blocks):
  """Returns the gate of each row, [n, block]; 0 for padding."""
  return jnp.where(blocks.valid, gates.reshape(-1)[blocks.assignments], 0)


def _gate_up(rows, w_gate_up):
  """Returns gate and up of the rows, [R, D] x [D, 2 F] -> [R, 2, F]."""
  w_gate_up = w_gate_up.reshape(rows.shape[1], -1)
  gate_up = products.dot('rd,df->rf', rows, w_gate_up)
  return gate_up.astype(rows.dtype).reshape(len(rows), 2, -1)


def _operands(w, copies, dtype):
  """Returns the weight for the forward and the backward product, in `dtype`.

  In FP8 they are its copies, dequantised: the loop multiplies in `dtype`.
  """
  if copies is None:
    return w, w
  wide = [fp8.dequantize(q, dtype) for q in copies]
  return wide[0], wide[-1]
