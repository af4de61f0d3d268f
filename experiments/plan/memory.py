"""What a training step holds on each device and sends between them.

The state's bytes come from the shapes and names of `state.abstract_state` and
from the table `sharding.RULES`, so they are exact for any mesh, also one that
does not exist. What a step holds besides is arithmetic on the config: what the
backward pass keeps under each `remat` policy, the largest layer at work, the
weights that FSDP has gathered, the blocks of logits. The surprising part is how
little of it is activations: one layer of experts, gathered and with its float32
gradient, outweighs what all other layers keep.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np
from flax import linen as nn

from mla_moe import cost, sharding
from mla_moe.config import Config, MeshConfig
from mla_moe.train import losses
from mla_moe.types import PyTree

_WIDTH = {'float32': 4, 'bfloat16': 2}


@dataclasses.dataclass(frozen=True)
class Footprint:
  """Bytes on one device; `total` is their sum.

  parameters, gradients and optimizer are float32. copies: the parameters as
  narrow as the products read them, which XLA makes of all layers at once,
  before their loop. saved: what all layers keep for the backward pass; working:
  the largest layer, going backward; gathered: weights brought together from the
  other shards, and their gradient before it is scattered; logits: the loss's
  blocks.
  """

  parameters: int
  gradients: int
  optimizer: int
  copies: int
  saved: int
  working: int
  gathered: int
  logits: int

  @property
  def total(self) -> int:
    return sum(dataclasses.astuple(self))


def footprint(config: Config, layout: PyTree | None = None) -> Footprint:
  """The footprint of a config on its mesh; `layout` is `abstract_state`'s.

  Without a layout the state is taken to be split evenly, which is what the
  arithmetic of `cost` says. Gradients are held once for the step and, with
  more than one micro-batch, once more for the one that is added.
  """
  if layout is None:
    even = cost.training_bytes_per_device(config)
    parameters, optimizer = even['parameters'], even['optimizer']
  else:
    parameters = state_bytes((layout.params, layout.router), config.mesh)
    zero1 = config.mesh.states == 'zero1'
    table = sharding.ZERO1 if zero1 else sharding.RULES
    optimizer = state_bytes(layout.opt, config.mesh, table)
  micro = config.data.micro_batch or config.data.batch_size
  sums = 2 if micro < config.data.batch_size else 1
  return Footprint(
    parameters=parameters,
    gradients=sums * parameters,
    optimizer=optimizer,
    copies=copies_bytes(config, parameters),
    saved=saved_bytes(config),
    working=working_bytes(config),
    gathered=gathered_bytes(config),
    logits=logits_bytes(config),
  )


def state_bytes(
  boxed: PyTree,
  mesh: MeshConfig,
  table: tuple = sharding.RULES,
) -> int:
  """Bytes on one device of a tree of boxed shapes, laid out by a table."""
  is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
  total = 0
  for leaf in jax.tree.leaves(boxed, is_leaf=is_box):
    names, value = ((), leaf) if not is_box(leaf) else (leaf.names, leaf.value)
    spec = sharding.spec(names, table)
    sizes = list(value.shape)
    for i, axes in enumerate(spec):
      axes = (axes,) if isinstance(axes, str) else axes or ()
      sizes[i] = -(-sizes[i] // math.prod(getattr(mesh, a) for a in axes))
    total += math.prod(sizes) * np.dtype(value.dtype).itemsize
  return total


def copies_bytes(config: Config, parameters: int) -> int:
  """Of a device's float32 `parameters`, as the products read them.

  In FP8 these are the eight-bit values for the products forward and backward.
  """
  wide = _WIDTH[config.model.dtype]
  return parameters * wide // 4 if wide < 4 else 0


def tokens_per_device(config: Config) -> int:
  """Tokens of one micro-batch on one device."""
  data, mesh = config.data, config.mesh
  rows = data.micro_batch or data.batch_size
  shards = mesh.data * mesh.fsdp * mesh.expert * mesh.context
  return rows * data.seq_len // shards


def saved_numbers(config: Config) -> dict[str, float]:
  """Numbers a token that one layer keeps for the backward pass, by its kind.

  'dense' and 'moe' layers; numbers of the activations' width. Every policy
  keeps the stream at the layer's entry; 'latents' what `mla.SAVED` names;
  'products' also those products of weights that something going backward reads
  (not the last of a layer, and no grouped product: jax does not count it).
  """
  model, mesh = config.model, config.mesh
  mla, moe, t = model.mla, model.moe, mesh.tensor
  heads = mla.heads / t
  query = mla.nope_dim + mla.rope_dim
  wide = _WIDTH[model.dtype]
  stream = model.dim / t  # split along its length
  lse = heads * 4 / wide
  latents = mla.query_rank + mla.kv_rank + mla.rope_dim
  latents += heads * mla.value_dim + lse
  order = 3 * moe.top_k * 4 / wide  # experts, slots, places: int32
  attention = mla.query_rank + mla.kv_rank + model.dim
  attention += heads * (query + mla.nope_dim + mla.value_dim)
  if mesh.devices == 1:
    attention += mla.rope_dim  # a CPU's down-projections are one
  shared = moe.shared * moe.width
  kept = {
    'full': (0.0, 0.0),
    'latents': (latents, latents + order),
    'products': (
      latents + attention + 2 * model.dense_width / t,
      latents + order + attention + 2 * shared / t + moe.experts * 4 / wide,
    ),
  }
  if model.compute.remat == 'none':
    dense, routed = _everything(config)
  else:
    dense, routed = kept[model.compute.remat]
  return {'dense': stream + dense, 'moe': stream + routed}


def _everything(config: Config) -> tuple[float, float]:
  """Numbers a token that one dense and one MoE layer make going forward."""
  model, t = config.model, config.mesh.tensor
  mla, moe = model.mla, model.moe
  query = mla.nope_dim + mla.rope_dim
  attention = 2 * model.dim + 2 * (mla.query_rank + mla.kv_rank)
  attention += mla.rope_dim
  attention += mla.heads / t * (2 * query + mla.nope_dim + 2 * mla.value_dim)
  dense = 3 * model.dense_width / t + model.dim
  rows = moe.top_k * (2 * model.dim + 3 * moe.width / t)
  shared = 3 * moe.shared * moe.width / t + model.dim
  return attention + dense, attention + rows + shared


def saved_bytes(config: Config) -> int:
  """What all layers keep on one device between forward and backward."""
  model, mesh = config.model, config.mesh
  numbers = saved_numbers(config)
  depth = model.mtp.depth
  stages = max(mesh.stage, 1)
  routed = model.moe_layers / stages + depth * (model.moe_layers > 0)
  dense = model.dense_layers + depth * (model.moe_layers == 0)
  per_token = dense * numbers['dense'] + routed * numbers['moe']
  wide = _WIDTH[model.dtype]
  return int(per_token * tokens_per_device(config) * wide)


def working_bytes(config: Config) -> int:
  """The largest layer made again, and its gradients, on one device.

  Experts hold their rows twice: the backward pass has values and gradients.
  Where tokens are gathered, those of the whole group are here, too, and what
  this device's experts have to say to each, float32.
  """
  model = config.model
  dense, routed = _everything(config)
  most = max(dense if model.dense_layers else 0.0, routed)
  if not model.moe_layers:
    most = dense
  wide = _WIDTH[model.dtype]
  tokens, group = tokens_per_device(config), config.mesh.expert
  gathered = 0
  if model.moe_layers and 1 < group <= model.moe.top_k:
    gathered = group * tokens * model.dim * (wide + 4)
  return int(2 * most * tokens * wide + gathered)


def gathered_bytes(config: Config) -> int:
  """The largest layer's weights, gathered over fsdp, and their gradient.

  The copy is in the activations' width (eight bits in FP8), the gradient
  float32 until it is scattered; the next layer's copy is on its way already.
  """
  model, mesh = config.model, config.mesh
  if mesh.fsdp == 1:
    return 0
  size = layer_parameters(config)
  wide = 1 if model.precision != 'bf16' else _WIDTH[model.dtype]
  return int(size * (2 * wide + 4))


def layer_parameters(config: Config) -> float:
  """Parameters of the largest layer that one device works with."""
  model, mesh = config.model, config.mesh
  counts = cost.parameters(model)
  attention = counts.attention / model.layers
  each = []
  if model.dense_layers:
    each.append(counts.dense / model.dense_layers)
  if model.moe_layers:
    routed = counts.routed / model.moe_layers / mesh.expert
    each.append(routed + counts.shared / model.moe_layers)
  return (max(each) + attention) / mesh.tensor


def logits_bytes(config: Config) -> int:
  """A block of logits and of their gradient, and the head's gradient.

  float32 and the activations' width; the head's gradient is whole on every
  device until the shards of it are taken.
  """
  model = config.model
  tokens = tokens_per_device(config) * (1 + model.mtp.depth)
  block = min(model.vocab, losses.BLOCK)
  wide = _WIDTH[model.dtype]
  head = model.vocab * model.dim * 4 // config.mesh.tensor
  return tokens * block * (4 + wide) + head


def bubble(stages: int, micro_batches: int) -> float:
  """Returns the fraction of a step that a stage waits: (S-1) / (M+S-1)."""
  return (stages - 1) / (micro_batches + stages - 1)


def traffic(config: Config) -> dict[str, float]:
  """Bytes that one device receives in a step, over each axis of the mesh.

  fsdp: weights forward and again backward, gradients scattered, and the
  embedding's rows; data: gradients summed over replicas (those of more than
  this axis, too); expert: each token's
  rows out and back, forward and backward, and out once more under `remat`, by
  the cheaper of an all-to-all of its K copies and an all-gather with a
  reduce-scatter; tensor: the stream's sums after embedding, attention and FFN.
  Weights that are gathered inside a region (experts, the latents' expansions,
  the head) have float32 gradients, those left to GSPMD gradients as wide as
  activations. Every micro-batch pays all of it.
  """
  model, mesh, data = config.model, config.mesh, config.data
  wide = _WIDTH[model.dtype]
  weights = 1 if model.precision != 'bf16' else wide
  micro = data.micro_batch or data.batch_size
  times = data.batch_size / micro
  tokens = tokens_per_device(config)
  counts = cost.parameters(config)
  depth = model.mtp.depth
  routed_layers = model.moe_layers + depth * (model.moe_layers > 0)
  expert = 3 * model.dim * model.moe.width * model.moe.experts
  routed = routed_layers * expert / (mesh.expert * mesh.tensor)
  blocks = model.layers + depth
  mla = model.mla
  up = blocks * mla.kv_rank * mla.heads * (mla.nope_dim + mla.value_dim)
  table = model.vocab * model.dim
  rest = counts.total + counts.mtp - routed_layers * expert - up
  rest -= counts.embedding + counts.head
  up, table, rest = (n / mesh.tensor for n in (up, table, rest))
  others = lambda n: (n - 1) / n
  twice = 1 if model.compute.remat == 'none' else 2
  stream = tokens * model.dim * wide
  rows = 2 * (1 + depth) * stream  # of the embedding, and their gradient
  once = 4 * (up + table) + wide * rest  # gradients that experts are not in
  gather = twice * weights * (routed + up + rest) + wide * table
  gather += 4 * routed + once + rows
  # The experts' replicas are the data axis; the rest's also the expert axis,
  # and both are one sum.
  once += 4 * table  # the embedding's: summed, but never scattered
  summed = 2 * 4 * routed / mesh.fsdp * others(mesh.data)
  also = 2 * once / mesh.fsdp * others(mesh.data * mesh.expert)
  if mesh.data > 1:
    summed, also = summed + also, 0.0
  # Tokens that are split over tensor, too, are gathered over both axes at once.
  passes = routed_layers * (4 if model.compute.remat == 'none' else 5)
  few = mesh.expert <= model.moe.top_k
  share = mesh.expert - 1 / mesh.tensor
  share = share if few else model.moe.top_k * others(mesh.expert)
  exchange = passes * stream * share
  aside = 0.0 if few else passes * stream * others(mesh.tensor)
  if mesh.expert == 1:
    exchange, aside = 0.0, exchange
  sums = 2 * stream * others(mesh.tensor)
  sums *= blocks * 2 * (1 + twice) + 1 + depth
  return {
    'fsdp': times * gather * others(mesh.fsdp),
    'data': times * summed,
    'expert': times * (exchange + also),
    'tensor': times * (sums + aside),
  }
