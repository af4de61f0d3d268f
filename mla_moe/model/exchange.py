"""Tokens to the experts of other devices and back, dropless.

Experts are split over the mesh's `expert` axis and their width over `tensor`;
tokens are split over both. `exchange` brings each token's row to where its
experts are and their weighted sum back, exactly, for any routing. Three
exchanges give the same numbers:

* gather: every device of the group sees all the group's tokens and computes
  what its own experts have to say; outputs are added and scattered. Up to K
  devices it moves no more than sending each token to K experts would, and has
  no counts to exchange and no buffer to overflow.
* padded: an all-to-all with room for half as many rows again as are balanced
  between each two devices. Rows that find none go in further rounds of the same
  buffers, of which a balanced step has none: memory is bounded, none is lost.
* ragged: the same buffers, but only real rows travel (TPU and GPU; a CPU has
  no such collective and emulates it).

In FP8 the rows travel as E4M3 with their scales, which are those of the
experts' first product, so that nothing is rounded twice. What comes back, and
all gradients, are in the activations' dtype (V3 section 3.3.3).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mla_moe import fp8, sharding
from mla_moe.config import ModelConfig
from mla_moe.fp8 import quantize as q8
from mla_moe.model import dispatch
from mla_moe.types import Array, Float, Int, PyTree

# The loops' name in a compiled program. A balanced step never enters them.
FURTHER = 'further_rounds'


class Split(NamedTuple):
  """Over which mesh axes a region's tokens are split, and all there are."""

  rows: tuple[str, ...]
  length: tuple[str, ...]
  every: tuple[str, ...]

  @property
  def tokens(self) -> tuple[str, ...]:
    return self.rows + self.length


def split(shape: tuple, names: tuple) -> Split:
  """Of a [B, T, D] stream with these logical axes."""
  rows, length, _ = sharding.mesh_axes(names, shape)
  return Split(rows, length, sharding.auto_axes())


# ------------------------------------------------------------------ exchange


def exchange(
  x: Float[Array, 'M D'],
  weights: Float[Array, 'M K'],
  chosen: Int[Array, 'M K'],
  ws: PyTree,
  compute: Callable,
  split: Split,
  config: ModelConfig,
  recipe: fp8.Recipe,
  meanwhile: Float[Array, ...] | None = None,
) -> tuple[Float[Array, 'M D'], Int[Array, '']]:
  """The weighted sum of each token's experts, wherever they are.

  `compute(x, weights, chosen, *ws, expected=)` is `moe.experts` of the experts
  that are here, whose ids count from 0. `meanwhile` is what else there is to
  compute while tokens are gathered. Returns also how many rows, of all devices,
  found no room in the first round.
  """
  if not split.every:
    return compute(x, weights, chosen, *ws), jnp.zeros((), jnp.int32)
  shape = jax.sharding.get_abstract_mesh().shape
  x, weights, chosen, ws = sharding.pvary((x, weights, chosen, ws))
  here = tuple(a for a in ('expert', 'tensor') if a in split.tokens)
  others = tuple(a for a in ('expert', 'tensor') if a not in split.tokens)
  moe = config.moe
  kind = _kind(config, shape['expert'], 'expert' in split.tokens)
  over = here if kind == 'gather' else tuple(a for a in here if a == 'tensor')
  if over:
    gather = functools.partial(
      jax.lax.all_gather, axis_name=over, axis=0, tiled=True
    )
    routing = gather(weights), gather(chosen)
    x = x if meanwhile is None else _after(routing, x)
    x = _sent(x, None, _Route('gather', over), recipe)
    both = x, routing
    x, routing = both if meanwhile is None else _after(meanwhile, both)
    weights, chosen = routing
  e = moe.experts // shape['expert']
  mine = functools.partial(_mine, count=e)
  overflow = jnp.zeros((), jnp.int32)
  if kind == 'gather':
    expected = max(chosen.size // shape['expert'], 1)
    out = compute(x, weights, mine(chosen), *ws, expected=expected)
  else:
    args = x, weights, chosen, ws
    out, extra = _rounds(*args, compute, mine, kind, shape, moe, recipe)
    # Along these axes all devices have counted the same rows.
    alike = lambda axis: axis == 'tensor' or axis not in split.tokens
    same = tuple(filter(alike, split.every))
    overflow = jax.lax.psum(extra, split.every) // sharding.axis_size(same)
  if over:
    out = jax.lax.psum_scatter(out, over, scatter_dimension=0, tiled=True)
  out = jax.lax.psum(out, others) if others else out
  # On axes that nothing is split over, all have computed the same.
  same = tuple(a for a in split.every if a not in split.tokens + others)
  return (jax.lax.pmean(out, same) if same else out), overflow


@jax.custom_vjp
def _after(done: PyTree, x: PyTree) -> PyTree:
  """`x`, for use once `done` is computed.

  A TPU's compiler gives independent work to the last transfer that it could
  hide; one before it, with nothing left beside it, stays synchronous.
  """
  return jax.lax.optimization_barrier((x, sharding.pvary(done)))[0]


_after.defvjp(lambda done, x: (_after(done, x), None), lambda _, g: (None, g))


def _kind(config: ModelConfig, experts: int, tokens_are_split: bool) -> str:
  if not tokens_are_split or experts == 1:
    return 'gather'
  if config.compute.exchange != 'auto':
    return config.compute.exchange
  if experts <= config.moe.top_k:
    return 'gather'
  return 'padded' if sharding.target_platform() == 'cpu' else 'ragged'


def _mine(chosen: Array, count: int) -> Array:
  """Ids counted from this device's first expert; `count` for any other's."""
  local = chosen - jax.lax.axis_index('expert') * count
  return jnp.where((local >= 0) & (local < count), local, count)


def _rounds(x, weights, chosen, ws, compute, mine, kind, shape, moe, recipe):
  """Rows to their experts' devices and back, [M, D] in x's dtype."""
  n, total = shape['expert'], chosen.size
  room = min(dispatch.room(-(-total // n), 8), total)
  order = dispatch.sort(chosen, moe.experts)
  sizes = order.sizes.reshape(n, -1).sum(-1)
  route = _Route(kind, ('expert',), n, room)
  plan = _Plan(order.slots, order.places, sizes, jnp.cumsum(sizes) - sizes)
  one = functools.partial(
    _round,
    compute=compute,
    mine=mine,
    route=route,
    recipe=recipe,
    each=moe.experts // n,
  )
  rounds = None
  if room < total:
    # Every device takes part in every round.
    most = jax.lax.pmax(sizes.max(), tuple(shape))
    rounds = sharding.pvary(-(-most // room))
  out = _over_rounds(one, rounds, x, weights, chosen, ws, plan)
  return out, jnp.maximum(sizes - room, 0).sum()


class _Plan(NamedTuple):
  """Assignments sorted by destination: both ways, rows for each, its first."""

  slots: Array
  places: Array
  sizes: Array
  starts: Array


def _round(
  i, x, weights, chosen, ws, plan, *, compute, mine, route, recipe, each
):
  """What the i-th `room` rows for each device bring back: [M, D] float32.

  A row's weight travels with it, so that nothing that comes back has to be
  kept, or made and sent again, for the weights' gradient.
  """
  room = route.room
  at = jnp.arange(room, dtype=jnp.int32)[None] + i * room
  valid = at < plan.sizes[:, None]
  slots = plan.slots[jnp.where(valid, plan.starts[:, None] + at, 0)]
  flat = chosen.reshape(-1)
  device = flat // each
  rank = plan.places - plan.starts[device] - i * room
  held = (rank >= 0) & (rank < room)
  places = jnp.where(held, device * room + rank, 0)
  slots, valid = slots.reshape(-1), valid.reshape(-1)
  send = lambda rows: jax.lax.all_to_all(rows, 'expert', 0, 0, tiled=True)
  sizes = jnp.clip(plan.sizes - i * room, 0, room)
  theirs = send(sizes)
  ids = send(jnp.where(valid, flat[slots], -1))
  shares = send(dispatch.spread(weights.reshape(-1, 1), slots, places, held))
  rows = dispatch.spread(x, slots, places, held)
  rows = _sent(rows, (sizes, theirs), route, recipe)
  back = compute(rows, shares, mine(ids)[:, None], *ws)
  back = _move(back, (theirs, sizes), route)
  return dispatch.collect(back, slots, valid, places, held, chosen.shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _over_rounds(one, rounds, x, weights, chosen, ws, plan):
  """The sum of all rounds; of the first alone where `rounds` is None.

  The first is plain code, so that other work can overlap its collectives. How
  many more there are nobody knows, hence a loop with a gradient of its own;
  that makes each round again, so that no two rounds' rows are held at once.
  """
  args = x, weights, chosen, ws, plan
  out = one(0, *args)
  if rounds is not None:
    add = lambda i, out: out + one(i, *args)
    with jax.named_scope(FURTHER):
      out = jax.lax.fori_loop(1, rounds, add, out)
  return out.astype(x.dtype)


def _over_rounds_forward(one, rounds, x, weights, chosen, ws, plan):
  out = _over_rounds(one, rounds, x, weights, chosen, ws, plan)
  return out, (rounds, x, weights, chosen, ws, plan)


def _over_rounds_backward(one, residuals, g):
  rounds, x, weights, chosen, ws, plan = residuals
  primals = x, weights, tuple(w.master if _is_eight(w) else w for w in ws)
  g = g.astype(jnp.float32)

  def grads_of(i):
    def f(x, weights, masters):
      both = zip(ws, masters, strict=True)
      return one(i, x, weights, chosen, tuple(map(_with_master, both)), plan)

    return jax.vjp(f, *primals)[1](g)

  grads = grads_of(0)
  if rounds is not None:
    wide = lambda grad: grad.astype(jnp.float32)
    add = lambda i, sums: jax.tree.map(jnp.add, sums, grads_of(i))
    with jax.named_scope(FURTHER):
      grads = jax.lax.fori_loop(1, rounds, add, jax.tree.map(wide, grads))
  like = lambda grad, primal: grad.astype(primal.dtype)
  dx, dweights, dws = jax.tree.map(like, grads, primals)
  dws = tuple(
    fp8.Weight(d, None) if _is_eight(w) else d
    for w, d in zip(ws, dws, strict=True)
  )
  return None, dx, dweights, None, dws, None


_over_rounds.defvjp(_over_rounds_forward, _over_rounds_backward)


def _is_eight(w) -> bool:
  return isinstance(w, fp8.Weight)


def _with_master(both):
  w, master = both
  return fp8.Weight(master, w.copies) if _is_eight(w) else master


# --------------------------------------------------------------- collectives


class _Route(NamedTuple):
  """A collective: its name, axes, and buffers of `devices` * `room` rows."""

  kind: str
  axes: tuple[str, ...]
  devices: int = 0
  room: int = 0


def _move(x: Array, sizes: tuple | None, route: _Route) -> Array:
  """Rows to other devices; `sizes` are those sent to each and got from each."""
  if route.kind == 'gather':
    return jax.lax.all_gather(x, route.axes, axis=0, tiled=True)
  if route.kind == 'padded':
    return jax.lax.all_to_all(x, route.axes, 0, 0, tiled=True)
  every = jnp.arange(route.devices, dtype=jnp.int32)
  me = jax.lax.axis_index(route.axes)
  args = (
    sharding.pvary(jnp.zeros_like(x)),
    sharding.pvary(every * route.room),
    sizes[0],
    sharding.pvary(jnp.full_like(every, me * route.room)),
    sizes[1],
  )
  if sharding.target_platform() == 'cpu':
    return emulated_ragged_all_to_all(x, *args, axis_name=route.axes[0])
  return jax.lax.ragged_all_to_all(x, *args, axis_name=route.axes[0])


def emulated_ragged_all_to_all(
  operand: Array,
  output: Array,
  input_offsets: Array,
  send_sizes: Array,
  output_offsets: Array,
  recv_sizes: Array,
  *,
  axis_name: str,
) -> Array:
  """`lax.ragged_all_to_all` by gathering everything, for a CPU's tests.

  Offsets into the output are those of the receiver, given by the sender.
  """
  me = jax.lax.axis_index(axis_name)
  operands = jax.lax.all_gather(operand, axis_name)
  first, sizes, target = (
    jax.lax.all_gather(a, axis_name)[:, me]
    for a in (input_offsets, send_sizes, output_offsets)
  )
  at = jnp.arange(output.shape[0], dtype=jnp.int32)[None] - target[:, None]
  hit = (at >= 0) & (at < sizes[:, None])
  source = jnp.argmax(hit, axis=0)
  row = first[source] + jnp.take_along_axis(at, source[None], axis=0)[0]
  row = jnp.clip(row, 0, operand.shape[0] - 1)
  found = hit.any(0).reshape(-1, *(1,) * (operand.ndim - 1))
  return jnp.where(found, operands[source, row], output)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _sent(x, sizes, route, recipe):
  """`_move`, as FP8 where the experts would round to it anyway."""
  if recipe.precision not in ('fp8_block', 'fp8_channel'):
    return _move(x, sizes, route)  # one scale for all is not known yet
  q = recipe.rows(x, 1)
  bits = jax.lax.bitcast_convert_type(q.values, jnp.uint8)
  bits, scales = _move(bits, sizes, route), _move(q.scales, sizes, route)
  values = jax.lax.bitcast_convert_type(bits, q.values.dtype)
  return q8.dequantize(q8.Quantized(values, scales, q.tiles, q.kind), x.dtype)


def _sent_forward(x, sizes, route, recipe):
  return _sent(x, sizes, route, recipe), (x, sizes)


def _sent_backward(route, recipe, residuals, g):
  x, sizes = residuals
  _, pull = jax.vjp(lambda x: _move(x, sizes, route), x)
  return *pull(g), None


_sent.defvjp(_sent_forward, _sent_backward)
