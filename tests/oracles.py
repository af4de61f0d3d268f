"""Plain products, with which kernels are compared."""

import jax
import jax.numpy as jnp


def block_product(a, sa, b, sb):
  """Returns a b^T, the dequantised operands' float32 product.

  a [M, K] and b [N, K] have scales [rows, K / 128]; those of b are of one row,
  or of 128.
  """
  wide = lambda q, s: (
    q.astype(jnp.float32)
    * jnp.repeat(jnp.repeat(s, 128, axis=1), q.shape[0] // s.shape[0], axis=0)
  )
  highest = jax.lax.Precision.HIGHEST
  return jnp.matmul(wide(a, sa), wide(b, sb).T, precision=highest)
