"""One product of two FP8 arrays, by the implementation that the hardware has.

Training multiplies three times, each time summing over the axis that its
operands' tiles lie along: y = x w, dx = g w^T, dw = x^T g (V3 section 3.3.2).
`multiply` is any of the three. Every implementation computes the same sum of
the same quantised numbers in float32:

  dequant  widens the operands: the reference, and right on any hardware
           (bfloat16 holds a dequantised number exactly)
  native   XLA's own FP8 dot, scaled afterwards: one scale along the sum
  mgpu     Pallas kernel for Hopper's tensor cores, scaled every 128 of the sum
  tpu      Pallas kernel for TPU v7
  mxfp8    Blackwell's block-scaled dot: each of our scales serves four of its
           blocks of 32

`config.FP8_IMPLS` says which of them computes which precision, and `choose`
which of them a device has. A kernel takes matrices whose rows lie along the
sum and whose lengths are multiples of 128; `matrix` makes them, with zeros.
Where no kernel can run, the product falls back to dequant: `usable` decides it
call by call, and `collect_fallbacks` lists the calls.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from mla_moe import kernels
from mla_moe.config import FP8_IMPLS, ConfigError
from mla_moe.fp8 import quantize as q8
from mla_moe.fp8.quantize import TILE, Quantized
from mla_moe.types import Array, Float, PyTree

# Implementations that multiply tiles of 128 and nothing else.
KERNELS = tuple(i for i in FP8_IMPLS['fp8_block'] if i != 'dequant')
# Those with kernels by expert; without one, experts' blocks are a loop.
GROUPED_KERNELS = ('mgpu', 'tpu')

_fallbacks: contextvars.ContextVar = contextvars.ContextVar(
  'fallbacks', default=None
)


@contextlib.contextmanager
def collect_fallbacks() -> Iterator[list[str]]:
  """Yields a list that gains a line for each product without its kernel.

  It does so while a program is traced; a compiled program adds no line.
  """
  token = _fallbacks.set([])
  try:
    yield _fallbacks.get()
  finally:
    _fallbacks.reset(token)


def choose(
  precision: str, impl: str = 'auto', device: Any = None
) -> tuple[str, str]:
  """Returns the implementation for `device` (the first one), and a warning.

  A device is a jax.Device, or has its platform, device_kind and (a GPU's)
  compute_capability. The warning is one line, or ''. It says that the hardware
  has no FP8 product of this precision: numbers are FP8's, the speed is not.

  Raises:
    ConfigError: an explicit `impl` that this precision or device cannot do.
  """
  if precision == 'bf16':
    return 'dequant', ''
  device = device or jax.devices()[0]
  fitting = [i for i in FP8_IMPLS[precision] if i in _hardware(device)]
  name = f'{device.platform} ({device.device_kind})'
  if impl == 'auto':
    # The CPU's native product only widens, as dequant does.
    if fitting and device.platform != 'cpu':
      return fitting[0], ''
    line = f'precision={precision} has no FP8 hardware on {name}: dequant'
    return 'dequant', line
  if impl != 'dequant' and impl not in fitting:
    can = ', '.join(['dequant', *fitting])
    raise ConfigError(
      f'compute.fp8={impl!r}: precision={precision} on {name} can be {can}'
    )
  return impl, ''


def _hardware(device: Any) -> tuple[str, ...]:
  """The implementations, besides dequant, that run on `device`."""
  if device.platform == 'cpu':
    return ('native',)
  if device.platform == 'tpu':
    generation = ''.join(c for c in device.device_kind if c.isdigit())
    return ('native', 'tpu') if int(generation[:1] or 0) >= 7 else ()
  capability = kernels.cuda_capability(device)
  if capability >= 10:
    return ('native', 'mxfp8')
  if capability >= 9:
    return ('native', 'mgpu')
  return ('native',) if capability >= 8.9 else ()


def usable(impl: str) -> str:
  """Returns `impl`, or 'dequant' where its kernel cannot run.

  GSPMD cannot split a kernel over a mesh; in shard_map each device has its own
  part already. `collect_fallbacks` gets a line for each fall-back.
  """
  mesh = jax.sharding.get_abstract_mesh()
  local = mesh.empty or mesh.size == 1 or mesh.are_all_axes_manual
  if impl not in KERNELS or local:
    return impl
  if _fallbacks.get() is not None:
    _fallbacks.get().append(
      f'fp8 impl={impl} has no kernel for a mesh of {mesh.size} devices '
      'outside shard_map: dequant'
    )
  return 'dequant'


# Below, `summed` are the axes of an operand (or of both) that a product sums
# over; the operand's other axes are those of the result.


def multiply(
  a: Quantized,
  b: Quantized,
  summed: tuple[tuple[int, ...], tuple[int, ...]],
  impl: str,
  dtype: DTypeLike = jnp.float32,
) -> Float[Array, '*product']:
  """Returns the sum over axes summed[0] of `a` and summed[1] of `b`.

  The result in `dtype` has the other axes of `a`, then those of `b`. Only the
  last summed axis of each may be tiled, and both are tiled alike there (or all
  summed axes lie in one tile).
  """
  impl = usable(impl)
  if impl in KERNELS:
    return _by_kernel(a, b, summed, impl, dtype)
  dot = functools.partial(
    jax.lax.dot_general,
    dimension_numbers=(summed, ((), ())),
    preferred_element_type=jnp.float32,
  )
  if impl != 'native':
    return _widened(dot, a, b).astype(dtype)
  # HIGHEST is what keeps cuBLASLt from accumulating in fewer bits.
  exact = functools.partial(dot, precision=jax.lax.Precision.HIGHEST)
  y = jax.lax.platform_dependent(a.values, b.values, cuda=exact, default=dot)
  sa, sb = _result_scales(a, summed[0]), _result_scales(b, summed[1])
  sa = sa.reshape(sa.shape + (1,) * sb.ndim)
  sb = sb.reshape((1,) * (sa.ndim - sb.ndim) + sb.shape)
  return (y * sa * sb).astype(dtype)


def _result_scales(q: Quantized, summed: tuple[int, ...]) -> Array:
  """The scales along the axes that stay; there is one along the sum."""
  assert all(q.scales.shape[d] == 1 for d in summed), (q.scales.shape, summed)
  return jnp.squeeze(q8.repeat_scales(q, other_axes(q, summed)), summed)


def _widened(dot, a: Quantized, b: Quantized) -> Array:
  """`dot` of the dequantised operands, exact but for float32 accumulation."""
  wide = lambda a, b: dot(q8.dequantize(a), q8.dequantize(b))
  narrow = lambda a, b: dot(q8.exact(a), q8.exact(b))
  return jax.lax.platform_dependent(a, b, cpu=wide, default=narrow)


# ------------------------------------------------------------ by kernel


def _by_kernel(a, b, summed, impl, dtype):
  """Returns `multiply` by a kernel, whose operands are padded matrices."""
  left, right = matrix(a, summed[0]), matrix(b, summed[1])
  if impl == 'mxfp8':
    y = _mxfp8(left, right, dtype)
  else:
    y = run_kernel(impl, 'matmul', *row_scales(left), *right, dtype=dtype)
  y = unpadded(y, 0, a, summed[0])
  return unpadded(y, y.ndim - 1, b, summed[1])


def run_kernel(
  impl: str, name: str, *args: Array, **options: DTypeLike
) -> Float[Array, '*product']:
  """Returns the result of kernel `name` of `impl`; imports Pallas only here.

  In a checked shard_map, a Pallas call declares along which axes of the mesh
  its result varies: those along which any operand varies. A weight may be the
  same on every device. So all operands are cast to vary along all these axes,
  and the kernels give their result the type of their first operand.
  """
  if impl == 'mgpu':
    from mla_moe.kernels import block_gpu as kernels
  else:
    from mla_moe.kernels import block_tpu as kernels
  args = [pvary_like(x, *args) for x in args]
  return pvary_like(getattr(kernels, name)(*args, **options), *args)


def pvary_like(x: Array, *likes: PyTree) -> Array:
  """Returns `x`, cast in shard_map to vary by device where any of `likes` does.

  A loop's carry and a kernel's operands must all vary alike.
  """
  varying = lambda x: jax.typeof(x).manual_axis_type.varying
  axes = frozenset().union(*map(varying, jax.tree.leaves(likes)))
  missing = tuple(sorted(axes - varying(x)))
  return jax.lax.pcast(x, missing, to='varying') if missing else x


def matrix(
  q: Quantized, summed: tuple[int, ...], lead: int = 0
) -> tuple[Float[Array, '*lead rows K'], Float[Array, '*lead blocks tiles']]:
  """Returns values [*lead, rows, K] and scales [*lead, rows, K / 128].

  K are the summed axes as one, rows the other axes after the `lead` leading
  ones. Values are padded with zeros: the last summed axis and the rows to
  multiples of 128. If the last of the rows' axes lies in blocks of 128, that
  axis is padded by itself, and the scales are [*lead, rows / 128, K / 128].
  """
  rows = other_axes(q, summed, lead)
  blocks = q.tile(rows[-1]) > 1
  ends = (summed[-1], rows[-1]) if blocks else (summed[-1],)
  pads = [(0, -n % TILE if d in ends else 0) for d, n in enumerate(q.shape)]
  values = jnp.pad(q.values, pads) if any(p for _, p in pads) else q.values
  scales = q8.repeat_scales(q, tuple(d for d in range(q.ndim) if d not in ends))

  def flat(x):
    length = math.prod(x.shape[d] for d in summed)
    x = x.transpose(*range(lead), *rows, *summed)
    return x.reshape(*x.shape[:lead], -1, length)

  values, scales = flat(values), flat(scales)
  short = -values.shape[-2] % TILE
  if short:
    pads = [(0, 0)] * lead + [(0, short), (0, 0)]
    values = jnp.pad(values, pads)
    scales = jnp.pad(scales, pads, constant_values=1.0)
  return values, scales


def other_axes(
  q: Quantized, summed: tuple[int, ...], lead: int = 0
) -> tuple[int, ...]:
  """Returns the axes that are not summed, after `lead` leading ones."""
  return tuple(d for d in range(lead, q.ndim) if d not in summed)


def row_scales(matrix: tuple[Array, Array]) -> tuple[Array, Array]:
  """Returns the result of `matrix` with a scale for every row."""
  values, scales = matrix
  rows = values.shape[-2] // scales.shape[-2]
  return values, jnp.repeat(scales, rows, axis=-2) if rows > 1 else scales


def unpadded(
  y: Float[Array, '*padded'],
  axis: int,
  q: Quantized,
  summed: tuple[int, ...],
  lead: int = 0,
) -> Float[Array, '*product']:
  """Returns `y` with its axis `axis`, the rows of `matrix`, as axes of `q`."""
  axes = other_axes(q, summed, lead)
  lengths = [q.shape[d] for d in axes]
  before, after = y.shape[:axis], y.shape[axis + 1 :]
  if q.tile(axes[-1]) == 1:
    y = jax.lax.slice_in_dim(y, 0, math.prod(lengths), axis=axis)
    return y.reshape(*before, *lengths, *after)
  y = y.reshape(*before, *lengths[:-1], -1, *after)
  last = axis + len(lengths) - 1
  return jax.lax.slice_in_dim(y, 0, lengths[-1], axis=last)


def _mxfp8(a, b, dtype):
  """Returns a b^T of two results of `matrix` by Blackwell's dot."""
  (a, sa), (b, sb) = row_scales(a), row_scales(b)
  narrow = lambda s: jnp.repeat(s, 4, axis=-1).astype(jnp.float8_e8m0fnu)[None]
  y = jax.nn.scaled_matmul(
    a[None], b[None], narrow(sa), narrow(sb), preferred_element_type=dtype
  )
  return pvary_like(y[0], a, b)
