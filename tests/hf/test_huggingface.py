"""Released checkpoints: transformers' numbers, exact round trips, bad input."""

import dataclasses
import functools
import importlib
import json
import pathlib
import shutil
import signal
import struct
import subprocess
import sys

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import linen as nn

from mla_moe import (
  ConfigError,
  Transformer,
  load_huggingface,
  save_huggingface,
  sharding,
)
from mla_moe.config import MeshConfig, MTPConfig, freeze
from mla_moe.hf import config_json, fp8_blocks, names, safetensors

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = ROOT / 'tests' / 'golden'
CASES = ('v2_lite', 'v3_yarn', 'v3_release')
CONFIGS = sorted(p.stem for p in (ROOT / 'configs').glob('[a-z]*.py'))


@functools.cache
def loaded(case):
  return load_huggingface(GOLDEN / case)


def tensors(folder):
  """name -> array of every tensor in a folder."""
  found = {}
  for path in sorted(pathlib.Path(folder).glob('*.safetensors')):
    with safetensors.File(path) as file:
      found |= {name: np.array(file.read(name)) for name in file.entries}
  return found


def rewrite(folder, change):
  """A copy of a golden's tensors in one file, changed; its config stays."""
  values = tensors(folder)
  change(values)
  for path in folder.glob('model*'):
    path.unlink()
  plan = {name: (x.dtype, x.shape) for name, x in values.items()}
  with safetensors.create(folder / 'model.safetensors', plan) as out:
    for name, x in values.items():
      out[name][...] = x


@pytest.fixture
def copy(tmp_path):
  def make(case):
    target = tmp_path / case
    shutil.copytree(GOLDEN / case, target)
    return target

  return make


def same_bytes(a, b):
  assert a.keys() == b.keys()
  for name in a:
    assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape
    assert a[name].tobytes() == b[name].tobytes(), name


@pytest.mark.parametrize('case', CASES)
def test_load_save_load_is_exact(case, tmp_path):
  config, variables = loaded(case)
  fp8 = case == 'v3_release'
  save_huggingface(tmp_path / 'out', config, variables, fp8, shard_bytes=10**6)
  same_bytes(tensors(GOLDEN / case), tensors(tmp_path / 'out'))
  again, back = load_huggingface(tmp_path / 'out')
  assert again == config
  chex.assert_trees_all_equal(back, variables)


def test_bfloat16_round_trip_is_exact(tmp_path):
  config, variables = load_huggingface(GOLDEN / 'v3_release', jnp.bfloat16)
  assert config.dtype == 'bfloat16'
  assert variables['router']['moe']['ffn']['bias'].dtype == jnp.float32
  assert variables['params']['embedding'].dtype == jnp.bfloat16
  save_huggingface(tmp_path / 'out', config, variables)
  again, back = load_huggingface(tmp_path / 'out', jnp.bfloat16)
  assert again == config
  chex.assert_trees_all_equal(back, variables)


def test_experts_in_one_tensor_load_like_experts_one_by_one(copy):
  folder = copy('v3_yarn')
  config, variables = loaded('v3_yarn')

  def fuse(values):
    for layer in range(config.dense_layers, config.layers):
      at = f'model.layers.{layer}.mlp.experts.'
      take = lambda e, part, at=at: values.pop(f'{at}{e}.{part}_proj.weight')
      every = range(config.moe.experts)
      both = [np.concatenate([take(e, 'gate'), take(e, 'up')]) for e in every]
      values[f'{at}gate_up_proj'] = np.stack(both)
      values[f'{at}down_proj'] = np.stack([take(e, 'down') for e in every])
    values['model.layers.0.self_attn.rotary_emb.inv_freq'] = np.ones(4, 'f4')

  rewrite(folder, fuse)
  chex.assert_trees_all_equal(load_huggingface(folder)[1], variables)


def test_leaves_are_laid_on_the_mesh():
  mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, expert=2))
  _, variables = load_huggingface(GOLDEN / 'v3_yarn', mesh=mesh)
  experts = variables['params']['moe']['ffn']['w_gate_up']
  assert experts.sharding.spec[1] == 'expert'
  assert len(experts.addressable_shards) == 8
  chex.assert_trees_all_equal(
    jax.device_get(variables), jax.device_get(loaded('v3_yarn')[1])
  )


def config_of(folder, **changes):
  path = folder / 'config.json'
  values = json.loads(path.read_text()) | changes
  path.write_text(json.dumps(values))


def test_rope_in_halves_loads_like_rope_in_pairs(copy):
  """`rope_interleave: false` says that rotated rows come in halves already."""
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
  config_of(folder, rope_interleave=False)
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
  power = lambda x: np.exp2(np.round(np.log2(x)))
  eight, wide = copy('v3_release'), None

  def narrow(values):
    for name in [n for n in values if n.endswith('_scale_inv')]:
      values[name] = power(values[name]).astype(ml_dtypes.float8_e8m0fnu)

  rewrite(eight, narrow)
  got = load_huggingface(eight)[1]
  shutil.rmtree(eight)
  wide = copy('v3_release')
  rewrite(
    wide,
    lambda v: v.update(
      {n: power(x) for n, x in v.items() if n.endswith('_scale_inv')}
    ),
  )
  chex.assert_trees_all_equal(got, load_huggingface(wide)[1])


def test_fp8_blocks_of_fused_experts_cross_from_gate_to_up(copy):
  """The fused tensor is quantised as one: 144 rows of each are 2.25 blocks."""
  config, _ = loaded('v3_release')
  assert config.moe.width % fp8_blocks.BLOCK
  fused, plain = {}, {}

  def change(values):
    every = range(config.moe.experts)
    for layer in range(config.dense_layers, config.layers + config.mtp.depth):
      at = f'model.layers.{layer}.mlp.experts.'

      def take(e, part, at=at):
        name = f'{at}{e}.{part}_proj.weight'
        return fp8_blocks.dequantize(
          values.pop(name), values.pop(f'{name}_scale_inv')
        )

      both = [np.concatenate([take(e, 'gate'), take(e, 'up')]) for e in every]
      down = [take(e, 'down') for e in every]
      for part, each in (('gate_up', both), ('down', down)):
        pairs = [fp8_blocks.quantize(x) for x in each]
        fused[f'{at}{part}_proj'] = np.stack([q for q, _ in pairs])
        fused[f'{at}{part}_proj_scale_inv'] = np.stack([s for _, s in pairs])
        for e, pair in enumerate(pairs):
          halves = np.split(fp8_blocks.dequantize(*pair), 2)
          parts = ('gate', 'up') if part == 'gate_up' else ('down',)
          halves = halves if part == 'gate_up' else [np.concatenate(halves)]
          for name, half in zip(parts, halves, strict=True):
            plain[f'{at}{e}.{name}_proj.weight'] = half

  results = []
  for experts in (fused, plain):
    folder = copy('v3_release')
    rewrite(folder, lambda v, new=experts: (change(v), v.update(new)))
    results.append(load_huggingface(folder)[1])
    shutil.rmtree(folder)
  chex.assert_trees_all_equal(*results)


@pytest.mark.parametrize('name', CONFIGS)
def test_every_shipped_config_survives(name, tmp_path):
  module = importlib.import_module(f'configs.{name}')
  config = freeze(module.get_config('smoke')).model
  tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
  init = Transformer(config).init
  shapes = nn.unbox(jax.eval_shape(init, jax.random.key(0), tokens))
  random = np.random.default_rng(0)
  make = lambda x: random.normal(0, 1, x.shape).astype(np.float32)
  variables = jax.tree.map(make, shapes)
  variables.setdefault('router', {})
  save_huggingface(tmp_path / 'out', config, variables)
  again, back = load_huggingface(tmp_path / 'out', config.dtype)
  kept = ('remat', 'precision')
  again = dataclasses.replace(again, **{k: getattr(config, k) for k in kept})
  rope = config.mla.rope
  if rope.factor == 1:  # without YaRN its numbers mean nothing
    mla = dataclasses.replace(again.mla, rope=rope)
    again = dataclasses.replace(again, mla=mla)
  assert again == config
  assert sum(x.size for x in jax.tree.leaves(back)) == sum(
    x.size for x in jax.tree.leaves(variables)
  )
  if config.dtype == 'float32':
    chex.assert_trees_all_equal(back, variables)


def test_every_mtp_module_goes_out_and_comes_back(tmp_path):
  """Layers after the last, each with norms of its own and copied ends."""
  config, _ = loaded('v3_yarn')
  config = dataclasses.replace(config, mtp=MTPConfig(2))
  random = np.random.default_rng(0)
  variables = {}
  for row in names.rows(config):
    at = variables
    for key in row.path[:-1]:
      at = at.setdefault(key, {})
    at[row.path[-1]] = random.normal(size=row.shape).astype(np.float32)
  save_huggingface(tmp_path / 'out', config, variables)
  values = tensors(tmp_path / 'out')
  for depth in range(2):
    at = f'model.layers.{config.layers + depth}.'
    norm = variables['params'][f'mtp_{depth}']['hidden_norm']['scale']
    np.testing.assert_array_equal(values[f'{at}hnorm.weight'], norm)
    head = values[f'{at}shared_head.head.weight']
    np.testing.assert_array_equal(head, values['lm_head.weight'])
  again, back = load_huggingface(tmp_path / 'out')
  assert again == config
  chex.assert_trees_all_equal(back, variables)
  values[f'model.layers.{config.layers + 1}.embed_tokens.weight'][3, 4] += 1
  rewrite(tmp_path / 'out', lambda v: v.update(values))
  refused(tmp_path / 'out', f'layers.{config.layers + 1}.embed_tokens')


# ----------------------------------------------------------------------- FP8


@pytest.mark.parametrize('power_of_two', [False, True])
@pytest.mark.parametrize('shape', [(128, 128), (200, 300), (8, 136)])
def test_quantising_what_was_dequantised_gives_the_same_bytes(
  power_of_two, shape
):
  random = np.random.default_rng(1)
  weight = random.normal(0, 0.02, shape).astype(np.float32)
  q, scale = fp8_blocks.quantize(weight, power_of_two)
  wide = fp8_blocks.dequantize(q, scale)
  rows = np.arange(shape[0]) // 128
  columns = np.arange(shape[1]) // 128
  oracle = q.astype(np.float32) * scale[rows][:, columns]
  np.testing.assert_array_equal(wide, oracle)
  assert np.abs(wide - weight).max() <= np.abs(weight).max() / 16
  for ask in (False, True):  # what the weights contain wins
    q2, scale2 = fp8_blocks.quantize(wide, ask)
    assert q2.tobytes() == q.tobytes() and scale2.tobytes() == scale.tobytes()
  if power_of_two:
    assert (np.frexp(scale)[0] == 0.5).all()


@hypothesis.settings(deadline=None, max_examples=40)
@hypothesis.given(st.integers(0, 2**32 - 1), st.floats(1e-6, 1e3))
def test_any_fp8_block_keeps_its_values(seed, scale):
  """Also one whose largest q is not 448: the bytes may differ, never values."""
  random = np.random.default_rng(seed)
  raw = random.integers(0, 256, (64, 140)).astype(np.uint8)
  raw[(raw & 127) > random.integers(1, 127)] = 0
  scales = np.full((1, 2), scale, np.float32)
  wide = fp8_blocks.dequantize(raw.view(fp8_blocks.E4M3), scales)
  q, found = fp8_blocks.quantize(wide)
  np.testing.assert_array_equal(fp8_blocks.dequantize(q, found), wide)


def test_powers_of_two_are_said_in_the_config(tmp_path):
  config, variables = loaded('v2_lite')
  save_huggingface(
    tmp_path / 'out', config, variables, fp8=True, power_of_two=True
  )
  values = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert values['quantization_config']['scale_fmt'] == 'ue8m0'
  config, variables = load_huggingface(tmp_path / 'out')
  save_huggingface(tmp_path / 'two', config, variables, fp8=True)
  same_bytes(tensors(tmp_path / 'out'), tensors(tmp_path / 'two'))
  assert json.loads((tmp_path / 'two' / 'config.json').read_text()) == values


# ----------------------------------------------------------------- bad input


def refused(folder, *words):
  with pytest.raises(ConfigError) as caught:
    load_huggingface(folder)
  text = str(caught.value)
  assert '\n' not in text
  for word in words:
    assert word in text, text


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
  refused(folder, 'model.safetensors', 'truncated')


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
  refused(folder, key.replace('parameters', 'scaling'), 'config.json')


def test_save_dies_without_leaving_a_folder(tmp_path):
  config, variables = loaded('v2_lite')
  bad = jax.tree.map(lambda x: x, variables)
  bad['params']['w_head'] = bad['params']['w_head'].at[0, 0].set(jnp.nan)
  with pytest.raises(ConfigError, match='lm_head.weight'):
    save_huggingface(tmp_path / 'out', config, bad)
  assert list(tmp_path.iterdir()) == []


KILLED = """
import os, pathlib, signal, sys
import numpy as np
from mla_moe import config as c
from mla_moe.hf import names, save, safetensors

moment, target, force = sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3:]
mla = c.MLAConfig(heads=2, query_rank=0, kv_rank=8, nope_dim=8, rope_dim=4)
config = c.ModelConfig(
  vocab=258, dim=64, layers=1, dense_layers=1, dense_width=32, mla=mla,
  mtp=c.MTPConfig(0),
)
variables = {}
for row in names.rows(config):
  at = variables
  for key in row.path[:-1]:
    at = at.setdefault(key, {})
  at[row.path[-1]] = np.ones(row.shape, np.float32)

def die(*_, **__):
  os.kill(os.getpid(), signal.SIGKILL)

if moment == 'file':
  save.fp8_blocks.check_finite = lambda name, _: 'o_proj' in name and die()
elif moment == 'config':
  save._take_place = die
elif moment == 'swap':
  save.shutil.rmtree = die
save.save_huggingface(target, config, variables, force=bool(force))
"""


@pytest.mark.parametrize('moment', ['file', 'config', 'swap'])
def test_a_killed_save_leaves_no_folder_that_looks_complete(moment, tmp_path):
  """SIGKILL in a file, before the last rename, and as the old one goes."""
  target = tmp_path / 'out'
  command = [sys.executable, '-c', KILLED, moment, str(target)]
  if moment == 'swap':
    shutil.copytree(GOLDEN / 'v2_lite', target)
    command.append('force')
  out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert out.returncode == -signal.SIGKILL, out.stderr
  (left,) = (p for p in tmp_path.iterdir() if p != target)
  if moment == 'swap':  # the new one is whole, the old one set aside
    assert load_huggingface(target)[0].vocab == 258
    assert left.name.startswith('.out.') and left.name.endswith('.old')
    return
  assert not target.exists()
  assert left.name.startswith('.out.') and left.name.endswith('.partial')
  if moment == 'file':
    refused(left, 'config.json')
    (file,) = left.glob('*.safetensors')
    with pytest.raises(ConfigError, match='safetensors'):
      safetensors.File(file)


def test_code_beside_the_weights_is_never_run(copy):
  folder = copy('v3_yarn')
  config_of(
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


def test_target_is_only_replaced_by_force(tmp_path):
  config, variables = loaded('v2_lite')
  target = tmp_path / 'out'
  target.mkdir()
  (target / 'precious').write_text('x')
  for force in (False, True):  # not even by force: no checkpoint
    with pytest.raises(ConfigError, match='out'):
      save_huggingface(target, config, variables, force=force)
  (target / 'config.json').write_text('{}')
  save_huggingface(target, config, variables, force=True)
  assert not (target / 'precious').exists()
  assert len(list(tmp_path.iterdir())) == 1


@hypothesis.settings(deadline=None, max_examples=300)
@hypothesis.given(st.data())
def test_row37_reader_survives_any_bytes(tmp_path_factory, small_file, data):
  """Damaged files are a ConfigError or read within their own bytes."""
  whole = small_file
  kind = data.draw(st.sampled_from(['bytes', 'cut', 'header', 'random']))
  if kind == 'random':
    blob = data.draw(st.binary(max_size=200))
  elif kind == 'cut':
    blob = whole[: data.draw(st.integers(0, len(whole)))]
  elif kind == 'bytes':
    blob = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
      at = data.draw(st.integers(0, len(blob) - 1))
      blob[at] = data.draw(st.integers(0, 255))
  else:
    number = st.integers(-(2**70), 2**70) | st.integers(0, 64)
    leaf = number | st.none() | st.booleans() | st.text(max_size=3)
    entry = st.fixed_dictionaries(
      {
        'dtype': st.sampled_from(['F32', 'F8_E4M3', 'X', 3]),
        'shape': st.lists(leaf, max_size=3),
        'data_offsets': st.lists(leaf, max_size=3),
      }
    )
    header = data.draw(st.dictionaries(st.text(max_size=3), entry | leaf))
    text = json.dumps(header).encode()
    blob = struct.pack('<Q', len(text)) + text + bytes(40)
  path = tmp_path_factory.getbasetemp() / 'fuzzed.safetensors'
  path.write_bytes(bytes(blob))
  try:
    with safetensors.File(path) as file:
      total = sum(file.read(name).nbytes for name in file.entries)
      assert total <= len(blob)
  except ConfigError as error:
    assert str(path) in str(error)


@pytest.fixture(scope='module')
def small_file(tmp_path_factory):
  path = tmp_path_factory.mktemp('small') / 'a.safetensors'
  plan = {
    'a': (np.dtype(np.float32), (3, 2)),
    'b': (np.dtype(ml_dtypes.float8_e4m3fn), (5,)),
  }
  with safetensors.create(path, plan) as out:
    out['a'][:], out['b'][:] = 1, 2
  return path.read_bytes()


def test_files_are_those_of_the_library(tmp_path):
  library = pytest.importorskip('safetensors.numpy')
  values = {'x': np.arange(6, dtype=np.float32).reshape(2, 3)}
  library.save_file(values, tmp_path / 'a.safetensors')
  with safetensors.File(tmp_path / 'a.safetensors') as file:
    np.testing.assert_array_equal(file.read('x'), values['x'])
  plan = {'x': (np.dtype(np.float32), (2, 3))}
  with safetensors.create(tmp_path / 'b.safetensors', plan) as out:
    out['x'][:] = values['x']
  back = library.load_file(tmp_path / 'b.safetensors')
  np.testing.assert_array_equal(back['x'], values['x'])


# -------------------------------------------------------------- transformers


@pytest.mark.slow
@pytest.mark.filterwarnings('default')
@pytest.mark.parametrize(
  'words',
  [
    ['--kind=v2', '--seed=3', 'q_lora_rank=32'],
    ['--kind=v3', '--seed=4', 'n_group=1', 'topk_group=1'],
    ['--kind=v3', '--seed=5', '--release', 'hidden_size=160'],
  ],
)
def test_fresh_goldens_hold(words, tmp_path):
  """Cases of other sizes than those kept, made by transformers just now."""
  pytest.importorskip('transformers')
  pytest.importorskip('torch')
  command = [sys.executable, str(ROOT / 'tests' / 'make_goldens.py')]
  subprocess.run([*command, f'--folder={tmp_path}', *words], check=True)
  config, variables = load_huggingface(tmp_path)
  expected = np.load(tmp_path / 'expected.npz')
  run = jax.jit(Transformer(config).apply)
  out = run(variables, expected['tokens'])
  chex.assert_trees_all_close(out.logits, expected['logits'], atol=2e-4)
  greedy = run(variables, expected['greedy']).logits.argmax(-1)
  np.testing.assert_array_equal(greedy[:, 23:-1], expected['greedy'][:, 24:])
  release = '--release' in words
  assert (out.mtp_logits is not None) == release
  if release:
    both = out.mtp_logits[0], expected['mtp_logits']
    chex.assert_trees_all_close(*both, atol=2e-4)
    save_huggingface(tmp_path / 'out', config, variables, fp8=True)
    same_bytes(tensors(tmp_path), tensors(tmp_path / 'out'))


@pytest.mark.slow
@pytest.mark.filterwarnings('default')
@pytest.mark.parametrize('name', ['tiny', 'deepseek_v2_lite', 'moonlight_16b'])
def test_transformers_loads_what_is_saved(name, tmp_path):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  module = importlib.import_module(f'configs.{name}')
  config = freeze(module.get_config('smoke')).model
  config = dataclasses.replace(config, dtype='float32', init_std=0.08)
  tokens = np.random.default_rng(0).integers(0, config.vocab, (2, 48))
  network = Transformer(config)
  variables = nn.unbox(network.init(jax.random.key(0), tokens[:, :8]))
  random = np.random.default_rng(1)
  router = variables.get('router', {})
  noise = lambda b: random.normal(0, 0.05, b.shape).astype(np.float32)
  variables['router'] = jax.tree.map(noise, router)
  # "Trained": a few steps of plain descent, which leave nothing symmetric.
  loss = lambda params: (
    network.apply({**variables, 'params': params}, tokens).logits[..., 0].mean()
  )
  grad = jax.jit(jax.grad(loss))
  for steps in (0, 3):
    for _ in range(steps):
      variables['params'] = jax.tree.map(
        lambda p, g: p - 0.5 * g, variables['params'], grad(variables['params'])
      )
    save_huggingface(tmp_path / f'{steps}', config, variables)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
      tmp_path / f'{steps}', dtype=torch.float32
    )
    with torch.no_grad():
      logits = theirs(torch.from_numpy(tokens)).logits.numpy()
    ours = network.apply(variables, tokens).logits
    chex.assert_trees_all_close(np.asarray(ours), logits, atol=2e-4)


def test_config_writes_what_it_reads():
  for case in CASES:
    values = json.loads((GOLDEN / case / 'config.json').read_text())
    config = config_json.read(values, 'float32')
    assert (
      config_json.read(config_json.write(config, 'float32'), 'float32')
      == config
    )
