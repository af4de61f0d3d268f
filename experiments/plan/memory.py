"""The bytes that a training step holds on one device, by arithmetic.

The state's bytes come from the shapes and names of `state.abstract_state` and
from the table `sharding.RULES`, so they are exact for any mesh, also for one
that does not exist. The rest is arithmetic on the config: the backward pass's
residuals under each `remat` policy, the largest layer at work, the weights that
FSDP has gathered, the blocks of logits. The surprising part is how little of it
is activations: one layer of experts, gathered and with its float32 gradient,
outweighs the residuals of all other layers.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import numpy as np
from flax import linen as nn

from mla_moe import cost, sharding
from mla_moe.config import Config, DataConfig, MeshConfig, ModelConfig
from mla_moe.train import losses, stage
from mla_moe.types import PyTree

from .. import chips
from ..adapters import lora
from ..adapters.state import abstract_state
from ..rl import teachers
from . import rollout

WIDTH = {'float32': 4, 'bfloat16': 2}  # bytes of a number


@dataclasses.dataclass(frozen=True)
class Footprint:
  """Bytes on one device; `total` are those of its fullest moment.

  With reinforcement that is an update or a rollout, which has decoding and
  cache in the place of all from gradients to logits.

  Attributes:
    parameters: float32, as gradients and optimizer are; adapters alone, if
      there are any.
    gradients: summed over micro-batches, and over a pipeline's turns.
    optimizer: its moments.
    copies: of the parameters, as narrow as the products read them. XLA makes
      those of all layers at once, before their loop.
    residuals: of all layers, from the forward pass for the backward pass.
    working: the largest layer, going backward; on a TPU with the floats of its
      frozen experts.
    gathered: weights brought together from the other shards, and their gradient
      before it is scattered.
    logits: the loss's blocks.
    reference: the policy from which reinforcement measures its divergence.
    teachers: their weights, where they distil into the policy.
    routes: the rollout's experts of an update's tokens, as `rl.replay` asks.
    decoding: the weights in the layout of decoding.
    cache: the latents of the answers that are drawn at a time.
    base: the frozen weights that adapters are trained over.
  """

  parameters: int
  gradients: int
  optimizer: int
  copies: int
  residuals: int
  working: int
  gathered: int
  logits: int
  reference: int = 0
  teachers: int = 0
  routes: int = 0
  decoding: int = 0
  cache: int = 0
  base: int = 0

  @property
  def state(self) -> int:
    """Bytes that stay from step to step."""
    own = self.parameters + self.optimizer + self.base
    return own + self.reference + self.teachers

  @property
  def rollout(self) -> int:
    """Bytes besides the state while answers are drawn."""
    return self.decoding + self.cache

  @property
  def update(self) -> int:
    """Bytes besides the state in a training step."""
    everything = sum(dataclasses.astuple(self))
    return everything - self.state - self.rollout

  @property
  def total(self) -> int:
    return self.state + max(self.update, self.rollout)


def training_bytes_per_device(config: Config) -> dict[str, int]:
  """Returns the bytes of a device's parameters, gradients and AdamW moments.

  All of them are float32; gradients and moments are of the trained parameters.
  Parameters are split over fsdp and tensor, experts and all matrices that no
  region gathers over expert, too, and all of the MoE layers over stage; zero1
  splits the moments over data. Activations are not counted.
  """
  counts, mesh, model = cost.parameters(config), config.mesh, config.model
  expert = 3 * model.dim * model.moe.width
  mtp_routed = model.mtp.depth * model.moe.experts * expert
  mtp_routed *= model.moe_layers > 0
  # A MoE layer without its experts: attention, norms, router, shared.
  attention = (counts.attention + counts.norms - model.dim) // model.layers
  staged = model.moe_layers * attention + counts.shared + counts.router
  rest = counts.total + counts.mtp - counts.routed - mtp_routed - staged
  in_stage, outside = dense_parameters(config)
  split = (counts.routed + in_stage) // mesh.stage + mtp_routed + outside
  whole = (staged - in_stage) // mesh.stage + rest - outside
  here = (split // mesh.expert + whole) // (mesh.fsdp * mesh.tensor)
  replicas = mesh.data if mesh.states == 'zero1' else 1
  trained = here
  if config.optim.trains == 'indexer':
    full = model.layers - model.dsa.types.count('shared')
    trained = counts.indexer * (full + model.mtp.depth) // full // mesh.fsdp
  return {
    'parameters': 4 * here,
    'gradients': 4 * trained,
    'optimizer': 8 * trained // replicas,
  }


def dense_parameters(config: Config) -> tuple[int, int]:
  """Returns the parameters that GSPMD gathers, over fsdp and expert.

  They are those of MoE layers, and those of all others: attention without the
  expansions of latents, shared experts and dense layers.
  """
  model, counts = config.model, cost.parameters(config)
  mla, depth = model.mla, model.mtp.depth
  expansion = 0
  if model.attention == 'mla':
    expansion = mla.kv_rank * mla.heads * (mla.nope_dim + mla.value_dim)
  attention = counts.attention // model.layers - expansion
  wide = (3 * model.dim * model.dense_width, 0)
  if model.moe_layers:
    wide = (0, counts.shared // model.moe_layers)
  in_stage = model.moe_layers * attention + counts.shared
  outside = (model.dense_layers + depth) * attention + counts.dense
  return in_stage, outside + depth * sum(wide)


def footprint(
  config: Config,
  layout: PyTree | None = None,
  slice_: chips.Slice | None = None,
) -> Footprint:
  """Returns the footprint of a config on its mesh.

  Args:
    config: of the model, its training and its mesh.
    layout: `abstract_state`'s. Without it the state counts as split evenly, by
      the arithmetic of `cost`.
    slice_: the devices of the mesh; by them 'auto' is chosen.

  Gradients are there once for the step and, with more than one micro-batch,
  once more for the micro-batch that is added. A pipeline's layers have them
  once more for the turn that is added.
  """
  if layout is None and config.model.lora.rank:
    layout = abstract_state(config)
  if layout is None:
    even = training_bytes_per_device(config)
    parameters, optimizer = even['parameters'], even['optimizer']
    staged = gradients = even['gradients']
  else:
    parameters = state_bytes((layout.params, layout.router), config.mesh)
    own = stage.trained(layout.params, config.optim)
    gradients = state_bytes(own, config.mesh)
    staged = state_bytes(own.get('moe', {}), config.mesh)
    zero1 = config.mesh.states == 'zero1'
    table = sharding.ZERO1 if zero1 else sharding.RULES
    optimizer = state_bytes(layout.opt, config.mesh, table)
  micro = config.data.micro_batch or config.data.batch_size
  sums = 2 if micro < config.data.batch_size else 1
  reinforced = {}
  if config.rl.task:
    # Decoding has the matrices whole along expert.
    mesh = config.mesh
    others = (mesh.expert - 1) / (mesh.expert * mesh.fsdp * mesh.tensor)
    whole = int(4 * sum(dense_parameters(config)) * others)
    reinforced = {
      'reference': parameters if config.rl.beta else 0,
      'teachers': teachers_bytes(config, parameters),
      'routes': rollout.record_bytes(config, config.data.batch_size)
      // rollout.shards(config.mesh),
      'decoding': decoding_bytes(config, parameters + whole),
      'cache': rollout.cache_bytes(config),
    }
  return Footprint(
    parameters=parameters,
    gradients=sums * gradients + (staged if config.mesh.stage > 1 else 0),
    optimizer=optimizer,
    copies=copies_bytes(config, parameters),
    residuals=residual_bytes(config),
    working=working_bytes(config, slice_),
    gathered=gathered_bytes(config),
    logits=logits_bytes(config),
    base=base_bytes(config),
    **reinforced,
  )


def base_bytes(config: Config) -> int:
  """Returns bytes on one device of the frozen weights under adapters."""
  model = config.model
  if not model.lora.rank:
    return 0
  return state_bytes(lora.boxed_base(model, model.dtype), config.mesh)


def decoding_bytes(config: Config, parameters: int) -> int:
  """Returns a device's bytes of the weights in the layout of decoding.

  Over a frozen base the routed experts stay codes, which one device reads
  where they are, and a mesh copies. All other matrices are floats there.
  """
  model, mesh = config.model, config.mesh
  if not model.lora.rank:
    return rollout.weights_bytes(config, parameters)
  counts = cost.parameters(config)
  floats = (counts.total - counts.routed) * WIDTH[model.dtype]
  copied = expert_codes_bytes(config) if mesh.devices > 1 else 0
  return floats // (mesh.fsdp * mesh.tensor) + copied


def expert_codes_bytes(config: Config) -> int:
  """Returns a device's bytes of the routed experts of a frozen base."""
  model = config.model
  if not (model.lora.rank and model.moe_layers):
    return 0
  ffn = lora.boxed_base(model, model.dtype)['moe']['ffn']
  return state_bytes([ffn['w_gate_up'], ffn['w_down']], config.mesh)


def teachers_bytes(config: Config, parameters: int) -> int:
  """Returns a device's bytes of the weights of all teachers.

  One whose folder is not here counts like the policy: as `parameters`, or as
  adapters and their base.
  """
  total = 0
  for name, *_ in config.rl.teachers:
    model, dtype = teachers.shape_of(name, config)
    size = parameters
    if model != config.model:
      size = state_bytes(_weights(model, config.data), config.mesh)
    of_base = base_bytes(dataclasses.replace(config, model=model))
    total += size * WIDTH[dtype] // 4 + of_base
  return total


@functools.lru_cache(maxsize=16)
def _weights(model: ModelConfig, data: DataConfig) -> PyTree:
  """Returns the shapes of a model's parameters, and of its routers."""
  layout = abstract_state(Config(model=model, data=data))
  return layout.params, layout.router


def state_bytes(
  boxed: PyTree,
  mesh: MeshConfig,
  table: tuple = sharding.RULES,
) -> int:
  """Returns bytes on one device of boxed shapes that a table lays out."""
  is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
  over = {axis: getattr(mesh, axis) for axis in sharding.AXES}
  total = 0
  for leaf in jax.tree.leaves(boxed, is_leaf=is_box):
    names, value = ((), leaf) if not is_box(leaf) else (leaf.names, leaf.value)
    names = sharding.fitted(names, value.shape, over, table)
    spec = sharding.spec(names, table)
    sizes = list(value.shape)
    for i, axes in enumerate(spec):
      axes = (axes,) if isinstance(axes, str) else axes or ()
      sizes[i] = -(-sizes[i] // math.prod(getattr(mesh, a) for a in axes))
    total += math.prod(sizes) * np.dtype(value.dtype).itemsize
  return total


def copies_bytes(config: Config, parameters: int) -> int:
  """Returns bytes of a device's float32 `parameters` as the products read them.

  In FP8 these are the eight-bit values for the products forward and backward.
  """
  width = WIDTH[config.model.dtype]
  return parameters * width // 4 if width < 4 else 0


def tokens_per_device(config: Config) -> int:
  """Returns the tokens of one micro-batch on one device, but for a pipeline's.

  Only `tensor` has the same tokens on all of its devices.
  """
  data, mesh = config.data, config.mesh
  rows = data.micro_batch or data.batch_size
  return rows * data.seq_len * mesh.tensor // mesh.devices


def turns(mesh: MeshConfig) -> tuple[int, int]:
  """Returns the micro-batches M of a pipeline, and its M + S - 1 turns.

  A pipeline is filled and emptied once in each micro-batch of the step; without
  stages both are 1. In each turn a stage computes, and keeps residuals of,
  S / M times as many tokens as a device has outside the pipeline.
  """
  micro_batches = mesh.pipeline or mesh.stage
  if mesh.stage == 1:
    micro_batches = 1
  return micro_batches, micro_batches + mesh.stage - 1


def residuals_per_token(config: Config) -> dict[str, float]:
  """Returns the residuals of one 'dense' and one 'moe' layer, numbers a token.

  They are numbers of the activations' width. Every policy keeps the stream at
  the layer's entry; 'latents' the names of `mla.SAVED`; 'products' also those
  products of weights that something going backward reads (not the last of a
  layer, and no grouped product: jax's policy does not see it).
  """
  model, mesh = config.model, config.mesh
  stream = model.dim / mesh.tensor  # split along its length
  if model.compute.remat == 'none':
    dense, routed = _all_activations(config)
    return {'dense': stream + dense, 'moe': stream + routed}
  mla, moe, tensor = model.mla, model.moe, mesh.tensor
  heads = mla.heads / tensor
  width = WIDTH[model.dtype]
  log_sum = heads * 4 / width  # the softmax's, float32
  latents = mla.query_rank + cached_here(config)
  latents += heads * mla.value_dim + log_sum + set_numbers(config)
  order = 4 * moe.top_k * 4 / width  # experts, slots, places, gates: 32 bits
  attention = model.dim + heads * (mla.nope_dim + mla.rope_dim)
  if model.attention == 'mla':
    attention += mla.query_rank + mla.kv_rank
    attention += heads * (mla.nope_dim + mla.value_dim)
  if mesh.devices == 1:  # a CPU's down-projections are one, and so are GQA's
    is_mla = model.attention == 'mla'
    attention += mla.rope_dim if is_mla else cached_here(config)
  shared = moe.shared * moe.width
  dense, routed = {
    'full': (0.0, 0.0),
    'latents': (latents, latents + order),
    'products': (
      latents + attention + 2 * model.dense_width / tensor,
      latents
      + order
      + attention
      + 2 * shared / tensor
      + moe.experts * 4 / width,
    ),
  }[model.compute.remat]
  return {'dense': stream + dense, 'moe': stream + routed}


def cached_here(config: Config) -> float:
  """Returns the numbers that a device has of a token's keys and values.

  A latent is whole on every device along tensor, GQA's heads are split.
  """
  numbers = sum(cost.cached(config.model))
  is_mla = config.model.attention == 'mla'
  return numbers if is_mla else numbers / config.mesh.tensor


def set_numbers(config: Config) -> float:
  """Returns the numbers of a token's set of keys, of the activations' width."""
  dsa, length = config.model.dsa, config.data.seq_len
  if not dsa.heads or dsa.attention == 'dense' or dsa.topk >= length:
    return 0.0
  return dsa.topk * 4 / WIDTH[config.model.dtype]  # int32


def _all_activations(config: Config) -> tuple[float, float]:
  """Returns the numbers a token that a dense and a MoE layer make forward."""
  model, tensor = config.model, config.mesh.tensor
  mla, moe = model.mla, model.moe
  query = mla.nope_dim + mla.rope_dim
  attention = 2 * model.dim + 2 * mla.query_rank + set_numbers(config)
  attention += cached_here(config)
  if model.attention == 'mla':
    attention += mla.kv_rank
  if model.dsa.heads:  # on every device along tensor
    attention += (model.dsa.heads + 1) * model.dsa.dim + model.dsa.heads
  heads = mla.heads / tensor
  attention += heads * (2 * query + 2 * mla.value_dim)
  if model.attention == 'mla':
    attention += heads * mla.nope_dim
  dense = 3 * model.dense_width / tensor + model.dim
  rows = moe.top_k * (2 * model.dim + 3 * moe.width / tensor)
  shared = 3 * moe.shared * moe.width / tensor + model.dim
  return attention + dense, attention + rows + shared


def residual_bytes(config: Config) -> int:
  """Returns bytes of all layers' residuals on one device.

  A pipeline's turns without a micro-batch leave residuals, too, and going
  backward those of one turn are there twice: XLA copies them out of the stack
  of all turns'.
  """
  model = config.model
  numbers = residuals_per_token(config)
  depth = model.mtp.depth
  micro_batches, times = turns(config.mesh)
  times += config.mesh.stage > 1
  routed = model.moe_layers * times / micro_batches
  routed += depth * (model.moe_layers > 0)
  dense = model.dense_layers + depth * (model.moe_layers == 0)
  per_token = dense * numbers['dense'] + routed * numbers['moe']
  return int(per_token * tokens_per_device(config) * WIDTH[model.dtype])


def exchange_of(config: Config) -> str:
  """Returns how tokens reach other devices' experts; '' without any.

  It is that of `model.exchange`; 'ragged' stands for 'padded', too, under auto.
  """
  kind, expert = config.model.compute.exchange, config.mesh.expert
  if expert == 1:
    return ''
  if kind == 'auto':
    return 'gather' if expert <= config.model.moe.top_k else 'ragged'
  return kind


def expert_floats_bytes(config: Config, slice_: chips.Slice | None) -> int:
  """Returns bytes of a layer's frozen experts as floats (`adapters.loop`).

  Grouped products read all of a device's, as on a TPU. The loop has one.
  """
  model, mesh, impl = config.model, config.mesh, config.model.compute.experts
  if not model.lora.rank or model.base == 'trained' or not model.moe_layers:
    return 0
  if impl == 'auto' and slice_ and not slice_.gpu:
    impl = 'ragged'
  if impl != 'ragged':
    return 0
  routed = cost.parameters(model).routed // model.moe_layers
  return routed * WIDTH[model.dtype] // (mesh.expert * mesh.tensor)


def working_bytes(config: Config, slice_: chips.Slice | None = None) -> int:
  """Returns bytes of the largest layer computed again, and of its gradients.

  Experts hold their rows twice: the backward pass has values and gradients.
  Where tokens are gathered, those of the whole group are here, too, and the
  outputs of this device's experts for each of them, float32. A pipeline has the
  stream of all its rows besides: as it enters, as it leaves, and of each turn.
  """
  model, mesh = config.model, config.mesh
  dense, routed = _all_activations(config)
  width = WIDTH[model.dtype]
  tokens = tokens_per_device(config)
  micro_batches, times = turns(mesh)
  in_turn = tokens * mesh.stage // micro_batches
  if model.mtp.depth:  # whose layers are no part of the pipeline
    in_turn = max(in_turn, tokens)
  if not model.moe_layers:
    return int(2 * dense * tokens * width)
  most = max(dense * tokens if model.dense_layers else 0.0, routed * in_turn)
  gathered = streams = 0
  if exchange_of(config) == 'gather':
    gathered = mesh.expert * in_turn * model.dim * (width + 4)
  if mesh.stage > 1:
    stream = mesh.stage * tokens * model.dim * width / mesh.tensor
    streams = (2 + times / micro_batches) * stream
  floats = expert_floats_bytes(config, slice_)
  return int(2 * most * width + gathered + streams) + floats


def gathered_bytes(config: Config) -> int:
  """Returns bytes of a layer's weights gathered over fsdp, and their gradient.

  It is the largest layer. The copy is in the activations' width (eight bits in
  FP8), the gradient float32 until it is scattered; the next layer's copy is on
  its way already.
  """
  model, mesh = config.model, config.mesh
  if mesh.fsdp * mesh.expert == 1:
    return 0
  width = 1 if model.precision != 'bf16' else WIDTH[model.dtype]
  if model.lora.rank:  # codes and scales, which have no gradient
    stacks = frozen_stacks(model)
    whole = dataclasses.replace(mesh, fsdp=1)
    each = [
      state_bytes(stack, whole) // count for stack, count in stacks.values()
    ]
    return 2 * max(each)
  parameters = layer_parameters(config)
  if mesh.fsdp == 1:  # over expert come matrices alone that no region gathers
    counts = cost.parameters(model)
    layers = model.moe_layers or 1
    parameters -= counts.routed / layers / mesh.expert / mesh.tensor
  return int(parameters * (2 * width + 4))


def frozen_stacks(model: ModelConfig) -> dict[str, tuple[PyTree, int]]:
  """Returns the boxed frozen weights of each stack of layers, and its layers.

  An MTP module is a stack of one.
  """
  base = lora.boxed_base(model, model.dtype)
  counts = {'dense': model.dense_layers, 'moe': model.moe_layers}
  stacks = {k: v for k, v in base.items() if k in counts or 'mtp_' in k}
  return {k: (v, counts.get(k, 1)) for k, v in stacks.items()}


def layer_parameters(config: Config) -> float:
  """Returns the parameters of the largest layer that one device works with."""
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
  """Returns bytes of a block of logits, its gradient, and the head's gradient.

  The logits are float32 and their gradient has the activations' width; the
  head's gradient is whole on every device until it is scattered.
  """
  model = config.model
  tokens = tokens_per_device(config) * (1 + model.mtp.depth)
  block = min(model.vocab, losses.BLOCK)
  head = model.vocab * model.dim * 4 // config.mesh.tensor
  head *= model.lora.rank == 0  # a frozen one has no gradient
  return tokens * block * (4 + WIDTH[model.dtype]) + head
