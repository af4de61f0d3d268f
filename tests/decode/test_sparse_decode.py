"""Sparse decoding over pages equals one whole pass, sets included."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from experiments.serving import scheduler
from mla_moe import CacheConfig
from mla_moe.config import (
  DSAConfig,
  MLAConfig,
  ModelConfig,
  MoEConfig,
  MTPConfig,
)
from mla_moe.decode import (
  forward,
  generation,
  latent_cache,
  sparse_attention,
)
from mla_moe.model import indexer, transformer

PAGE, LENGTH = 4, 32
SMALL = CacheConfig(dtype='float32', page=PAGE)
CONFIG = ModelConfig(
  vocab=64,
  dim=32,
  layers=2,
  dense_layers=1,
  dense_width=32,
  max_positions=128,
  dtype='float32',
  mla=MLAConfig(
    heads=2, query_rank=16, kv_rank=24, nope_dim=8, rope_dim=8, value_dim=8
  ),
  moe=MoEConfig(experts=4, shared=1, top_k=2, groups=1, top_groups=1, width=16),
  mtp=MTPConfig(1),
  dsa=DSAConfig(heads=3, dim=16, topk=6, types=('full', 'shared')),
)


@functools.cache
def model():
  """Tokens [2, LENGTH], parameters, and the whole pass over the tokens."""
  net, random = transformer.Transformer(CONFIG), np.random.default_rng(0)
  init = lambda key: nn.unbox(net.init(key, jnp.zeros((1, 8), jnp.int32)))
  shapes = jax.eval_shape(init, jax.random.key(0))
  normal = lambda x: random.normal(size=x.shape).astype(np.float32)

  def leaf(path, x):
    is_scale = path[-1].key == 'scale'
    return is_scale + (0.2 if is_scale else 0.3) * normal(x)

  variables = jax.tree_util.tree_map_with_path(leaf, shapes)
  tokens = random.integers(0, 64, (2, LENGTH)).astype(np.int32)

  @jax.jit
  def whole(variables):
    out = net.apply(variables, tokens, method=net.features)
    weights = forward.unstack(CONFIG, variables)
    states = jnp.stack([out.hidden, out.mtp_hidden[0]])
    return weights, out.hidden, forward.logits(weights, states)

  return tokens, variables, *whole(variables)


@functools.cache
def jitted(name, **more):
  run = functools.partial(getattr(forward, name), config=CONFIG, **more)
  return jax.jit(run, donate_argnums=1)


def rows(cache_config=SMALL, length=LENGTH):
  """The caches of the main model and of MTP, over pages in another order."""
  cache = latent_cache.empty(CONFIG, 2, length, cache_config)
  pages = cache.layers[0].values.shape[0]
  order = np.random.default_rng(0).permutation(pages).astype(np.int32)
  cache = cache.replace(table=order[np.asarray(cache.table)])
  return forward.split(cache, CONFIG)


def test_prefill_chunks_and_decode_equal_one_pass():
  tokens, _, weights, _, (expected, _) = model()
  cache, _ = rows()
  whole = np.full(2, 24, np.int32)
  run = jitted('prefill', chunk=12)  # masked, then gathered
  x, cache = run(weights, cache, tokens[:, :24], whole)
  out = [forward.logits(weights, x)]
  for i in range(24, 28):
    logits, cache = jitted('decode_step')(weights, cache, tokens[:, i])
    out.append(logits[:, None])
  out = jnp.concatenate(out, 1)
  chex.assert_trees_all_close(out, expected[:, :28], atol=2e-4)


def test_the_mtp_module_selects_by_itself():
  tokens, _, weights, hidden, (_, expected) = model()
  _, cache = rows()
  out = []
  for part in (slice(0, 15), slice(15, 30)):
    after = tokens[:, part.start + 1 : part.stop + 1]
    x, cache = jitted('draft')(weights, cache, hidden[:, part], after)
    out.append(forward.logits(weights, x))
  out = jnp.concatenate(out, 1)
  chex.assert_trees_all_close(out, expected[:, :30], atol=2e-4)


def index_of(tokens, heads=3, dim=16):
  """Whole numbers: their scores are exact, and many are equal."""
  random = np.random.default_rng(1)
  draw = lambda *size: random.integers(-2, 3, size).astype(np.float32)
  return indexer.Index(
    draw(2, tokens, heads, dim), draw(2, tokens, heads), draw(2, tokens, dim)
  )


slow = pytest.mark.slow


@pytest.mark.parametrize(
  'topk', [6, *(pytest.param(k, marks=slow) for k in (1, 19))]
)
def test_sets_over_pages_equal_those_of_the_whole(topk, monkeypatch):
  monkeypatch.setattr(sparse_attention, '_TILE', 8)
  monkeypatch.setattr(sparse_attention, '_NUMBERS', 200)
  index = index_of(LENGTH)
  whole = jax.jit(indexer.select, static_argnums=1)
  expected = np.asarray(whole(index, topk))
  cache, _ = rows()
  start, more = np.array([7, 12], np.int32), np.array([20, 20], np.int32)
  (pages, *_) = cache.layers
  none = jnp.zeros((2, LENGTH, 24)), jnp.zeros((2, LENGTH, 8))
  slots = latent_cache.next_slots(cache, LENGTH)
  pages = latent_cache.write(pages, slots, *none, index.k)
  cache = cache.replace(layers=(pages,), lengths=start)
  queries = start[:, None] + np.arange(20)
  take = lambda x: np.take_along_axis(
    x, queries.reshape(2, 20, *[1] * (x.ndim - 2)), 1
  )
  index = indexer.Index(take(index.q), take(index.w), index.k)
  expected = take(expected)
  select = jax.jit(sparse_attention.select, static_argnums=(3, 4))
  longest = (start + more).max()
  sets = select(index, cache, longest, topk, 'gathered')
  np.testing.assert_array_equal(sets, expected)
  mask = np.asarray(select(index, cache, longest, topk, 'masked'))
  for row, query in np.ndindex(2, 20):
    keys = expected[row, query]
    chosen = np.flatnonzero(mask[row, query])
    np.testing.assert_array_equal(chosen, np.sort(keys[keys >= 0]))


@pytest.mark.slow
def test_gathered_equals_masked(monkeypatch):
  tokens, _, weights, _, _ = model()
  out = []
  for form in ('gathered', 'masked'):
    choose = lambda *_, form=form: form
    monkeypatch.setattr(sparse_attention.sparse, 'choose_form', choose)
    cache, _ = rows()
    run = functools.partial(forward.hidden, config=CONFIG, form='decompressed')
    out.append(jax.jit(run)(weights, cache, tokens)[0])
  chex.assert_trees_all_close(*out, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
  'speculative', [False, pytest.param(True, marks=pytest.mark.by_hand)]
)
def test_rollouts_are_those_of_the_whole_pass(speculative):
  """Also samples of one prompt, whose pages are copied."""
  tokens, variables, weights, _, _ = model()
  out = generation.rollout(
    CONFIG,
    weights,
    tokens[:, :9],
    12,
    lengths=[9, 5],
    speculative=speculative,
    cache=SMALL,
    samples=2,
    multiple=1,
  )
  net = transformer.Transformer(CONFIG)
  whole = jax.jit(functools.partial(net.apply, method=net.features))
  for row, length in enumerate((9, 9, 5, 5)):
    text = np.zeros((2, LENGTH), np.int32)
    text[0, :length] = tokens[row // 2, :length]
    text[0, length : length + 12] = out.tokens[row]
    hidden = whole(variables, text).hidden[0, length - 1 : length + 11]
    logits = np.asarray(forward.logits(weights, hidden))
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_array_equal(logits.argmax(-1), out.tokens[row])
    chex.assert_trees_all_close(
      log_probs.max(-1), out.log_probs[row], atol=2e-4
    )


@pytest.mark.slow
@pytest.mark.parametrize('dtype', ['bfloat16', 'int8', 'float8'])
def test_narrow_caches_keep_the_best_keys(dtype):
  """An indexer's key has its own scale, and most of the set remains."""
  random = np.random.default_rng(0)
  normal = lambda *size: random.normal(size=size).astype(np.float32)
  index = indexer.Index(
    normal(2, 32, 8, 16), normal(2, 32, 8) ** 2, normal(2, 32, 16)
  )
  index.k[:, ::3] *= 40  # one scale for two keys would lose the others
  cache, _ = rows(CacheConfig(dtype=dtype, page=PAGE))
  none = jnp.zeros((2, LENGTH, 24)), jnp.zeros((2, LENGTH, 8))
  slots = latent_cache.next_slots(cache, LENGTH)
  pages = latent_cache.write(cache.layers[0], slots, *none, index.k)
  keys = latent_cache.read_index(pages, cache.table, 'float32', 16)
  norm = lambda x: np.linalg.norm(x, axis=-1)
  error = norm(keys - index.k) / norm(index.k)
  bound = {'bfloat16': 0.004, 'int8': 0.02, 'float8': 0.06}[dtype]
  assert bound / 20 < error.max() < bound, error.max()
  cache = cache.replace(layers=(pages,))
  sets = jax.jit(sparse_attention.select, static_argnums=(3, 4))(
    index, cache, LENGTH, 12, 'gathered'
  )
  whole = jax.jit(indexer.select, static_argnums=1)(index, 12)
  common = [
    np.isin(mine, best).mean()
    for mine, best in zip(
      np.asarray(sets)[:, 12:].reshape(-1, 12),
      np.asarray(whole)[:, 12:].reshape(-1, 12),
      strict=True,
    )
  ]
  assert np.mean(common) > 0.97
  per = pages.index.dtype.itemsize * 16 + 4 * (dtype[-1] == '8')
  leaves = [x for x in (pages.index, pages.index_scales) if x is not None]
  assert sum(x.nbytes for x in leaves) == per * 2 * LENGTH


@pytest.mark.parametrize('outliers', [1, 30])
def test_float8_keys_keep_98_of_100(outliers):
  """V3.2's 64 heads of 128: the best 2048 of 8192, four features larger."""
  random = np.random.default_rng(0)
  normal = lambda *size: random.normal(size=size).astype(np.float32)
  index = indexer.Index(
    normal(1, 4, 64, 128), normal(1, 4, 64), normal(1, 8192, 128)
  )
  index.k[..., :4] *= outliers
  few, exact = (np.asarray(x)[0] for x in overlapping(index))
  common = [np.isin(a, b).mean() for a, b in zip(few, exact, strict=True)]
  assert 0.98 <= np.mean(common) < 1, common


@jax.jit
def overlapping(index):
  """The sets over float8 pages, and those of the exact scores."""
  dsa = DSAConfig(heads=64, dim=128)
  config = dataclasses.replace(CONFIG, dsa=dsa, layers=1)
  cache_config = CacheConfig(dtype='float8', page=128)
  cache = latent_cache.empty(config, 1, 8192, cache_config)
  none = jnp.zeros((1, 8192, 24)), jnp.zeros((1, 8192, 8))
  slots = latent_cache.next_slots(cache, 8192)
  pages = latent_cache.write(cache.layers[0], slots, *none, index.k)
  cache = cache.replace(layers=(pages,), lengths=jnp.full(1, 8191))
  few = sparse_attention.select(index, cache, jnp.int32(8192), 2048, 'gathered')
  return few, jax.lax.top_k(indexer.scores(*index), 2048)[1]


@pytest.mark.slow
def test_no_step_copies_a_pool_or_makes_all_scores(monkeypatch):
  """A layer's latents are 6 MiB, and the scores of all pairs 256 MiB."""
  monkeypatch.setattr(sparse_attention, '_TILE', 256)
  monkeypatch.setattr(sparse_attention, '_NUMBERS', 1 << 19)
  _, _, weights, *_ = model()
  cache, _ = rows(CacheConfig(dtype='float32', page=64), 32768)
  size = sum(x.nbytes for x in jax.tree.leaves(cache))
  tokens = jnp.zeros((2, 1024), jnp.int32)
  for name, part, most in (
    ('decode_step', tokens[:, 0], 3 << 20),
    ('hidden', tokens, 12 << 20),
  ):
    run = functools.partial(getattr(forward, name), config=CONFIG)
    if name == 'hidden':
      run = functools.partial(run, form='decompressed')
    lowered = jax.jit(run, donate_argnums=1).lower(weights, cache, part)
    out = lowered.compile().memory_analysis()
    assert out.alias_size_in_bytes >= size
    assert out.temp_size_in_bytes < most, (name, out.temp_size_in_bytes)


def test_shared_layers_have_no_keys_and_dense_ones_neither():
  cache = latent_cache.empty(CONFIG, 1, LENGTH, SMALL)
  has = [pages.index is not None for pages in cache.layers]
  assert has == [True, False, True]  # MTP's is last
  dense = dataclasses.replace(CONFIG.dsa, attention='dense')
  config = dataclasses.replace(CONFIG, dsa=dense)
  cache = latent_cache.empty(config, 1, LENGTH, SMALL)
  assert not any(pages.index is not None for pages in cache.layers)


@pytest.mark.slow
def test_a_pass_is_the_same_by_kernel():
  from jax.experimental.pallas import tpu as pltpu

  tokens, _, weights, _, _ = model()
  dsa = dataclasses.replace(CONFIG.dsa, topk=20)
  config, out = dataclasses.replace(CONFIG, dsa=dsa), {}
  cache_config = CacheConfig(dtype='float32', page=128, impl='tpu')
  cache = latent_cache.empty(config, 2, 256, cache_config)
  cache, _ = forward.split(cache.replace(impl='xla'), config)
  run = jax.jit(functools.partial(forward.hidden, config=config))
  _, cache = run(weights, cache, tokens)
  step = functools.partial(forward.decode_step, config=config)
  for impl in ('xla', 'tpu'):
    with pltpu.force_tpu_interpret_mode():
      args = weights, cache.replace(impl=impl), tokens[:, 0]
      out[impl], _ = jax.jit(step)(*args)
  chex.assert_trees_all_close(out['tpu'], out['xla'], atol=1e-4)


@pytest.mark.slow
def test_a_gpu_attends_to_gathered_sets(monkeypatch):
  """Of 20 of a row's keys in any order, and of fewer."""
  from mla_moe.kernels import latent_gpu

  mla = MLAConfig(heads=2, kv_rank=32, nope_dim=8, rope_dim=16, value_dim=8)
  random = np.random.default_rng(0)
  normal = lambda *size: random.normal(size=size).astype(np.float32)
  keys = [[random.permutation(60)[:20] for _ in range(3)] for _ in range(2)]
  selected = np.array(keys, np.int32)
  selected[1, 0, 7:] = -1
  table = random.permutation(8).reshape(2, 4).astype(np.int32)
  pages = latent_cache.Pages(normal(8, 16, 48))
  cache = latent_cache.Cache((pages,), table, np.array([59, 59], np.int32))
  interpreted = functools.partial(latent_gpu.attend, interpret=True)
  monkeypatch.setattr(latent_gpu, 'attend', interpreted)
  run = jax.jit(functools.partial(sparse_attention.attend, mla=mla))
  q = 0.3 * normal(2, 2, 3, 48)
  expected, out = (
    run(q, selected, cache.replace(impl=x)) for x in ('xla', 'gpu')
  )
  chex.assert_trees_all_close(out, expected[..., :32], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
  'speculative', [True, pytest.param(False, marks=pytest.mark.by_hand)]
)
def test_a_server_continues_as_a_row_alone_does(speculative):
  """Chunks, pages that samples share, drafts, and rows beside each other."""
  tokens, _, weights, _, _ = model()
  server = scheduler.Scheduler(
    CONFIG,
    weights,
    rows=2,
    length=LENGTH,
    chunk=8,
    cache=SMALL,
    speculative=speculative,
  )
  options = dict(cache=SMALL, multiple=1)
  expected, texts = {}, {}
  for ids, samples in ((tokens[0, :14], 2), (tokens[1, :21], 1)):
    alone = generation.rollout(CONFIG, weights, ids[None], 9, **options)
    for ticket in server.submit(ids, 9, samples=samples):
      expected[ticket], texts[ticket] = alone.tokens[0].tolist(), []
  while server.busy:
    for event in server.step():
      texts[event.ticket].append(event.token)
  assert texts == expected
