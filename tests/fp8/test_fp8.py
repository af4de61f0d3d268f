"""FP8: the quantiser bit by bit, products in float64, and what errs how far.

The oracles know nothing of the package's arrays: loops over tiles in numpy,
with ml_dtypes' rounding, and float64 products of the quantised operands.
"""

import functools
import inspect
import itertools

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import linen as nn
from jax.experimental.pallas import tpu as pltpu

from mla_moe import fp8
from mla_moe.config import ConfigError
from mla_moe.fp8 import gemm

NEW = jax.__version_info__ >= (0, 11)
TINY = 2.0**-100


def tiled(x, tiles, pow2=True):
  """(values, scales, values * scales in float64) by loops."""
  x = np.asarray(x, np.float32)
  tiles = (1,) * (x.ndim - len(tiles)) + tuple(tiles)
  tiles = [n if t < 0 else min(t, n) for t, n in zip(tiles, x.shape, strict=1)]
  counts = [-(-n // t) for t, n in zip(tiles, x.shape, strict=True)]
  values = np.zeros(x.shape, ml_dtypes.float8_e4m3fn)
  scales = np.zeros(counts, np.float32)
  exact = np.zeros(x.shape, np.float64)
  for index in itertools.product(*map(range, counts)):
    at = zip(index, tiles, strict=True)
    cut = tuple(slice(i * t, (i + 1) * t) for i, t in at)
    amax = np.abs(x[cut]).max()
    scale = np.float32(1)
    if amax >= TINY and pow2:
      mantissa, exponent = np.frexp(amax)  # mantissa in [0.5, 1)
      scale = np.float32(2.0 ** (int(exponent) - 9 + (mantissa > 0.875)))
    elif amax >= TINY:
      scale = amax / np.float32(448)
    scales[index] = scale
    small = np.clip(x[cut] / scale, -448, 448)
    values[cut] = small.astype(ml_dtypes.float8_e4m3fn)
    exact[cut] = values[cut].astype(np.float64) * np.float64(scale)
  return values, scales, exact


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


@pytest.mark.parametrize(
  'shape, tiles',
  [
    ((7, 300), (128,)),
    ((300, 200), (128, 128)),
    ((5, 130, 5), (128, 1)),
    ((9, 33), (fp8.quantize.WHOLE, fp8.quantize.WHOLE)),
    ((4, 40), (fp8.quantize.WHOLE,)),
    ((4, 130, 2, 140), (128, 1, 128)),
  ],
)
def test_the_quantiser_equals_loops_over_tiles(shape, tiles):
  x = hard(shape)
  for kind in ('pow2', 'float32'):
    run = jax.jit(lambda x, kind=kind: fp8.quantize.quantize(x, tiles, kind))
    got = run(x)
    values, scales, exact = tiled(x, tiles, kind == 'pow2')
    if kind == 'pow2':
      chex.assert_trees_all_equal(got.scales, scales)
      bits = np.asarray(got.values).view(np.uint8)
      chex.assert_trees_all_equal(bits, values.view(np.uint8))
      wide = np.asarray(fp8.dequantize(got), np.float64)
      chex.assert_trees_all_equal(wide, exact.astype(np.float32).astype(float))
    else:  # XLA may divide by multiplying with 1 / 448
      chex.assert_trees_all_close(got.scales, scales, rtol=2e-7)


# The tiles of (x, w) in y, of (g, w) in dx, of (x, g) in dw, by the issue.
B, W = 128, -1
TILES = {
  'fp8_block': ((B,), (B, 1, B), (B,), (B, 1, B), (B, 1), (B, 1, 1)),
  'fp8_channel': ((W,), (W, 1, 1), (W, W), (1, W, W), (W, W, 1), (W, W, 1, 1)),
  'fp8_tensor': ((W,) * 3, (W,) * 3, (W,) * 4, (W,) * 3, (W,) * 3, (W,) * 4),
}


def dense_oracle(x, w, g, precision, pow2=True):
  t = TILES[precision]
  q = lambda a, tiles: tiled(a, tiles, pow2)[2]
  return (
    np.einsum('btk,kgn->btgn', q(x, t[0]), q(w, t[1])),
    np.einsum('btgn,kgn->btk', q(g, t[2]), q(w, t[3])),
    np.einsum('btk,btgn->kgn', q(x, t[4]), q(g, t[5])),
  )


def interpreted(impl):
  """The context in which `impl`'s kernels run on a CPU; skips where none."""
  if impl == 'mgpu':
    if not NEW:
      pytest.skip("jax 0.10's interpreter of Mosaic GPU kernels is unfinished")
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.force_gpu_interpret_mode()
  if impl == 'mxfp8' and not NEW:
    pytest.skip('jax 0.10 has no scaled_matmul on CPU')
  return pltpu.force_tpu_interpret_mode()


CASES = [
  *itertools.product(TILES, ['dequant'], ['pow2', 'float32']),
  *itertools.product(
    ['fp8_channel', 'fp8_tensor'], ['native'], ['pow2', 'float32']
  ),
  ('fp8_block', 'mgpu', 'pow2'),
  ('fp8_block', 'tpu', 'pow2'),
  ('fp8_block', 'mxfp8', 'pow2'),
]


@pytest.mark.parametrize('precision, impl, kind', CASES)
@pytest.mark.parametrize(
  'keep', ['fp8', pytest.param('input', marks=pytest.mark.slow)]
)
def test_products_equal_float64_of_the_same_operands(
  precision, impl, kind, keep
):
  """Partial tiles everywhere: 150 tokens, 200 channels, 2 x 136 outputs."""
  x, w = normal(0, 2, 150, 200), normal(1, 200, 2, 136, scale=0.1)
  g = normal(2, 2, 150, 2, 136, scale=1e-3)
  options = {'impl': impl, 'scales': kind, 'keep': keep}
  with interpreted(impl):
    got = products(lambda x, w: fp8.dot(x, w, precision, **options), x, w, g)
  expected = dense_oracle(x, w, g, precision, kind == 'pow2')
  for a, b in zip(got, expected, strict=True):
    assert relative(a, b) < (1e-6 if kind == 'pow2' else 3e-4)
  full = (
    np.einsum('btk,kgn->btgn', x, w),
    np.einsum('btgn,kgn->btk', g, w),
    np.einsum('btk,btgn->kgn', x, g),
  )
  for a, b in zip(got, full, strict=True):
    assert 0.02 < relative(a, b) < 0.06, 'not quantised, or badly'


def grouped_oracle(x, w, g, sizes, precision):
  t = TILES[precision]
  y, dx = np.zeros(g.shape), np.zeros(x.shape)
  dw = np.zeros(w.shape)
  used = sum(sizes)
  x, g = np.asarray(x).copy(), np.asarray(g).copy()
  x[used:], g[used:] = 0, 0
  whole = precision == 'fp8_tensor'
  q = lambda a, tiles: tiled(a, (-1,) * a.ndim if whole else tiles)[2]
  qx, qg = q(x, t[0]), q(g, t[2])
  over_all = precision != 'fp8_block'
  cx = q(x, (-1, 1)) if over_all else None
  cg = q(g, (-1, 1, 1)) if over_all else None
  start = 0
  for e, size in enumerate(sizes):
    at = slice(start, start + size)
    start += size
    if not size:
      continue
    tile = lambda a: tiled(a, t[1])[2]
    y[at] = np.einsum('mk,kgn->mgn', qx[at], tile(w[e]))
    dx[at] = np.einsum('mgn,kgn->mk', qg[at], tiled(w[e], t[3])[2])
    own_x = cx[at] if over_all else tiled(x[at], (B, 1))[2]
    own_g = cg[at] if over_all else tiled(g[at], (B, 1, 1))[2]
    dw[e] = np.einsum('mk,mgn->kgn', own_x, own_g)
  return y, dx, dw


# The layout does not depend on the scales.
GROUPED = [c[:2] for c in CASES if c[2] == 'pow2']


@pytest.mark.parametrize('precision, impl', GROUPED)
def test_grouped_products_equal_float64_by_expert(precision, impl):
  """An expert without rows, one of two tiles, and NaN after the last group."""
  sizes = (60, 0, 150, 7)
  x, w = normal(3, 230, 136), normal(4, 4, 136, 2, 72, scale=0.1)
  g = normal(5, 230, 2, 72)
  x, g = x.at[217:].set(jnp.nan), g.at[217:].set(jnp.inf)
  run = functools.partial(fp8.ragged_dot, precision=precision, impl=impl)
  with interpreted(impl):
    got = products(lambda x, w: run(x, w, jnp.asarray(sizes)), x, w, g)
  expected = grouped_oracle(x, w, g, sizes, precision)
  for a, b in zip(got, expected, strict=True):
    assert relative(a, b) < 1e-6
  assert not np.asarray(got[0])[217:].any()
  assert not np.asarray(got[1])[217:].any()
  assert not np.asarray(got[2])[1].any()


def test_pow2_products_do_not_depend_on_the_dtype_they_are_widened_to():
  """bfloat16 holds a dequantised number exactly; not float32 scales'."""
  x = hard((40, 300))[4:]
  for kind, same in (('pow2', True), ('float32', False)):
    q = fp8.quantize.quantize(x, (128,), kind)
    narrow = fp8.dequantize(q, jnp.bfloat16).astype(jnp.float32)
    assert bool((narrow == fp8.dequantize(q)).all()) == same


def test_tiling_again_changes_nothing_under_powers_of_two():
  x = normal(6, 300, 260)

  @functools.partial(jax.jit, static_argnums=1)
  def twice(x, kind):
    first = fp8.quantize.quantize(x, (128,), kind)
    again = fp8.retile(first, (128, 1))
    return fp8.dequantize(first), fp8.dequantize(again)

  chex.assert_trees_all_equal(*twice(x, 'pow2'))
  first, again = twice(x, 'float32')
  assert (first != again).mean() > 0.5


def test_blocks_survive_token_outliers_that_a_tensor_does_not():
  """Gradients whose scale spreads log-normally over tokens; dx by token."""
  random = np.random.default_rng(8)
  x, w = normal(9, 512, 128), normal(10, 128, 128, scale=0.1)
  spread = np.exp(random.normal(size=(512, 1)) * 4).astype(np.float32)
  g = normal(11, 512, 128) * spread

  def p99(precision):
    dx = products(lambda x, w: fp8.dot(x, w, precision), x, w, g)[1]
    error = np.asarray(dx - g @ w.T)
    norm = np.linalg.norm(error, axis=1) / np.linalg.norm(g @ w.T, axis=1)
    return np.percentile(norm, 99)

  assert p99('fp8_block') < 0.06
  assert p99('fp8_tensor') > 0.3


def test_row26_what_is_not_finite_stays_in_its_row_and_shows():
  x, w = normal(12, 4, 300), normal(13, 300, 40)
  x = x.at[1, 7].set(jnp.nan).at[2, 200].set(jnp.inf)
  bad = ~np.isfinite(np.asarray(jax.jit(fp8.dot)(x, w)))
  assert bad[1:3].all() and not bad[[0, 3]].any()


def test_row26_zeros_and_faint_gradients_survive():
  x, w = normal(14, 130, 200), normal(15, 200, 40)
  x = x.at[:, :128].set(0)
  g = normal(16, 130, 40, scale=1e-28)
  g = g.at[3].set(0)
  y, dx, dw = products(fp8.dot, x, w, g)
  assert relative(y, x @ w) < 0.06
  wide = lambda a: np.asarray(a, np.float64)
  assert relative(dx, wide(g) @ wide(w).T) < 0.06
  assert relative(wide(dw)[128:], (wide(x).T @ wide(g))[128:]) < 0.06
  assert not np.asarray(dx)[3].any() and not np.asarray(dw)[:128].any()
  nothing = jax.jit(fp8.dot)(jnp.zeros((3, 5)), jnp.zeros((5, 2)))
  assert not np.asarray(nothing).any()


def text(f, *args):
  return jax.jit(f).lower(*args).as_text()


def test_bf16_is_the_plain_dot():
  x, w = normal(0, 2, 5, 8).astype(jnp.bfloat16), normal(1, 8, 6)

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
  x, w = normal(0, 16, 32), normal(1, 32, 16)
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
  x, master = normal(0, 3, 20, 40), normal(1, 2, 40, 24)
  g = normal(2, 3, 20, 24)
  # The first axis is one of layers, over which a scan goes.
  ready = fp8.prepare(master, precision, lead=1)

  def layer(x, w):
    return jnp.tanh(fp8.dot(x, w, precision)) @ jnp.ones((24, 40)) / 24, None

  def plain(x, master):
    return (jax.lax.scan(layer, x, master)[0] @ jnp.ones((40, 24)) * g).sum()

  def prepared(x, master):
    return plain(x, fp8.Weight(master, ready.copies))

  expected = jax.jit(jax.grad(plain, (0, 1)))(x, master)
  got = jax.jit(jax.grad(prepared, (0, 1)))(x, master)
  chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-6)
  assert got[1].dtype == jnp.float32
  # The master's values play no part: they may be left where they are.
  first = fp8.prepare(master[0], precision)
  other = fp8.Weight(jnp.zeros((40, 24)), first.copies)
  run = jax.jit(lambda x, w: fp8.dot(x, w, precision))
  chex.assert_trees_all_equal(run(x, other), run(x, master[0]))


def test_several_weights_share_one_quantised_input():
  x = normal(0, 30, 40)
  ws = normal(1, 40, 24), normal(2, 40, 8)
  gs = normal(3, 30, 24), normal(4, 30, 8)
  ys, dx, dws = products(lambda x, ws: fp8.dots(x, ws), x, ws, gs)
  parts = [products(fp8.dot, x, w, g) for w, g in zip(ws, gs, strict=True)]
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
  x, w = normal(0, 512, 256).astype(jnp.bfloat16), normal(1, 256, 128)

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
  x, w = normal(0, 64, 128), normal(1, 128, 128, scale=0.1)
  loss = lambda x, w: jnp.sum(fp8.dot(jnp.tanh(x), w) ** 2)
  policy = jax.checkpoint_policies.save_only_these_names(fp8.SAVED)
  kept = jax.checkpoint(loss, policy=policy)
  plain = jax.jit(jax.grad(loss, (0, 1)))(x, w)
  for remade in (kept, jax.checkpoint(loss)):
    got = jax.jit(jax.grad(remade, (0, 1)))(x, w)
    for a, b in zip(got, plain, strict=True):
      assert relative(a, b) < 2e-2
  _, pull = jax.vjp(kept, x, w)
  leaves = [leaf for leaf in jax.tree.leaves(pull) if leaf.shape == x.shape]
  assert sorted(str(leaf.dtype) for leaf in leaves) == ['float32', 'uint8']


def test_flax_layers_take_it():
  layer = nn.DenseGeneral(
    features=(4, 6),
    axis=(-2, -1),
    dot_general=fp8.DotGeneral('fp8_block', 'dequant'),
  )
  x = normal(0, 3, 5, 8, 10)
  got, variables = jax.jit(layer.init_with_output)(jax.random.key(0), x)
  kernel = variables['params']['kernel']
  expected = np.einsum('btij,ijnh->btnh', x, kernel)
  assert 0.02 < relative(got, expected) < 0.06
  with pytest.raises(ValueError, match='no batch axes'):
    fp8.DotGeneral()(x, x, (((3,), (3,)), ((0,), (0,))))


def test_a_released_checkpoints_blocks_are_read():
  """`weight` [out, in] and its multiplier `weight_scale_inv`, cut at 576."""
  random = np.random.default_rng(3)
  weight = random.normal(size=(576, 200)).astype(ml_dtypes.float8_e4m3fn)
  scale = random.uniform(0.5, 2, size=(5, 2)).astype(np.float32)
  expected = np.zeros((200, 576), np.float32)
  for i, j in itertools.product(range(576), range(200)):
    expected[j, i] = np.float32(weight[i, j]) * scale[i // 128, j // 128]
  ours = fp8.Quantized(
    jnp.asarray(weight.T), jnp.asarray(scale.T), (128, 128), 'float32'
  )
  chex.assert_trees_all_equal(fp8.dequantize(ours), expected)


class Device:
  """What `choose` asks of a device."""

  def __init__(self, platform, kind, capability=None):
    self.platform, self.device_kind = platform, kind
    self.compute_capability = capability


H100 = Device('gpu', 'NVIDIA H100 80GB HBM3', '9.0')


@pytest.mark.parametrize(
  'device, block, channel',
  [
    (Device('cpu', 'cpu'), 'dequant', 'dequant'),
    (H100, 'mgpu', 'native'),
    (Device('gpu', 'NVIDIA B200', '10.0'), 'mxfp8', 'native'),
    (Device('gpu', 'NVIDIA A100-SXM4-40GB', '8.0'), 'dequant', 'dequant'),
    (Device('tpu', 'TPU v5p'), 'dequant', 'dequant'),
    (Device('tpu', 'TPU v6 lite'), 'dequant', 'dequant'),
    (Device('tpu', 'TPU7x'), 'tpu', 'native'),
  ],
)
def test_the_implementation_follows_the_hardware(device, block, channel):
  for precision, expected in (('fp8_block', block), ('fp8_channel', channel)):
    impl, line = fp8.choose(precision, device=device)
    assert impl == expected
    assert (impl == 'dequant') == bool(line) and '\n' not in line


def test_what_cannot_be_done_is_refused_in_one_line():
  for device, precision, impl in (
    (Device('cpu', 'cpu'), 'fp8_block', 'mgpu'),
    (H100, 'fp8_block', 'tpu'),
    (H100, 'fp8_block', 'native'),
    (H100, 'fp8_tensor', 'mgpu'),
    (Device('gpu', 'NVIDIA A100-SXM4-40GB', '8.0'), 'fp8_tensor', 'native'),
  ):
    with pytest.raises(ConfigError, match='can be dequant'):
      fp8.choose(precision, impl, device=device)
  x, w = jnp.ones((2, 4)), jnp.ones((4, 2))
  for options in (
    {'precision': 'fp4'},
    {'impl': 'cuda'},
    {'scales': 'e8m0'},
    {'impl': 'mxfp8', 'scales': 'float32'},
    {'impl': 'native'},
    {'impl': 'mgpu', 'precision': 'fp8_tensor'},
  ):
    with pytest.raises(ConfigError):
      fp8.dot(x, w, **options)
  with pytest.raises(ValueError, match=r'\(2, 4\).*no product'):
    inspect.unwrap(fp8.dot)(x, x)  # without the tests' own check of shapes


def test_calls_without_a_kernel_fall_back_and_are_counted():
  mesh = jax.make_mesh(
    (8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  x, w = normal(0, 16, 8), normal(1, 8, 8)
  with jax.set_mesh(mesh), gemm.fallbacks() as lines:
    y = jax.jit(lambda x, w: fp8.dot(x, w, impl='tpu'))(x, w)
  assert len(lines) == 1 and '8 devices' in lines[0]
  chex.assert_trees_all_close(y, jax.jit(fp8.dot)(x, w), rtol=1e-6)
