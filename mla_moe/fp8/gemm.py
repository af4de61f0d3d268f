"""One product of FP8 arrays, computed by what the hardware has.

Training multiplies three times, each time summing over the axis that its
operands' tiles lie along: y = x w, dx = g w^T, dw = x^T g (V3 section 3.3.2).
`multiply` is any of them. Every implementation computes the same sum of the
same quantised numbers in float32:

  dequant  widens the operands: the reference, and right on any hardware
           (bfloat16 holds a dequantised number exactly if its scale is a
           power of two)
  native   XLA's own FP8 dot, scaled afterwards: one scale along the sum
  mgpu     Pallas kernel for Hopper's tensor cores, scaled every 128 of the sum
  tpu      Pallas kernel for TPU v7
  mxfp8    Blackwell's block-scaled dot: each power-of-two scale serves four of
           its blocks of 32

A kernel takes matrices whose rows lie along the sum and multiples of 128;
`matrix` makes them, with zeros. What no kernel takes falls back to dequant,
call by call; `fallbacks` tells how often.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from mla_moe.config import ConfigError
from mla_moe.fp8 import quantize as q8
from mla_moe.fp8.quantize import TILE, Quantized
from mla_moe.types import Array, PyTree

PRECISIONS = ('bf16', 'fp8_tensor', 'fp8_channel', 'fp8_block')
IMPLS = ('auto', 'dequant', 'native', 'mgpu', 'tpu', 'mxfp8')
BLOCKED = ('mgpu', 'tpu', 'mxfp8')  # they know tiles and nothing else
BY_EXPERT = ('mgpu', 'tpu')  # with kernels by expert; others go block by block

_seen: contextvars.ContextVar = contextvars.ContextVar('seen', default=None)


@contextlib.contextmanager
def fallbacks():
  """Collects, while programs are traced, a line for each call that fell back.

  A program that was traced before tells nothing.
  """
  token = _seen.set([])
  try:
    yield _seen.get()
  finally:
    _seen.reset(token)


def choose(
  precision: str,
  impl: str = 'auto',
  scales: str = 'pow2',
  device: Any = None,
) -> tuple[str, str]:
  """The implementation for `device` (the first one), and a line or ''.

  The line says that the hardware has no FP8 product of this precision, so
  that the numbers are FP8's and the speed is not.

  Raises:
    ConfigError: an explicit `impl` that this precision or device cannot do.
  """
  if precision == 'bf16':
    return 'dequant', ''
  device = device or jax.devices()[0]
  able = _able(device)
  if scales != 'pow2':
    able = tuple(i for i in able if i != 'mxfp8')
  blocks = precision == 'fp8_block'
  fitting = [i for i in able if (i in BLOCKED) == blocks]
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


def _able(device: Any) -> tuple[str, ...]:
  if device.platform == 'cpu':
    return ('native',)
  if device.platform == 'tpu':
    generation = ''.join(c for c in device.device_kind if c.isdigit())
    return ('native', 'tpu') if int(generation[:1] or 0) >= 7 else ()
  capability = float(getattr(device, 'compute_capability', 0) or 0)
  if capability >= 10:
    return ('native', 'mxfp8')
  if capability >= 9:
    return ('native', 'mgpu')
  return ('native',) if capability >= 8.9 else ()


# An axis of an operand is summed over or kept; `multiply` lists those summed.


def multiply(
  a: Quantized,
  b: Quantized,
  over: tuple[tuple[int, ...], tuple[int, ...]],
  impl: str,
  dtype=jnp.float32,
) -> Array:
  """The product over axes over[0] of `a` and over[1] of `b`, in `dtype`.

  The result has the kept axes of `a`, then those of `b`. Only the last axis
  summed of each may be tiled, and both are tiled alike there (or all summed
  axes lie in one tile).
  """
  if impl in BLOCKED and not falls_back(impl):
    return _blocked(a, b, over, impl, dtype)
  dims = (over, ((), ()))
  dot = functools.partial(jax.lax.dot_general, dimension_numbers=dims)
  dot = functools.partial(dot, preferred_element_type=jnp.float32)
  if impl != 'native':
    return _widened(dot, a, b).astype(dtype)
  # HIGHEST is what keeps cuBLASLt from accumulating in fewer bits.
  exact = functools.partial(dot, precision=jax.lax.Precision.HIGHEST)
  y = jax.lax.platform_dependent(a.values, b.values, cuda=exact, default=dot)
  sa, sb = _kept_scales(a, over[0]), _kept_scales(b, over[1])
  sa = sa.reshape(sa.shape + (1,) * sb.ndim)
  sb = sb.reshape((1,) * (sa.ndim - sb.ndim) + sb.shape)
  return (y * sa * sb).astype(dtype)


def falls_back(impl: str) -> bool:
  """Whether this call cannot be the kernel's; noted if so."""
  why = ''
  mesh = jax.sharding.get_abstract_mesh()
  # GSPMD cannot split a kernel; in shard_map nothing is left to split.
  if not mesh.empty and mesh.size > 1 and not mesh.are_all_axes_manual:
    why = f'a mesh of {mesh.size} devices outside shard_map'
  if why and _seen.get() is not None:
    _seen.get().append(f'fp8 impl={impl} has no kernel for {why}: dequant')
  return bool(why)


def _kept_scales(q: Quantized, over: tuple[int, ...]) -> Array:
  """Scales by the kept axes; there must be one along the sum."""
  assert all(q.scales.shape[d] == 1 for d in over), (q.scales.shape, over)
  kept = tuple(d for d in range(q.ndim) if d not in over)
  return jnp.squeeze(q8.spread(q, kept), over)


def _widened(dot, a: Quantized, b: Quantized) -> Array:
  """`dot` of the dequantised operands, exact but for float32 accumulation."""

  def wide(a, b):
    return dot(q8.dequantize(a), q8.dequantize(b))

  def narrow(a, b):
    return dot(q8.dequantize(a, jnp.bfloat16), q8.dequantize(b, jnp.bfloat16))

  def precise(a, b):
    highest = jax.lax.Precision.HIGHEST
    return dot(q8.dequantize(a), q8.dequantize(b), precision=highest)

  default = narrow if a.kind == b.kind == 'pow2' else precise
  return jax.lax.platform_dependent(a, b, cpu=wide, default=default)


# ------------------------------------------------------------ by kernel


def _blocked(a, b, over, impl, dtype):
  left, right = matrix(a, over[0]), matrix(b, over[1])
  if impl == 'mxfp8':
    y = _mxfp8(left, right, dtype)
  else:
    y = run_kernel(impl, 'matmul', *per_row(left), *right, dtype=dtype)
  y = unpadded(y, 0, a, over[0])
  return unpadded(y, y.ndim - 1, b, over[1])


def run_kernel(impl: str, name: str, *args: Array, **options) -> Array:
  """The result of a kernel of `impl`; Pallas is imported only where it runs.

  In a checked shard_map, a Pallas call has to say along which axes of the mesh
  its result differs. That is wherever any operand does; all are marked so
  before (a weight may be the same on every device), and the kernels' results
  are of their first operand's type.
  """
  if impl == 'mgpu':
    from mla_moe.kernels import block_gpu as kernels
  else:
    from mla_moe.kernels import block_tpu as kernels
  same = [marked(x, *args) for x in args]
  return marked(getattr(kernels, name)(*same, **options), *same)


def marked(x: Array, *likes: PyTree) -> Array:
  """`x`, marked in shard_map as differing by device where any of `likes` is."""
  differs = lambda x: jax.typeof(x).manual_axis_type.varying
  axes = frozenset().union(*map(differs, jax.tree.leaves(likes)))
  new = tuple(sorted(axes - differs(x)))
  return jax.lax.pcast(x, new, to='varying') if new else x


def matrix(q: Quantized, over: tuple[int, ...], lead: int = 0):
  """(values [*lead, rows, K], scales [*lead, rows or rows / 128, K / 128]).

  Rows are the kept axes after `lead` leading ones, K those summed over; both
  are padded with zeros to multiples of 128, as is the last summed axis. A kept
  axis in blocks has one scale a block, and is padded itself.
  """
  rows = kept(q, over, lead)
  blocks = q.tile(rows[-1]) > 1
  ends = (over[-1], rows[-1]) if blocks else (over[-1],)
  pads = [(0, -n % TILE if d in ends else 0) for d, n in enumerate(q.shape)]
  values = jnp.pad(q.values, pads) if any(p for _, p in pads) else q.values
  scales = q8.spread(q, tuple(d for d in range(q.ndim) if d not in ends))

  def flat(x):
    summed = math.prod(x.shape[d] for d in over)
    x = x.transpose(*range(lead), *rows, *over)
    return x.reshape(*x.shape[:lead], -1, summed)

  values, scales = flat(values), flat(scales)
  short = -values.shape[-2] % TILE
  if short:
    pads = [(0, 0)] * lead + [(0, short), (0, 0)]
    values = jnp.pad(values, pads)
    scales = jnp.pad(scales, pads, constant_values=1.0)
  return values, scales


def kept(q: Quantized, over: tuple[int, ...], lead: int = 0):
  """The axes of `q` that its product keeps, after `lead` leading ones."""
  return tuple(d for d in range(lead, q.ndim) if d not in over)


def per_row(matrix):
  """`matrix`'s result with a scale for every row."""
  values, scales = matrix
  per = values.shape[-2] // scales.shape[-2]
  return values, jnp.repeat(scales, per, axis=-2) if per > 1 else scales


def unpadded(y, axis: int, q: Quantized, over, lead: int = 0):
  """Axis `axis` of a product as the kept axes of its operand `q`."""
  axes = kept(q, over, lead)
  lengths = [q.shape[d] for d in axes]
  before, after = y.shape[:axis], y.shape[axis + 1 :]
  if q.tile(axes[-1]) == 1:
    y = jax.lax.slice_in_dim(y, 0, math.prod(lengths), axis=axis)
    return y.reshape(*before, *lengths, *after)
  y = y.reshape(*before, *lengths[:-1], -1, *after)
  at = axis + len(lengths) - 1
  return jax.lax.slice_in_dim(y, 0, lengths[-1], axis=at)


def _mxfp8(a, b, dtype):
  (a, sa), (b, sb) = per_row(a), per_row(b)
  narrow = lambda s: jnp.repeat(s, 4, axis=-1).astype(jnp.float8_e8m0fnu)[None]
  y = jax.nn.scaled_matmul(
    a[None], b[None], narrow(sa), narrow(sb), preferred_element_type=dtype
  )
  return marked(y[0], a, b)
