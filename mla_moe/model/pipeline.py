"""Pipeline parallelism of the MoE layers: a ring of stages, one program.

Each of S stages holds 1/S of the layers. A batch is cut into M micro-batches.
In every turn one of them enters the first stage and all others move on to the
next stage (Huang et al. 2019); after M + S - 1 turns the last one has left the
last stage. All devices run the same code: a stage without a micro-batch
computes on stale numbers, and its result is discarded. That is the bubble,
(S - 1) / (M + S - 1) of the time. The backward pass is autodiff's, which turns
the ring around. Only the stage axis is manual here: within a stage, layers are
laid on the other axes as without a pipeline. No token is dropped.

Outside the MoE layers the stage axis is a data axis: embedding, dense layers,
loss and MTP modules would otherwise be computed S times.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mla_moe import sharding
from mla_moe.config import ModelConfig
from mla_moe.model import block, moe, rope
from mla_moe.types import Array, Float, Int, PyTree


def stages() -> int:
  """Returns the number of stages of the mesh, 1 where there is none."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if 'stage' in mesh.manual_axes else mesh.shape.get('stage', 1)


def takes(rows: int, micro_batches: int = 0) -> bool:
  """Whether a pipeline takes this many rows; the stack computes others."""
  count = stages()
  shards = sharding.axis_size(('data', 'fsdp', 'expert')) if count > 1 else 1
  return count > 1 and rows % ((micro_batches or count) * shards) == 0


def run(
  variables: PyTree,
  config: ModelConfig,
  x: Float[Array, 'B T D'],
  angles: rope.Angles,
  segments: Int[Array, 'B T'] | None,
  micro_batches: int = 0,
  functions: block.Functions = block.Functions(),
) -> tuple[Float[Array, 'B T D'], moe.Stats]:
  """Returns the output of the MoE stack, `block.stack`, computed by all stages.

  Args:
    variables: of the stack, with a leading axis of layers.
    config: the model's.
    x: the stream.
    angles: of the rotation.
    segments: numbers of documents, or None.
    micro_batches: M, which `takes` these rows; 0 is one a stage.
    functions: of the layers.
  """
  count = stages()
  micro_batches = micro_batches or count
  length = jax.tree.leaves(variables)[0].shape[0] // count
  args = config, True, functions
  layer = block.remat_block(config, length)(*args, parent=None)
  region = functools.partial(_region, layer, count, micro_batches)
  shard_map = jax.shard_map(
    region,
    in_specs=(PartitionSpec('stage'), *(PartitionSpec(),) * 3),
    out_specs=(PartitionSpec(), PartitionSpec('stage')),
    axis_names={'stage'},
    check_vma=False,  # see `sharding.shard_map`
  )
  return shard_map(variables, x, angles, segments)


def _region(layer, count, micro_batches, variables, *rows):
  """Returns the output of all stages; `variables` are this stage's layers."""
  stage = jax.lax.axis_index('stage')
  last = stage == count - 1
  x = rows[0]

  def turn(received, time):
    index = time - stage  # of the micro-batch that is here
    take = lambda x: _micro_batch(
      x, jnp.clip(index, 0, micro_batches - 1), micro_batches
    )
    x, angles, segments = jax.tree.map(take, rows)
    x = jnp.where(stage == 0, x, received)

    def one(x, variables):
      args = (x, None), angles, segments, None
      (x, _), reports = layer.apply(variables, *args)
      return x, reports.stats

    x, stats = jax.lax.scan(one, x, variables)
    real = (index >= 0) & (index < micro_batches)
    stats = jax.tree.map(lambda s: jnp.where(real, s, 0), stats)
    ring = [(i, (i + 1) % count) for i in range(count)]
    return jax.lax.ppermute(x, 'stage', ring), (x, stats)

  shape = (x.shape[0] // micro_batches, *x.shape[1:])
  zeros = sharding.pvary(jnp.zeros(shape, x.dtype))
  turns = jnp.arange(micro_batches + count - 1, dtype=jnp.int32)
  _, (out, stats) = jax.lax.scan(turn, zeros, turns)
  # A micro-batch leaves the last stage count - 1 turns after it has entered.
  out = jnp.where(last, out[count - 1 :], 0)
  out = jax.lax.psum(out, 'stage').swapaxes(0, 1).reshape(x.shape)
  total = jax.tree.map(lambda s: s.sum(0), stats)
  return out, total._replace(
    balance=total.balance / micro_batches,
    entropy=total.entropy / micro_batches,
  )


def _micro_batch(x: Array, index: Array, count: int) -> Array:
  """Returns every count-th row from `index` on: each device keeps its rows."""
  rows = x.reshape(x.shape[0] // count, count, *x.shape[1:])
  return jax.lax.dynamic_index_in_dim(rows, index, 1, keepdims=False)
