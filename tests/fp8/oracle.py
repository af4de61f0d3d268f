"""FP8 by numpy alone: loops over tiles, ml_dtypes' rounding, float64 products.

Nothing here knows of the package's arrays.
"""

import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

TINY = 2.0**-100
B, W = 128, -1
# The tiles of (x, w) in y, of (g, w) in dx, of (x, g) in dw.
TILES = {
  'fp8_block': ((B,), (B, 1, B), (B,), (B, 1, B), (B, 1), (B, 1, 1)),
  'fp8_channel': ((W,), (W, 1, 1), (W, W), (1, W, W), (W, W, 1), (W, W, 1, 1)),
  'fp8_tensor': ((W,) * 3, (W,) * 3, (W,) * 4, (W,) * 3, (W,) * 3, (W,) * 4),
}


def tiled(x, tiles):
  """(values, scales, values * scales in float64) by loops."""
  x = np.asarray(x, np.float32)
  tiles = (1,) * (x.ndim - len(tiles)) + tuple(tiles)
  tiles = [n if t < 0 else min(t, n) for t, n in zip(tiles, x.shape, strict=1)]
  counts = [-(-n // t) for t, n in zip(tiles, x.shape, strict=True)]
  values = np.zeros(x.shape, ml_dtypes.float8_e4m3fn)
  scales = np.zeros(counts, np.float32)
  exact = np.zeros(x.shape, np.float64)
  for index in itertools.product(*map(range, counts)):
    pairs = zip(index, tiles, strict=True)
    cut = tuple(slice(i * t, (i + 1) * t) for i, t in pairs)
    amax = np.abs(x[cut]).max()
    scale = np.float32(1)
    if amax >= TINY:
      mantissa, exponent = np.frexp(amax)  # mantissa in [0.5, 1)
      scale = np.float32(2.0 ** (int(exponent) - 9 + (mantissa > 0.875)))
    scales[index] = scale
    small = np.clip(x[cut] / scale, -448, 448)
    values[cut] = small.astype(ml_dtypes.float8_e4m3fn)
    exact[cut] = values[cut].astype(np.float64) * np.float64(scale)
  return values, scales, exact


def dense(x, w, g, precision):
  """(y, dx, dw) of x [B, T, K] and w [K, G, N] in float64."""
  t = TILES[precision]
  q = lambda a, tiles: tiled(a, tiles)[2]
  return (
    np.einsum('btk,kgn->btgn', q(x, t[0]), q(w, t[1])),
    np.einsum('btgn,kgn->btk', q(g, t[2]), q(w, t[3])),
    np.einsum('btk,btgn->kgn', q(x, t[4]), q(g, t[5])),
  )


def grouped(x, w, g, sizes, precision):
  """(y, dx, dw) of sorted rows x [M, K] and w [E, K, G, N] in float64."""
  t = TILES[precision]
  y, dx = np.zeros(g.shape), np.zeros(x.shape)
  dw = np.zeros(w.shape)
  used = sum(sizes)
  x, g = np.asarray(x).copy(), np.asarray(g).copy()
  x[used:], g[used:] = 0, 0
  whole = precision == 'fp8_tensor'
  q = lambda a, tiles: tiled(a, (-1,) * a.ndim if whole else tiles)[2]
  qx, qg = q(x, t[0]), q(g, t[2])
  all_rows = precision != 'fp8_block'
  cx = q(x, (-1, 1)) if all_rows else None
  cg = q(g, (-1, 1, 1)) if all_rows else None
  start = 0
  for e, size in enumerate(sizes):
    rows = slice(start, start + size)
    start += size
    if not size:
      continue
    y[rows] = np.einsum('mk,kgn->mgn', qx[rows], tiled(w[e], t[1])[2])
    dx[rows] = np.einsum('mgn,kgn->mk', qg[rows], tiled(w[e], t[3])[2])
    own_x = cx[rows] if all_rows else tiled(x[rows], (B, 1))[2]
    own_g = cg[rows] if all_rows else tiled(g[rows], (B, 1, 1))[2]
    dw[e] = np.einsum('mk,mgn->kgn', own_x, own_g)
  return y, dx, dw


def hard(shape):
  """Magnitudes from 1e-30 to 1e30, zeros, and the edges of a scale."""
  random = np.random.default_rng(7)
  x = random.normal(size=shape) * 10 ** random.uniform(-30, 30, shape)
  x = x.astype(np.float32)
  x.reshape(-1)[::17] = 0
  x[0] = 0
  edge = np.float32(448 * 2.0**5)
  x[1:4] = np.clip(x[1:4], -1, 1)
  x[1].reshape(-1)[0] = edge
  x[2].reshape(-1)[0] = np.nextafter(edge, np.float32(np.inf))
  x[3].reshape(-1)[0] = np.nextafter(edge, np.float32(0))
  return x


def normal(seed, *shape, scale=1.0):
  x = np.random.default_rng(seed).normal(size=shape) * scale
  return jnp.asarray(x, jnp.float32)


def relative(a, b):
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  return np.linalg.norm(a - b) / np.linalg.norm(b)


def products(f, x, w, g):
  """(y, dx, dw) of f(x, w), compiled."""

  def run(x, w, g):
    y, pull = jax.vjp(f, x, w)
    return (y, *pull(g))

  return jax.jit(run)(x, w, g)
