"""Decoding on a mesh: equal to one device, and the cache stays where it is."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from configs import tiny
from mla_moe import CacheConfig, rollout, sharding
from mla_moe.config import DSAConfig, MeshConfig, MTPConfig, freeze
from mla_moe.decode import forward, latent_cache
from mla_moe.model import transformer

PAGE = 16
DENSE = DSAConfig()
SPARSE = DSAConfig(heads=4, dim=32, topk=8)


@functools.cache
def shaped(**changes):
  """Returns a config, its function of a key, and the variables' shapes."""
  config = freeze(tiny.get_config()).model
  config = dataclasses.replace(config, layers=2, init_std=0.2, **changes)
  tokens = jnp.zeros((1, 8), jnp.int32)
  init = lambda key: transformer.Transformer(config).init(key, tokens)
  return config, init, jax.eval_shape(init, jax.random.key(0))


def prompt(config, batch=8):
  draw = np.random.default_rng(0)
  return draw.integers(0, config.vocab, (batch, 20)).astype(np.int32)


def laid_out(boxed, mesh):
  return jax.device_put(nn.unbox(boxed), sharding.shardings(boxed, mesh))


@pytest.mark.slow
@pytest.mark.parametrize(
  'speculative, dsa',
  [
    (False, DENSE),
    pytest.param(True, DENSE, marks=pytest.mark.by_hand),
    (True, SPARSE),
  ],
)
def test_a_mesh_continues_as_one_device_does(speculative, dsa):
  config, init, _ = shaped(dsa=dsa)
  boxed = jax.jit(init)(jax.random.key(0))
  options = dict(
    speculative=speculative, cache=CacheConfig(page=PAGE), temperature=0.0
  )
  lengths = np.array([20, 7, 13, 20, 1, 9, 20, 16])
  ask = functools.partial(
    rollout, config, prompt=prompt(config), max_new_tokens=16, lengths=lengths
  )
  alone = ask(variables=nn.unbox(boxed), **options)
  mesh = sharding.make_mesh(MeshConfig(data=2, expert=2, tensor=2))
  with jax.set_mesh(mesh):
    laid = laid_out(boxed, mesh)
    together = ask(variables=laid, **options)
    if not speculative:
      # Three rows, which four shares of a batch cannot divide.
      few = ask(
        variables=laid,
        prompt=prompt(config)[:3],
        lengths=lengths[:3],
        **options,
      )
      np.testing.assert_array_equal(few.tokens, alone.tokens[:3])
  np.testing.assert_array_equal(together.tokens, alone.tokens)
  np.testing.assert_allclose(together.log_probs, alone.log_probs, atol=1e-4)


def step_on(mesh, rows=8, length=8192):
  """A compiled step of `rows`, and the shapes that its devices send."""
  config, _, boxed = shaped(mtp=MTPConfig(0))
  boxed = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), boxed)
  mesh = sharding.make_mesh(mesh)
  with jax.set_mesh(mesh):
    variables = laid_out(boxed, mesh)
    weights = forward.layer_weights(config, variables)
    cache = latent_cache.empty(config, rows, length, CacheConfig(page=PAGE))
    cache, _ = forward.split(cache, config)
    # Rows, with their pages, lie on the devices that hold the batch.
    of_rows = jax.NamedSharding(mesh, sharding.spec(('batch',)))
    cache = jax.device_put(cache, of_rows)
    step = functools.partial(forward.decode_step, config=config)
    tokens = jax.device_put(np.zeros(rows, np.int32), of_rows)
    lowered = jax.jit(step, donate_argnums=1).lower(weights, cache, tokens)
    compiled = lowered.compile()
  moved = re.findall(
    r'= (.*?) (?:all-gather|all-reduce|all-to-all|collective-permute|'
    r'reduce-scatter)',
    compiled.as_text(),
  )
  arrays = [x for one in moved for x in re.findall(r'\[([\d,]*)\]', one)]
  shapes = [[int(n) for n in x.split(',') if n] for x in arrays]
  return compiled, shapes, cache


@pytest.mark.slow
def test_data_sharding_moves_no_cache():
  config, *_ = shaped(mtp=MTPConfig(0))
  compiled, moved, cache = step_on(MeshConfig(data=8))
  width = latent_cache.width(cache.layers[0], 0)
  rank = config.mla.kv_rank
  for sizes in moved:
    assert width not in sizes and rank not in sizes, sizes
    assert np.prod(sizes) < 8 * 8 * config.vocab, sizes
  out = compiled.memory_analysis()
  each = cache.layers[0].values.nbytes // 8
  assert out.temp_size_in_bytes < each / 2
  assert out.alias_size_in_bytes >= each * config.layers


def test_rows_travel_to_the_experts_and_not_the_experts_to_them():
  config, *_ = shaped(mtp=MTPConfig(0))
  mesh = MeshConfig(data=2, expert=2, tensor=2)
  _, moved, _ = step_on(mesh, length=64)
  rows = 8 * config.dim
  assert any(config.dim in sizes for sizes in moved)  # rows do
  assert rows < config.dim * config.moe.width // 2  # a device's share of one
  for sizes in moved:
    assert np.prod(sizes) <= rows, sizes
