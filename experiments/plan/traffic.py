"""The bytes that a device receives in a training step, over each mesh axis.

fsdp brings weights forward and again backward, scatters gradients, and brings
the embedding's rows. data sums gradients over replicas. expert sends each
token's rows out and back, forward and backward, and brings its parts of those
weights that no region gathers. tensor sums the stream after
embedding, attention and FFN. context brings the other parts' latents and index
keys. stage hands the stream on from turn to turn. Every micro-batch pays all of
it, and in a pipeline the MoE layers pay for their weights and gradients in
every turn. A ring of n devices brings each of them (n-1)/n of a gathered or
scattered array, and twice that of a sum. Where the indexers alone are trained,
nothing else has a gradient: the stream goes forward once. Frozen weights travel
as their codes, and have no gradients: adapters have.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from typing import NamedTuple

from mla_moe import cost, sharding
from mla_moe.config import Config, ModelConfig

from ..adapters import lora
from . import memory


def by_axis(config: Config) -> dict[str, float]:
  """Returns bytes that one device receives in a step, over each axis.

  A sum over several axes at once counts as the first one's, in the order of
  `sharding.AXES`.
  """
  one = collections.Counter(dict.fromkeys(sharding.AXES, 0.0))
  for part in _parts(config):
    for axis, size in _of_part(config, part).items():
      one[axis] += part.turns * size
  one['fsdp'] += _embedded(config)
  one.update(_adapted(config))  # += would drop axes without bytes
  one['tensor'] += _summed_around(config)
  one['stage'] += _handed_on(config)
  data = config.data
  micro_batches = data.batch_size / (data.micro_batch or data.batch_size)
  return {axis: micro_batches * size for axis, size in one.items()}


class _Part(NamedTuple):
  """Layers that compute the same tokens, as one device has them.

  Attributes:
    tokens: that they compute at a time.
    turns: how many times in a micro-batch.
    layers: their number.
    routed: the number of those with experts.
    replicas: axes over which the experts' gradients are summed; those of other
      weights are summed over expert, too.
    experts: parameters that one device multiplies by, before FSDP.
    expansion: likewise, of the latents' up-projections.
    table: of the head, and as many again of the embedding.
    rest: of everything else.
    indexer: of indexers, which are whole on all devices along tensor.
    indexed: the number of layers that bring index keys, and an indexer.
  """

  tokens: float
  turns: int
  layers: float
  routed: float
  replicas: tuple[str, ...]
  experts: float
  expansion: float
  table: float
  rest: float
  indexer: float
  indexed: int


def _parts(config: Config) -> tuple[_Part, _Part]:
  """Returns the main model's MoE layers, and everything else.

  The MoE layers are the pipeline where there is one. Everything else is split
  over stage as over data, its weights have replicas there.
  """
  model, mesh, depth = config.model, config.mesh, config.model.mtp.depth
  counts, mla = cost.parameters(config), model.mla
  micro_batches, turns = memory.turns(mesh)
  expert = 3 * model.dim * model.moe.width * model.moe.experts
  expansion = mla.kv_rank * mla.heads * (mla.nope_dim + mla.value_dim)
  expansion *= model.attention == 'mla'
  layer = (counts.attention + counts.norms - model.dim) / model.layers
  routed = depth * (model.moe_layers > 0)
  tables = counts.embedding + counts.head
  total = counts.total + counts.mtp - tables - routed * expert - counts.routed
  total -= (model.layers + depth) * expansion
  own = model.layers - model.dsa.types.count('shared')
  own *= model.dsa.heads > 0
  modules = depth * (own > 0)
  indexer = counts.indexer / max(own, 1)
  total -= (own + modules) * indexer
  indexed = _indexed(model) + modules
  staged = model.moe_layers * (layer - expansion) + counts.shared
  staged += counts.router
  tokens = memory.tokens_per_device(config)

  def part(tokens, turns, layers, routed, replicas, table, rest, *index):
    size = routed * expert / (mesh.expert * mesh.tensor)
    others = (layers * expansion, table, rest)
    others = (n / mesh.tensor for n in others)
    widths = (size, *others, *index)
    return _Part(tokens, turns, layers, routed, replicas, *widths)

  here = model.moe_layers / mesh.stage
  replicas = ('data', 'context')
  return (
    part(
      tokens * mesh.stage / micro_batches,
      turns,
      here,
      here,
      replicas,
      0.0,
      staged / mesh.stage,
      0.0,  # with an indexer there are no stages: the other part has them all
      0,
    ),
    part(
      tokens,
      1,
      model.dense_layers + depth,
      routed,
      (*replicas, 'stage'),
      model.vocab * model.dim,
      total - staged,
      indexed * indexer,
      indexed,
    ),
  )


def _indexed(model: ModelConfig) -> int:
  """Returns the layers of the main model that bring index keys.

  A scan has one body: in a stack with an indexer shared layers have a copy of
  one, too, and bring keys, which they do not read.
  """
  if not model.dsa.heads:
    return 0
  types = model.dsa.types or ('full',) * model.layers
  stacks = types[: model.dense_layers], types[model.dense_layers :]
  return sum(len(stack) for stack in stacks if 'full' in stack)


def _of_part(config: Config, part: _Part) -> collections.Counter:
  """Returns bytes over each axis, each time that a part computes."""
  mesh, model = config.mesh, config.model
  stream = part.tokens * model.dim * memory.WIDTH[model.dtype]
  sums = 2 * (1 + _learns(config) * _passes(config)) * part.layers
  out = collections.Counter(
    fsdp=_gathered(config, part) * _others(mesh.fsdp),
    tensor=2 * stream * _others(mesh.tensor) * sums,
    context=_latents(config, part),
  )
  width = memory.WIDTH[model.dtype]
  copy = 1 if model.precision != 'bf16' else width
  if not model.lora.rank:
    shards = copy * _passes(config) * part.rest / mesh.fsdp
    out['expert'] += shards * _others(mesh.expert)
  for axis, size in _exchanged(config, part.routed * stream).items():
    out[axis] += size
  # Gradients are scattered over fsdp first.
  own = _trained(config, part)
  dense = _dense_gradients(config, own) + 4 * own.table
  for size, axes in (
    (4 * own.experts, part.replicas),
    (dense, (*part.replicas, 'expert')),
  ):
    among = [a for a in sharding.AXES if a in axes and getattr(mesh, a) > 1]
    if among:
      devices = math.prod(getattr(mesh, a) for a in among)
      out[among[0]] += 2 * size / mesh.fsdp * _others(devices)
  return out


def _others(n: int) -> float:
  """Returns the fraction of a gathered array that comes from other devices."""
  return (n - 1) / n


def _passes(config: Config) -> int:
  """Returns how often a step goes forward: twice where layers are remade."""
  return 1 if config.model.compute.remat == 'none' else 2


def _adapted(config: Config) -> collections.Counter:
  """Returns bytes of frozen weights and their adapters, those of the layers.

  Adapters travel as the float32 that they are.
  """
  model, mesh, out = config.model, config.mesh, collections.Counter()
  if not model.lora.rank:
    return out
  adapters = lora.boxed_shapes(model)
  whole = dataclasses.replace(mesh, fsdp=1)
  brought = lambda tree: (
    memory.state_bytes(tree, whole) - memory.state_bytes(tree, mesh)
  )
  stacks = [stack for stack, _ in memory.frozen_stacks(model).values()]
  out['fsdp'] = _passes(config) * brought(stacks)
  out['fsdp'] += (_passes(config) + 1) * brought(adapters)
  among = [a for a in ('data', 'expert', 'context') if getattr(mesh, a) > 1]
  if among:  # experts' adapters have one replica along expert: an upper bound
    devices = math.prod(getattr(mesh, a) for a in among)
    size = memory.state_bytes(adapters, mesh)
    out[among[0]] += 2 * size * _others(devices)
  return out


def _learns(config: Config) -> bool:
  """Returns whether the stream has gradients, and layers are remade whole."""
  return config.optim.trains == 'all'


def _trained(config: Config, part: _Part) -> _Part:
  """Returns a part with those of its parameters that have gradients."""
  if _learns(config) and not config.model.lora.rank:
    return part
  return part._replace(experts=0.0, expansion=0.0, table=0.0, rest=0.0)


def _dense_gradients(config: Config, part: _Part) -> float:
  """Returns bytes of the gradients that are scattered, but for the experts'.

  Weights that are gathered inside a region (the latents' expansions, the head)
  have float32 gradients, those left to GSPMD gradients as wide as activations.
  Those of FP8 products are float32, too; an indexer has none.
  """
  model = config.model
  width = memory.WIDTH[model.dtype]
  wide = part.expansion + part.table
  rest = part.rest * (width if model.precision == 'bf16' else 4)
  return 4 * wide + rest + width * part.indexer


def _gathered(config: Config, part: _Part) -> float:
  """Returns bytes of weights and gradients on all devices along fsdp."""
  model = config.model
  width = memory.WIDTH[model.dtype]
  copy = 1 if model.precision != 'bf16' else width
  passes, own = _passes(config), _trained(config, part)
  if model.lora.rank:
    return width * part.table  # the rest by `_adapted`
  weights = passes * (part.expansion + part.rest + part.indexer)
  # Attention alone is remade for an indexer's loss.
  weights += (passes if _learns(config) else 1) * part.experts
  size = copy * weights + width * part.table
  return size + 4 * own.experts + _dense_gradients(config, own)


def _latents(config: Config, part: _Part) -> float:
  """Returns bytes over context: latents, keys and their gradients.

  They are gathered again backward: a gathered latent is never saved.
  """
  model, passes = config.model, _passes(config)
  numbers = part.layers * memory.cached_here(config)
  numbers *= passes + _learns(config)
  numbers += part.indexed * model.dsa.dim * (passes + 1)
  each = part.tokens * numbers * memory.WIDTH[model.dtype]
  return each * (config.mesh.context - 1)


def _exchanged(config: Config, stream: float) -> dict[str, float]:
  """Returns bytes of tokens on their way to experts, by axis.

  `stream` has all routed layers' bytes. A token's rows travel out and back,
  forward and backward, and out once more under `remat`. `auto` is an all-gather
  with a reduce-scatter up to K devices, beyond them an all-to-all of K copies;
  `padded` sends whole buffers of them. Tokens that are split over tensor, too,
  are gathered over both axes at once, which counts as expert's.
  """
  mesh, top_k = config.mesh, config.model.moe.top_k
  sent = (2 + _learns(config) * (1 + _passes(config))) * stream
  kind = memory.exchange_of(config)
  if not kind:
    return {'tensor': sent * _others(mesh.tensor)}
  if kind == 'gather':
    return {'expert': sent * (mesh.expert - 1 / mesh.tensor)}
  to_experts = sent * top_k * _others(mesh.expert)
  if kind == 'padded':
    to_experts *= 1.5  # `dispatch.capacity`
  return {'expert': to_experts, 'tensor': sent * _others(mesh.tensor)}


def _stream(config: Config) -> float:
  """Returns bytes of the stream of one micro-batch, outside the pipeline."""
  model = config.model
  width = memory.WIDTH[model.dtype]
  return memory.tokens_per_device(config) * model.dim * width


def _embedded(config: Config) -> float:
  """Returns bytes over fsdp of the embedding's rows, and of their gradient."""
  times = (1 + _learns(config)) * (1 + config.model.mtp.depth)
  return times * _stream(config) * _others(config.mesh.fsdp)


def _summed_around(config: Config) -> float:
  """Returns bytes over tensor of the stream's sums outside the layers."""
  times = (1 + _learns(config)) * (1 + config.model.mtp.depth)
  return times * _stream(config) * _others(config.mesh.tensor)


def _handed_on(config: Config) -> float:
  """Returns bytes over stage.

  In each turn, forward and backward, the stream of its rows goes to the next
  stage. Before the first turn every stage gathers all rows, after the last it
  has the sum of all stages' outputs; backward there are one gather, and the
  sums of both ends.
  """
  mesh = config.mesh
  micro_batches, turns = memory.turns(mesh)
  if mesh.stage == 1:
    return 0.0
  rows = mesh.stage * _stream(config) / mesh.tensor
  ends = (2 + 3 * 2) * _others(mesh.stage)
  return rows * (2 * turns / micro_batches + ends)
