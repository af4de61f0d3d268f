"""The embedding's lookup on a mesh is the table's rows, and so its gradient."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from mla_moe import sharding
from mla_moe.config import MeshConfig
from mla_moe.model import embedding

V, D, B, T = 24, 16, 8, 8


@pytest.mark.parametrize(
  'sizes, rows',
  [
    ({'fsdp': 2, 'expert': 2, 'tensor': 2}, B),
    ({'data': 2, 'fsdp': 4}, B),
    ({'fsdp': 4, 'tensor': 2}, 3),  # rows that nothing divides: whole
  ],
)
def test_a_mesh_gives_the_rows_and_the_gradient(sizes, rows):
  mesh = sharding.make_mesh(MeshConfig(**sizes))
  random = np.random.default_rng(0)
  table = random.normal(size=(V, D)).astype(np.float32)
  tokens = random.integers(0, V, (rows, T)).astype(np.int32)
  tokens[0, 0] = V + 5  # clipped
  weigh = random.normal(size=(rows, T, D)).astype(np.float32)

  def f(table, tokens):
    out = embedding.lookup(table, tokens, 'float32')
    return (out * weigh).sum(), out

  run = jax.jit(jax.value_and_grad(f, has_aux=True))
  (_, out), grad = run(table, np.minimum(tokens, V - 1))
  with jax.set_mesh(mesh):
    where = NamedSharding(mesh, sharding.spec(('vocab', 'embed')))
    (_, got), slope = run(jax.device_put(table, where), tokens)
  np.testing.assert_array_equal(got, out)
  np.testing.assert_array_equal(out, table[np.minimum(tokens, V - 1)])
  np.testing.assert_allclose(slope, grad, rtol=1e-6, atol=1e-6)


def test_no_device_embeds_the_whole_batch():
  """What GSPMD does of itself: [B, T, D] of the whole batch everywhere."""
  mesh = sharding.make_mesh(MeshConfig(fsdp=8))
  with jax.set_mesh(mesh):
    where = lambda *axes: NamedSharding(mesh, sharding.spec(axes))
    table = jax.ShapeDtypeStruct(
      (V, D), 'float32', sharding=where(None, 'embed')
    )
    tokens = jax.ShapeDtypeStruct(
      (B, T), jnp.int32, sharding=where('batch', None)
    )
    f = lambda table, tokens: (
      embedding.lookup(table, tokens, 'float32') ** 2
    ).sum()
    text = jax.jit(jax.grad(f)).lower(table, tokens).compile().as_text()
  assert ' all-to-all(' in text  # of its columns for the group
  sizes = re.findall(r'f32\[([\d,]+)\]', text)
  largest = max(math.prod(map(int, size.split(','))) for size in sizes)
  assert largest < B * T * D
