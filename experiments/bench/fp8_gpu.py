"""FP8 against bfloat16 on a GPU: correctness, then time. NOT RUN YET.

No GPU was at hand when this was written, and no figure of it has been measured;
the Mosaic GPU kernels have been interpreted, and compiled for an H100, but not
run on one. Two products check y, dx and dw of the block-scaled kernels against
dequantised products of the same FP8. Then each shape of DeepSeek-V3's layers is
timed, forward and backward, in bfloat16, per-tensor FP8 (XLA's own, by
cuBLASLt) and block FP8, in TFLOP/s. The aim is 1.4 times bfloat16 on the dense
shapes, and 70% of per-tensor FP8.
"""

from __future__ import annotations

import functools
import pathlib
import time

import jax
import jax.numpy as jnp

from mla_moe import fp8
from mla_moe.config import ConfigError

TOKENS = 8192
# name: (K, N) of the products of a V3 layer.
DENSE = {
  'q_down': (7168, 1536),
  'q_up': (1536, 24576),
  'kv_down': (7168, 512),
  'kv_up': (512, 16384),
  'out': (16384, 7168),
  'expert up': (7168, 2048),
  'expert down': (2048, 7168),
}
RECIPES = ('bf16', 'fp8_tensor', 'fp8_block')


def training(f):
  """Returns (x, w, g) -> y, dx and dw of a product."""

  def run(x, w, g):
    y, pull = jax.vjp(f, x, w)
    return y, *pull(g)

  return jax.jit(run)


def seconds(run, args, repeats: int = 20) -> float:
  """Returns the median wall-clock time of one call."""
  jax.block_until_ready(run(*args))
  times = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(run(*args))
    times.append(time.perf_counter() - start)
  return sorted(times)[len(times) // 2]


def operands(m: int, k: int, n: int, experts: int = 0):
  """Returns normal x, float32 master w, and g at the scale of training."""
  keys = jax.random.split(jax.random.key(0), 3)
  lead = (experts,) if experts else ()
  x = jax.random.normal(keys[0], (m, k), jnp.bfloat16)
  w = jax.random.normal(keys[1], (*lead, k, n), jnp.float32) * k**-0.5
  g = jax.random.normal(keys[2], (m, n), jnp.bfloat16) * 1e-3
  return x, w, g


def relative(a, b) -> float:
  """Returns |a - b| / |b| in float32."""
  a, b = a.astype(jnp.float32), b.astype(jnp.float32)
  return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


def check(name: str, product, args) -> bool:
  """Compares the kernels with dequantised products; prints the errors."""
  fast = training(functools.partial(product, precision='fp8_block'))
  plain = training(
    functools.partial(product, precision='fp8_block', impl='dequant')
  )
  parts = zip(fast(*args), plain(*args), strict=True)
  errors = [relative(a, b) for a, b in parts]
  # y and dx are rounded to bfloat16, which may fall either way.
  good = max(errors[:2]) < 3e-3 and errors[2] < 1e-5
  text = ' '.join(f'{e:.1e}' for e in errors)
  print(f'{"ok " if good else "BAD"} {name}: y, dx, dw err by {text}')
  return good


def row(name: str, product, args, flops: float) -> None:
  """Prints times of every recipe: all three products, then the forward alone.

  The forward product has its weights quantised beforehand, as in serving.
  """
  line = f'{name:22}'
  base = 0.0
  x, w, _ = args
  for precision in RECIPES:
    f = functools.partial(product, precision=precision)
    whole = seconds(training(f), args)
    base = base or whole
    ready = w
    if precision != 'bf16':
      lead = w.ndim - 2
      ready = jax.jit(
        functools.partial(fp8.prepare, precision=precision, lead=lead)
      )(w)
    forward = seconds(jax.jit(f), (x, ready))
    line += (
      f' | {1e3 * whole:8.3f} ms {3 * flops / whole / 1e12:6.0f} TF/s '
      f'x{base / whole:4.2f}, fwd {flops / forward / 1e12:5.0f}'
    )
  print(line, flush=True)


def flags(parser) -> None:
  """Adds this benchmark's flags."""
  parser.add_argument('--experts', type=int, default=256)


def run(out: pathlib.Path, args) -> None:
  """Prints the checks, then the tables."""
  if jax.default_backend() != 'gpu':
    raise ConfigError('fp8_gpu: needs an NVIDIA GPU, and jax sees none')
  device = jax.devices()[0]
  print(f'{device.device_kind}, jax {jax.__version__}')
  for precision in RECIPES[1:]:
    impl, line = fp8.choose(precision)
    print(f'{precision}: {impl} {line}')
  check_all()
  print(f'{"forward and backward":22} | ' + ' | '.join(RECIPES))
  for name, (k, n) in DENSE.items():
    flops = 2 * TOKENS * k * n
    row(f'{name} {k} x {n}', fp8.dot, operands(TOKENS, k, n), flops)
  time_experts(args.experts)


def check_all() -> None:
  """Checks a dense and a grouped product.

  Raises:
    SystemExit: one of them is wrong.
  """
  sizes = jnp.full((8,), 100, jnp.int32).at[3].set(0)
  grouped = lambda x, w, precision, **options: fp8.ragged_dot(
    x, w, sizes, precision, **options
  )
  good = check('dense 512 x 1024 x 768', fp8.dot, operands(512, 1024, 768))
  good &= check('grouped, 8 experts', grouped, operands(1024, 512, 384, 8))
  if not good:
    raise SystemExit('the kernels are wrong: no times')


def time_experts(experts: int) -> None:
  """Prints the rates of the grouped products of `experts` experts.

  In FP8 alone: bfloat16's lax.ragged_dot is a dense masked product on GPUs,
  slow and large. Rows are those of one layer: 8 choices of 8192 tokens.
  """
  rows = TOKENS * 8
  even = jnp.full((experts,), rows // experts, jnp.int32)
  run = functools.partial(
    fp8.ragged_dot, group_sizes=even, precision='fp8_block'
  )
  for name in ('expert up', 'expert down'):
    k, n = DENSE[name]
    args = operands(rows, k, n, experts)
    whole = seconds(training(run), args)
    rate = 6 * rows * k * n / whole / 1e12
    print(f'{experts} experts, {name}: {1e3 * whole:.3f} ms {rate:.0f} TF/s')
    del args  # gigabytes, before the next ones
