"""No key of config.json is misread: it is computed, means nothing, or refused.

Each row of REFUSED changed the logits by 0.9 to 2.7 without a word, or is a key
that other networks compute.
"""

import json

import pytest
from releases import GOLDEN

from mla_moe.checked import ConfigError
from mla_moe.hf import config_json, dialects, formats

YARN = {
  'type': 'yarn',
  'factor': 4.0,
  'original_max_position_embeddings': 64,
}


def values(case='v3_yarn', **changes):
  path = GOLDEN / case / 'config.json'
  return json.loads(path.read_text()) | changes


def rope(**changes):
  return {'rope_parameters': values()['rope_parameters'] | changes}


REFUSED = [
  # two ropes that differ
  ({'rope_scaling': YARN}, 'rope_scaling=', 'leave one of them out'),
  ({'rope_theta': 5e6}, 'rope_theta=5000000.0', 'leave one of them out'),
  # Llama 4's growth of queries, in three spellings
  (rope(llama_4_scaling_beta=0.1), 'llama_4_scaling_beta=0.1', 'deepseek_v3'),
  ({'llama_4_scaling': {'beta': 0.1}}, 'llama_4_scaling={', 'not understood'),
  ({'llama_4_scaling_beta': 0.1}, 'llama_4_scaling_beta=0.1', 'take the key'),
  # a factor without a type
  (
    {'rope_parameters': None, 'rope_scaling': {'factor': 8.0}},
    'factor=8.0',
    'add "type": "yarn"',
  ),
  ({'rope_interleave': None}, 'rope_interleave=None', 'set true'),
  ({'scoring_func': 'softmax'}, "scoring_func='softmax'", 'sigmoid'),
  ({'topk_method': 'greedy'}, "topk_method='greedy'", 'noaux_tc'),
  # computed by other networks
  ({'partial_rotary_factor': 0.5}, 'partial_rotary_factor=0.5', 'set it to 1'),
  (rope(partial_rotary_factor=0.3), 'partial_rotary_factor=0.3', 'computed'),
  ({'swiglu_limit': 10.0}, 'swiglu_limit=10.0', 'take the key out'),
  ({'sliding_window': 128}, 'sliding_window=128', 'take the key out'),
  ({'index_topk': 2048}, 'index_topk=2048', 'take the key out'),
  ({'index_n_heads': 64}, 'index_n_heads=64', 'take the key out'),
  ({'final_logit_softcapping': 30.0}, 'final_logit_softcapping=30.0', 'only 0'),
  ({'attn_logit_softcapping': 50.0}, 'attn_logit_softcapping=50.0', 'only 0'),
  ({'scale_emb': 12}, 'scale_emb=12', 'only 1'),
  ({'use_mla': False, 'x': 1}, 'x=1', 'not understood'),
  ({'head_dim': 99}, 'head_dim=99', 'qk_rope_head_dim=16'),
  ({'qk_head_dim': 99}, 'qk_head_dim=99', 'is 40'),
  ({'mlp_layer_types': ['sparse'] * 3 + ['dense']}, 'mlp_layer_types', 'first'),
  (
    {'n_routed_experts': None, 'num_experts': 16},
    'num_experts=16',
    'not under',
  ),
  ({'num_local_experts': 8}, 'num_local_experts=8', 'contradicts'),
  ({'post_mlp_layernorm': True}, 'post_mlp_layernorm=True', 'take the key'),
  ({'quantization_config': 'fp8'}, "quantization_config='fp8'", 'type dict'),
  ({'text_config': {'hidden_size': 8}}, 'text_config={', 'take the key'),
  ({'model_type': 'youtu'}, "model_type='youtu'", 'set both'),
]


@pytest.mark.parametrize(
  'changes, words, fix', REFUSED, ids=[words for _, words, _ in REFUSED]
)
def test_a_key_that_would_be_misread_is_refused(changes, words, fix):
  with pytest.raises(ConfigError) as caught:
    config_json.read(values(**changes), 'float32')
  text = str(caught.value)
  assert words in text and fix in text, text
  assert '\n' not in text and len(text) < 500


MEANINGLESS = [
  {'rope_scaling': None, 'rope_theta': 10000.0},
  rope(partial_rotary_factor=1.0, truncate=True, attention_factor=None),
  {'rope_interleave': True, 'sliding_window': None, 'swiglu_limit': None},
  {'head_dim': 16, 'qk_head_dim': 40, 'partial_rotary_factor': 1.0},
  {'auto_map': {'AutoModel': 'evil.Model'}, 'aux_loss_alpha': 1e-3},
  {'temperature': 0.6, 'top_k': 50, 'chunk_size_feed_forward': 0},
  {'moe_router_enable_expert_bias': True, 'score_function': 'sigmoid'},
  {'use_sliding_window': False, 'new_thing': None, 'old': [], '_x': 3},
  {'num_local_experts': 16, 'num_mtp_layers': 0},
]


@pytest.mark.parametrize('changes', MEANINGLESS)
def test_a_key_that_means_nothing_changes_nothing(changes):
  plain = config_json.read(values(num_nextn_predict_layers=0), 'float32')
  assert (
    config_json.read(values(num_nextn_predict_layers=0) | changes, 'float32')
    == plain
  )


def test_equal_ropes_in_both_places_are_one():
  old = dict(values()['rope_parameters'])
  old['type'] = old.pop('rope_type')
  assert config_json.read(values(rope_scaling=old), 'float32') == (
    config_json.read(values(), 'float32')
  )


def test_absent_keys_have_the_family_s_values():
  """transformers' V3 has eight groups where a file names none."""
  less = values(n_routed_experts=32)
  for key in ('n_group', 'topk_group', 'norm_topk_prob'):
    del less[key]
  moe = config_json.read(less, 'float32').moe
  assert (moe.groups, moe.top_groups, moe.normalize) == (8, 4, True)
  moe = config_json.read(less | {'n_group': None}, 'float32').moe
  assert moe.groups == 1


GROUP = {'num_bits': 4, 'type': 'int', 'symmetric': True, 'group_size': 32}


def packed(**changes):
  return {
    'quant_method': 'compressed-tensors',
    'format': 'pack-quantized',
    'config_groups': {'group_0': {'weights': GROUP | changes}},
  }


@pytest.mark.parametrize(
  'quantization, words',
  [
    ({'quant_method': 'gptq', 'bits': 4}, "quant_method='gptq'"),
    ({'quant_method': 'awq'}, "quant_method='awq'"),
    ({'quant_method': 'bitsandbytes'}, 'only fp8, compressed-tensors'),
    (packed(symmetric=False), 'symmetric=False'),
    (packed(num_bits=3), 'num_bits=3'),
    (packed() | {'format': 'marlin-24'}, "format='marlin-24'"),
    (packed() | {'transform_config': {'u': {}}}, 'transform_config'),
    (
      packed() | {'sparsity_config': {'format': 'sparse-24'}},
      'sparse-24',
    ),
    ({'quant_method': 'compressed-tensors'}, 'no config_groups; read: fp8'),
    ({'config_groups': 3}, 'no config_groups; read: fp8, compressed'),
    ({'config_groups': {'g': {'weights': [3]}}}, 'no config_groups'),
    ({'weight_block_size': [128, 0]}, 'weight_block_size=[128, 0]'),
    ({'weight_block_size': 128}, 'weight_block_size=128'),
  ],
)
def test_a_quantisation_that_is_not_read_is_refused(quantization, words):
  with pytest.raises(ConfigError) as caught:
    formats.blocks(quantization)
  assert words in str(caught.value) and len(str(caught.value)) < 300


def test_tiles_of_the_config_are_those_it_names():
  assert formats.blocks(packed()) == ((1, 32),)
  assert formats.blocks(None) == ()
  assert formats.blocks({'weight_block_size': [32, 64]}) == ((32, 64),)
  blocks = packed(block_structure=[128, 128], group_size=None)
  assert formats.blocks(blocks) == ((128, 128),)


JUNK = ('a', [1], {'a': 1}, -1, 10**30, float('nan'))


def parts(values, path=()):
  """Yields the path of each value in an object, those of inner ones, too."""
  for key, value in values.items():
    yield (*path, key)
    if isinstance(value, dict):
      yield from parts(value, (*path, key))


def replaced(values, path, value):
  key, *rest = path
  return values | {key: replaced(values[key], rest, value) if rest else value}


@pytest.mark.parametrize('case', ['glm4_moe_lite', 'large3'])
def test_a_value_of_another_type_is_a_line(case):
  """Each value of a config in turn, by each of JUNK: read, or one line."""
  (path,) = (GOLDEN / 'families' / case).glob('*.json')
  base = json.loads(path.read_text())
  key = 'quantization' if case == 'large3' else 'quantization_config'
  base[key] = packed(block_structure=[128, 128])
  base[key]['sparsity_config'] = {'format': 'dense'}
  refusals = 0
  for path in parts(base):
    for value in JUNK:
      values = replaced(base, path, value)
      try:
        config_json.read(values, 'float32')
        words = dialects.of(values)[1]
        formats.blocks(words.get('quantization_config'))
      except ConfigError as error:
        refusals += 1
        assert '\n' not in str(error) and len(str(error)) < 500, path
  assert refusals > 100
