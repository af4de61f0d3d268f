"""The embedding on a mesh: tokens travel, the table does not.

A device holds D / fsdp columns (and, under `tensor`, some rows) of the table.
It reads its columns for the tokens of its whole fsdp group, whose ids are a few
kilobytes. An all-to-all then gives each device all columns of its own tokens.
Left to GSPMD, every device would gather the embedded tokens of the whole
micro-batch, forward and backward: memory that grows with the pod. The table's
gradient is summed in float32, also where activations are bfloat16.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mla_moe import sharding
from mla_moe.types import Array, Float, Int


def lookup(
  table: Float[Array, 'V D'], tokens: Int[Array, 'B T'], dtype: str
) -> Float[Array, 'B T D']:
  """Returns each token's row in `dtype`, sharded as the stream.

  Ids beyond the table are clipped.
  """
  if not sharding.auto_axes():
    return table[tokens].astype(dtype)
  shape = (*tokens.shape, table.shape[1])
  stream = ('batch', 'length', 'stream')
  batch, length, _ = sharding.mesh_axes(stream, shape)
  tensor, fsdp = sharding.mesh_axes(('vocab', 'embed'), table.shape)
  names = ('batch', 'part' if tensor else 'length')
  equal = tuple(a for a in sharding.auto_axes() if a not in batch + length)
  # The devices that share the table's columns have different tokens.
  exchanged = bool(fsdp) and set(fsdp) <= set(batch)
  vocab = table.shape[0]

  def region(table, tokens):
    table, ids = sharding.pvary((table, jnp.clip(tokens, 0, vocab - 1)))
    if exchanged:
      ids = jax.lax.all_gather(ids, fsdp, axis=0, tiled=True)
    if tensor:
      ids = ids - jax.lax.axis_index(tensor) * len(table)
      here = (ids >= 0) & (ids < len(table))
      x = jnp.where(here[..., None], table[jnp.where(here, ids, 0)], 0)
    else:
      x = table[ids]
    x = x.astype(dtype)
    if exchanged:
      x = jax.lax.all_to_all(x, fsdp, 0, 2, tiled=True)
    elif fsdp:
      x = jax.lax.all_gather(x, fsdp, axis=2, tiled=True)
    if tensor and set(tensor) <= set(length):
      x = jax.lax.psum_scatter(x, tensor, scatter_dimension=1, tiled=True)
    elif tensor:
      x = jax.lax.psum(x, tensor)
    return sharding.pmean(x, tuple(a for a in equal if a not in tensor))

  spec = sharding.array_spec
  in_specs = spec(('vocab', 'embed'), table), spec(names, tokens)
  out_spec = PartitionSpec(batch or None, length or None, None)
  return sharding.shard_map(region, in_specs, out_spec)(table, tokens)
