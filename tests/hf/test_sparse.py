"""V3.2 and GLM-5: the indexer's tensors, its keys of config.json, and cost."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from releases import GOLDEN, loaded, refused, same_bytes, set_config, tensors

import mla_moe
from configs import deepseek_v32
from experiments import convert, indexers
from experiments.checkpointing import load
from experiments.plan import memory
from mla_moe import Transformer, cost, load_huggingface, save_huggingface
from mla_moe.checked import ConfigError
from mla_moe.config import Config, DSAConfig, ReleaseConfig, freeze
from mla_moe.hf import config_json, names
from mla_moe.train.state import abstract_state

CASES = ('deepseek_v32', 'glm_moe_dsa', 'v32_release')
FOLDER = GOLDEN / 'families'
PREFIX = 'model.layers.{}.self_attn.indexer.'


def case(name):
  return (*loaded(f'families/{name}'), np.load(FOLDER / name / 'expected.npz'))


def params_of(variables, stack):
  return variables['params'][stack]['attention']['indexer']


@pytest.mark.parametrize(
  'name',
  [
    'v32_release',
    *(pytest.param(x, marks=pytest.mark.slow) for x in CASES[:2]),
  ],
)
def test_logits_are_those_of_transformers(name):
  """Another set of one query moves logits by tenths: the sets are equal."""
  config, variables, expected = case(name)
  both = jnp.stack(
    [expected['tokens'], np.pad(expected['greedy'], [(0, 0), (0, 48)])]
  )
  run = jax.jit(
    lambda v, x: jax.lax.map(lambda x: Transformer(config).apply(v, x), x)
  )
  out = run(variables, both)
  chex.assert_trees_all_close(out.logits[0], expected['logits'], atol=2e-4)
  sparse = np.abs(expected['logits'] - expected['logits_dense'])
  assert sparse[:, : config.dsa.topk].max() < 1e-5 < 0.5 < sparse.max()
  greedy = out.logits[1].argmax(-1)
  np.testing.assert_array_equal(greedy[:, 23:47], expected['greedy'][:, 24:])
  if name == 'v32_release':
    chex.assert_trees_all_close(
      out.mtp_logits[0, 0], expected['mtp_logits'], atol=2e-4
    )


@pytest.mark.parametrize('name', CASES)
def test_it_goes_out_as_it_came(name, tmp_path):
  config, variables, _ = case(name)
  fp8 = name == 'v32_release'
  save_huggingface(tmp_path / 'out', config, variables, fp8=fp8)
  same_bytes(tensors(FOLDER / name), tensors(tmp_path / 'out'))
  again, back = load_huggingface(tmp_path / 'out')
  assert again == config
  chex.assert_trees_all_equal(back, variables)


def test_the_release_stores_the_indexer_as_deepseek_does():
  stored = tensors(FOLDER / 'v32_release')
  config, variables, _ = case('v32_release')
  for layer in range(config.layers + config.mtp.depth):
    dtypes = {
      name.removeprefix(PREFIX.format(layer)): str(x.dtype)
      for name, x in stored.items()
      if name.startswith(PREFIX.format(layer))
    }
    assert dtypes == {
      'wq_b.weight': 'float8_e4m3fn',
      'wq_b.weight_scale_inv': 'float32',
      'wk.weight': 'float8_e4m3fn',
      'wk.weight_scale_inv': 'float32',
      'k_norm.weight': 'float32',
      'k_norm.bias': 'float32',
      'weights_proj.weight': 'bfloat16',
    }
  # Loaded as bfloat16, the norm keeps its float32 numbers.
  narrow = load_huggingface(FOLDER / 'v32_release', jnp.bfloat16)[1]
  norm = params_of(narrow, 'moe')['key_norm']
  chex.assert_trees_all_equal(norm, params_of(variables, 'moe')['key_norm'])
  assert params_of(narrow, 'moe')['w_key'].dtype == jnp.bfloat16


@pytest.mark.parametrize('name', ['deepseek_v32', 'glm_moe_dsa'])
def test_rotated_features_of_the_indexer(name):
  """V3.2's are halves, and go in as they are; GLM's are neighbours."""
  config, variables, _ = case(name)
  stored, ours = tensors(FOLDER / name), params_of(variables, 'dense')
  rotated, dim = config.mla.rope_dim, config.dsa.dim
  order = np.arange(dim)
  if name == 'glm_moe_dsa':
    pairs = order[:rotated].reshape(-1, 2).T.reshape(-1)
    order = np.concatenate([pairs, order[rotated:]])
    assert (order != np.arange(dim)).any()
  read = lambda part: stored[f'{PREFIX.format(0)}{part}']
  query = read('wq_b.weight').reshape(config.dsa.heads, dim, -1)[:, order]
  expected = {
    'w_query': query.transpose(2, 0, 1),
    'w_key': read('wk.weight')[order].T,
    'w_heads': read('weights_proj.weight').T,
    'key_norm': {
      'scale': read('k_norm.weight')[order],
      'bias': read('k_norm.bias')[order],
    },
  }
  chex.assert_trees_all_equal(jax.tree.map(lambda x: x[0], ours), expected)


def test_the_layout_is_obeyed_under_either_name(copy):
  """GLM-5 relabelled as V3.2 keeps its key, and goes out as GLM-5."""
  config, variables, _ = case('glm_moe_dsa')
  folder = copy('families/glm_moe_dsa')
  changes = dict(
    architectures=['DeepseekV32ForCausalLM'], model_type='deepseek_v32'
  )
  set_config(folder, indexer_rope_interleave=True, **changes)
  again, back = load_huggingface(folder)
  assert again == dataclasses.replace(config, release=ReleaseConfig())
  chex.assert_trees_all_equal(back, variables)
  assert config_json.family_of(again) == 'glm_moe_dsa'
  set_config(folder, indexer_rope_interleave=False)
  halves, other = load_huggingface(folder)
  assert not halves.dsa.interleaved
  flat = functools.partial(traverse_util.flatten_dict, sep='.')
  back, other = flat(back), flat(other)
  changed = {
    name
    for name, x in back.items()
    if (np.asarray(x) != np.asarray(other[name])).any()
  }
  assert changed == {
    f'params.{stack}.attention.indexer.{leaf}'
    for stack in ('dense', 'moe')
    for leaf in ('w_query', 'w_key', 'key_norm.scale', 'key_norm.bias')
  }


def glm(**changes):
  values = {
    'architectures': ['GlmMoeDsaForCausalLM'],
    'model_type': 'glm_moe_dsa',
    **config_json.write(case('glm_moe_dsa')[0], 'float32'),
  }
  for key in ('indexer_types', 'index_topk_pattern'):
    values.pop(key)
  return values | changes


def test_types_of_layers_in_each_spelling():
  read = lambda **changes: config_json.read(glm(**changes), 'float32').dsa.types
  types = ('full', 'shared', 'full', 'shared')
  assert (
    read() == read(index_topk_freq=1) == read(indexer_types=['full'] * 4) == ()
  )
  assert read(indexer_types=[*types]) == types
  assert read(index_topk_pattern='FSFS') == types
  assert read(index_topk_freq=2, index_skip_topk_offset=1) == types
  # GLM-5.2: full on 0, 1, 2, 6, 10, ...: 21 of 78.
  model = {'num_hidden_layers': 78, 'first_k_dense_replace': 3}
  own = read(**model, index_topk_freq=4, index_skip_topk_offset=3)
  full = [i for i, kind in enumerate(own) if kind == 'full']
  assert full == [0, 1, *range(2, 78, 4)] and len(full) == 21


REFUSED = [
  ({'indexer_types': ['full'] * 3}, 'num_hidden_layers=4'),
  ({'indexer_types': ['shared'] + ['full'] * 3}, '"full" for the first'),
  ({'index_topk_pattern': 'FXFS'}, 'index_topk_pattern=FXFS'),
  ({'indexer_types': ['full'] * 4, 'index_topk_freq': 2}, 'the same as'),
  ({'index_topk_freq': '2'}, 'must be of type int'),
  ({'indexer_rope_interleave': None}, 'interleaved=None'),
  ({'rope_interleave': False}, 'whatever this says'),
  ({'layer_types': ['full_attention'] * 4}, 'must be an indexed_attention'),
  ({'index_topk': 0}, 'index_topk=0'),
  ({'index_head_dim': 4}, 'index_head_dim=4: must not be below mla.rope_dim=8'),
  ({'index_n_heads': '4'}, "index_n_heads='4': must be of type int"),
  ({'index_topk_pattern': 5}, 'index_topk_pattern=5: must be of type str or'),
  ({'index_topk_freq': -4}, 'index_topk_freq=-4'),
]


@pytest.mark.parametrize('changes, words', REFUSED, ids=[w for _, w in REFUSED])
def test_a_key_of_the_indexer_that_would_be_misread(changes, words):
  with pytest.raises(ConfigError) as caught:
    config_json.read(glm(**changes), 'float32')
  assert words in str(caught.value) and '\n' not in str(caught.value)


def test_an_indexer_of_a_shared_layer_is_left_over(copy):
  folder = copy('families/glm_moe_dsa')
  set_config(folder, indexer_types=['full', 'shared', 'shared', 'shared'])
  refused(folder, 'left over', 'model.layers.2.self_attn.indexer')
  set_config(folder, indexer_types=['full'] * 4)
  refused(folder, 'missing', 'model.layers.1.self_attn.indexer')
  set_config(
    folder, architectures=['DeepseekV3ForCausalLM'], model_type='deepseek_v3'
  )
  refused(folder, 'deepseek_v3', 'take the key out')


def test_models_that_no_sparse_release_computes():
  config = case('deepseek_v32')[0]
  assert config_json.family_of(config) == 'deepseek_v32'
  shared = ('full', 'shared')
  for change, reason in (
    (dict(rope_first=False), 'dsa.rope_first=True'),
    (dict(k_norm_eps=1e-5), 'dsa.k_norm_eps=1e-06'),
    (dict(q_from='x'), "dsa.q_from='latent'"),
    (dict(types=shared), 'deepseek_v32 has an indexer in each layer'),
  ):
    dsa = dataclasses.replace(config.dsa, **change)
    with pytest.raises(ConfigError, match=reason):
      config_json.family_of(dataclasses.replace(config, dsa=dsa))
  release = ReleaseConfig(family='deepseek_v3')
  with pytest.raises(ConfigError, match='deepseek_v3 has no indexer'):
    config_json.family_of(dataclasses.replace(config, release=release))
  dense = dataclasses.replace(config, dsa=DSAConfig())
  assert config_json.family_of(dense) == 'deepseek_v3'


def test_parameters_and_cache_are_the_published_ones():
  """V3.2 to the last parameter; GLM-5's indexer by layer (dsa.md 1.3)."""
  model = Config().model
  v32 = dataclasses.replace(model, dsa=DSAConfig(heads=64))
  counts, dense = cost.parameters(v32), cost.parameters(model)
  assert counts.total == 671_877_944_064 == dense.total + counts.indexer
  assert counts.active - dense.active == counts.indexer == 61 * 13_959_424
  assert counts.mtp - dense.mtp == 13_959_424
  assert cost.cache_bytes_per_token(v32) == 61 * (1152 + 256)
  mla = dataclasses.replace(model.mla, query_rank=2048)
  dsa = DSAConfig(heads=32, types=('full', 'shared') * 2)
  glm5 = dataclasses.replace(model, dim=6144, layers=4, mla=mla, dsa=dsa)
  assert cost.parameters(glm5).indexer == 2 * 9_371_904
  assert cost.cache_bytes_per_token(glm5) == 4 * 1152 + 2 * 256


@pytest.mark.parametrize('name', CASES)
def test_counts_are_those_of_the_leaves(name):
  config, variables, _ = case(name)
  counts = cost.parameters(config)
  leaves = sum(x.size for x in jax.tree.leaves(variables))
  assert counts.total + counts.mtp == leaves


def test_flops_of_sparse_attention_by_hand():
  """dsa.md 1.7: a pair of index 16,512, of MHA 81,920, absorbed 278,528."""
  model = Config().model
  v32 = dataclasses.replace(model, dsa=DSAConfig(heads=64))
  flops = lambda m, n: cost.train_flops_per_token(m, n)
  # 13,959,168 matrix parameters, whose input has no gradient.
  index = 61 * 4 * 13_959_168
  for n, keys, pair in ((1024, 512, 81_920), (131072, 2032, 278_528)):
    attention = 61 * 3 * pair * keys
    scores = 61 * 16_512 * (n / 2 + 2 * keys)
    expected = flops(model, 0) + attention + index + scores
    assert flops(v32, n) == pytest.approx(expected, rel=1e-12)
  assert flops(v32, 131072) < flops(model, 131072) / 3


def test_a_warm_up_trains_the_indexers_alone():
  config = freeze(deepseek_v32.get_config('warmup,smoke'))
  layout = abstract_state(config)
  whole = memory.footprint(config, layout)
  even = memory.training_bytes_per_device(config)
  counts = cost.parameters(config)
  own = counts.indexer // config.model.layers
  own = counts.indexer + own * config.model.mtp.depth
  assert whole.optimizer == even['optimizer'] + 4 == 8 * own + 4  # its count
  micro = config.data.micro_batch or config.data.batch_size
  sums = 2 if micro < config.data.batch_size else 1
  assert whole.gradients == sums * even['gradients'] == sums * 4 * own
  assert whole.parameters == 4 * (counts.total + counts.mtp)
  # The trunk goes forward alone; the index learns from all keys.
  model, n = config.model, 128
  dense = dataclasses.replace(model, dsa=DSAConfig())
  trunk = cost.train_flops_per_token(dense, n) / 3
  dsa, x = model.dsa, model.mla.query_rank
  matrices = (x * dsa.heads + model.dim) * dsa.dim + model.dim * dsa.heads
  pairs = 3 * n / 2 * 2 * dsa.heads * (dsa.dim + 1)
  index = model.layers * (4 * matrices + pairs)
  got = cost.train_flops_per_token(config, n)
  assert got == pytest.approx(trunk + index, rel=1e-12)


@pytest.mark.parametrize('attention', ['dense', 'sparse'])
def test_a_warm_up_s_release_says_that_it_was_dense(
  attention, tmp_path, monkeypatch, capsys
):
  config = freeze(deepseek_v32.get_config('warmup,smoke'))
  dsa = dataclasses.replace(config.model.dsa, attention=attention)
  model = dataclasses.replace(config.model, dsa=dsa)
  config = dataclasses.replace(config, model=model)
  monkeypatch.setattr(convert.workdir, 'read_config', lambda _: config)
  monkeypatch.setattr(load, 'load_run', lambda *_, **__: (config, {}))
  monkeypatch.setattr(mla_moe, 'save_huggingface', lambda *_, **__: None)
  convert.to_huggingface(tmp_path, tmp_path / 'out')
  output = capsys.readouterr().out
  assert output.count('\n') == (attention == 'dense')
  assert ('trained dense' in output) == (attention == 'dense')


@pytest.mark.parametrize(
  'attention, trains, hint',
  [
    ('dense', 'indexer', ''),
    ('dense', 'all', 'optim.trains=indexer'),
    ('sparse', 'indexer', 'model.dsa.attention=dense'),
    ('sparse', 'all', 'model.dsa.attention=dense optim.trains=indexer'),
  ],
)
def test_the_hint_of_a_fresh_indexer_names_the_flags_not_set(
  attention, trains, hint
):
  text = indexers._hint(attention, trains).replace('--config.', '')
  assert text.partition(':')[2].strip() == hint and bool(text) == bool(hint)


@pytest.mark.slow
def test_a_dense_release_gets_a_fresh_indexer(capsys):
  """Its other numbers stay, and it goes out as V3.2."""
  config, variables = loaded('v3_release')
  dsa = DSAConfig(heads=2, dim=24, topk=8, attention='dense')
  model = indexers.added(config, dsa)
  assert model.dsa == dsa and config_json.family_of(model) == 'deepseek_v32'
  whole = indexers.completed(variables, model, 3, 'indexer')
  output = capsys.readouterr().out
  assert output.endswith('parameters of its indexers are random.\n')
  fresh = traverse_util.flatten_dict(whole)
  for path, leaf in traverse_util.flatten_dict(variables).items():
    assert fresh.pop(path) is leaf
  rows = {row.path: row.shape for row in names.rows(model)}
  assert {k: x.shape for k, x in fresh.items()} == {
    k: rows[k] for k in rows if 'indexer' in k
  }
  assert sum(x.size for x in fresh.values()) == (
    cost.parameters(model).indexer
    + cost.parameters(model).mtp
    - cost.parameters(config).mtp
  )
  assert all(x.std() > 0 for k, x in fresh.items() if 'key_norm' not in k)
  assert indexers.completed(whole, model, 4, 'all') is whole
  own = dataclasses.replace(dsa, heads=9, attention='sparse')
  assert indexers.added(model, own).dsa == dataclasses.replace(
    dsa, attention='sparse'
  )
