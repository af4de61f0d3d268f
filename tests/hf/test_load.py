"""Loading: all layouts give the same leaves; errors name the tensor or file."""

import dataclasses
import json
import shutil
import sys
import time
import tracemalloc

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from releases import (
  GOLDEN,
  dequantized,
  loaded,
  refused,
  rewrite,
  set_config,
)

from experiments.bench import formats
from mla_moe import load_huggingface, sharding
from mla_moe.config import ConfigError, MeshConfig
from mla_moe.hf import config_json, fp8_blocks, load, names


def test_experts_in_one_tensor_load_like_experts_one_by_one(copy):
  folder = copy('v3_yarn')
  config, variables = loaded('v3_yarn')

  def fuse(values):
    for layer in range(config.dense_layers, config.layers):
      prefix = f'model.layers.{layer}.mlp.experts.'
      parts = {
        part: [
          values.pop(f'{prefix}{e}.{part}_proj.weight')
          for e in range(config.moe.experts)
        ]
        for part in ('gate', 'up', 'down')
      }
      gate_up = [np.stack(parts[part]) for part in ('gate', 'up')]
      values[f'{prefix}gate_up_proj'] = np.concatenate(gate_up, axis=1)
      values[f'{prefix}down_proj'] = np.stack(parts['down'])
    values['model.layers.0.self_attn.rotary_emb.inv_freq'] = np.ones(4, 'f4')

  rewrite(folder, fuse)
  chex.assert_trees_all_equal(load_huggingface(folder)[1], variables)


@pytest.mark.parametrize(
  'case, numbers', [('v3_release', 5000), ('families/mistral4', 500)]
)
def test_pieces_of_matrices_make_the_same_leaves(case, numbers, monkeypatch):
  """A piece is a few rows that divide neither a matrix nor a block of FP8."""
  expected = loaded(case)[1]
  monkeypatch.setattr(names, '_PIECE', numbers)
  chex.assert_trees_all_equal(load_huggingface(GOLDEN / case)[1], expected)


def test_leaves_are_laid_on_the_mesh():
  mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, expert=2))
  _, variables = load_huggingface(GOLDEN / 'v3_yarn', mesh=mesh)
  experts = variables['params']['moe']['ffn']['w_gate_up']
  assert experts.sharding.spec[1] == 'expert'
  assert len(experts.addressable_shards) == 8
  chex.assert_trees_all_equal(
    jax.device_get(variables), jax.device_get(loaded('v3_yarn')[1])
  )


def test_rope_in_halves_loads_like_rope_in_pairs(copy):
  """`rope_interleave: false` means that the file pairs the halves already."""
  folder = copy('v3_yarn')
  config, variables = loaded('v3_yarn')
  mla = config.mla
  r, n = mla.rope_dim, mla.heads
  halves = np.concatenate([np.arange(0, r, 2), np.arange(1, r, 2)])

  def deinterleave(values):
    for name, x in values.items():
      if 'kv_a_proj' in name:
        x[mla.kv_rank :] = x[mla.kv_rank :][halves]
      elif name.endswith(('q_proj.weight', 'q_b_proj.weight')):
        heads = x.reshape(n, -1, x.shape[1])
        heads[:, mla.nope_dim :] = heads[:, mla.nope_dim :][:, halves]

  rewrite(folder, deinterleave)
  set_config(folder, rope_interleave=False)
  chex.assert_trees_all_equal(load_huggingface(folder)[1], variables)


def test_float16_files_load_in_both_dtypes(copy):
  folder = copy('v2_lite')
  halve = lambda x: x.astype(np.float16)
  rewrite(folder, lambda v: v.update({k: halve(x) for k, x in v.items()}))
  expected = jax.tree.map(
    lambda x: np.asarray(x).astype(np.float16).astype(np.float32),
    loaded('v2_lite')[1],
  )
  chex.assert_trees_all_equal(load_huggingface(folder)[1], expected)
  narrow = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), expected)
  got = load_huggingface(folder, jnp.bfloat16)[1]
  chex.assert_trees_all_equal(jax.device_get(got), narrow)


def test_scales_of_eight_bits_load_like_those_of_32(copy):
  """V3.1's powers of two may be written as exponents (F8_E8M0)."""
  results = []
  for dtype in (np.float32, ml_dtypes.float8_e8m0fnu):

    def change(values, dtype=dtype):
      for name in [n for n in values if n.endswith('_scale_inv')]:
        power = np.exp2(np.round(np.log2(values[name])))
        values[name] = power.astype(dtype)

    folder = copy('v3_release')
    rewrite(folder, change)
    results.append(load_huggingface(folder)[1])
    shutil.rmtree(folder)
  chex.assert_trees_all_equal(*results)


def test_fp8_blocks_of_fused_experts_cross_from_gate_to_up(copy):
  """The fused tensor is quantised as one: 144 rows of gate are 1.125 tiles."""
  config, _ = loaded('v3_release')
  assert config.moe.width % fp8_blocks.TILE
  fused, plain = {}, {}  # the same experts in two layouts

  def pop_experts(values):
    for layer in range(config.dense_layers, config.layers + config.mtp.depth):
      prefix = f'model.layers.{layer}.mlp.experts.'

      def pop(part, prefix=prefix):
        names = [
          f'{prefix}{e}.{part}_proj.weight' for e in range(config.moe.experts)
        ]
        return [
          dequantized(values.pop(name), values.pop(f'{name}_scale_inv'))
          for name in names
        ]

      gate_up = zip(pop('gate'), pop('up'), strict=True)
      gate_up = [np.concatenate(pair) for pair in gate_up]
      for part, matrices in (('gate_up', gate_up), ('down', pop('down'))):
        quantized = [fp8_blocks.quantize(x) for x in matrices]
        q, scale = (np.stack(x) for x in zip(*quantized, strict=True))
        fused[f'{prefix}{part}_proj'] = q
        fused[f'{prefix}{part}_proj_scale_inv'] = scale
        parts = part.split('_')
        for e, pair in enumerate(quantized):
          split = np.split(dequantized(*pair), len(parts))
          for name, matrix in zip(parts, split, strict=True):
            plain[f'{prefix}{e}.{name}_proj.weight'] = matrix

  results = []
  for experts in (fused, plain):
    folder = copy('v3_release')
    rewrite(folder, lambda v, new=experts: (pop_experts(v), v.update(new)))
    results.append(load_huggingface(folder)[1])
    shutil.rmtree(folder)
  chex.assert_trees_all_equal(*results)


def test_code_beside_the_weights_is_never_run(copy):
  folder = copy('v3_yarn')
  set_config(
    folder,
    auto_map={'AutoModelForCausalLM': 'modeling_evil.DeepseekV3ForCausalLM'},
  )
  for name in ('modeling_evil.py', 'configuration_evil.py', '__init__.py'):
    (folder / name).write_text('raise SystemExit("imported")\n')
  again, variables = load_huggingface(folder)
  config, expected = loaded('v3_yarn')
  assert again == config
  chex.assert_trees_all_equal(variables, expected)
  assert 'modeling_evil' not in sys.modules


def test_missing_and_left_over_tensors_are_all_named(copy):
  folder = copy('v2_lite')

  def change(values):
    del values['model.norm.weight'], values['lm_head.weight']
    values['stray'] = np.zeros(3, np.float32)

  rewrite(folder, change)
  refused(folder, 'model.norm.weight', 'lm_head.weight', 'stray')


def test_missing_shards_are_named(copy):
  folder = copy('v3_release')
  for n in (1, 3):
    (folder / f'model-0000{n}-of-00003.safetensors').unlink()
  refused(folder, 'model-00001-of', 'model-00003-of')


def test_wrong_shape_dtype_and_nan_are_named(copy):
  name = 'model.layers.1.mlp.gate.weight'
  for change, word in (
    (lambda x: x.T.copy(), 'shape'),
    (lambda x: x.astype(np.int32), 'I32'),
    (lambda x: np.where(x == x.max(), np.nan, x), 'NaN'),
    (lambda x: np.where(x == x.max(), -np.inf, x), 'infinity'),
  ):
    folder = copy('v2_lite')

    def put(values, change=change):
      values[name] = change(values[name])

    rewrite(folder, put)
    refused(folder, name, word)
    shutil.rmtree(folder)


def test_truncated_file_is_refused(copy):
  folder = copy('v2_lite')
  path = folder / 'model.safetensors'
  path.write_bytes(path.read_bytes()[:-1])
  refused(folder, 'model.safetensors', 'is truncated or incomplete')


@pytest.mark.parametrize(
  'place', ['../x.safetensors', '/x.safetensors', 'x.bin']
)
def test_row39_index_that_leaves_the_folder_is_refused(copy, place):
  folder = copy('v3_release')
  index = folder / 'model.safetensors.index.json'
  values = json.loads(index.read_text())
  values['weight_map']['lm_head.weight'] = place
  index.write_text(json.dumps(values))
  refused(folder, 'lm_head.weight', place)


@pytest.mark.parametrize(
  'key, value',
  [
    ('architectures', ['LlamaForCausalLM']),
    ('hidden_size', 'wide'),
    ('attention_bias', True),
    ('hidden_act', 'gelu'),
    ('n_group', 3),
    ('num_hidden_layers', None),
    ('rope_parameters', {'rope_type': 'linear', 'factor': 2.0}),
  ],
)
def test_row38_config_that_is_not_computed_is_refused(copy, key, value):
  folder = copy('v3_yarn')
  path = folder / 'config.json'
  values = json.loads(path.read_text()) | {key: value}
  path.write_text(json.dumps(values))
  refused(folder, key, 'config.json')


@pytest.mark.parametrize(
  'changes',
  [
    {'num_hidden_layers': 10**6},
    {'n_routed_experts': 10**9, 'n_group': 1, 'topk_group': 1},
    {'num_nextn_predict_layers': 10**7},
  ],
)
def test_a_hostile_count_is_compared_before_names_are_made(changes, copy):
  folder = copy('v3_release')
  set_config(folder, **changes)
  start = time.process_time()
  refused(folder, 'tensors', 'missing')
  assert time.process_time() - start < 2


def test_fused_experts_are_counted_by_their_shape(copy):
  folder = copy('v3_yarn')
  name = 'model.layers.2.mlp.experts.gate_up_proj'
  rewrite(folder, lambda v: v.update({name: np.ones((4, 2, 2), 'f4')}))
  set_config(folder, n_routed_experts=10**9, n_group=1, topk_group=1)
  refused(folder, 'gate_up_proj', '1000000000 experts')


def test_a_name_cannot_write_to_the_terminal(copy):
  folder = copy('v2_lite')
  name = '\x1b]0;owned\x07\nerror: fake line'
  rewrite(folder, lambda v: v.update({name: np.ones(1, 'f4')}))
  refused(folder, 'left over', r'\x1b]0;owned\x07 error: fake line')


def test_a_number_that_bfloat16_cannot_hold_is_not_loaded(copy):
  folder = copy('v2_lite')

  def enlarge(values):
    values['lm_head.weight'][0, 0] = 3.4e38

  rewrite(folder, enlarge)
  load_huggingface(folder)
  with pytest.raises(ConfigError, match='lm_head.weight'):
    load_huggingface(folder, jnp.bfloat16)


def test_a_device_is_no_file(copy):
  """/dev/zero never ends, and a pipe never begins."""
  for name in ('config.json', 'model.safetensors'):
    folder = copy('v2_lite') / name
    folder.unlink()
    folder.symlink_to('/dev/zero')
    refused(folder.parent, name, 'no regular file')
    shutil.rmtree(folder.parent)


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['int4', 'nvfp4'])
def test_memory_beyond_the_leaves_is_below_a_matrix(
  kind, tmp_path, monkeypatch
):
  """Kimi K2 Thinking's names and layout, its matrices in eight pieces each."""
  monkeypatch.setattr(names, '_PIECE', 2**15)
  monkeypatch.setattr(fp8_blocks, 'CHUNK', 2**12)
  monkeypatch.setattr(load, '_THREADS', 1)
  config = formats.model(experts=8, width=512)
  mla = dataclasses.replace(config.mla, heads=2, query_rank=32, kv_rank=32)
  config = dataclasses.replace(config, dim=512, vocab=64, mla=mla)
  formats.write(tmp_path, config_json.write(config, 'bfloat16'), kind)
  read, peaks = load.in_threads, []

  def traced(*args):  # the leaves are there already, and are not counted
    tracemalloc.start()
    try:
      read(*args)
      peaks.append(tracemalloc.get_traced_memory()[1])
    finally:
      tracemalloc.stop()

  monkeypatch.setattr(load, 'in_threads', traced)
  _, variables = load_huggingface(tmp_path)
  experts = variables['params']['moe']['ffn']['w_down']
  chex.assert_shape(experts, (1, 8, 512, 512))
  assert 0 < peaks[0] < experts[0, 0].nbytes
