"""A layer of experts: the module, and the region in which it runs on a mesh.

A router chooses K of E small feed-forward networks (experts) for each token; a
shared expert is for every token (V3 equation 12). On a mesh, GSPMD would gather
all tokens to route them. So routing and experts run in a region (`shard_map`):
each device routes its own tokens, and `exchange` brings them to the devices of
their experts and back. Down from here: exchange, experts, dispatch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from mla_moe import fp8, sharding
from mla_moe.config import ModelConfig
from mla_moe.model import dispatch, exchange, layers, products, router, weights
from mla_moe.types import Array, Float, Int

SAVED = (*router.SAVED, *dispatch.SAVED)
# Logical axes of the experts' weights.
GATE_UP = ('experts', 'embed', 'gate_up', 'mlp')
PACKED = ('experts', 'embed', 'mlp')
DOWN = ('experts', 'mlp', 'embed')
_STREAM = ('batch', 'length', 'stream')


class Stats(NamedTuple):
  """Measurements of one MoE layer over all tokens of the batch."""

  load: Array  # [E] int32: number of tokens of each expert
  balance: Array  # [] float32: `router.balance`
  entropy: Array  # [] float32: `router.entropy`, nats
  overflow: Array  # [] int32: rows that `exchange` sent in later rounds


class MoE(nn.Module):
  """The shared expert plus the routed experts of one layer."""

  config: ModelConfig
  route: Callable = router.route

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'B T D'],
    mask: Float[Array, 'B T'] | None,
    routes: Int[Array, 'B T K'] | None = None,
  ) -> tuple[Float[Array, 'B T D'], tuple[Stats, Array | None]]:
    moe, std = self.config.moe, self.config.init_std
    dim, e, width = x.shape[-1], moe.experts, moe.width
    recipe = products.recipe(self.config)
    options = dict(std=std, recipe=recipe, dtype=x.dtype)
    weight = functools.partial(weights.weight, self, **options)
    w_router = weights.param(self, 'w_router', (dim, e), ('embed', None), std)
    ws = (
      weight('w_gate_up', (e, dim, 2, width), GATE_UP),
      weight('w_down', (e, width, dim), DOWN),
    )
    bias = None
    if moe.method == 'noaux_tc':
      zeros = nn.with_logical_partitioning(nn.initializers.zeros, ('norm',))
      make = lambda: zeros(None, (e,), jnp.float32)
      bias = self.variable('router', 'bias', make).value

    # Outside the region, so that it can be computed while tokens travel.
    shared = None
    if moe.shared:
      width = moe.shared * width
      shared = layers.FeedForward(width, std, recipe, name='shared')(x)
    args = x, mask, w_router, bias, ws, self.config, recipe, shared
    out, stats, chosen = routed(*args, self.route, routes)
    out = out if shared is None else out + shared
    return out, (stats, None if routes is None else chosen)


def routed(
  x: Float[Array, 'B T D'],
  mask: Float[Array, 'B T'] | None,
  w_router: Float[Array, 'D E'],
  bias: Float[Array, ' E'] | None,
  ws: tuple,
  config: ModelConfig,
  recipe: fp8.Recipe,
  shared: Float[Array, 'B T D'] | None = None,
  route: Callable = router.route,
  routes: Int[Array, 'B T K'] | None = None,
) -> tuple[Float[Array, 'B T D'], Stats, Int[Array, 'B T K']]:
  """Returns the sum of routed experts by gates, Stats, and the router's choice.

  `ws` are gate and up [E, D, 2, F] (or `packed`) and down [E, F, D]. A 0 in
  `mask` leaves a token out of the Stats. `shared`, not added here, is computed
  while tokens travel. `routes` are those of `router.replay`.
  """
  moe = config.moe
  axes = exchange.token_axes(x.shape, _STREAM)
  ws_axes = (GATE_UP if ws[0].ndim == 4 else PACKED), DOWN
  splits = tuple(map(weights.fsdp_split, ws, ws_axes))

  def region(x, mask, w_router, bias, ws, shared, routes):
    b, t, dim = x.shape
    flat = x.reshape(b * t, dim)
    flat_mask = None if mask is None else mask.reshape(-1)
    with jax.named_scope('route'):
      own = routing = route(flat, w_router, bias, moe)
      if routes is not None:
        routing = router.replay(own, routes.reshape(b * t, -1), moe)
    ws = weights.packed(ws[0]), ws[1]
    ws = tuple(map(weights.gather, ws, splits, (x.dtype,) * len(ws)))
    with jax.named_scope('experts'):
      args = flat, routing, ws, axes, config, recipe, shared
      out, overflow = exchange.exchange(*args)
    by_row = lambda x: x.reshape(b, t, x.shape[-1])
    scores, counted = by_row(routing.scores), router.counted(routing, moe)
    balance = router.balance(scores, by_row(counted), mask, axes.length)
    load = router.load(routing.chosen, moe.experts, flat_mask)
    stats = Stats(
      load=sharding.psum(load, axes.tokens),
      balance=sharding.pmean(balance, axes.batch),
      entropy=router.entropy(routing.scores, flat_mask, axes.tokens),
      overflow=overflow,
    )
    return out.reshape(b, t, dim), stats, by_row(own.chosen)

  specs = (
    sharding.array_spec(_STREAM, x),
    sharding.array_spec(_STREAM[:2], mask),
    sharding.array_spec((None, None), w_router),
    sharding.array_spec((None,), bias),
    tuple(map(weights.specs, ws, ws_axes)),
    sharding.array_spec(_STREAM, shared),
    sharding.array_spec(_STREAM, routes),
  )
  outputs = specs[0], sharding.PartitionSpec(), specs[0]
  args = x, mask, w_router, bias, ws, shared, routes
  return sharding.shard_map(region, specs, outputs)(*args)
