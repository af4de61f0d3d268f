"""Grouped-query attention equals Llama's and an oracle, in all its forms."""

import dataclasses
import functools
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mla_moe import CacheConfig, cost, sharding
from mla_moe import config as c
from mla_moe.decode import forward, latent_cache
from mla_moe.hf import config_json
from mla_moe.model import gqa, rope, transformer
from mla_moe.train import optim as optimizers
from mla_moe.train import step
from mla_moe.train.state import init_state
from mla_moe.types import Batch

SLOW = pytest.mark.slow
GOLDEN = pathlib.Path(__file__).parents[1] / 'golden' / 'llama'
LLAMA = c.ModelConfig(
  vocab=64,
  dim=32,
  layers=2,
  dense_layers=2,
  dense_width=48,
  max_positions=64,
  norm_eps=1e-5,
  bos_id=1,
  eos_id=2,
  dtype='float32',
  attention='gqa',
  kv_heads=2,
  compute=c.ComputeConfig(remat='none'),
  mla=c.MLAConfig(
    heads=4,
    query_rank=0,
    nope_dim=0,
    rope_dim=8,
    value_dim=8,
    rope=c.RopeConfig(theta=500.0),
  ),
  mtp=c.MTPConfig(0),
)
# Heads of which a part is rotated, values of another width; with experts.
WIDE = dataclasses.replace(
  LLAMA,
  dense_layers=1,
  mla=dataclasses.replace(LLAMA.mla, nope_dim=6, rope_dim=4, value_dim=12),
  moe=c.MoEConfig(experts=4, top_k=2, width=16, groups=1, top_groups=1),
)


@functools.cache
def golden():
  """Parameters and outputs of transformers' model, its tensors transposed."""
  x = np.load(GOLDEN / 'expected.npz')
  norm = lambda name: {'scale': stacked(f'{name}.weight', (32,))}

  def stacked(name, shape):
    each = [x[f'model.layers.{i}.{name}'].T for i in range(LLAMA.layers)]
    return np.stack([w.reshape(shape) for w in each])

  heads = lambda name, n: stacked(f'self_attn.{name}_proj.weight', (32, n, 8))
  ffn = [stacked(f'mlp.{n}_proj.weight', (32, 48)) for n in ('gate', 'up')]
  layers = {
    'attention_norm': norm('input_layernorm'),
    'attention': {
      **{'w_q': heads('q', 4), 'w_k': heads('k', 2), 'w_v': heads('v', 2)},
      'w_out': stacked('self_attn.o_proj.weight', (4, 8, 32)),
    },
    'ffn_norm': norm('post_attention_layernorm'),
    'ffn': {
      'w_gate_up': np.stack(ffn, axis=2),
      'w_down': stacked('mlp.down_proj.weight', (48, 32)),
    },
  }
  params = {
    'embedding': x['model.embed_tokens.weight'],
    'w_head': x['lm_head.weight'].T,
    'final_norm': {'scale': x['model.norm.weight']},
    'dense': layers,
  }
  return {'params': params}, x


def test_logits_and_greedy_text_are_those_of_llama():
  variables, expected = golden()
  run = jax.jit(transformer.Transformer(LLAMA).apply)
  logits = run(variables, expected['tokens']).logits
  chex.assert_trees_all_close(logits, expected['logits'], atol=2e-5)
  greedy = expected['greedy']
  picked = np.argmax(run(variables, greedy).logits, -1)[:, 7:-1]
  np.testing.assert_array_equal(picked, greedy[:, 8:])


@functools.cache
def decoder(name, config, **more):
  run = functools.partial(getattr(forward, name), config=config, **more)
  return jax.jit(run, donate_argnums=1)


def decoded(config, variables, tokens, cache_config):
  """Logits of a prompt of 8, in two chunks, then of a token at a time."""
  weights = jax.jit(functools.partial(forward.unstack, config))(variables)
  cache = latent_cache.empty(config, 2, 24, cache_config)
  pages = cache.layers[0].values.shape[0]
  order = np.random.default_rng(0).permutation(pages).astype(np.int32)
  cache = cache.replace(table=order[np.asarray(cache.table)])
  cache, _ = forward.split(cache, config)
  whole = np.full(2, 8, np.int32)
  prefill = decoder('prefill', config, chunk=4)
  x, cache = prefill(weights, cache, tokens[:, :8], whole)
  out = [forward.logits(weights, x)]
  for i in range(8, 24):
    step = decoder('decode_step', config)
    logits, cache = step(weights, cache, tokens[:, i])
    out.append(logits[:, None])
  return np.concatenate(out, axis=1)


@pytest.mark.parametrize(
  'dtype, atol', [('float32', 2e-5), pytest.param('int8', 0.3, marks=SLOW)]
)
def test_decoding_over_the_cache_is_llama(dtype, atol):
  variables, expected = golden()
  cache_config = CacheConfig(dtype=dtype, page=4)
  out = decoded(LLAMA, variables, expected['tokens'], cache_config)
  chex.assert_trees_all_close(out, expected['logits'], atol=atol)


def oracle(x, w, config, segments):
  """The layer in float64, a query at a time."""
  a, heads = config.mla, config.kv_heads
  x, w = np.float64(x), jax.tree.map(np.float64, w)
  angle = np.arange(x.shape[1])[:, None] * rope.frequencies(a.rope_dim, a.rope)
  turn = np.exp(1j * angle)[None, :, None]

  def rotated(x):
    nope, first, second = np.split(
      x, [a.nope_dim, a.nope_dim + a.rope_dim // 2], axis=-1
    )
    pair = (first + 1j * second) * turn
    return np.concatenate([nope, pair.real, pair.imag], axis=-1)

  q, k, v = (np.einsum('btd,dnh->btnh', x, w[n]) for n in ('w_q', 'w_k', 'w_v'))
  q, k, out = rotated(q), rotated(k), np.zeros(x.shape)
  for b, t, n in np.ndindex(*q.shape[:3]):
    seen = [s for s in range(t + 1) if segments[b, s] == segments[b, t]]
    own = n // (a.heads // heads)
    logits = k[b, seen, own] @ q[b, t, n] / np.sqrt(q.shape[-1])
    probs = np.exp(logits - logits.max())
    out[b, t] += probs @ v[b, seen, own] / probs.sum() @ w['w_out'][n]
  return out


@pytest.mark.parametrize(
  'heads', [2, pytest.param(1, marks=SLOW), pytest.param(4, marks=SLOW)]
)
def test_a_layer_is_the_oracles(heads):
  config = dataclasses.replace(WIDE, kv_heads=heads)
  layer, random = gqa.Attention(config), np.random.default_rng(0)
  x = random.normal(size=(2, 9, 32)).astype(np.float32)
  segments = np.repeat([[0, 1]], [4, 5], axis=1).repeat(2, axis=0)
  positions = np.tile(np.arange(9, dtype=np.int32), (2, 1))
  angles = rope.angles(positions, 4, config.mla.rope)
  args = jnp.array(x), angles, jnp.int32(segments)
  shapes = jax.eval_shape(layer.init, jax.random.key(0), *args)
  draw = lambda x: random.normal(size=x.shape, scale=0.3).astype(np.float32)
  variables = jax.tree.map(draw, nn.unbox(shapes))
  y, _, _ = jax.jit(layer.apply)(variables, *args)
  expected = oracle(x, variables['params'], config, segments)
  chex.assert_trees_all_close(np.float64(y), expected, atol=2e-5)


def test_costs_are_those_of_the_arrays():
  leaves = jax.tree.leaves(golden()[0])
  assert sum(x.size for x in leaves) == cost.parameters(LLAMA).total
  each = cost.train_flops_per_token(WIDE, 16)
  longer = cost.train_flops_per_token(WIDE, 18)
  assert longer - each == 2 * 6 * 4 * (10 + 12)  # a key more in two layers
  cache = CacheConfig(dtype='bfloat16', page=4)
  cache = latent_cache.empty(WIDE, 1, 4, cache)
  per_token = sum(x.nbytes for x in jax.tree.leaves(cache.layers)) / 4
  assert cost.cache_bytes_per_token(WIDE) == per_token == 2 * 2 * 2 * 22


@pytest.mark.parametrize(
  'changes, words',
  [
    (dict(kv_heads=3), 'divide mla.heads=4'),
    (dict(kv_heads=0), 'at least 1'),
    (dict(attention='mla'), 'kv_heads=2, mla.nope_dim=0: of MLA are 0'),
    (dict(mla=c.MLAConfig(heads=4)), 'mla.query_rank=1536, .* set them to 0'),
    (dict(dsa=c.DSAConfig(heads=2, q_from='x')), 'dsa.heads=2'),
    (dict(lora=c.LoRAConfig(rank=2)), 'lora.rank=2'),
    (dict(base='int8'), 'of which GQA has none'),
  ],
)
def test_a_model_without_meaning_is_refused_in_a_line(changes, words):
  with pytest.raises(c.ConfigError, match=words) as caught:
    dataclasses.replace(LLAMA, **changes)
  assert '\n' not in str(caught.value)


def test_a_mesh_and_a_release_refuse_what_they_have_not():
  with pytest.raises(c.ConfigError, match='tensor=4.*kv_heads=2'):
    c.Config(model=LLAMA, mesh=c.MeshConfig(tensor=4))
  with pytest.raises(c.ConfigError, match="attention='gqa'"):
    config_json.write(LLAMA, 'float32')
  for impl in ('gpu', 'tpu'):
    with pytest.raises(c.ConfigError, match=f'impl={impl!r}.*gqa'):
      latent_cache.empty(LLAMA, 1, 4, CacheConfig(impl=impl))


@SLOW
def test_eight_devices_are_one():
  """Loss, gradients and decoding, with heads, rows and length split."""
  variables, expected = golden()
  config = dataclasses.replace(LLAMA, layers=1, dense_layers=1)
  params = dict(variables['params'])
  params['dense'] = jax.tree.map(lambda x: x[:1], params['dense'])
  tokens = np.tile(expected['tokens'], (2, 1))
  init = transformer.Transformer(config).init
  boxed = jax.eval_shape(init, jax.random.key(0), tokens)['params']
  mesh = sharding.make_mesh(c.MeshConfig(fsdp=2, context=2, tensor=2))
  where = sharding.shardings(boxed, mesh)

  @jax.jit
  def both(params, cache):
    def loss(params):
      out = transformer.Transformer(config).apply({'params': params}, tokens)
      return jnp.square(out.logits).mean()

    weights = forward.unstack(config, {'params': params})
    run = functools.partial(forward.hidden, form='decompressed')
    x, _ = run(weights, cache, tokens, config)
    return jax.value_and_grad(loss)(params), x

  cache = latent_cache.empty(config, 4, 24, CacheConfig(page=4))
  cache, _ = forward.split(cache, config)
  alone = jax.device_get(both(params, cache))
  with jax.set_mesh(mesh):
    together = jax.device_get(both(jax.device_put(params, where), cache))
  chex.assert_trees_all_close(together, alone, atol=2e-5)


@SLOW
def test_a_step_in_fp8_with_muon_knows_all_weights():
  model = dataclasses.replace(
    WIDE, vocab=264, precision='fp8_block', compute=c.ComputeConfig()
  )
  data = c.DataConfig(seq_len=16, batch_size=2)
  optim = c.OptimConfig(optimizer='muon')
  config = c.Config(model=model, optim=optim, data=data)
  rows = jax.ShapeDtypeStruct((1, 2, 16), jnp.int32)
  batch = Batch(rows, rows, rows, rows, np.int32(1))
  before = jax.eval_shape(
    lambda key: init_state(key, config), jax.random.key(0)
  )
  train = functools.partial(step.train_step, config=config)
  rates = optimizers.Rates(1e-2, 0.0, 0.0)
  after, _ = jax.eval_shape(train, before, batch, rates)
  chex.assert_trees_all_equal_shapes_and_dtypes(after.params, before.params)
