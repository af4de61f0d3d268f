"""FP8 in the model: its products, its memory, its traffic and its health."""

import dataclasses
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from configs import tiny
from experiments.data import batches
from experiments.training import fp8_health
from mla_moe import fp8, sharding
from mla_moe.config import (
  ComputeConfig,
  ConfigError,
  DSAConfig,
  MeshConfig,
  MTPConfig,
  freeze,
)
from mla_moe.model import block, layers, products, rope, transformer, weights
from mla_moe.train import optim, step
from mla_moe.train.state import init_state

SMOKE = freeze(tiny.get_config('smoke'))
RATES = optim.Rates(1e-3, 0.01, 0.3)


def with_model(config=SMOKE, **changes):
  changed = dataclasses.replace(config.model, **changes)
  return dataclasses.replace(config, model=changed)


def a_layer(**changes):
  """A run of one layer, of experts, short rows and no matrix of Muon's."""
  config = with_model(layers=1, dense_layers=0, mtp=MTPConfig(0), **changes)
  data = dataclasses.replace(config.data, seq_len=32)
  adamw = dataclasses.replace(config.optim, optimizer='adamw')
  return dataclasses.replace(config, data=data, optim=adamw)


def make(config):
  random = np.random.default_rng(0)
  stream = random.integers(0, 256, 20000).astype(np.uint16)
  return batches.batch_at(stream, config.data, 0, 256)


def lowered(config):
  """A step's program, with the optimizer that multiplies no matrices."""
  adamw = dataclasses.replace(config.optim, optimizer='adamw')
  config = dataclasses.replace(config, optim=adamw)
  state = jax.eval_shape(lambda: init_state(jax.random.key(0), config))
  run = functools.partial(step.train_step, config=config)
  return jax.jit(run).lower(state, make(config), RATES)


def test_a_training_step_multiplies_in_fp8_what_deepseek_does():
  """All three products of every linear layer; nothing else."""
  compute = ComputeConfig(fp8='native', experts='ragged', remat='none')
  config = with_model(
    precision='fp8_channel', compute=compute, layers=1, dense_layers=0
  )
  dots = {True: [], False: []}  # by whether they take FP8
  pattern = r'dot_general (.*?): \((tensor<[^)]*)\)'
  for dims, operands in re.findall(pattern, lowered(config).as_text()):
    fp8_operands = operands.count('f8E4M3FN')
    assert fp8_operands in (0, 2), operands
    dots[fp8_operands == 2].append((dims, operands))
  attention, shared, routed = 7, 2, 2
  blocks = 2 * (attention + shared + routed)  # the layers', the MTP module's
  assert len(dots[True]) == 3 * blocks
  c = config.model
  high = (c.vocab, c.moe.experts, 2 * c.dim)  # head, router, MTP's projection
  for dims, operands in dots[False]:
    sizes = {int(n) for n in re.findall(r'(\d+)x', operands)}
    assert 'batching_dims' in dims or sizes & set(high), operands


def test_bf16_has_no_trace_of_fp8():
  text = lowered(freeze(tiny.get_config('micro'))).as_text()
  assert 'f8E' not in text
  x, w = jnp.ones((2, 3, 4), jnp.bfloat16), jnp.ones((4, 2, 5))
  program = r'(?s)attributes.*'  # after its name
  ours = lambda x, w: products.einsum('...d,dgf->...gf', x, w)
  plain = lambda x, w: jnp.einsum('...d,dgf->...gf', x, w.astype(x.dtype))

  def alone(x, w):
    w = w.astype(x.dtype).reshape(4, 10)
    (y,) = jax.lax.split(x.reshape(6, 4) @ w, (10,), axis=1)
    return y.reshape(2, 3, 2, 5)

  text = lambda f: re.search(program, jax.jit(f).lower(x, w).as_text())[0]
  assert text(ours) == text(alone)
  with jax.set_mesh(sharding.make_mesh(MeshConfig(data=8))):
    assert text(ours) == text(plain)


def test_products_alone_are_those_of_a_mesh():
  """One of matrices side by side, or each by its einsum; gradients, too."""
  equations = 'btnu,nud->btd', 'btnu,nudf->btdf'
  draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)
  x, ws = draw(0, 2, 3, 4, 5), (draw(1, 4, 5, 6), draw(2, 4, 5, 2, 3))

  def run(x, ws):
    ys = products.einsums(equations, x, ws)
    return sum(jnp.sin(y).sum() for y in ys), ys

  both = jax.value_and_grad(run, argnums=(0, 1), has_aux=True)
  alone = jax.jit(both)(x, ws)
  with jax.set_mesh(sharding.make_mesh(MeshConfig(data=8))):
    split = jax.jit(both)(x, ws)
  chex.assert_trees_all_close(alone, split, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_copies_made_once_change_nothing():
  config = with_model(
    precision='fp8_block', compute=ComputeConfig(remat='latents')
  )
  none = MTPConfig(0)
  config = dataclasses.replace(config.model, layers=2, mtp=none)
  tokens = jnp.arange(48, dtype=jnp.int32).reshape(2, 24)
  network = transformer.Transformer(config)
  variables = nn.unbox(jax.jit(network.init)(jax.random.key(0), tokens))
  copies = transformer.fp8_copies(variables['params'], config)
  names = {
    path[-1].key
    for path, _ in jax.tree_util.tree_leaves_with_path(
      copies, is_leaf=lambda x: isinstance(x, tuple)
    )
  }
  assert names == set(weights.FP8_WEIGHTS) - {'w_q', 'w_k', 'w_v'}

  def loss(params, copies):
    if copies is not None:
      params = transformer.with_copies(params, copies)
    both = {**variables, 'params': params}
    out = network.apply(both, tokens, method=network.features)
    return jnp.square(out.hidden).mean() + out.hidden[0, 3, 2]

  run = jax.jit(jax.value_and_grad(loss))
  expected = run(variables['params'], None)
  got = run(variables['params'], copies)
  chex.assert_trees_all_close(got, expected, rtol=2e-2, atol=1e-3)
  chex.assert_trees_all_equal_dtypes(got, expected)
  assert float(abs(got[0] - expected[0])) < 1e-5


def gathered(text):
  """The dtype and the size of each all-gather of a compiled program."""
  calls = re.findall(r'= (\w+)\[([\d,]*)\][^=]* all-gather\(', text)
  lengths = lambda shape: [int(n) for n in shape.split(',') if n]
  return [(dtype, int(np.prod(lengths(shape)))) for dtype, shape in calls]


def test_fsdp_gathers_eight_bits():
  """Every weight crosses devices as FP8 and a few scales; sums stay float32."""
  mesh = MeshConfig(fsdp=8)
  recipe = fp8.Recipe()
  layer = layers.FeedForward(256, 0.02, recipe)
  x = jax.random.normal(jax.random.key(1), (16, 8, 1024))
  boxed = jax.eval_shape(layer.init, jax.random.key(0), x)
  params = nn.unbox(jax.jit(layer.init)(jax.random.key(0), x))
  alone = jax.jit(jax.grad(lambda p, x: (layer.apply(p, x) ** 2).sum()))
  expected = alone(params, x)
  with jax.set_mesh(sharding.make_mesh(mesh)):
    where = sharding.shardings(boxed, sharding.make_mesh(mesh))

    def loss(p, x):
      x = sharding.constrain(x, 'batch', 'length', 'stream')
      return (layer.apply(p, x) ** 2).sum()

    run = jax.jit(jax.grad(loss), in_shardings=(where, None))
    run = run.lower(params, x).compile()
    got = run(jax.device_put(params, where), x)
  moved = gathered(run.as_text())
  weights = sum(p.size for p in jax.tree.leaves(params))
  fp8_bytes = sum(size for dtype, size in moved if dtype == 'u8')
  assert fp8_bytes >= weights
  assert all(n <= weights // 64 for dtype, n in moved if dtype != 'u8'), moved
  chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_sharded_step_equals_one_devices():
  config = a_layer(precision='fp8_block', dim=128)
  state = init_state(jax.random.key(0), config)
  run = functools.partial(step.train_step, config=config)
  _, alone = jax.jit(run)(state, make(config), RATES)
  mesh = sharding.make_mesh(MeshConfig(fsdp=4, expert=2))
  with jax.set_mesh(mesh):
    state = init_state(jax.random.key(0), config, mesh)
    _, spread = jax.jit(run)(state, make(config), RATES)
  for name in ('loss', 'grad_norm'):
    assert float(spread[name]) == pytest.approx(float(alone[name]), rel=1e-5)


def activation_bytes(precision, remat):
  """Bytes of activations that one block keeps for its backward pass."""
  config = with_model(
    precision=precision,
    compute=ComputeConfig(remat=remat),
    dtype='bfloat16',
    dense_width=384,
    dim=256,
  ).model
  one = block.remat_block(config)(config, False)
  x = jnp.zeros((2, 256, 256), jnp.bfloat16)
  angles = rope.angles(jnp.zeros((2, 256), jnp.int32), 8, config.mla.rope)
  args = ((x, None), angles, None, None)
  params = nn.unbox(jax.eval_shape(lambda: one.init(jax.random.key(0), *args)))
  run = lambda params, x: one.apply(params, (x, None), *args[1:])[0][0]
  pull = jax.eval_shape(lambda p, x: jax.vjp(run, p, x)[1], params, x)
  # No weight has 512 rows, or it would count as so many tokens.
  of_tokens = lambda a: a.shape[:2] == (2, 256) or a.shape[0] == 512
  leaves = [a for a in jax.tree.leaves(pull) if a.ndim and of_tokens(a)]
  return sum(a.size * a.dtype.itemsize for a in leaves)


@pytest.mark.parametrize('remat', ['none', 'latents'])
def test_fp8_saves_less_for_the_backward_pass(remat):
  bf16 = activation_bytes('bf16', remat)
  assert activation_bytes('fp8_block', remat) < bf16


def test_health_counts_what_a_tile_loses():
  x = np.full((2, 256), 2.0**-20, np.float32)
  x[0, 0] = 448  # flushes its tile's other 127, and sits at the largest number
  x[1, 128:] = 0
  x[1, 200] = 3
  stats = fp8_health.tile_stats(jnp.asarray(x), fp8.Recipe().rows(x))
  # All of a tile of equal powers of two are 256 in E4M3, not its 448.
  assert float(stats['saturated']) == pytest.approx(1 / 512)
  assert float(stats['flushed']) == pytest.approx(127 / 512)
  assert float(stats['range']) == pytest.approx(np.log2(448 * 2**20), 1e-5)


@pytest.mark.slow
def test_health_sees_the_arrays_of_the_model():
  config = with_model(precision='fp8_block', layers=2, mtp=MTPConfig(0))
  batch = make(config)
  state = init_state(jax.random.key(0), config)
  run = jax.jit(functools.partial(fp8_health.measure, config=config))
  health = jax.device_get(run(state.params, state.router, batch))
  assert {v.shape for v in health.values()} == {(config.model.layers,)}
  for name in ('y_error', 'dx_error'):
    assert (health[name] > 0.02).all() and (health[name] < 0.06).all(), health
  # The first layer's input is the embedding, normed.
  x = np.asarray(state.params['embedding'])[batch.tokens[0, 0]]
  x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6)
  w = np.asarray(state.params['dense']['attention']['w_kv_down'][0])
  y = np.asarray(fp8.dot(jnp.asarray(x), jnp.asarray(w)))
  error = np.linalg.norm(y - x @ w) / np.linalg.norm(x @ w)
  assert float(health['y_error'][0]) == pytest.approx(error, rel=0.02)


def test_health_reads_layers_that_share_an_indexer():
  dsa = DSAConfig(heads=2, dim=16, topk=8, types=('full', 'shared'))
  config = with_model(precision='fp8_block', layers=2, dsa=dsa)
  state = jax.eval_shape(lambda: init_state(jax.random.key(0), config))
  run = functools.partial(fp8_health.measure, config=config)
  health = jax.eval_shape(run, state.params, state.router, make(config))
  assert {v.shape for v in health.values()} == {(2,)}


def test_what_fp8_cannot_be_is_refused():
  for changes in (
    {'precision': 'fp8'},
    {'fp8': 'cuda'},
    {'fp8': 'mgpu'},
    {'precision': 'fp8_block', 'fp8': 'native'},
    {'precision': 'fp8_tensor', 'fp8': 'tpu'},
    {'precision': 'fp8_block', 'experts': 'padded'},
  ):
    precision = changes.pop('precision', 'bf16')
    with pytest.raises(ConfigError) as error:
      with_model(precision=precision, compute=ComputeConfig(**changes))
    assert '\n' not in str(error.value)


@pytest.mark.by_hand
def test_fp8_learns_as_bf16_does():
  """A toy language model, 300 steps: the losses end within 0.02.

  By hand: each product and its gradients are compared with float64's above.
  """
  random = np.random.default_rng(0)
  words = random.integers(0, 256, (64, 6))
  stream = words[random.integers(0, 64, 8000)].reshape(-1).astype(np.uint16)
  ends = {}
  for precision in ('bf16', 'fp8_block'):
    config = a_layer(precision=precision)
    run = jax.jit(functools.partial(step.train_step, config=config))
    state = init_state(jax.random.key(0), config)
    late = []
    for i in range(300):
      batch = batches.batch_at(stream, config.data, i, 256)
      state, metrics = run(state, batch, optim.Rates(3e-3, 0.01, 0.3))
      late = [*late[-19:], float(metrics['main_loss'])]
    ends[precision] = np.mean(late)
  assert abs(ends['bf16'] - ends['fp8_block']) < 0.02, ends
