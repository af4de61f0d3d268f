"""The routed experts' sum with frozen weights: an expert at a time.

The other forms (`experts`) multiply by all experts' floats. Here a block of
rows of one expert is a turn of a loop, which dequantises that expert and no
other. The gradient is a second loop over the same blocks, in whose carry the
adapters' gradients lie; the weights have none. On a TPU grouped products of a
layer's floats are faster (`ragged`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mla_moe import sharding
from mla_moe.fp8 import OwnWeight
from mla_moe.model import dispatch, expert_loop, layers
from mla_moe.types import Array, Float, Int

_LARGEST = 512  # rows of a block: a larger one dequantises an expert less often


def feed_forward(
  x: Float[Array, 'M D'],
  gates: Float[Array, 'M K'],
  chosen: Int[Array, 'M K'],
  w_gate_up: OwnWeight,
  w_down: OwnWeight,
  impl: str,
  expected: int,
) -> Float[Array, 'M D']:
  """Returns `experts.feed_forward` of frozen weights.

  `impl` 'ragged', and 'auto' on a TPU, are grouped products; every other is the
  loop.
  """
  experts = w_down.shape[0]
  if impl == 'auto' and sharding.target_platform() == 'tpu':
    impl = 'ragged'
  order = dispatch.sort(chosen, experts)
  ws = w_gate_up, w_down
  if impl == 'ragged':
    return _ragged(x, gates, chosen, order, ws).astype(x.dtype)
  mean = max(expected // experts, 1)
  block = min(max(1 << (mean - 1).bit_length(), 8), _LARGEST)
  blocks = expert_loop.cut(chosen, order, block, 0)
  adapters = [w.trained for w in ws]
  codes = [w.bare for w in ws]
  return _over_blocks(x, gates, adapters, codes, blocks).astype(x.dtype)


def _expert(rows, w_gate_up, w_down):
  """Returns one expert's output of its rows, float32."""
  hidden = layers.glu(w_gate_up.product(rows), -2)
  return w_down.product(hidden).astype(jnp.float32)


@jax.custom_vjp
def _over_blocks(x, gates, adapters, codes, blocks):
  """Returns the sum over the blocks' rows of experts times gates, float32."""
  ws = [w.with_trained(p) for w, p in zip(codes, adapters, strict=True)]

  def add(i, out):
    tokens = blocks.assignments[i] // gates.shape[1]
    rows = _expert(x[tokens], *(w[blocks.expert[i]] for w in ws))
    gate = _gates_of_rows(gates, blocks, i)
    return out.at[tokens].add(rows * gate[:, None])

  start = sharding.pvary(jnp.zeros(x.shape, jnp.float32))
  return jax.lax.fori_loop(0, blocks.live, add, start)


def _forward(*args):
  return _over_blocks(*args), args


def _backward(args, g):
  x, gates, adapters, codes, blocks = args
  ws = [w.with_trained(p) for w, p in zip(codes, adapters, strict=True)]

  def add(i, carry):
    dx, d_gates, d_adapters = carry
    e, tokens = blocks.expert[i], blocks.assignments[i] // gates.shape[1]
    ws_of_e = [w[e] for w in ws]

    def of_expert(rows, adapters):
      pairs = zip(ws_of_e, adapters, strict=True)
      return _expert(rows, *(w.with_trained(pair) for w, pair in pairs))

    pairs = [w.trained for w in ws_of_e]
    out, pull = jax.vjp(of_expert, x[tokens], pairs)
    d_gates = d_gates.at[i].set((out * g[tokens]).sum(-1))
    gate = _gates_of_rows(gates, blocks, i)
    d_rows, d_pairs = pull(g[tokens] * gate[:, None])
    # One expert of adapters is that of all.
    put = lambda sums, d: sums.at[jnp.minimum(e, len(sums) - 1)].add(d)
    d_adapters = jax.tree.map(put, d_adapters, d_pairs)
    return dx.at[tokens].add(d_rows.astype(dx.dtype)), d_gates, d_adapters

  zeros = lambda a: jnp.zeros(a.shape, jnp.float32)
  start = zeros(x), zeros(blocks.assignments), jax.tree.map(zeros, adapters)
  start = sharding.pvary(start)
  dx, d_gates, d_adapters = jax.lax.fori_loop(0, blocks.live, add, start)
  d_gates = jnp.where(blocks.present, d_gates.reshape(-1)[blocks.rows], 0)
  d_gates = d_gates.reshape(gates.shape).astype(gates.dtype)
  return dx.astype(x.dtype), d_gates, d_adapters, None, None


_over_blocks.defvjp(_forward, _backward)


def _gates_of_rows(gates, blocks, i):
  """Returns the gates of block i's rows; 0 for padding."""
  gate = gates.reshape(-1)[blocks.assignments[i]]
  return jnp.where(blocks.valid[i], gate, 0).astype(jnp.float32)


def _ragged(x, gates, chosen, order, ws):
  """Returns the sum by grouped products of all rows, sorted by expert."""
  sizes, total = order.sizes, chosen.size
  present = chosen.reshape(-1) < len(sizes)
  valid = jnp.arange(total) < sizes.sum()
  rows = jnp.where(present, order.positions, 0)
  layout = dispatch.Layout(order.assignments, valid, rows, present)

  def multiply(rows, w):
    dot = lambda x, w: jax.lax.ragged_dot(
      x, w.reshape(*w.shape[:2], -1).astype(x.dtype), sizes
    )
    # The backward pass makes the floats again, or those of all layers stay.
    floats = lambda w: jax.lax.stop_gradient(w.floats(rows.dtype))
    y = jax.checkpoint(lambda rows, w: dot(rows, floats(w)))(rows, w)
    if w.a is not None:
      each = lambda x: jnp.broadcast_to(x, (len(sizes), *x.shape[1:]))
      y += dot(dot(rows, each(w.a)), each(w.b))
    return y

  gate_up = multiply(dispatch.permute(x, layout), ws[0])
  hidden = layers.glu(gate_up.reshape(total, 2, -1), -2)
  out = multiply(dispatch.weigh(hidden, gates, layout), ws[1])
  return dispatch.unpermute(out, layout, gates.shape[1])
