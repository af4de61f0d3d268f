"""Saving: round trips are bit-exact, and a folder is complete or absent."""

import dataclasses
import errno
import importlib
import json
import os
import pathlib
import shutil
import signal

import chex
import children
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
from mla_moe.checked import ConfigWarning
from mla_moe.config import LoRAConfig, MTPConfig, freeze
from mla_moe.hf import config_json, names, safetensors, save

CASES = ('v2_lite', 'v3_yarn', 'v3_release')
# The models of sft and r1 are those of the others.
CONFIGS = {p.stem for p in (ROOT / 'configs').glob('[a-z]*.py')} - {'sft', 'r1'}


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


@pytest.mark.parametrize('name', sorted(CONFIGS))
def test_every_shipped_config_survives(name, tmp_path):
  module = importlib.import_module(f'configs.{name}')
  config = freeze(module.get_config('smoke')).model
  # A release holds no adapters, and names no base.
  config = dataclasses.replace(config, base='trained', lora=LoRAConfig())
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
  line = f'the MTP modules, whose .*layers.{config.layers + 1}.embed_tokens'
  with pytest.warns(ConfigWarning, match=line):
    again, back = load_huggingface(tmp_path / 'out')
  assert again == dataclasses.replace(config, mtp=MTPConfig(0))
  assert not [name for name in back['params'] if 'mtp' in name]


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


@pytest.mark.parametrize('moment', ['file', 'config', 'swap'])
def test_a_killed_save_leaves_no_folder_that_looks_complete(moment, tmp_path):
  """SIGKILL in a file, before the last rename, while the old one is deleted."""
  target = tmp_path / 'out'
  script = pathlib.Path(__file__).parent / 'killed_save.py'
  words = [script, moment, target]
  if moment == 'swap':
    ignore = shutil.ignore_patterns('expected.npz')
    shutil.copytree(GOLDEN / 'v2_lite', target, ignore=ignore)
    words.append('force')
  out = children.run(*words)
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
  save_huggingface(target, config, variables)
  (target / 'tokenizer.json').write_text('old')
  with pytest.raises(ConfigError, match='--force'):
    save_huggingface(target, config, variables)
  save_huggingface(target, config, variables, force=True)
  names = {path.name for path in target.iterdir()}
  written = {'config.json', 'generation_config.json', 'model.safetensors'}
  assert names == written
  assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
  'names',
  [
    ('precious',),
    ('config.json',),
    ('config.json', 'model.safetensors', 'thesis.tex'),
    ('config.json', 'metrics.jsonl', 'checkpoints/100/x'),
    ('config.json', 'model.safetensors', 'tokenizer.json/x'),
  ],
)
def test_not_even_force_deletes_a_file_that_no_export_writes(names, tmp_path):
  config, variables = loaded('v2_lite')
  for name in names:
    path = tmp_path / 'out' / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(name)
  with pytest.raises(ConfigError, match='out') as error:
    save_huggingface(tmp_path / 'out', config, variables, force=True)
  assert '\n' not in str(error.value)
  assert all((tmp_path / 'out' / name).read_text() == name for name in names)
  assert [path.name for path in tmp_path.iterdir()] == ['out']


def test_a_link_and_the_working_folder_are_targets(tmp_path, monkeypatch):
  config, variables = loaded('v2_lite')
  (tmp_path / 'real').mkdir()
  (tmp_path / 'link').symlink_to('real')
  save_huggingface(tmp_path / 'link', config, variables)
  assert (tmp_path / 'link').is_symlink()
  assert (tmp_path / 'real' / 'config.json').is_file()
  (tmp_path / 'here').mkdir()
  monkeypatch.chdir(tmp_path / 'here')
  save_huggingface('.', config, variables)
  assert (tmp_path / 'here' / 'config.json').is_file()
  assert len(list(tmp_path.iterdir())) == 3


def test_a_target_that_cannot_be_moved_is_refused_first(tmp_path, monkeypatch):
  """As a mount point: its rename is EBUSY."""
  (tmp_path / 'out').mkdir()

  def busy(*_):
    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

  monkeypatch.setattr(save.os, 'rename', busy)
  with pytest.raises(ConfigError, match='busy'):
    with save.replacing(tmp_path / 'out'):
      pytest.fail('something was written')
  assert list(tmp_path.iterdir()) == [tmp_path / 'out']


def test_a_target_that_is_filled_meanwhile_stays(tmp_path):
  with pytest.raises(ConfigError, match='another process'):
    with save.replacing(tmp_path / 'out') as scratch:
      (scratch / 'config.json').write_text('{}')
      (tmp_path / 'out').mkdir()
      (tmp_path / 'out' / 'metrics.jsonl').write_text('mine')
  assert (tmp_path / 'out' / 'metrics.jsonl').read_text() == 'mine'
  assert list(tmp_path.iterdir()) == [tmp_path / 'out']


def test_a_full_disk_is_an_error_before_a_byte_is_mapped(tmp_path, monkeypatch):
  """A store to a hole of a mapped file would be SIGBUS, not an exception."""
  plan = {'x': (np.dtype(np.float32), (4,))}

  def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  with safetensors.create(tmp_path / 'x.safetensors', plan) as arrays:
    stat = (tmp_path / 'x.safetensors').stat()
    assert stat.st_blocks * 512 >= stat.st_size > 0  # no holes
    arrays['x'][:] = 1
  config, variables = loaded('v2_lite')
  monkeypatch.setattr(safetensors.os, 'posix_fallocate', full)
  with pytest.raises(OSError, match='No space left') as error:
    save_huggingface(tmp_path / 'out', config, variables)
  assert error.value.filename.endswith('.safetensors')
  assert [path.name for path in tmp_path.iterdir()] == ['x.safetensors']


def test_a_link_out_of_the_folder_is_not_copied(tmp_path):
  (tmp_path / 'secret').write_text('PRIVATE KEY')
  source = tmp_path / 'source'
  source.mkdir()
  (source / 'vocab.json').symlink_to('../secret')
  with pytest.raises(ConfigError, match='link out of the folder'):
    save.extras_of(source)
  (source / 'vocab.json').unlink()
  (source / 'merges.txt').symlink_to('/dev/zero')
  with pytest.raises(ConfigError, match='no regular file'):
    save.extras_of(source)
  hub = tmp_path / 'model' / 'snapshots' / 'main'
  hub.mkdir(parents=True)
  (tmp_path / 'model' / 'blobs').mkdir()
  (tmp_path / 'model' / 'blobs' / '0a').write_text('{}')
  (hub / 'tokenizer.json').symlink_to('../../blobs/0a')
  assert save.extras_of(hub)['tokenizer.json'].read_text() == '{}'


def test_a_number_that_bfloat16_cannot_hold_is_refused(tmp_path):
  config, variables = loaded('v2_lite')
  large = jax.tree.map(lambda x: x, variables)
  w_head = large['params']['w_head']
  large['params']['w_head'] = w_head.at[0, 0].set(3.4e38)
  save_huggingface(tmp_path / 'wide', config, large)
  with pytest.raises(ConfigError, match='lm_head.weight'):
    save_huggingface(tmp_path / 'half', config, large, dtype='bfloat16')
  assert [path.name for path in tmp_path.iterdir()] == ['wide']
