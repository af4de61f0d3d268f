"""Saving: round trips are bit-exact, and a folder is complete or absent."""

import dataclasses
import importlib
import json
import shutil
import signal
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from releases import GOLDEN, ROOT, loaded, refused, rewrite, same_bytes, tensors

from mla_moe import (
  ConfigError,
  Transformer,
  load_huggingface,
  save_huggingface,
)
from mla_moe.config import MTPConfig, freeze
from mla_moe.hf import config_json, names, safetensors

CASES = ('v2_lite', 'v3_yarn', 'v3_release')
CONFIGS = sorted(p.stem for p in (ROOT / 'configs').glob('[a-z]*.py'))


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


def test_config_writes_what_it_reads():
  for case in CASES:
    values = json.loads((GOLDEN / case / 'config.json').read_text())
    config = config_json.read(values, 'float32')
    assert (
      config_json.read(config_json.write(config, 'float32'), 'float32')
      == config
    )


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
  again = dataclasses.replace(
    again, compute=config.compute, precision=config.precision
  )
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
  """A module is a layer after the last, with copies of embedding and head."""
  config, _ = loaded('v3_yarn')
  config = dataclasses.replace(config, mtp=MTPConfig(2))
  random = np.random.default_rng(0)
  variables = {}
  for row in names.rows(config):
    tree = variables
    for key in row.path[:-1]:
      tree = tree.setdefault(key, {})
    tree[row.path[-1]] = random.normal(size=row.shape).astype(np.float32)
  save_huggingface(tmp_path / 'out', config, variables)
  values = tensors(tmp_path / 'out')
  for depth in range(2):
    layer = f'model.layers.{config.layers + depth}'
    norm = variables['params'][f'mtp_{depth}']['hidden_norm']['scale']
    np.testing.assert_array_equal(values[f'{layer}.hnorm.weight'], norm)
    head = values[f'{layer}.shared_head.head.weight']
    np.testing.assert_array_equal(head, values['lm_head.weight'])
  again, back = load_huggingface(tmp_path / 'out')
  assert again == config
  chex.assert_trees_all_equal(back, variables)
  values[f'model.layers.{config.layers + 1}.embed_tokens.weight'][3, 4] += 1
  rewrite(tmp_path / 'out', lambda v: v.update(values))
  refused(tmp_path / 'out', f'layers.{config.layers + 1}.embed_tokens')


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
from mla_moe.hf import names, outgoing, save

moment, target, force = sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3:]
mla = c.MLAConfig(heads=2, query_rank=0, kv_rank=8, nope_dim=8, rope_dim=4)
config = c.ModelConfig(
  vocab=258, dim=64, layers=1, dense_layers=1, dense_width=32, mla=mla,
  mtp=c.MTPConfig(0),
)
variables = {}
for row in names.rows(config):
  tree = variables
  for key in row.path[:-1]:
    tree = tree.setdefault(key, {})
  tree[row.path[-1]] = np.ones(row.shape, np.float32)

def die(*_, **__):
  os.kill(os.getpid(), signal.SIGKILL)

if moment == 'file':
  outgoing.fp8_blocks.check_finite = lambda name, _: 'o_proj' in name and die()
elif moment == 'config':
  save._replace = die
elif moment == 'swap':
  save.shutil.rmtree = die
save.save_huggingface(target, config, variables, force=bool(force))
"""


@pytest.mark.parametrize('moment', ['file', 'config', 'swap'])
def test_a_killed_save_leaves_no_folder_that_looks_complete(moment, tmp_path):
  """SIGKILL in a file, before the last rename, while the old one is deleted."""
  target = tmp_path / 'out'
  command = [sys.executable, '-c', KILLED, moment, str(target)]
  if moment == 'swap':
    shutil.copytree(GOLDEN / 'v2_lite', target)
    command.append('force')
  out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert out.returncode == -signal.SIGKILL, out.stderr
  (left,) = (p for p in tmp_path.iterdir() if p != target)
  if moment == 'swap':  # the new one is complete, the old one moved away
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
