"""FP8 against bfloat16 on a GPU: correctness, then time. NOT RUN YET.

  python -m experiments.bench.fp8_gpu

No GPU was at hand when this was written: no number of it has been measured,
and the Mosaic GPU kernels have been interpreted and lowered, never compiled to
machine code. For each shape of DeepSeek-V3's layers it checks y, dx and dw of
the block-scaled kernels against dequantised products, then times a forward and
backward pass in bfloat16, per-tensor FP8 (XLA's own, cuBLASLt) and block FP8,
and prints TFLOP/s. The aim is 1.4 times bfloat16 on the dense shapes, and 70%
of what per-tensor FP8 reaches.
"""

from __future__ import annotations

import argparse
import functools
import time

import jax
import jax.numpy as jnp

from mla_moe import fp8

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
  """y, dx and dw of a product."""

  def run(x, w, g):
    y, pull = jax.vjp(f, x, w)
    return y, *pull(g)

  return jax.jit(run)


def seconds(run, args, repeats: int = 20) -> float:
  """Median wall-clock time of one call."""
  jax.block_until_ready(run(*args))
  times = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(run(*args))
    times.append(time.perf_counter() - start)
  return sorted(times)[len(times) // 2]


def forward_seconds(f, args) -> float:
  """Of the forward product alone, weights quantised beforehand."""
  return seconds(jax.jit(f), args)


def operands(m: int, k: int, n: int, experts: int = 0):
  """Normal x, float32 master w and g at the scale of training."""
  keys = jax.random.split(jax.random.key(0), 3)
  lead = (experts,) if experts else ()
  x = jax.random.normal(keys[0], (m, k), jnp.bfloat16)
  w = jax.random.normal(keys[1], (*lead, k, n), jnp.float32) * k**-0.5
  g = jax.random.normal(keys[2], (m, n), jnp.bfloat16) * 1e-3
  return x, w, g


def relative(a, b) -> float:
  """Of two arrays, in float32."""
  a, b = a.astype(jnp.float32), b.astype(jnp.float32)
  return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


def check(name: str, product, args):
  """The hardware's kernels against dequantised products of the same FP8."""
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


def row(name: str, product, args, flops: float):
  """Times of every recipe: all three products, then the forward alone."""
  line = f'{name:22}'
  base = 0.0
  x, w, _ = args
  for precision in RECIPES:
    f = functools.partial(product, precision=precision)
    took = seconds(training(f), args)
    base = base or took
    ready = w
    if precision != 'bf16':
      lead = w.ndim - 2
      ready = jax.jit(
        functools.partial(fp8.prepare, precision=precision, lead=lead)
      )(w)
    alone = forward_seconds(f, (x, ready))
    line += (
      f' | {1e3 * took:8.3f} ms {3 * flops / took / 1e12:6.0f} TF/s '
      f'x{base / took:4.2f}, fwd {flops / alone / 1e12:5.0f}'
    )
  print(line, flush=True)


def main():
  """Checks, then the table."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--experts', type=int, default=256)
  experts = parser.parse_args().experts
  device = jax.devices()[0]
  print(f'{device.device_kind}, jax {jax.__version__}')
  for precision in RECIPES[1:]:
    impl, line = fp8.choose(precision)
    print(f'{precision}: {impl} {line}')

  sizes = jnp.full((8,), 100, jnp.int32).at[3].set(0)
  grouped = lambda x, w, precision, **options: fp8.ragged_dot(
    x, w, sizes, precision, **options
  )
  good = check('dense 512 x 1024 x 768', fp8.dot, operands(512, 1024, 768))
  good &= check('grouped, 8 experts', grouped, operands(1024, 512, 384, 8))
  if not good:
    raise SystemExit('the kernels are wrong: no times')

  print(f'{"forward and backward":22} | ' + ' | '.join(RECIPES))
  for name, (k, n) in DENSE.items():
    flops = 2 * TOKENS * k * n
    row(f'{name} {k} x {n}', fp8.dot, operands(TOKENS, k, n), flops)

  # bfloat16's lax.ragged_dot is a dense masked product on GPUs: slow, and
  # large. Rows of one layer's share: 8 choices of 8192 tokens.
  rows = TOKENS * 8
  even = jnp.full((experts,), rows // experts, jnp.int32)
  by_expert = functools.partial(fp8.ragged_dot, group_sizes=even)
  for name in ('expert up', 'expert down'):
    k, n = DENSE[name]
    x, w, g = operands(rows, k, n, experts)
    run = functools.partial(by_expert, precision='fp8_block')
    took = seconds(training(run), (x, w, g))
    reach = 6 * rows * k * n / took / 1e12
    print(f'{experts} experts, {name}: {1e3 * took:.3f} ms {reach:.0f} TF/s')
    del x, w, g


if __name__ == '__main__':
  main()
