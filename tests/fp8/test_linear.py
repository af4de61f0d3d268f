"""Linear layers in FP8: weights, gradients, memory, and what is not touched."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import linen as nn

from mla_moe import fp8


def text(f, *args):
  return jax.jit(f).lower(*args).as_text()


def test_bf16_is_the_plain_dot():
  x, w = oracle.normal(0, 2, 5, 8).astype(jnp.bfloat16), oracle.normal(1, 8, 6)

  def ours(x, w):
    return jax.vjp(lambda x, w: fp8.dot(x, w, 'bf16'), x, w)

  def plain(x, w):
    return jax.vjp(
      lambda x, w: jnp.einsum('btk,kn->btn', x, w.astype(x.dtype)), x, w
    )

  rename = lambda s: s.replace('@jit_ours', '').replace('@jit_plain', '')
  assert rename(text(ours, x, w)) == rename(text(plain, x, w))


@pytest.mark.parametrize('precision', ['fp8_channel', 'fp8_tensor'])
def test_native_dots_take_fp8_operands(precision):
  run = functools.partial(fp8.dot, precision=precision, impl='native')
  x, w = oracle.normal(0, 16, 32), oracle.normal(1, 32, 16)
  both = lambda x, w: jax.vjp(run, x, w)[1](x[:, :16])
  lowered = text(both, x, w)
  dots = [line for line in lowered.splitlines() if 'dot_general' in line]
  assert len(dots) == 3 - 1  # the forward product is dead here
  assert all(line.count('f8E4M3FN') == 2 for line in dots)


@pytest.mark.parametrize(
  'precision',  # one copy of a weight, and two
  ['fp8_block', pytest.param('fp8_channel', marks=pytest.mark.slow)],
)
def test_a_prepared_weight_gives_the_same_results_and_masters_gradients(
  precision,
):
  x, master = oracle.normal(0, 3, 20, 40), oracle.normal(1, 2, 40, 24)
  g = oracle.normal(2, 3, 20, 24)
  # The first axis is one of layers, over which a scan goes.
  copies = fp8.Recipe(precision).weights(master, 1)

  def layer(x, w):
    return jnp.tanh(fp8.dot(x, w, precision)) @ jnp.ones((24, 40)) / 24, None

  def plain(x, master):
    return (jax.lax.scan(layer, x, master)[0] @ jnp.ones((40, 24)) * g).sum()

  def prepared(x, master):
    return plain(x, fp8.Weight(master, copies))

  expected = jax.jit(jax.grad(plain, (0, 1)))(x, master)
  got = jax.jit(jax.grad(prepared, (0, 1)))(x, master)
  chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-6)
  assert got[1].dtype == jnp.float32
  # The master's values play no part: they may be left where they are.
  first = fp8.Recipe(precision).weights(master[0])
  other = fp8.Weight(jnp.zeros((40, 24)), first)
  run = jax.jit(lambda x, w: fp8.dot(x, w, precision))
  chex.assert_trees_all_equal(run(x, other), run(x, master[0]))


def test_several_weights_share_one_quantised_input():
  x = oracle.normal(0, 30, 40)
  ws = oracle.normal(1, 40, 24), oracle.normal(2, 40, 8)
  gs = oracle.normal(3, 30, 24), oracle.normal(4, 30, 8)
  ys, dx, dws = oracle.products(lambda x, ws: fp8.dots(x, ws), x, ws, gs)
  parts = [
    oracle.products(fp8.dot, x, w, g) for w, g in zip(ws, gs, strict=True)
  ]
  chex.assert_trees_all_close(ys, tuple(p[0] for p in parts), rtol=1e-5)
  chex.assert_trees_all_close(dx, parts[0][1] + parts[1][1], rtol=1e-4)
  chex.assert_trees_all_close(dws, tuple(p[2] for p in parts), rtol=1e-4)
  lowered = text(lambda x: fp8.dots(x, ws), x)
  casts = [s for s in lowered.splitlines() if 'f8E4M3FN>' in s.split('->')[-1]]
  assert len([s for s in casts if 'stablehlo.convert' in s]) == 3


def saved_bytes(f, *args):
  """Bytes that the backward pass of `f` finds, its arguments left out."""
  _, pull = jax.vjp(f, *args)
  known = {id(a) for a in args}
  leaves = [x for x in jax.tree.leaves(pull) if id(x) not in known]
  return sum(x.nbytes for x in leaves)


def test_saved_activations_take_half_the_memory():
  x, w = (
    oracle.normal(0, 512, 256).astype(jnp.bfloat16),
    oracle.normal(1, 256, 128),
  )

  def layer(precision):
    return lambda x, w: fp8.dot(jax.nn.silu(x), w, precision)

  def down(precision):  # what silu itself saves is not ours
    saved = saved_bytes(layer(precision), x, w)
    return saved - saved_bytes(lambda x: jax.nn.silu(x), x)

  weight = w.size * 2  # in the plain product, the weight cast to bfloat16
  assert down('bf16') == x.size * 2 + weight
  assert down('fp8_block') == x.size + x.size // 128 * 4


def test_remat_policies_know_the_saved_activations():
  """Values up to 448, which a policy that saves floats would lose."""
  x, w = oracle.normal(0, 64, 128), oracle.normal(1, 128, 128, scale=0.1)
  loss = lambda x, w: jnp.sum(fp8.dot(jnp.tanh(x), w) ** 2)
  policy = jax.checkpoint_policies.save_only_these_names(fp8.SAVED)
  kept = jax.checkpoint(loss, policy=policy)
  plain = jax.jit(jax.grad(loss, (0, 1)))(x, w)
  for remade in (kept, jax.checkpoint(loss)):
    got = jax.jit(jax.grad(remade, (0, 1)))(x, w)
    for a, b in zip(got, plain, strict=True):
      assert oracle.relative(a, b) < 2e-2
  _, pull = jax.vjp(kept, x, w)
  leaves = [leaf for leaf in jax.tree.leaves(pull) if leaf.shape == x.shape]
  assert sorted(str(leaf.dtype) for leaf in leaves) == ['float32', 'uint8']


def test_flax_layers_take_it():
  layer = nn.DenseGeneral(
    features=(4, 6),
    axis=(-2, -1),
    dot_general=fp8.DotGeneral('fp8_block', 'dequant'),
  )
  x = oracle.normal(0, 3, 5, 8, 10)
  got, variables = jax.jit(layer.init_with_output)(jax.random.key(0), x)
  kernel = variables['params']['kernel']
  expected = np.einsum('btij,ijnh->btnh', x, kernel)
  assert 0.02 < oracle.relative(got, expected) < 0.06
  with pytest.raises(ValueError, match='no batch axes'):
    fp8.DotGeneral()(x, x, (((3,), (3,)), ((0,), (0,))))
