"""The bytes that a device receives in a training step, over each mesh axis.

fsdp brings weights forward and again backward, scatters gradients, and brings
the embedding's rows. data sums gradients over replicas. expert sends each
token's rows out and back, forward and backward. tensor sums the stream after
embedding, attention and FFN. Every micro-batch pays all of it. A ring of n
devices brings each of them (n-1)/n of a gathered or scattered array, and twice
that of a sum.
"""

from __future__ import annotations

from typing import NamedTuple

from mla_moe import cost
from mla_moe.config import Config

from . import memory


def by_axis(config: Config) -> dict[str, float]:
  """Returns bytes that one device receives in a step, over each axis.

  A sum over several axes at once counts as one axis's, as noted below.
  """
  data = config.data
  weights, stream = _weights(config), _stream_bytes(config)
  of_data, of_expert = _summed(config, weights)
  tokens_out, tokens_aside = _exchanged(config, stream)
  micro_batches = data.batch_size / (data.micro_batch or data.batch_size)
  one = {
    'fsdp': _gathered(config, weights, stream),
    'data': of_data,
    'expert': of_expert + tokens_out,
    'tensor': _stream_sums(config, stream) + tokens_aside,
  }
  return {axis: micro_batches * size for axis, size in one.items()}


def bubble(stages: int, micro_batches: int) -> float:
  """Returns the fraction of a pipelined step that a device waits.

  It is (S-1) / (n+S-1) of S stages and n micro-batches.
  """
  return (stages - 1) / (micro_batches + stages - 1)


class _Weights(NamedTuple):
  """Parameters of all layers that one device multiplies by, before FSDP.

  `expansion` are the latents' up-projections; `table` is the head, and as many
  again are the embedding; `rest` is everything else.
  """

  experts: float
  expansion: float
  table: float
  rest: float


def _weights(config: Config) -> _Weights:
  model, mesh = config.model, config.mesh
  counts, mla, depth = cost.parameters(config), model.mla, model.mtp.depth
  layer = 3 * model.dim * model.moe.width * model.moe.experts
  experts = _moe_layers(config) * layer
  expansion = (model.layers + depth) * mla.kv_rank * mla.heads
  expansion *= mla.nope_dim + mla.value_dim
  rest = counts.total + counts.mtp - experts - expansion
  rest -= counts.embedding + counts.head
  return _Weights(
    experts / (mesh.expert * mesh.tensor),
    *(n / mesh.tensor for n in (expansion, model.vocab * model.dim, rest)),
  )


def _moe_layers(config: Config) -> int:
  """Returns the MoE layers, those of the MTP modules included."""
  model = config.model
  return model.moe_layers + model.mtp.depth * (model.moe_layers > 0)


def _stream_bytes(config: Config) -> int:
  """Returns bytes of the residual stream of one micro-batch on one device."""
  width = memory.WIDTH[config.model.dtype]
  return memory.tokens_per_device(config) * config.model.dim * width


def _others(n: int) -> float:
  """Returns the fraction of a gathered array that comes from other devices."""
  return (n - 1) / n


def _passes(config: Config) -> int:
  """Returns how often a step goes forward: twice where layers are remade."""
  return 1 if config.model.compute.remat == 'none' else 2


def _dense_gradients(config: Config, w: _Weights) -> float:
  """Returns bytes of the gradients that are scattered, but for the experts'.

  Weights that are gathered inside a region (the latents' expansions, the head)
  have float32 gradients, those left to GSPMD gradients as wide as activations.
  """
  width = memory.WIDTH[config.model.dtype]
  return 4 * (w.expansion + w.table) + width * w.rest


def _gathered(config: Config, w: _Weights, stream: int) -> float:
  """Returns bytes over fsdp."""
  model = config.model
  width = memory.WIDTH[model.dtype]
  copy = 1 if model.precision != 'bf16' else width
  rows = 2 * (1 + model.mtp.depth) * stream  # embedded, and their gradient
  size = _passes(config) * copy * (w.experts + w.expansion + w.rest)
  size += width * w.table
  size += 4 * w.experts + _dense_gradients(config, w) + rows
  return size * _others(config.mesh.fsdp)


def _summed(config: Config, w: _Weights) -> tuple[float, float]:
  """Returns bytes of gradients summed over replicas, by (data, expert).

  The experts' replicas are the data axis. All else is replicated over data and
  expert, and both are one sum: it counts as data's if that axis is there.
  """
  mesh = config.mesh
  size = _dense_gradients(config, w)
  size += 4 * w.table  # the embedding's: summed, but never scattered
  experts = 2 * 4 * w.experts / mesh.fsdp * _others(mesh.data)
  dense = 2 * size / mesh.fsdp * _others(mesh.data * mesh.expert)
  return (experts + dense, 0.0) if mesh.data > 1 else (experts, dense)


def _exchanged(config: Config, stream: int) -> tuple[float, float]:
  """Returns bytes of tokens on their way to experts, by (expert, tensor).

  A token's rows travel out and back, forward and backward, and out once more
  under `remat`; by the cheaper of an all-to-all of its K copies and an
  all-gather with a reduce-scatter. Tokens that are split over tensor, too, are
  gathered over both axes at once, which counts as expert's.
  """
  mesh, top_k = config.mesh, config.model.moe.top_k
  sent = _moe_layers(config) * (3 + _passes(config)) * stream
  if mesh.expert == 1:
    return 0.0, sent * _others(mesh.tensor)
  if mesh.expert <= top_k:
    return sent * (mesh.expert - 1 / mesh.tensor), 0.0
  return sent * (top_k * _others(mesh.expert)), sent * _others(mesh.tensor)


def _stream_sums(config: Config, stream: int) -> float:
  """Returns bytes of the stream's sums over tensor."""
  model = config.model
  depth = model.mtp.depth
  blocks = model.layers + depth
  sums = blocks * 2 * (1 + _passes(config)) + 1 + depth
  return 2 * stream * _others(config.mesh.tensor) * sums
