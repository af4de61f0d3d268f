"""The decoding kernels beside their oracle, and lowered for what runs them."""

import functools
import importlib.util
import os
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh

from experiments.bench import card_checks
from mla_moe import CacheConfig, ConfigError, ModelConfig
from mla_moe.config import MLAConfig
from mla_moe.decode import latent_attention, latent_cache
from mla_moe.kernels import latent_gpu, latent_tpu
from mla_moe.model import rope


def operands(width, rank, page, tokens=1, heads=4, pages=11, count=3):
  """Rows of several lengths on scattered pages; keys beyond them are huge."""
  random = np.random.default_rng(0)
  normal = lambda *size: random.normal(size=size).astype(np.float32)
  q = normal(3, tokens * heads, width) * 0.3
  pool = normal(pages, page, width)
  start = np.array([count * page - tokens, 0, page + 3], np.int32)
  table = random.permutation(pages)[: 3 * count].reshape(3, count)
  table = table.astype(np.int32)
  for row in range(3):
    for key in range(start[row] + tokens, count * page):
      pool[table[row, key // page], key % page] = 1e4
  return q, pool, table, start, dict(heads=heads, rank=rank)


@pytest.mark.parametrize('tokens', [1, 2])
def test_the_tpu_kernel_equals_the_oracle(tokens):
  *args, widths = operands(256, 128, 128, tokens)
  expected = jax.jit(functools.partial(card_checks.absorbed, **widths))(*args)
  with pltpu.force_tpu_interpret_mode():
    got = jax.jit(functools.partial(latent_tpu.attend, **widths))(*args)
  chex.assert_trees_all_close(got, expected, atol=1e-5)


@pytest.mark.parametrize(
  'tokens, splits, page, count',
  [(2, 8, 32, 3), (5, 1, 32, 3), (1, None, 64, 9)],
)
def test_the_gpu_kernel_equals_the_oracle(tokens, splits, page, count):
  *args, widths = operands(80, 64, page, tokens, pages=3 * count, count=count)
  expected = jax.jit(functools.partial(card_checks.absorbed, **widths))(*args)
  kernel = functools.partial(latent_gpu.attend, splits=splits, interpret=True)
  got = jax.jit(functools.partial(kernel, **widths))(*args)
  chex.assert_trees_all_close(got, expected, atol=1e-5)


def test_a_layer_is_the_same_by_kernel():
  mla = MLAConfig(
    heads=4, query_rank=0, kv_rank=64, nope_dim=32, rope_dim=16, value_dim=32
  )
  model = ModelConfig(layers=1, dense_layers=1, dim=64, mla=mla, vocab=256)
  random = np.random.default_rng(0)
  make = lambda *size: 0.2 * random.normal(size=size).astype(np.float32)
  w = jax.jit(latent_attention.weights, static_argnums=1)(
    {
      'w_q': make(64, 4, 48),
      'w_kv_down': make(64, 64),
      'w_k_rope': make(64, 16),
      'w_k_up': make(64, 4, 32),
      'w_v_up': make(64, 4, 32),
      'w_out': make(4, 32, 64),
      'kv_norm': {'scale': np.ones(64, np.float32)},
    },
    'float32',
  )
  lengths = jnp.array([130, 3], jnp.int32)
  x = make(2, 2, 64)
  positions = np.asarray(lengths)[:, None] + np.arange(2)
  angles = rope.angles(positions.astype(np.int32), 16, mla.rope)
  past, outputs = random.normal(size=(4, 128, 80)), {}
  for impl in ('xla', 'tpu'):
    cache = latent_cache.empty(model, 2, 256, CacheConfig(impl=impl))
    cache = cache.replace(lengths=lengths)
    values = np.array(cache.layers[0].values)
    values[..., :80] = past
    pages = latent_cache.Pages(jnp.asarray(values))
    run = jax.jit(
      functools.partial(
        latent_attention.attend,
        cache=cache,
        valid=None,
        config=model,
        form='absorbed',
      )
    )
    with pltpu.force_tpu_interpret_mode():
      outputs[impl], *_ = run(w, x, angles, pages)
  assert np.abs(outputs['xla']).max() > 1e-3
  chex.assert_trees_all_close(outputs['tpu'], outputs['xla'], atol=1e-5)


def test_kernels_refuse_what_they_cannot_read():
  with pytest.raises(ConfigError, match='int8'):
    CacheConfig(dtype='int8', impl='gpu')
  with pytest.raises(ConfigError, match='128'):
    CacheConfig(page=64, impl='tpu')


CHIPS = {
  'gpu': ('cuda', AbstractDevice('NVIDIA H100 80GB HBM3', 132, 'gpu')),
  'tpu': ('tpu', AbstractDevice('TPU7x', 2, 'tpu')),
}


@pytest.mark.filterwarnings('ignore:The Pallas Triton backend')  # jax 0.12
@pytest.mark.parametrize('impl, target', [('gpu', 'triton'), ('tpu', 'tpu_')])
def test_they_lower_at_the_size_of_v3(impl, target):
  platform, device = CHIPS[impl]
  shape = jax.ShapeDtypeStruct
  width, page = (576, 64) if impl == 'gpu' else (640, 128)
  kernel = latent_gpu.attend if impl == 'gpu' else latent_tpu.attend
  run = functools.partial(kernel, heads=128, rank=512)
  args = (
    shape((8, 128, width), jnp.bfloat16),
    shape((512, page, width), jnp.bfloat16),
    shape((8, 32), jnp.int32),
    shape((8,), jnp.int32),
  )
  mesh = AbstractMesh((1,), ('x',), abstract_device=device)
  with jax.sharding.use_abstract_mesh(mesh):
    lowered = jax.jit(run).trace(*args).lower(lowering_platforms=(platform,))
  calls = [x for x in lowered.as_text().splitlines() if 'custom_call' in x]
  assert any(target in line for line in calls), calls


AHEAD = """
import functools
import jax
import jax.numpy as jnp
from jax.experimental import topologies
from mla_moe.kernels import latent_tpu

for chip in ('v5e:2x2', 'v6e:2x2', 'tpu7x:2x2x1'):
  chips = topologies.get_topology_desc(chip, platform='tpu')
  where = jax.sharding.SingleDeviceSharding(chips.devices[0])
  shape = lambda s, d: jax.ShapeDtypeStruct(s, d, sharding=where)
  run = functools.partial(latent_tpu.attend, heads=128, rank=512)
  pool = shape((4096, 128, 640), jnp.bfloat16)
  for tokens in (1, 2):
    program = jax.jit(run).lower(
      shape((8, 128 * tokens, 640), jnp.bfloat16),
      pool,
      shape((8, 32), jnp.int32),
      shape((8,), jnp.int32),
    ).compile()
    assert 'tpu_custom_call' in program.as_text()
    # Nothing of the pool is copied on its way into the kernel.
    assert program.memory_analysis().temp_size_in_bytes < 4 << 20, chip
    print(chip, tokens, program.memory_analysis().temp_size_in_bytes)
"""


@pytest.mark.slow
@pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None,
  reason='compiling for a TPU needs the extra [tpu]',
)
def test_the_tpu_kernel_compiles_and_copies_no_pool():
  """Really compiled, on any machine: libtpu needs no TPU for that."""
  env = {
    **os.environ,
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'JAX_PLATFORMS': 'cpu',
  }
  subprocess.run([sys.executable, '-c', AHEAD], check=True, env=env)
