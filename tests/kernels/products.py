"""A program that compiles FP8's products for a device that is not here.

Each test puts lines before it that define `shape`, `impl` and `target`.
"""

PRODUCTS = """
import jax
import jax.numpy as jnp
from mla_moe import fp8

def both(f):
  def run(x, w, g, sizes):
    y, pull = jax.vjp(lambda x, w: f(x, w, sizes), x, w)
    return y, *pull(g)
  return run

x, g = shape((1024, 512), jnp.bfloat16), shape((1024, 384), jnp.bfloat16)
sizes = shape((4,), jnp.int32)
dense = lambda x, w, sizes: fp8.dot(x, w, impl=impl)
grouped = lambda x, w, sizes: fp8.ragged_dot(x, w, sizes, impl=impl)
for run, w in ((dense, (512, 384)), (grouped, (4, 512, 384))):
  lowered = jax.jit(both(run)).lower(x, shape(w, jnp.float32), g, sizes)
  text = lowered.compile().as_text()  # y, dx and dw
  assert text.count(f'custom_call_target="{target}') == 3
"""
