"""The embedding's rows of tokens on a mesh: tokens travel, the table does not.

A device holds D / fsdp columns (and, under `tensor`, some rows) of the table.
It reads them for the tokens of its whole fsdp group, whose ids are a few
kilobytes, and an all-to-all turns columns of many tokens into all columns of
its own. Left to GSPMD, every device gathers the embedded tokens of the whole
micro-batch, forward and backward: memory that grows with the pod. The table's
gradient is summed in float32, whatever the activations are.
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
  """Each token's row in `dtype`, laid out as the stream; ids are clipped."""
  if not sharding.auto_axes():
    return table[tokens].astype(dtype)
  shape = (*tokens.shape, table.shape[1])
  stream = ('batch', 'length', 'stream')
  rows, length, _ = sharding.mesh_axes(stream, shape)
  parts, over = sharding.mesh_axes(('vocab', 'embed'), table.shape)
  names = ('batch', 'part' if parts else 'length')
  same = tuple(a for a in sharding.auto_axes() if a not in rows + length)
  together = bool(over) and set(over) <= set(rows)
  vocab = table.shape[0]

  def local(table, tokens):
    table, at = sharding.pvary((table, jnp.clip(tokens, 0, vocab - 1)))
    if together:
      at = jax.lax.all_gather(at, over, axis=0, tiled=True)
    if parts:
      at = at - jax.lax.axis_index(parts) * len(table)
      here = (at >= 0) & (at < len(table))
      x = jnp.where(here[..., None], table[jnp.where(here, at, 0)], 0)
    else:
      x = table[at]
    x = x.astype(dtype)
    if together:
      x = jax.lax.all_to_all(x, over, 0, 2, tiled=True)
    elif over:
      x = jax.lax.all_gather(x, over, axis=2, tiled=True)
    if parts and set(parts) <= set(length):
      x = jax.lax.psum_scatter(x, parts, scatter_dimension=1, tiled=True)
    elif parts:
      x = jax.lax.psum(x, parts)
    averaged = tuple(a for a in same if a not in parts)
    return jax.lax.pmean(x, averaged) if averaged else x

  lay = sharding.array_spec
  specs = lay(('vocab', 'embed'), table), lay(names, tokens)
  out = PartitionSpec(rows or None, length or None, None)
  return sharding.shard_map(local, specs, out)(table, tokens)
