"""Rows of tokens sent to other devices: three collectives, in FP8 if possible.

Rows in FP8 travel as E4M3 with the scales of the experts' first product, so
that nothing is rounded twice. Rows that come back, and all gradients, travel in
the activations' dtype (V3 section 3.3.3).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mla_moe import fp8, sharding
from mla_moe.config import ConfigError
from mla_moe.fp8 import quantize as q8
from mla_moe.types import Array, Float


class Route(NamedTuple):
  """A collective: its kind, mesh axes, and the rows of a `ragged` result."""

  kind: str
  axes: tuple[str, ...]
  capacity: int = 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def send(
  x: Float[Array, 'R D'], sizes: tuple | None, route: Route, recipe: fp8.Recipe
) -> Float[Array, 'received D']:
  """Returns `move` of the rows, in FP8 where the experts round to it anyway.

  With `fp8_tensor` the experts use one scale for all their rows, which no
  device knows before it has them: those rows travel in their own dtype.
  """
  if recipe.precision not in ('fp8_block', 'fp8_channel'):
    return move(x, sizes, route)
  q = recipe.rows(x, 1)
  bits = jax.lax.bitcast_convert_type(q.values, jnp.uint8)
  bits, scales = move(bits, sizes, route), move(q.scales, sizes, route)
  bits = jax.lax.optimization_barrier(bits)  # else rows are laid out as floats
  values = jax.lax.bitcast_convert_type(bits, q.values.dtype)
  return q8.dequantize(q8.Quantized(values, scales, q.tiles), x.dtype)


def _send_forward(x, sizes, route, recipe):
  return send(x, sizes, route, recipe), (x, sizes)


def _send_backward(route, recipe, residuals, g):
  x, sizes = residuals
  _, pull = jax.vjp(lambda x: move(x, sizes, route), x)
  return *pull(g), None


send.defvjp(_send_forward, _send_backward)


def move(x: Array, sizes: tuple | None, route: Route) -> Array:
  """Returns the rows that other devices send here, [received, ...].

  `sizes`, for `ragged` alone, are int32 arrays of [devices]: each device's
  first row here, their number, the place of the first in its result, and the
  number of rows from it.
  """
  if route.kind == 'gather':
    return jax.lax.all_gather(x, route.axes, axis=0, tiled=True)
  if route.kind == 'padded':
    return jax.lax.all_to_all(x, route.axes, 0, 0, tiled=True)
  result = sharding.pvary(jnp.zeros((route.capacity, *x.shape[1:]), x.dtype))
  return ragged_all_to_all(x, result, *sizes, axis_name=route.axes[0])


def ragged_all_to_all(x: Array, *args: Array, axis_name: str) -> Array:
  """Returns `lax.ragged_all_to_all`.

  Raises:
    ConfigError: the devices have none.
  """
  if not sharding.ragged_exchange():
    raise ConfigError(
      "config.model.compute.exchange='ragged': a CPU or a v5e larger than 4x4 "
      'has no ragged all-to-all; use auto, gather or padded'
    )
  return jax.lax.ragged_all_to_all(x, *args, axis_name=axis_name)
