"""The kernels of a card beside their oracles: parts `fp8` and `attention`.

An error is |a - b| / |b| over a whole array, with b the oracle's result.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mla_moe import fp8, kernels
from mla_moe.kernels import latent_gpu
from mla_moe.model import attention


def relative(a, b) -> float:
  """Returns |a - b| / |b| in float32."""
  a, b = a.astype(jnp.float32), b.astype(jnp.float32)
  return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


def with_gradients(f):
  """Returns (x, w, g) -> y, dx and dw of y = f(x, w), jitted."""

  def run(x, w, g):
    y, pull = jax.vjp(f, x, w)
    return y, *pull(g)

  return jax.jit(run)


def operands(m: int, k: int, n: int, count: int = 0):
  """Returns normal x, float32 master w of `count` experts, and a small g."""
  keys = jax.random.split(jax.random.key(0), 3)
  lead = (count,) if count else ()
  x = jax.random.normal(keys[0], (m, k), jnp.bfloat16)
  w = jax.random.normal(keys[1], (*lead, k, n), jnp.float32) * k**-0.5
  g = jax.random.normal(keys[2], (m, n), jnp.bfloat16) * 1e-3
  return x, w, g


def fp8_products(rows, toy: bool) -> None:
  """Native products, then kernels, beside products of dequantised operands."""
  sizes = jnp.full((8,), 100, jnp.int32).at[3].set(0)
  grouped = lambda x, w, precision, **options: fp8.ragged_dot(
    x, w, sizes, precision, **options
  )
  cases = {
    'dense': (fp8.dot, operands(256, 256, 384)),
    'by expert': (grouped, operands(1024, 256, 384, 8)),
  }
  if not toy:
    cases['dense, long sum'] = fp8.dot, operands(512, 7168, 1024)
  with rows.attempt('quantised numbers'):
    check_quantised(rows)
  block, note = fp8.choose('fp8_block')
  if note and not toy:  # dequant would be compared with itself
    rows.fail('fp8_block', note)
  # Last, since it is the one that can spoil the device.
  for precision, impl in {
    'fp8_tensor': 'native',
    'fp8_channel': 'native',
    'fp8_block': block,
  }.items():
    if impl == 'dequant' and not toy:
      continue
    for name, (product, args) in cases.items():
      figure = f'{precision}, {impl}, {name}'
      with rows.attempt(figure):
        check_product(rows, figure, product, args, precision, impl)


def check_quantised(rows) -> None:
  """Adds the error of a quantised array, beside NumPy's; it must be none.

  A compiler that folds a conversion to FP8 and back leaves x as it was.
  """
  x = np.random.default_rng(0).normal(size=(64, 256)).astype(np.float32)
  tiles = x.reshape(64, 2, 128)
  largest = np.abs(tiles).max(-1, keepdims=True)
  scales = 2.0 ** np.ceil(np.log2(largest / 448))
  values = (tiles / scales).astype(jnp.float8_e4m3fn).astype(np.float32)
  got = jax.jit(lambda x: fp8.dequantize(fp8.Recipe().rows(x)))(x)
  error = relative(got, jnp.asarray((values * scales).reshape(x.shape)))
  add_errors(rows, 'quantised numbers', ('x',), [error], (1e-9,))


def check_product(rows, figure, product, args, precision, impl) -> None:
  """Adds the errors of y, dx and dw of an implementation.

  y and dx are rounded to bfloat16, which may fall either way. dw is float32,
  and its bound is the accumulator's.
  """
  of = lambda impl: with_gradients(
    functools.partial(product, precision=precision, impl=impl)
  )(*args)
  errors = list(map(relative, of(impl), of('dequant')))
  # Hopper's tensor cores cut FP8 products to about 14 bits as they add them,
  # within mgpu's tiles of 128, too: 2^-13 of the sum, and twice that is safe.
  # cuBLASLt may add more of them before it turns to float32.
  bound = {'native': 2e-3, 'mgpu': 2**-12}.get(impl, 1e-5)
  add_errors(rows, figure, ('y', 'dx', 'dw'), errors, (3e-3, 3e-3, bound))


def add_errors(rows, figure: str, names, errors, bounds) -> None:
  """Adds a row with the largest of some errors; NaN is never below a bound."""
  listed = list(zip(names, errors, bounds, strict=True))
  text = ', '.join(f'{n} {error:.1e} < {most:g}' for n, error, most in listed)
  good = all(error < most for _, error, most in listed)
  rows.add(figure, float(np.max(errors)), 'error', text, good)


def absorbed(q, pages, table, start, *, heads: int, rank: int):
  """Returns `latent_tpu.attend` in plain JAX, float32: the kernels' oracle."""
  keys = pages[table].reshape(len(q), -1, pages.shape[-1]).astype(jnp.float32)
  highest = jax.lax.Precision.HIGHEST
  wide = q.astype(jnp.float32)
  logits = jnp.einsum('bgw,bsw->bgs', wide, keys, precision=highest)
  token = jnp.arange(q.shape[1]) // heads
  last = start[:, None, None] + token[None, :, None]
  seen = jnp.arange(keys.shape[1])[None, None] <= last
  probs = jax.nn.softmax(jnp.where(seen, logits, kernels.MASKED))
  values = keys[..., :rank]
  return jnp.einsum('bgs,bsc->bgc', probs, values, precision=highest)


def attention_kernels(rows, toy: bool) -> None:
  """Attention's cores beside the quadratic one, decoding's kernel beside its.

  At V3's widths of a head.
  """
  for core in ['xla'] + ['cudnn'] * (jax.default_backend() == 'gpu'):
    with rows.attempt(f'attention, {core}'):
      check_core(rows, core, *((1, 64, 2) if toy else (2, 1024, 16)))
  for tokens in (1, 2):
    figure = f'absorbed kernel, {tokens} new tokens'
    with rows.attempt(figure):
      *args, widths = latents(toy, tokens, batch=4, context=160)
      got = latent_attend(widths)(*args)
      # A GPU's compiler takes 20 s over the oracle's products in float32.
      with jax.default_device(jax.local_devices(backend='cpu')[0]):
        args = jax.device_put(args, jax.local_devices(backend='cpu')[0])
        oracle = absorbed(*args, **widths)
      error = relative(got, jax.device_put(oracle, got.sharding))
      add_errors(rows, figure, ('y',), [error], (1e-2,))


def check_core(rows, core: str, batch: int, length: int, heads: int) -> None:
  """Adds the errors of a core's output and gradients."""
  keys = iter(jax.random.split(jax.random.key(0), 4))
  make = lambda width: jax.random.normal(
    next(keys), (batch, length, heads, width), jnp.bfloat16
  )
  qkv, g = (make(192), make(192), make(128)), make(128)

  def of(impl, *args):
    attend = functools.partial(attention.attend, scale=192**-0.5, impl=impl)

    def run(g, *args):
      y, pull = jax.vjp(attend, *args)
      return y, *pull(g.astype(y.dtype))

    return jax.jit(run)(g, *args)

  with jax.default_matmul_precision('highest'):
    oracle = of('reference', *(x.astype(jnp.float32) for x in qkv))
  errors = list(map(relative, of(core, *qkv), oracle))
  names = 'y', 'dq', 'dk', 'dv'
  add_errors(rows, f'attention, {core}', names, errors, (2e-2,) * 4)


def latents(toy: bool, tokens: int, batch: int, context: int):
  """Returns queries, pages, table, starts and widths of absorbed attention.

  The first row's keys fill its pages, the second has none before its new
  tokens, and the others have 3 more than one page. Keys beyond are huge.
  """
  heads, rank, rope_dim, page = (4, 32, 16, 32) if toy else (128, 512, 64, 64)
  random = np.random.default_rng(0)
  width, count = rank + rope_dim, -(-context // page)
  table = random.permutation(batch * count).reshape(batch, count)
  start = np.full(batch, page + 3)
  start[0], start[1] = count * page - tokens, 0
  pages = random.normal(size=(batch * count, page, width))
  keys = np.arange(count * page).reshape(count, page)
  for row in range(batch):
    pages[table[row][keys // page], keys % page] = np.where(
      (keys < start[row] + tokens)[..., None], pages[table[row]], 1e4
    )
  q = random.normal(size=(batch, tokens * heads, width)) * width**-0.5
  return (
    jnp.asarray(q, jnp.bfloat16),
    jnp.asarray(pages, jnp.bfloat16),
    jnp.asarray(table, jnp.int32),
    jnp.asarray(start, jnp.int32),
    dict(heads=heads, rank=rank),
  )


def latent_attend(widths: dict):
  """Returns the Triton kernel, jitted; a CPU interprets it."""
  interpret = jax.default_backend() == 'cpu'
  return jax.jit(
    functools.partial(latent_gpu.attend, **widths, interpret=interpret)
  )
