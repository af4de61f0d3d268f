"""Tokens to the experts of other devices and back, exactly, for any routing.

Experts are split over the mesh's `expert` axis and their width over `tensor`;
tokens are split over both. `exchange` brings each token to the devices of its
experts, computes the experts there (`experts.feed_forward`) and brings the sum
back. Three kinds give the same numbers:

* gather: each device gets all tokens of its group and computes the outputs of
  its own experts; outputs are summed and scattered. Up to K devices, that moves
  no more rows than sending each token to K experts, and no buffer overflows.
* padded: an all-to-all of buffers, from each device to each other one, of 1.5
  times the balanced number of rows. Rows that exceed a buffer go in further
  rounds of the same buffers: memory is bounded and no row is dropped. A step
  with balanced load has no further round.
* ragged: the same buffers, but only real rows travel. Not all devices have
  this collective (`sharding.ragged_exchange`).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mla_moe import fp8, sharding
from mla_moe.config import ModelConfig
from mla_moe.model import collectives, dispatch, experts, router
from mla_moe.types import Array, Float, Int, PyTree

# The loops' name in a compiled program, by which the plan leaves them out.
FURTHER = 'further_rounds'


class TokenAxes(NamedTuple):
  """The mesh axes of a region, and those that split its [B, T, D] stream."""

  batch: tuple[str, ...]
  length: tuple[str, ...]
  region: tuple[str, ...]

  @property
  def tokens(self) -> tuple[str, ...]:
    return self.batch + self.length


def token_axes(shape: tuple, names: tuple) -> TokenAxes:
  """Returns the TokenAxes of a stream with logical axes `names`.

  To be called outside the region, in which no axis is automatic any more.
  """
  batch, length, _ = sharding.mesh_axes(names, shape)
  return TokenAxes(batch, length, sharding.auto_axes())


def exchange(
  x: Float[Array, 'M D'],
  routing: router.Routing,
  ws: tuple,
  axes: TokenAxes,
  config: ModelConfig,
  recipe: fp8.Recipe,
  shared: Float[Array, ...] | None = None,
) -> tuple[Float[Array, 'M D'], Int[Array, '']]:
  """Returns the sum of each token's experts by gates, and the overflow.

  The overflow is the number of rows, of all devices, that exceeded the buffers
  of the first round.

  Args:
    x: this device's tokens.
    routing: of these tokens, with ids that count all devices' experts.
    ws: gate and up, and down, of this device's experts.
    axes: of the region.
    config: of the model.
    recipe: precision of the experts' products.
    shared: the shared expert's output, computed while tokens are gathered.

  Raises:
    ConfigError: the kind is ragged and the platform a CPU.
  """
  gates, chosen = routing.gates, routing.chosen
  if not axes.region:
    out = _compute(x, gates, chosen, ws, config, recipe)
    return out, jnp.zeros((), jnp.int32)
  devices = sharding.axis_size(('expert',))
  x, gates, chosen, ws = sharding.pvary((x, gates, chosen, ws))
  split = tuple(a for a in ('expert', 'tensor') if a in axes.tokens)
  whole = tuple(a for a in ('expert', 'tensor') if a not in axes.tokens)
  kind = _kind(config, devices, 'expert' in axes.tokens)
  # Devices along `tensor` have parts of the same experts: they need the same
  # tokens, whatever the kind.
  gathered = split
  if kind != 'gather':
    gathered = tuple(a for a in split if a == 'tensor')
  if gathered:
    x, gates, chosen = _gather(x, gates, chosen, gathered, recipe, shared)
  overflow = jnp.zeros((), jnp.int32)
  if kind == 'gather':
    expected = max(chosen.size // devices, 1)
    ids = _own_ids(chosen, config.moe.experts // devices)
    out = _compute(x, gates, ids, ws, config, recipe, expected)
  else:
    out, exceeding = _in_rounds(x, gates, chosen, ws, kind, config, recipe)
    overflow = _all_devices(exceeding, axes)
  if gathered:
    out = jax.lax.psum_scatter(out, gathered, scatter_dimension=0, tiled=True)
  out = sharding.psum(out, whole)
  # Along axes that split neither tokens nor experts, the sums are equal.
  equal = tuple(a for a in axes.region if a not in axes.tokens + whole)
  return sharding.pmean(out, equal), overflow


def _kind(config: ModelConfig, devices: int, tokens_are_split: bool) -> str:
  """Returns gather, padded or ragged, with 'auto' decided.

  Where the expert axis splits no tokens, all devices have them: `gather`.
  """
  if not tokens_are_split or devices == 1:
    return 'gather'
  if config.compute.exchange != 'auto':
    return config.compute.exchange
  if devices <= config.moe.top_k:
    return 'gather'
  return 'ragged' if sharding.ragged_exchange() else 'padded'


def _all_devices(rows: Array, axes: TokenAxes) -> Array:
  """Returns the sum of a number of rows over all devices, each row once.

  Along `tensor`, and along axes that split no tokens, devices count equal rows.
  """
  is_equal = lambda axis: axis == 'tensor' or axis not in axes.tokens
  equal = tuple(filter(is_equal, axes.region))
  return jax.lax.psum(rows, axes.region) // sharding.axis_size(equal)


def _compute(x, gates, ids, ws, config, recipe, expected=0):
  if not len(x):  # a batch without tokens
    return x.astype(jnp.float32)
  impl = config.compute.experts
  compute = functools.partial(experts.feed_forward, impl=impl, recipe=recipe)
  return compute(x, gates, ids, *ws, expected=expected)


def _own_ids(chosen: Array, count: int) -> Array:
  """Returns ids among this device's `count` experts; `count` for all others."""
  local = chosen - jax.lax.axis_index('expert') * count
  return jnp.where((local >= 0) & (local < count), local, count)


def _gather(x, gates, chosen, axes, recipe, shared):
  """Returns the tokens, gates and ids of all devices along `axes`.

  A TPU's compiler hides one transfer behind independent work, the last that it
  can: here the sums on their way back. Others stay synchronous. So the routing
  travels before the tokens, and gathered tokens are for use only after the
  shared expert is computed: its work then hides their transfer.
  """
  gather = functools.partial(
    jax.lax.all_gather, axis_name=axes, axis=0, tiled=True
  )
  routing = gather(gates), gather(chosen)
  x = x if shared is None else _after(routing, x)
  x = collectives.send(x, None, collectives.Route('gather', axes), recipe)
  tokens = x, routing
  x, routing = tokens if shared is None else _after(shared, tokens)
  return x, *routing


@jax.custom_vjp
def _after(done: PyTree, x: PyTree) -> PyTree:
  """Returns `x`, which the program may use only after it has `done`."""
  return jax.lax.optimization_barrier((x, sharding.pvary(done)))[0]


_after.defvjp(lambda done, x: (_after(done, x), None), lambda _, g: (None, g))


# -------------------------------------------------------------------- rounds


def _in_rounds(x, gates, chosen, ws, kind, config, recipe):
  """Returns the experts' sum [M, D] in x's dtype, and the device's overflow."""
  sizes = jax.sharding.get_abstract_mesh().shape
  devices, total = sizes['expert'], chosen.size
  capacity = min(dispatch.capacity(-(-total // devices), 8), total)
  order = dispatch.sort(chosen, config.moe.experts)
  to_device = order.sizes.reshape(devices, -1).sum(-1)
  order = order._replace(
    sizes=to_device, starts=jnp.cumsum(to_device) - to_device
  )
  route = collectives.Route(kind, ('expert',), devices, capacity)
  run_round = functools.partial(
    _round, route=route, config=config, recipe=recipe
  )
  rounds = None
  if capacity < total:
    # Every device takes part in every round.
    most = jax.lax.pmax(to_device.max(), tuple(sizes))
    rounds = sharding.pvary(-(-most // capacity))
  out = _all_rounds(run_round, rounds, x, gates, chosen, ws, order)
  return out, jnp.maximum(to_device - capacity, 0).sum()


def _round(i, x, gates, chosen, ws, order, *, route, config, recipe):
  """Returns the sum over the i-th `capacity` rows for each device.

  It is [M, D] in float32; `order` is by device. A row's gate travels with it:
  outputs come back multiplied, and the gates' gradient is computed where the
  outputs are, so that none is saved or sent again for it.
  """
  capacity = route.capacity
  own = config.moe.experts // route.devices
  index = jnp.arange(capacity, dtype=jnp.int32)[None] + i * capacity
  valid = index < order.sizes[:, None]
  position = jnp.where(valid, order.starts[:, None] + index, 0)
  assignments = order.assignments[position]
  flat = chosen.reshape(-1)
  device = flat // own
  rank = order.positions - order.starts[device] - i * capacity
  present = (rank >= 0) & (rank < capacity)
  rows = jnp.where(present, device * capacity + rank, 0)
  assignments, valid = assignments.reshape(-1), valid.reshape(-1)
  layout = dispatch.Layout(assignments, valid, rows, present)

  swap = lambda x: jax.lax.all_to_all(x, 'expert', 0, 0, tiled=True)
  sent = jnp.clip(order.sizes - i * capacity, 0, capacity)
  received = swap(sent)
  ids = swap(jnp.where(valid, flat[assignments], -1))
  row_gates = swap(dispatch.permute(gates.reshape(-1, 1), layout))
  rows = dispatch.permute(x, layout)
  rows = collectives.send(rows, (sent, received), route, recipe)
  ids = _own_ids(ids, own)[:, None]
  out = _compute(rows, row_gates, ids, ws, config, recipe)
  out = collectives.move(out, (received, sent), route)
  return dispatch.unpermute(out, layout, chosen.shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _all_rounds(run_round, rounds, x, gates, chosen, ws, order):
  """Returns the sum of all rounds, of the first alone if `rounds` is None.

  The first round is plain code, so that other work can overlap its collectives.
  The number of further rounds is a value, so they are a loop, which JAX cannot
  differentiate backward. The gradient below computes each round again, so that
  only one round's rows are in memory.
  """
  args = x, gates, chosen, ws, order
  out = run_round(0, *args)
  if rounds is not None:
    add = lambda i, out: out + run_round(i, *args)
    with jax.named_scope(FURTHER):
      out = jax.lax.fori_loop(1, rounds, add, out)
  return out.astype(x.dtype)


def _all_rounds_forward(run_round, rounds, x, gates, chosen, ws, order):
  out = _all_rounds(run_round, rounds, x, gates, chosen, ws, order)
  return out, (rounds, x, gates, chosen, ws, order)


def _all_rounds_backward(run_round, residuals, g):
  rounds, x, gates, chosen, ws, order = residuals
  primals = x, gates, tuple(map(_trained, ws))
  g = g.astype(jnp.float32)

  def grads_of(i):
    def f(x, gates, masters):
      pairs = zip(ws, masters, strict=True)
      ws_of_f = tuple(_with(w, master) for w, master in pairs)
      return run_round(i, x, gates, chosen, ws_of_f, order)

    return jax.vjp(f, *primals)[1](g)

  grads = grads_of(0)
  if rounds is not None:
    wide = lambda grad: grad.astype(jnp.float32)
    add = lambda i, sums: jax.tree.map(jnp.add, sums, grads_of(i))
    with jax.named_scope(FURTHER):
      grads = jax.lax.fori_loop(1, rounds, add, jax.tree.map(wide, grads))
  narrow = lambda grad, primal: grad.astype(primal.dtype)
  dx, d_gates, d_masters = jax.tree.map(narrow, grads, primals)
  pairs = zip(ws, d_masters, strict=True)
  d_ws = tuple(_with(w, d, frozen=False) for w, d in pairs)
  return None, dx, d_gates, None, d_ws, None


_all_rounds.defvjp(_all_rounds_forward, _all_rounds_backward)


def _trained(w) -> PyTree:
  """Returns the part of a weight that has a gradient."""
  if isinstance(w, fp8.OwnWeight):
    return w.trained
  return w.master if isinstance(w, fp8.Weight) else w


def _with(w, trained: PyTree, frozen: bool = True) -> PyTree:
  """Returns `w` with another trained part, and the frozen one or None."""
  if isinstance(w, fp8.OwnWeight):
    return w.with_trained(trained, frozen)
  if isinstance(w, fp8.Weight):
    return fp8.Weight(trained, w.copies if frozen else None)
  return trained
