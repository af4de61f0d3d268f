"""Decoding over the latent cache equals the training forward, in every form."""

import dataclasses
import functools
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_moe import CacheConfig, load_huggingface
from mla_moe.config import ModelConfig
from mla_moe.decode import forward, latent_attention, latent_cache
from mla_moe.model import experts, router, transformer

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'
CASES = ('v2_lite', 'v3_yarn', 'v3_release')
LENGTH = 96
SMALL = CacheConfig(dtype='float32', page=16)


@functools.cache
def golden(case):
  config, variables = load_huggingface(GOLDEN / case)
  expected = np.load(GOLDEN / case / 'expected.npz')
  weights = forward.layer_weights(config, variables)
  return config, variables, weights, expected


@functools.cache
def jitted(name, config, **more):
  run = functools.partial(getattr(forward, name), config=config, **more)
  return jax.jit(run, donate_argnums=1)


def empty(config, batch=2, length=LENGTH, cache_config=SMALL):
  return latent_cache.empty(config, batch, length, cache_config)


def scrambled(cache):
  """The same rows over pages in another order."""
  pages = cache.layers[0].values.shape[0]
  order = np.random.default_rng(0).permutation(pages).astype(np.int32)
  return dataclasses.replace(cache, table=order[np.asarray(cache.table)])


@pytest.mark.parametrize(
  'case',
  [
    *(*CASES[::2], 'families/mistral4'),
    pytest.param('v3_yarn', marks=pytest.mark.slow),
  ],
)
def test_prefill_and_decode_equal_forward(case):
  config, _, weights, expected = golden(case)
  tokens, whole = expected['tokens'], np.full(2, 40, np.int32)
  cache, _ = forward.split(scrambled(empty(config)), config)
  x, cache = jitted('prefill', config)(weights, cache, tokens[:, :40], whole)
  out = [forward.logits(weights, x)]
  step = jitted('decode_step', config)
  for i in range(40, 48):
    logits, cache = step(weights, cache, tokens[:, i])
    out.append(logits[:, None])
  x, cache = jitted('hidden', config)(weights, cache, tokens[:, 48:])
  out.append(forward.logits(weights, x))
  out = np.concatenate(out, axis=1)
  chex.assert_trees_all_close(out, expected['logits'], atol=2e-4)
  np.testing.assert_array_equal(cache.lengths, [96, 96])


@pytest.mark.parametrize('case', ['v2_lite'])
def test_absorbed_equals_decompressed_over_a_prefix_and_in_chunks(case):
  config, _, weights, expected = golden(case)
  tokens, whole = expected['tokens'], np.full(2, 96, np.int32)
  out = {}
  for form in ('absorbed', 'decompressed'):
    cache, _ = forward.split(scrambled(empty(config)), config)
    run = jitted('hidden', config, form=form)
    x = []
    for part in (tokens[:, :48], tokens[:, 48:]):
      y, cache = run(weights, cache, part)
      x.append(y)
    out[form] = np.concatenate(x, axis=1)
  chex.assert_trees_all_close(*out.values(), atol=2e-5)
  cache, _ = forward.split(empty(config), config)
  run = jitted('prefill', config, chunk=48)
  x, _ = run(weights, cache, tokens, whole)
  chex.assert_trees_all_close(x, out['absorbed'], atol=2e-5)


@pytest.mark.parametrize('form', ['absorbed', 'decompressed'])
def test_long_rows_are_read_in_blocks_large_and_small(form, monkeypatch):
  from mla_moe.decode import latent_attention

  monkeypatch.setattr(latent_attention, '_blocks', lambda size, numbers: (1, 4))
  config, _, weights, expected = golden('v3_yarn')
  cache, _ = forward.split(scrambled(empty(config, length=112)), config)
  run = jax.jit(functools.partial(forward.hidden, config=config, form=form))
  x, _ = run(weights, cache, expected['tokens'])
  out = forward.logits(weights, x)
  chex.assert_trees_all_close(out, expected['logits'], atol=2e-4)


def test_many_rows_are_read_a_few_at_a_time(monkeypatch):
  from mla_moe.decode import latent_attention

  monkeypatch.setattr(latent_attention, '_ROWS', 16)
  config, _, weights, expected = golden('v2_lite')
  tokens = np.tile(expected['tokens'][:, :8], (24, 1))
  cache, _ = forward.split(scrambled(empty(config, 48, 8)), config)
  run = jax.jit(functools.partial(forward.hidden, config=config))
  x, _ = run(weights, cache, tokens)
  logits = np.tile(expected['logits'][:, :8], (24, 1, 1))
  chex.assert_trees_all_close(forward.logits(weights, x), logits, atol=2e-4)
  sizes = lambda x: jnp.full(len(x), len(x))
  assert (latent_attention._by_rows(sizes, (jnp.ones(48),)) == 16).all()


def test_ragged_rows_equal_single_ones():
  config, _, weights, expected = golden('v3_release')
  tokens, valid = expected['tokens'][:, :40], np.array([40, 23], np.int32)
  prefill = jitted('prefill', config)
  step = jitted('decode_step', config)
  together, _ = forward.split(empty(config), config)
  x, together = prefill(weights, together, tokens, valid)
  ends = forward.last(x, valid)
  nexts = expected['tokens'][:, 50:53]
  for row in range(2):
    alone, _ = forward.split(empty(config), config)
    n = valid[row]
    twice = tokens[[row, row], :n]  # the programs are those of two rows
    x, alone = prefill(weights, alone, twice, valid[[row, row]])
    chex.assert_trees_all_close(ends[row], x[0, -1], atol=2e-5)
    for token in nexts[row]:
      single, alone = step(weights, alone, np.array([token, token]))
    if row == 0:
      for i in range(3):
        both, together = step(weights, together, nexts[:, i])
    chex.assert_trees_all_close(both[row], single[0], atol=5e-5)
  np.testing.assert_array_equal(together.lengths, valid + 3)


def test_a_full_row_drops_what_comes_and_hurts_no_other():
  config, _, weights, expected = golden('v3_yarn')
  cache, _ = forward.split(empty(config, length=48), config)
  tokens = expected['tokens'][:, :48]
  valid = np.array([48, 20], np.int32)
  _, cache = jitted('prefill', config)(weights, cache, tokens, valid)
  before = jax.tree.map(np.array, cache)
  _, cache = jitted('decode_step', config)(weights, cache, tokens[:, 0])
  for old, new in zip(before.layers, cache.layers, strict=True):
    changed = (old.values != np.asarray(new.values)).any((1, 2))
    np.testing.assert_array_equal(changed, [False] * 4 + [True] + [False])


def test_no_step_copies_the_cache():
  config, _, weights, _ = golden('v3_release')
  cache, _ = forward.split(empty(config, 4, 16384), config)
  size = sum(x.nbytes for x in jax.tree.leaves(cache))
  tokens = jnp.zeros((4, 2), jnp.int32)
  for name, new in (('decode_step', tokens[:, 0]), ('hidden', tokens)):
    lowered = jitted(name, config).lower(weights, cache, new)
    out = lowered.compile().memory_analysis()
    assert out.alias_size_in_bytes >= size
    largest = max(x.nbytes for x in jax.tree.leaves(cache))
    assert out.temp_size_in_bytes < largest / 4, name


@pytest.mark.parametrize(
  'dtype, bound',
  [
    *(('bfloat16', 0.01), ('int8', 0.015)),
    pytest.param('float8', 0.06, marks=pytest.mark.slow),
  ],
)
def test_narrow_caches_move_logits_little(dtype, bound):
  config, _, weights, expected = golden('v3_yarn')
  narrow = CacheConfig(dtype=dtype, page=16)
  cache, _ = forward.split(empty(config, cache_config=narrow), config)
  extend = jitted('hidden', config)
  _, cache = extend(weights, cache, expected['tokens'][:, :48])
  x, _ = extend(weights, cache, expected['tokens'][:, 48:])
  out = forward.logits(weights, x)
  wanted = expected['logits'][:, 48:]
  norm = lambda x: np.linalg.norm(x, axis=-1)
  # By token: rounding sends a few to other experts, which is no small error.
  error = np.median(norm(out - wanted) / norm(wanted))
  assert bound / 20 < error < bound, error
  rank, rope = config.mla.kv_rank, config.mla.rope_dim
  leaves = jax.tree.leaves(cache.layers[0])
  per = sum(leaf.dtype.itemsize * leaf.shape[-1] for leaf in leaves)
  assert per == (
    2 * (rank + rope) if dtype == 'bfloat16' else rank + 4 + 2 * rope
  )


def test_quantised_tiles_keep_their_scale():
  x = np.random.default_rng(0).normal(size=(3, 256)).astype(np.float32)
  x[:, 128:] *= 1e3
  for kind, bound in ((jnp.int8, 0.005), (jnp.float8_e4m3fn, 0.04)):
    values, scales = latent_cache.quantise(x, kind)
    back = latent_cache.dequantise(values, scales)
    assert scales.shape == (3, 2) and values.dtype == kind
    for half in (slice(0, 128), slice(128, 256)):
      error = np.linalg.norm((back - x)[:, half]) / np.linalg.norm(x[:, half])
      assert error < 3 * bound


def test_the_mtp_module_over_its_cache_equals_training():
  config, variables, weights, expected = golden('v3_release')
  tokens = expected['tokens']
  features = jax.jit(
    functools.partial(
      transformer.Transformer(config).apply,
      method=transformer.Transformer.features,
    )
  )(variables, tokens)
  _, cache = forward.split(empty(config), config)
  out = []
  for part in (slice(0, 47), slice(47, 94)):
    after = tokens[:, part.start + 1 : part.stop + 1]
    x, cache = jitted('draft', config)(
      weights, cache, features.hidden[:, part], after
    )
    out.append(forward.logits(weights, x))
  out = np.concatenate(out, axis=1)
  chex.assert_trees_all_close(
    out, expected['mtp_logits'][..., :94, :], atol=2e-4
  )


def test_few_rows_equal_the_dense_sum():
  """Also where rows choose the same experts: each expert counts once."""
  random = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
  x, gates = normal(3, 8), normal(3, 2)
  up, down = normal(5, 8, 12), normal(5, 6, 8)
  dense = jax.jit(functools.partial(experts.feed_forward, impl='dense'))
  for chosen in ([[3, 1], [1, 3], [0, 3]], [[4, 4], [2, 0], [2, 2]]):
    chosen = jnp.array(chosen)
    routing = router.Routing(gates, chosen, normal(3, 5))
    out = jax.jit(forward.few_rows)(x, routing, up, down)
    wanted = dense(x, gates, chosen, up, down)
    chex.assert_trees_all_close(out, wanted, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize('tokens, few', [(4, True), (5, False)])
def test_few_tokens_read_the_chosen_experts_alone(tokens, few, monkeypatch):
  config, _, weights, _ = golden('v2_lite')
  rows = []
  monkeypatch.setattr(
    forward, 'few_rows', lambda x, *_: rows.append(x.shape) or x
  )
  run = functools.partial(forward.hidden, config=config)
  ids = np.zeros((2, tokens), np.int32)
  main, _ = forward.split(empty(config), config)
  jax.eval_shape(run, weights, main, ids)
  assert rows == [(2 * tokens, config.dim)] * config.moe_layers * few


def test_a_shards_page_ids_are_those_of_its_own_pool(monkeypatch):
  """The second of two devices has pages 4 to 7 of 8, as 0 to 3."""
  pages = latent_cache.Pages(jnp.zeros((4, 2, 3)))
  table, lengths = jnp.array([[5, 4], [6, 7]]), jnp.array([2, 1])
  cache = latent_cache.Cache((pages,), table, lengths)
  new = jnp.full((2, 1, 2), 7.0), jnp.full((2, 1, 1), 9.0)
  core = lambda q, kv, up, cache, valid, scale: cache.table
  monkeypatch.setattr(latent_attention, '_absorbed', core)
  table, pages, _ = latent_attention._write_and_attend(
    'absorbed',
    ModelConfig(),
    None,
    new,
    None,
    cache.replace(layers=(pages,)),
    jnp.array([1, 1]),
    None,
    None,
  )
  np.testing.assert_array_equal(table, [[1, 0], [2, 3]])
  right = np.zeros((4, 2, 3))
  right[0, 0] = right[2, 1] = [7, 7, 9]
  np.testing.assert_array_equal(pages.values, right)


def test_rows_that_are_taken_bring_their_pages():
  """Of three rows of two pages each, the last and the first."""
  number = lambda *shape: np.arange(6).reshape(6, *shape)
  pages = latent_cache.Pages(number(1, 1), routes=number(1, 1), index=number(1))
  table, lengths = np.arange(6).reshape(3, 2), np.array([3, 1, 4])
  cache = latent_cache.Cache((pages, pages), table, lengths)
  taken = latent_cache.taken(cache, np.array([2, 0]))
  np.testing.assert_array_equal(taken.table, [[0, 1], [2, 3]])
  np.testing.assert_array_equal(taken.lengths, [4, 3])
  pools = jax.tree.leaves(taken.layers)
  assert len(pools) == 6
  for pool in pools:
    np.testing.assert_array_equal(pool.reshape(-1), [4, 5, 0, 1])
