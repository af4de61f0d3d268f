"""The kernels of sparse attention beside their oracles, and compiled."""

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

from experiments.bench import card_checks
from mla_moe.kernels import sparse_tpu


def reference(q, w, pages, table, start, *, heads, topk):
  """Whether a key is in a new token's set, [B, T, S], by jax's own `top_k`."""
  keys = pages[table].reshape(len(q), -1, pages.shape[-1]).astype(jnp.float32)
  highest = jax.lax.Precision.HIGHEST
  wide = q.astype(jnp.float32)
  dots = jnp.einsum('bgi,bsi->bgs', wide, keys, precision=highest)
  scores = jax.nn.relu(dots) * w[..., None]
  scores = scores.reshape(len(q), -1, heads, keys.shape[1]).sum(2)
  token = jnp.arange(scores.shape[1])
  last = start[:, None, None] + token[None, :, None]
  seen = jnp.arange(keys.shape[1])[None, None] <= last
  scores = jnp.where(seen, jnp.where(scores == 0, 0.0, scores), -jnp.inf)
  _, best = jax.lax.top_k(scores, topk)
  chosen = jax.nn.one_hot(best, keys.shape[1], dtype=jnp.int32).sum(2) > 0
  return chosen & seen


@pytest.mark.slow
@pytest.mark.parametrize('tokens, count', [(1, 3), (2, 10)])
def test_sets_equal_the_oracle(tokens, count):
  """Whole numbers: scores are exact, many are equal, and most of them 0."""
  random, heads, size = np.random.default_rng(0), 4, 128
  draw = lambda *size: random.integers(-2, 3, size).astype(np.float32)
  pages = draw(2 * count + 1, size, 128) * (random.random((size, 1)) < 0.3)
  table = random.permutation(2 * count + 1)[: 2 * count].reshape(2, count)
  start = np.array([count * size - tokens, 130], np.int32)
  args = draw(2, tokens * heads, 128), draw(2, tokens * heads)
  args += pages.astype(np.float32), table.astype(np.int32), start
  sizes = dict(heads=heads, topk=200)
  expected = np.asarray(jax.jit(functools.partial(reference, **sizes))(*args))
  with pltpu.force_tpu_interpret_mode():
    mask = jax.jit(functools.partial(sparse_tpu.select, **sizes))(*args)
  np.testing.assert_array_equal(mask, expected)
  assert expected[0].sum(-1).max() == 200 > expected[1].sum(-1).max()
  keys = jax.jit(sparse_tpu.positions, static_argnums=1)(mask, 200)
  for row, token in np.ndindex(2, tokens):
    marks = np.flatnonzero(expected[row, token])
    np.testing.assert_array_equal(keys[row, token, : len(marks)], marks)
    assert (np.asarray(keys[row, token, len(marks) :]) == -1).all()


@functools.partial(jax.jit, static_argnums=1)
def best(x, topk):
  return jax.vmap(functools.partial(sparse_tpu._best, topk=topk))(x)


@pytest.mark.parametrize('topk', [1, 150])
def test_the_best_are_the_first_of_equal_ones(topk):
  """Of 256 numbers: most are equal, some the extremes, some are not seen."""
  random, least = np.random.default_rng(0), np.iinfo(np.int32).min
  x = random.integers(-2, 3, (4, 256)).astype(np.int32)
  x[1] = np.where(random.random(256) < 0.5, least, x[1])
  x[2, :3] = np.iinfo(np.int32).max, least + 1, -1
  x[3] = 0
  mask = np.asarray(best(x.reshape(4, 2, 128), topk)).reshape(4, 256)
  for row, own in zip(x, mask, strict=True):
    order = np.argsort(-row.astype(np.int64), kind='stable')[:topk]
    expected = np.sort(order[row[order] > least])
    np.testing.assert_array_equal(np.flatnonzero(own), expected)
  assert mask[1].sum() <= topk == mask[0].sum()


def test_positions_are_those_of_the_marks():
  """Of three lines: none, one in 20, half, and more than there are slots."""
  random = np.random.default_rng(0)
  mask = random.random((1, 4, 384)) < np.array([0, 0.05, 0.5, 1])[:, None]
  mask[0, 2, 128:256] = False  # a line without a mark
  keys = jax.jit(sparse_tpu.positions, static_argnums=1)(mask, 200)
  for marks, own in zip(mask[0], np.asarray(keys)[0], strict=True):
    marks = np.flatnonzero(marks)[:200]
    rest = np.full(200 - len(marks), -1)
    np.testing.assert_array_equal(own, np.concatenate([marks, rest]))


@pytest.mark.slow
def test_attention_gathers_its_sets():
  """Three blocks of scattered slots; those after a row's set are huge.

  A word has two tokens; in float32, which has one, a pass runs by kernel
  (`test_sparse_decode`).
  """
  random, (rows, heads, width) = np.random.default_rng(0), (2, 4, 256)
  normal = lambda *size: random.normal(size=size).astype(np.float32)
  pages = normal(4, 128, width)
  pages[3, 100:] = 1e4
  slots = np.stack([random.permutation(484)[:384] for _ in range(rows)])
  counts = np.array([384, 130], np.int32)
  slots[1, 130:] = 484 + np.arange(254) % 28
  args = normal(rows, heads, width) * 0.3, pages
  args = [jnp.asarray(x, jnp.bfloat16) for x in args]
  with pltpu.force_tpu_interpret_mode():
    run = jax.jit(functools.partial(sparse_tpu.attend, rank=128))
    out = run(*args, slots.astype(np.int32), counts)
  sets = args[1].reshape(-1, width)[slots]  # a set is a page of the oracle
  table = np.arange(rows, dtype=np.int32)[:, None]
  oracle = functools.partial(card_checks.absorbed, heads=heads, rank=128)
  expected = jax.jit(oracle)(args[0], sets, table, counts - 1)
  chex.assert_trees_all_close(out.astype('float32'), expected, atol=0.01)


AHEAD = """
import functools
import jax
import jax.numpy as jnp
from jax.experimental import topologies
from mla_moe.kernels import sparse_tpu

def sets(*args):
  mask = sparse_tpu.select(*args, heads=64, topk=2048)
  return sparse_tpu.positions(mask, 2048)

for chip in ('v5e:2x2', 'v6e:2x2', 'tpu7x:2x2x1'):
  chips = topologies.get_topology_desc(chip, platform='tpu')
  where = jax.sharding.SingleDeviceSharding(chips.devices[0])
  shape = lambda s, d: jax.ShapeDtypeStruct(s, d, sharding=where)
  for tokens in (1, 2):
    program = jax.jit(sets).lower(
      shape((8, 64 * tokens, 128), jnp.bfloat16),
      shape((8, 64 * tokens), jnp.float32),
      shape((8192, 128, 128), jnp.bfloat16),
      shape((8, 1024), jnp.int32),
      shape((8,), jnp.int32),
    ).compile()
    assert 'tpu_custom_call' in program.as_text()
    # The pool has 256 MiB, scores of 131,072 keys 4 MiB a new token.
    assert program.memory_analysis().temp_size_in_bytes < 48 << 20, chip
    print(chip, tokens, program.memory_analysis().temp_size_in_bytes)
  for dtype in (jnp.bfloat16, jnp.float32):
    program = jax.jit(functools.partial(sparse_tpu.attend, rank=512)).lower(
      shape((16, 128, 640), dtype),
      shape((8192, 128, 640), dtype),
      shape((16, 2048), jnp.int32),
      shape((16,), jnp.int32),
    ).compile()
    assert 'tpu_custom_call' in program.as_text()
    # A set of latents has 2.5 MiB; the pool 1.25 GiB and twice as much.
    assert program.memory_analysis().temp_size_in_bytes < 1 << 20, chip
    print(chip, dtype.__name__, program.memory_analysis().temp_size_in_bytes)
"""


@pytest.mark.slow
@pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None,
  reason='compiling for a TPU needs the extra [tpu]',
)
def test_it_compiles_for_three_chips_and_copies_no_pool():
  env = {
    **os.environ,
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'JAX_PLATFORMS': 'cpu',
  }
  subprocess.run([sys.executable, '-c', AHEAD], check=True, env=env)
