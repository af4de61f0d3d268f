"""One layer: x + MLA(norm(x)), then x + FFN(norm(x)); and stacks of them.

A stack is a scan over layers whose parameters have a leading layer axis, so
that neither the program nor its compile time grows with depth.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
from flax import linen as nn

from mla_moe import sharding
from mla_moe.config import ModelConfig
from mla_moe.model import (
  attention,
  gqa,
  indexer,
  layers,
  mla,
  moe,
  products,
  rope,
  router,
  sparse,
)
from mla_moe.types import Array, Float, Int

_STREAM = ('batch', 'length', 'stream')


class Functions(NamedTuple):
  """The functions of a layer that a caller may replace by others like them."""

  attend: Callable = attention.attend
  route: Callable = router.route


class Reports(NamedTuple):
  """Measurements of one layer, each None where there are none."""

  stats: moe.Stats | None  # of its experts
  routes: Array | None  # [B, T, K]: the router's choices, beside a replay
  index: sparse.Report | None  # of its indexer


class Block(nn.Module):
  """Pre-norm attention, then the experts if `routed`, else a dense FFN.

  The carry is the stream, and the sets of keys where layers share them
  (`indexer.Sets`). A `mask` of 0 leaves a token out of the stats.
  """

  config: ModelConfig
  routed: bool
  functions: Functions = Functions()

  @nn.compact
  def __call__(
    self,
    carry: tuple[Float[Array, 'B T D'], indexer.Sets | None],
    angles: rope.Angles,
    segments: Int[Array, 'B T'] | None,
    mask: Float[Array, 'B T'] | None,
    routes: Int[Array, 'B T K'] | None = None,
  ) -> tuple[tuple, Reports]:
    c, (x, sets) = self.config, carry
    norm = lambda name: layers.RMSNorm(c.norm_eps, name=name)
    h = sharding.constrain(norm('attention_norm')(x), *_STREAM)
    with jax.named_scope('attention'):
      core = self.functions.attend
      layer = gqa.Attention if c.attention == 'gqa' else mla.Attention
      attention_layer = layer(c, core, name='attention')
      y, report, sets = attention_layer(h, angles, segments, sets)
    x = x + sharding.constrain(y, *_STREAM)
    h = sharding.constrain(norm('ffn_norm')(x), *_STREAM)
    with jax.named_scope('ffn'):
      if self.routed:
        y, stats = moe.MoE(c, self.functions.route, name='ffn')(h, mask, routes)
      else:
        ffn = layers.FeedForward(
          c.dense_width, c.init_std, products.recipe(c), name='ffn'
        )
        y, stats = ffn(h), (None, None)
    return (x + sharding.constrain(y, *_STREAM), sets), Reports(*stats, report)


def remat_block(config: ModelConfig, length: int = 1) -> type[nn.Module]:
  """Returns Block, rematerialised as `config.compute.remat` says.

  `length` is that of the scan whose body it is. XLA unrolls a loop of one turn
  and would then merge the second computation with the first and keep its
  values, which `prevent_cse` forbids.
  """
  remat = config.compute.remat
  if remat == 'none':
    return Block
  policies = jax.checkpoint_policies
  policy = None
  if remat in ('latents', 'products'):
    policy = policies.save_only_these_names(*mla.SAVED, *moe.SAVED)
  if remat == 'products':
    for extra in (
      policies.dots_with_no_batch_dims_saveable,
      policies.save_only_these_names(products.FP8_OUTPUT),
    ):
      policy = policies.save_from_both_policies(extra, policy)
  return nn.remat(Block, prevent_cse=length == 1, policy=policy)


def stack(config: ModelConfig, routed: bool, functions: Functions) -> nn.Module:
  """Returns the MoE or the dense blocks as a scan; stats get a layer axis."""
  length, axis, types = config.dense_layers, 'layers', config.dsa.types
  types = types[length:] if routed else types[:length]
  if routed:
    length, axis = config.moe_layers, 'routed_layers'
  layers_of_stack = nn.scan(
    remat_block(config, length),
    length=length,
    variable_axes={'params': 0, 'router': 0},
    split_rngs={'params': True},
    in_axes=(*[nn.broadcast] * 3, 0),
    metadata_params={nn.PARTITION_NAME: axis},
  )
  run = indexer.expanded(layers_of_stack, types)
  return run(config, routed, functions, name='moe' if routed else 'dense')
