"""A collective that XLA does not have for CPUs, made of others that it has."""

import jax
import jax.numpy as jnp

from mla_moe.types import Array


def ragged_all_to_all(
  operand: Array,
  output: Array,
  input_offsets: Array,
  send_sizes: Array,
  output_offsets: Array,
  recv_sizes: Array,
  *,
  axis_name: str,
) -> Array:
  """`lax.ragged_all_to_all` by gathering everything on every device.

  `output_offsets` are the sender's: where its rows belong on each receiver.
  """
  me = jax.lax.axis_index(axis_name)
  operands = jax.lax.all_gather(operand, axis_name)
  first, sizes, target = (
    jax.lax.all_gather(a, axis_name)[:, me]
    for a in (input_offsets, send_sizes, output_offsets)
  )
  rank = jnp.arange(output.shape[0], dtype=jnp.int32)[None] - target[:, None]
  arrives = (rank >= 0) & (rank < sizes[:, None])
  source = jnp.argmax(arrives, axis=0)
  row = first[source] + jnp.take_along_axis(rank, source[None], axis=0)[0]
  row = jnp.clip(row, 0, operand.shape[0] - 1)
  is_written = arrives.any(0).reshape(-1, *(1,) * (operand.ndim - 1))
  return jnp.where(is_written, operands[source, row], output)
