"""The model against transformers' own outputs, and its identities."""

import dataclasses
import functools
import importlib
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from configs import smoke
from mla_moe import cost, load_huggingface
from mla_moe.config import (
  ComputeConfig,
  Config,
  ConfigError,
  MTPConfig,
  freeze,
)
from mla_moe.model import block, rope, transformer

SLOW = pytest.mark.slow
CASES = ('v2_lite', 'v3_yarn', 'v3_release')
GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'
CONFIGS = pathlib.Path(__file__).parents[2] / 'configs'


@functools.cache
def golden(case):
  folder = GOLDEN / case
  config, variables = load_huggingface(folder)
  config = dataclasses.replace(config, compute=ComputeConfig(remat='none'))
  return config, variables, np.load(folder / 'expected.npz')


@functools.cache
def forward(config):
  return jax.jit(transformer.Transformer(config).apply)


@pytest.mark.parametrize('case', CASES)
def test_logits_equal_those_of_transformers(case):
  config, variables, expected = golden(case)
  out = forward(config)(variables, expected['tokens'])
  chex.assert_trees_all_close(out.logits, expected['logits'], atol=2e-4)
  if 'mtp_logits' in expected:
    assert out.mtp_logits.shape[0] == config.mtp.depth == 1
    chex.assert_trees_all_close(
      out.mtp_logits[0], expected['mtp_logits'], atol=2e-4
    )
  tokens = expected['tokens'].size
  assert (out.expert_load.sum(-1) == tokens * config.moe.top_k).all()
  assert out.expert_load.shape == (config.moe_layers, config.moe.experts)


@pytest.mark.parametrize('case', CASES)
def test_greedy_continuation_equals_that_of_transformers(case):
  config, variables, expected = golden(case)
  # The prompt's 24 tokens and what follows them; one teacher-forced pass
  # checks all, since each token must be the argmax before it.
  greedy = expected['greedy']
  np.testing.assert_array_equal(greedy[:, :24], expected['tokens'][:, :24])
  whole = np.pad(greedy, ((0, 0), (0, 96 - greedy.shape[1])))
  logits = forward(config)(variables, whole).logits
  picked = np.argmax(logits, -1)[:, 23 : greedy.shape[1] - 1]
  np.testing.assert_array_equal(picked, greedy[:, 24:])


def test_one_token_is_the_beginning_of_any_sequence():
  config, variables, expected = golden('v3_yarn')
  out = forward(config)(variables, expected['tokens'][:, :1])
  chex.assert_trees_all_close(out.logits, expected['logits'][:, :1], atol=2e-4)


@pytest.mark.parametrize(
  'precision, shape',
  [('bf16', (0, 8)), ('bf16', (2, 0)), ('fp8_block', (0, 8))],
)
def test_no_sequence_and_no_token_have_no_logits(precision, shape):
  config, variables, _ = golden('v3_release')
  config = dataclasses.replace(config, precision=precision)
  run = transformer.Transformer(config).apply
  out = jax.eval_shape(run, variables, jnp.zeros(shape, jnp.int32))
  b, t = shape
  assert out.logits.shape == (b, t, config.vocab)
  assert out.mtp_logits.shape == (1, b, max(t - 1, 0), config.vocab)
  assert out.expert_load.shape == (config.moe_layers, config.moe.experts)


def test_no_position_sees_its_future():
  config, variables, expected = golden('v3_release')
  tokens = expected['tokens']
  other = tokens.copy()  # the first may be read while it is computed on
  other[:, 50] = (other[:, 50] + 1) % config.vocab
  before, after = (forward(config)(variables, x) for x in (tokens, other))
  chex.assert_trees_all_close(
    before.logits[:, :50], after.logits[:, :50], atol=1e-5
  )
  # Position 48 of the MTP module joins token 49; position 49 joins token 50.
  same = before.mtp_logits[:, :, :49], after.mtp_logits[:, :, :49]
  chex.assert_trees_all_close(*same, atol=1e-5)
  assert np.abs(before.logits[:, 50:] - after.logits[:, 50:]).max() > 1e-2
  changed = before.mtp_logits[:, :, 49] - after.mtp_logits[:, :, 49]
  assert np.abs(changed).max() > 1e-2


def test_packed_segments_equal_documents_alone():
  config, variables, expected = golden('v3_yarn')
  tokens = expected['tokens']
  positions = np.concatenate([np.arange(40), np.arange(56)])
  positions = np.tile(positions.astype(np.int32), (2, 1))
  segments = np.tile(np.repeat([0, 1], [40, 56]).astype(np.int32), (2, 1))
  packed = forward(config)(variables, tokens, positions, segments).logits
  # What follows a document changes nothing of it, as the test above shows.
  second = np.roll(tokens, -40, axis=1)
  first, second = (
    forward(config)(variables, x).logits for x in (tokens, second)
  )
  parts = np.concatenate([first[:, :40], second[:, :56]], 1)
  chex.assert_trees_all_close(packed, parts, atol=2e-5)


@functools.cache
def gradients(remat):
  config, variables, expected = golden('v3_release')
  tokens = expected['tokens'][:1, :32]
  compute = ComputeConfig(remat=remat)
  layers = dict(layers=2, dense_layers=0)
  config = dataclasses.replace(
    config, compute=compute, mtp=MTPConfig(0), **layers
  )

  @jax.jit
  @jax.grad
  def grad(params):
    out = transformer.Transformer(config).apply(
      {**variables, 'params': params}, tokens
    )
    return (out.logits**2).mean()

  left_out = ('mtp_', 'dens')
  params = variables['params'].items()
  return grad({k: v for k, v in params if k[:4] not in left_out})


@pytest.mark.parametrize(
  'remat',
  ['latents', *(pytest.param(r, marks=SLOW) for r in ('products', 'full'))],
)
def test_remat_changes_no_gradient(remat):
  expected = gradients('none')
  chex.assert_trees_all_close(gradients(remat), expected, rtol=1e-4, atol=1e-6)


def test_a_vocabulary_that_is_left_to_a_tokenizer_is_no_size():
  model = transformer.Transformer(smoke(Config()).model)
  tokens = jnp.zeros((1, 4), jnp.int32)
  with pytest.raises(ConfigError, match='vocab=0: .*`freeze`'):
    jax.eval_shape(model.init, jax.random.key(0), tokens)


def test_a_single_layer_is_made_again_too():
  """XLA takes a loop of one turn for none, and would keep what it made."""
  config = dataclasses.replace(smoke(Config()).model, vocab=264)
  config = dataclasses.replace(config, layers=1, dense_layers=1)

  def work(remat):
    run = block.stack(
      dataclasses.replace(config, compute=ComputeConfig(remat=remat)),
      False,
      block.Functions(),
    )
    x = jax.ShapeDtypeStruct((1, 64, config.dim), jnp.float32)
    none = [None] * 3  # neither segments, nor a mask, nor routes
    angles = rope.angles(
      jnp.arange(64)[None], config.mla.rope_dim, config.mla.rope
    )
    init = lambda x: run.init(jax.random.key(0), (x, None), angles, *none)
    variables = jax.eval_shape(init, x)

    def loss(variables, x):
      return run.apply(variables, (x, None), angles, *none)[0][0].sum()

    step = jax.jit(jax.value_and_grad(loss))
    compiled = step.lower(variables, x).compile()
    return compiled.cost_analysis()['flops']

  assert work('full') > 1.2 * work('none')


def test_bfloat16_is_near_float32():
  config, variables, expected = golden('v3_release')
  half = dataclasses.replace(config, dtype='bfloat16')
  out = forward(half)(variables, expected['tokens'])
  assert out.logits.dtype == jnp.float32
  # By token: rounding sends a few to other experts, which is no small error.
  norm = lambda x: np.linalg.norm(x, axis=-1)
  error = norm(out.logits - expected['logits']) / norm(expected['logits'])
  assert 1e-4 < np.median(error) < 0.03


def test_tied_embeddings_have_no_head():
  config, _, _ = golden('v2_lite')
  tied = dataclasses.replace(config, tie_embeddings=True)
  tokens = jnp.zeros((1, 8), jnp.int32)
  module = transformer.Transformer(tied)
  variables = jax.eval_shape(module.init, jax.random.key(0), tokens)
  assert 'w_head' not in variables['params']
  out = jax.eval_shape(module.apply, nn.unbox(variables), tokens)
  assert out.logits.shape == (1, 8, config.vocab)


@SLOW
def test_tied_embeddings_are_the_head():
  """As the model whose head is their transpose; both uses send a gradient."""
  config, _, _ = golden('v3_release')
  config = dataclasses.replace(
    config, layers=1, dense_layers=1, mtp=MTPConfig(1)
  )
  tied = transformer.Transformer(
    dataclasses.replace(config, tie_embeddings=True)
  )
  apart = transformer.Transformer(config)
  tokens = jnp.arange(10, dtype=jnp.int32).reshape(2, 5) % 7
  both = nn.unbox(jax.jit(tied.init)(jax.random.key(0), tokens))['params']
  two = both | {'w_head': both['embedding'].T}

  @functools.partial(jax.jit, static_argnums=0)
  def run(module, params):
    def loss(params):
      out = module.apply({'params': params}, tokens)
      logits = (out.logits, out.mtp_logits)
      likely = jax.tree.map(lambda x: jax.nn.log_softmax(x)[..., 3], logits)
      return sum(x.sum() for x in jax.tree.leaves(likely)), logits

    return jax.value_and_grad(loss, has_aux=True)(params)

  (value, logits), grads = run(tied, both)
  (expected, others), parts = run(apart, two)
  chex.assert_trees_all_close(logits, others, atol=1e-5)
  chex.assert_trees_all_close(value, expected, rtol=1e-6)
  head = parts.pop('w_head').T
  for part in (head, parts['embedding']):
    assert jnp.abs(part).max() > 1e-3  # neither is the whole
  parts['embedding'] += head
  chex.assert_trees_all_close(grads, parts, rtol=1e-5, atol=5e-6)


def leaves(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(
  'name',
  sorted(
    p.stem
    for p in CONFIGS.glob('*.py')
    if p.stem not in ('__init__', 'sft', 'r1')
  ),
)
def test_every_config_has_the_parameters_that_cost_counts(name):
  module = importlib.import_module(f'configs.{name}')
  config = freeze(module.get_config()).model
  tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
  init = transformer.Transformer(config).init
  shapes = jax.eval_shape(init, jax.random.key(0), tokens)
  params, router = nn.unbox(shapes['params']), shapes.get('router', {})
  mtp = [key for key in params if key.startswith('mtp_')]
  apart = sum(leaves(params[key]) + leaves(router.get(key, {})) for key in mtp)
  counts = cost.parameters(config)
  assert leaves(params) + leaves(router) - apart == counts.total
  assert apart == counts.mtp
