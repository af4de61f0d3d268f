"""Pipeline parallelism of the MoE layers: a ring of stages, one program.

Each of S stages holds its share of the layers. A batch is cut into M
micro-batches, which enter the first stage one a turn and then move on to the
next stage every turn (Huang et al. 2019); after M + S - 1 turns the last one
has left the last stage. All devices run the same code: a stage without a
micro-batch computes on whatever it holds, and nobody reads it. That is the
bubble, (S - 1) / (M + S - 1) of the time. Going backward is autodiff's, which
turns the ring around. Only the stage axis is manual here: within a stage,
layers are laid on the other axes as ever, experts and all; nothing is dropped.

Outside the MoE layers the stages are data parallel, or the embedding, the dense
layers, the loss and the MTP modules would be computed S times.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mla_moe import sharding
from mla_moe.config import ConfigError, ModelConfig
from mla_moe.model import block, moe
from mla_moe.types import Array, Float, Int, PyTree


def stages() -> int:
  """Stages of the mesh, 1 where there is none."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if 'stage' in mesh.manual_axes else mesh.shape.get('stage', 1)


def bubble(stages: int, micro: int) -> float:
  """The share of a pipeline's time in which a stage has nothing to do."""
  return (stages - 1) / (micro + stages - 1)


def run(
  variables: PyTree,
  config: ModelConfig,
  x: Float[Array, 'B T D'],
  cos: Float[Array, 'B T half'],
  sin: Float[Array, 'B T half'],
  segments: Int[Array, 'B T'] | None,
  micro: int = 0,
) -> tuple[Float[Array, 'B T D'], moe.Stats]:
  """The MoE stack on all stages: what `block.stack` computes, layer by layer.

  `variables` are the stack's, with a leading axis of layers; `micro` the number
  of micro-batches (0: one a stage), which must divide the rows of a device.
  """
  count = stages()
  micro = micro or count
  shards = sharding.axis_size(('data', 'fsdp', 'expert'))
  if x.shape[0] % (micro * shards):
    raise ConfigError(
      f'config.mesh.pipeline={micro} micro-batches of {shards} shards: must '
      f'divide the {x.shape[0]} rows of a batch'
    )
  length = jax.tree.leaves(variables)[0].shape[0] // count
  layer = block.remat_block(config, length)(config, True, parent=None)

  def local(variables, *rows):
    me = jax.lax.axis_index('stage')
    last = me == count - 1

    def turn(held, at):
      mine = at - me  # which micro-batch is here
      take = lambda x: _micro(x, jnp.clip(mine, 0, micro - 1), micro)
      x, cos, sin, segments = (None if r is None else take(r) for r in rows)
      x = jnp.where(me == 0, x, held)

      def one(x, variables):
        return layer.apply(variables, x, cos, sin, segments, None)

      x, stats = jax.lax.scan(one, x, variables)
      here = (mine >= 0) & (mine < micro)
      stats = jax.tree.map(lambda s: jnp.where(here, s, 0), stats)
      ring = [(i, (i + 1) % count) for i in range(count)]
      return jax.lax.ppermute(x, 'stage', ring), (x, stats)

    shape = (x.shape[0] // micro, *x.shape[1:])
    held = sharding.pvary(jnp.zeros(shape, x.dtype))
    turns = jnp.arange(micro + count - 1, dtype=jnp.int32)
    _, (out, stats) = jax.lax.scan(turn, held, turns)
    # The j-th left the last stage count - 1 turns after it had entered.
    out = jnp.where(last, out[count - 1 :], 0)
    out = jax.lax.psum(out, 'stage').swapaxes(0, 1).reshape(x.shape)
    total = jax.tree.map(lambda s: s.sum(0), stats)
    return out, total._replace(
      balance=total.balance / micro, entropy=total.entropy / micro
    )

  run = jax.shard_map(
    local,
    in_specs=(PartitionSpec('stage'), *(PartitionSpec(),) * 4),
    out_specs=(PartitionSpec(), PartitionSpec('stage')),
    axis_names={'stage'},
    check_vma=False,  # see `sharding.shard_map`
  )
  return run(variables, x, cos, sin, segments)


def _micro(x: Array, index: Array, micro: int) -> Array:
  """Every micro-th row from `index`: so each device keeps its own rows."""
  rows = x.reshape(x.shape[0] // micro, micro, *x.shape[1:])
  return jax.lax.dynamic_index_in_dim(rows, index, 1, keepdims=False)
