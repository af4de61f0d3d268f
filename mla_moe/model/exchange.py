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
* ragged: only real rows travel, from their sorted order to one buffer a device,
  1.5 times the balanced number. Rounds as before. Not all devices have this
  collective (`sharding.ragged_exchange`).
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
  gathered = tuple(a for a in split if kind == 'gather' or a == 'tensor')
  if gathered:
    x, gates, chosen = _gather(x, gates, chosen, gathered, recipe, shared)
  overflow = jnp.zeros((), jnp.int32)
  if kind == 'gather':
    expected = max(chosen.size // devices, 1)
    own = config.moe.experts // devices
    ids = chosen - jax.lax.axis_index('expert') * own
    ids = jnp.where((ids >= 0) & (ids < own), ids, own)
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
  """Returns the experts' sum [M, D] in x's dtype, and the device's overflow.

  The rows from one device to another have consecutive places in a stream, of
  which a round moves `capacity`. For `padded` each pair of devices has a stream
  of its own; for `ragged` all rows that one device receives are one.
  """
  sizes = jax.sharding.get_abstract_mesh().shape
  devices, total = sizes['expert'], chosen.size
  order = dispatch.sort(chosen, config.moe.experts)
  counts = jax.lax.all_gather(order.sizes, 'expert')  # [from, E]
  to = counts.reshape(devices, devices, -1).sum(-1)  # [from, to]
  places, most = jnp.zeros_like(to), total  # of each pair's first row
  if kind == 'ragged':
    places, most = jnp.cumsum(to, 0) - to, devices * total
  capacity = min(dispatch.capacity(-(-most // devices), 8), most)
  route = collectives.Route(kind, ('expert',), capacity)
  run_round = functools.partial(_round, route, config, recipe)
  rounds = None
  if capacity < most:
    # Every device takes part in every round.
    rounds = jax.lax.pmax((places + to).max(), tuple(sizes))
    rounds = sharding.pvary(-(-rounds // capacity))
  plan = order, counts, to, places
  out = _all_rounds(run_round, rounds, x, gates, chosen, ws, plan)
  late = to - jnp.clip(capacity - places, 0, to)
  return out, late[jax.lax.axis_index('expert')].sum()


def _round(route, config, recipe, i, x, gates, chosen, ws, plan):
  """Returns the sum over the i-th `capacity` places of each stream.

  It is [M, D] in float32. A row's gate travels with it: outputs come back
  multiplied, and the gates' gradient is computed where the outputs are, so
  that none is saved or sent again for it.
  """
  order, counts, to, places = plan
  capacity, me = route.capacity, jax.lax.axis_index('expert')
  own = counts.shape[1] // len(to)
  low = jnp.clip(i * capacity - places, 0, to)  # the first row that is moved
  sizes = jnp.clip((i + 1) * capacity - places, 0, to) - low
  first = jnp.cumsum(to, 1) - to + low
  device = chosen.reshape(-1) // own
  rank = order.positions - first[me, device]
  present = (rank >= 0) & (rank < sizes[me, device])
  here = jax.lax.dynamic_slice_in_dim(counts, me * own, own, 1)
  if route.kind == 'ragged':
    here = here.reshape(1, -1)
    assignments, rows = order.assignments, order.positions
    valid = present[assignments]
    target = jnp.clip(places + low - i * capacity, 0, capacity)
    there = first[me], sizes[me], target[me], sizes[:, me]
    back = target[:, me], sizes[:, me], first[:, me], sizes[me]
  else:
    there = back = None
    index = jnp.arange(capacity, dtype=jnp.int32)[None]
    valid = index < sizes[me][:, None]
    position = jnp.where(valid, first[me][:, None] + index, 0)
    assignments = order.assignments[position].reshape(-1)
    rows = jnp.where(present, device * capacity + rank, 0)
  layout = dispatch.Layout(assignments, valid.reshape(-1), rows, present)
  # A stream's rows are sorted by expert, in blocks of one sender each.
  ends = jnp.cumsum(here, 1)
  place = jnp.arange(capacity, dtype=jnp.int32) + i * capacity
  block = (ends[:, None] <= place[None, :, None]).sum(-1, dtype=jnp.int32)
  ids = jnp.where(block < ends.shape[1], block % own, own).reshape(-1, 1)

  row_gates = dispatch.permute(gates.reshape(-1, 1), layout)
  row_gates = collectives.move(row_gates, there, route)
  rows = dispatch.permute(x, layout)
  rows = collectives.send(rows, there, route, recipe)
  out = _compute(rows, row_gates, ids, ws, config, recipe)
  out = collectives.move(out, back, route._replace(capacity=chosen.size))
  return dispatch.unpermute(out, layout, chosen.shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _all_rounds(run_round, rounds, x, gates, chosen, ws, plan):
  """Returns the sum of all rounds, of the first alone if `rounds` is None.

  The first round is plain code, so that other work can overlap its collectives.
  The number of further rounds is a value, so they are a loop, which JAX cannot
  differentiate backward. The gradient below computes each round again, so that
  only one round's rows are in memory.
  """
  args = x, gates, chosen, ws, plan
  out = run_round(0, *args)
  if rounds is not None:
    add = lambda i, out: out + run_round(i, *args)
    with jax.named_scope(FURTHER):
      out = jax.lax.fori_loop(1, rounds, add, out)
  return out.astype(x.dtype)


def _all_rounds_forward(run_round, rounds, x, gates, chosen, ws, plan):
  out = _all_rounds(run_round, rounds, x, gates, chosen, ws, plan)
  return out, (rounds, x, gates, chosen, ws, plan)


def _all_rounds_backward(run_round, residuals, g):
  rounds, x, gates, chosen, ws, plan = residuals
  primals = x, gates, tuple(map(_trained, ws))
  g = g.astype(jnp.float32)

  def grads_of(i):
    def f(x, gates, masters):
      ws_of_f = tuple(map(_with, ws, masters))
      return run_round(i, x, gates, chosen, ws_of_f, plan)

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
