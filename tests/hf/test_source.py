"""Files beside a model, and folders that are not quite those of config.json."""

import contextlib
import dataclasses
import json
import pathlib
import re
import shutil

import chex
import numpy as np
import pytest
from releases import GOLDEN, loaded, refused, rewrite, set_config

from experiments import ends as ends_of
from mla_moe import load_huggingface, save_huggingface
from mla_moe.checked import ConfigError, ConfigWarning, few
from mla_moe.hf import config_json, outgoing, save, source

ADAPTER = 'adapter_config.json'


def opened(folder):
  """Returns the config, and the number of tensors of each file that is read."""
  with contextlib.ExitStack() as stack:
    whole = source.Source(pathlib.Path(folder), config_json.F32, stack)
    paths = [file.path.name for file in whole.files.values()]
    return whole.config, {name: paths.count(name) for name in paths}


def index_of(folder, change):
  """Rewrites the index of a folder after `change(weight_map)`."""
  path = folder / 'model.safetensors.index.json'
  values = json.loads(path.read_text())
  change(values['weight_map'])
  path.write_text(json.dumps(values))


@pytest.mark.parametrize('case', ['v2_lite', 'v3_release'])
def test_files_beside_the_model_are_not_read(copy, case):
  folder, (config, files) = copy(case), opened(GOLDEN / case)
  for name in list(files):  # as macOS, peft, Mistral and PyTorch name theirs
    (folder / f'._{name}').write_bytes(b'Mac OS X')
  for name in ('adapter_model', 'consolidated', 'consolidated.00'):
    (folder / f'{name}.safetensors').write_bytes(b'another')
  (folder / 'original').mkdir()
  for name in ('pytorch_model.bin', 'original/consolidated.00.pth'):
    (folder / name).write_bytes(b'pickle')
  assert opened(folder) == (config, files)
  if len(files) == 1:  # a single file may have any name
    (folder / 'model.safetensors').rename(folder / 'mine.safetensors')
    assert opened(folder) == (config, {'mine.safetensors': files.popitem()[1]})


def test_one_file_comes_before_an_index(copy):
  """As in transformers, which says nothing of it."""
  folder = copy('v2_lite')
  weight_map = {'model.norm.weight': 'model-00001-of-00001.safetensors'}
  index = folder / 'model.safetensors.index.json'
  index.write_text(json.dumps({'weight_map': weight_map}))
  with pytest.warns(ConfigWarning, match='not read.*the files that model.safe'):
    assert [*opened(folder)[1]] == ['model.safetensors']
  weight_map['model.norm.weight'] = 'model.safetensors'
  index.write_text(json.dumps({'weight_map': weight_map}))
  assert [*opened(folder)[1]] == ['model.safetensors']


def test_an_adapter_is_not_forgotten(copy):
  """Its base alone would be another model than transformers loads."""
  folder = copy('v2_lite')
  (folder / ADAPTER).write_text('{"base_model_name_or_path": "lab/base"}')
  refused(folder, ADAPTER, "'lab/base'", 'merge_and_unload')
  for path in folder.glob('[cm]*'):  # an adapter's folder has no model
    path.unlink()
  refused(folder, ADAPTER, "'lab/base'", 'merge_and_unload')


def test_pickles_are_named_and_not_read(copy):
  folder = copy('v2_lite')
  (folder / 'model.safetensors').rename(folder / 'pytorch_model.bin')
  refused(folder, '0 .safetensors', 'pytorch_model.bin', 'save_pretrained')


def test_a_tensor_is_read_from_the_shard_that_holds_it(copy):
  """The index only names the files, as in transformers."""
  folder, name = copy('v3_release'), 'model.norm.weight'
  shards = [f'model-0000{i}-of-00003.safetensors' for i in (1, 2)]
  expected = opened(folder)
  assert shards[0] in expected[1]
  index_of(folder, lambda m: m.update({name: shards[m[name] == shards[0]]}))
  assert opened(folder) == expected
  index_of(folder, lambda m: m.pop(name))
  assert opened(folder) == expected


def test_a_tensor_in_two_shards_is_refused(copy):
  """Programs disagree which of them they read."""
  folder, name = copy('v3_release'), 'model.norm.weight'
  second = 'model-4.safetensors'

  def repeat(places):
    shutil.copy(folder / places[name], folder / second)
    places[name] = second

  index_of(folder, repeat)
  refused(folder, 'more than one shard holds: ', 'model.', ' more')


COPIES = 'embed_tokens', 'shared_head.head'


@pytest.mark.parametrize('name', COPIES)
def test_mtp_with_another_embedding_or_head_is_left_out(copy, name):
  folder = copy('v3_release')
  config, variables = loaded('v3_release')
  name = f'model.layers.{config.layers}.{name}.weight'
  rewrite(folder, lambda v: v.update({name: v[name] * 2}))
  with pytest.warns(ConfigWarning, match=f'not read.*MTP modules.*{name}'):
    if 'embed' not in name:
      assert opened(folder)[0].mtp.depth == 0
      return
    again, theirs = load_huggingface(folder)
  assert again == dataclasses.replace(config, mtp=again.mtp)
  rest = {k: v for k, v in variables['params'].items() if k != 'mtp_0'}
  chex.assert_trees_all_equal(theirs['params'], rest)


def test_a_broken_mtp_module_has_a_way_round(copy):
  folder = copy('v3_release')
  config, _ = loaded('v3_release')
  name = f'model.layers.{config.layers}.input_layernorm.weight'
  rewrite(folder, lambda v: v.pop(name))
  refused(folder, name, 'num_nextn_predict_layers=0 loads the model without')
  set_config(folder, num_nextn_predict_layers=0)
  with pytest.warns(ConfigWarning, match='not read.*: model.layers.3.'):
    again, _ = opened(folder)
  assert again == dataclasses.replace(config, mtp=again.mtp)


@pytest.mark.parametrize('case', ['v3_yarn', 'v3_release'])
def test_the_first_layers_of_a_model_are_a_model(copy, case):
  """`num_hidden_layers` made smaller; the next layer is no MTP module."""
  folder = copy(case)
  config, variables = loaded(case)
  set_config(folder, num_hidden_layers=2)
  with pytest.warns(ConfigWarning, match=r'layers after the 2 of .*more'):
    again, theirs = load_huggingface(folder)
  assert again == dataclasses.replace(config, layers=2, mtp=again.mtp)
  ours, first = variables['params']['moe'], theirs['params']['moe']
  chex.assert_trees_all_equal(first['ffn']['w_down'], ours['ffn']['w_down'][:1])
  chex.assert_trees_all_equal(
    theirs['params']['dense'], variables['params']['dense']
  )


def test_dense_layers_beyond_the_last_are_all_of_them(copy):
  """transformers: layer i has experts only if i >= first_k_dense_replace."""
  folder = copy('v2_lite')
  set_config(folder, num_hidden_layers=1, first_k_dense_replace=3)
  with pytest.warns(ConfigWarning, match='layers after the 1 of'):
    config, _ = opened(folder)
  assert (config.layers, config.dense_layers) == (1, 1)
  for bad in ('three', -1, 1.5):
    set_config(folder, first_k_dense_replace=bad)
    refused(folder, 'first_k_dense_replace=', repr(bad))


def test_a_tied_head_that_differs_has_a_way_round(copy):
  folder = copy('v2_lite')
  set_config(folder, tie_word_embeddings=True)
  refused(folder, "'lm_head.weight' is not a copy", 'tie_word_embeddings=false')


@pytest.mark.parametrize(
  'method', ['compressed-tensors', 'gptq', 'awq', 'bitsandbytes', None]
)
def test_other_quantised_formats_are_one_short_line(copy, method):
  folder = copy('v2_lite')
  set_config(folder, quantization_config={'quant_method': method, 'bits': 4})

  def pack(values):
    for name in [n for n in values if '.experts.' in n]:
      values[f'{name}_packed'] = values.pop(name).astype(np.int32)

  rewrite(folder, pack)
  with pytest.raises(ConfigError) as caught:
    load_huggingface(folder)
  line = str(caught.value).removeprefix(str(folder))
  assert f'quant_method={method!r}' in line
  assert 'only fp8, compressed-tensors' in line or 'config_groups' in line
  assert len(line) < 300


def test_no_line_grows_with_the_number_of_names(copy):
  """Each place that lists names, with 100 of them; then any other place."""
  many = [f'model.layers.1.mlp.experts.{i}.x.weight' for i in range(100)]
  assert few(many[:3]) == ', '.join(many[:3])
  lines = []

  def line(function, *args):
    with pytest.raises(ConfigError) as caught:
      function(*args)
    lines.append(str(caught.value))

  folder = copy('v3_release')
  index_of(folder, lambda m: m.update(dict.fromkeys(many, m['lm_head.weight'])))
  line(opened, folder)
  shards = {name: f'{i}.safetensors' for i, name in enumerate(many)}
  index_of(folder, lambda m: m.update(shards))
  line(opened, folder)
  config, variables = loaded('v3_release')
  extra = variables | {'more': dict.fromkeys(many, np.zeros(1))}
  for other in (extra, {}):
    line(outgoing.Tensors, config, other, False, False, None)
  folder = copy('v2_lite')
  stray = dict.fromkeys(many, np.zeros(1, np.float32))
  rewrite(folder, lambda v: v.update(stray))
  line(opened, folder)
  rewrite(
    folder, lambda v: [v.pop(n) for n in [*v] if 'down' in n or n in many]
  )
  line(opened, folder)
  for path in folder.glob('model*'):
    path.unlink()
  for i in range(20):
    (folder / f'{i}.bin').touch()
  line(opened, folder)
  for text in lines:
    assert len(text) < 1000
    assert re.search(r'[\w.]+(, [\w.]+){2} and [\d,]{2,} more', text), text
  whole = str(ConfigError(f'first {many} last'))
  assert len(whole) < 2100
  assert whole.startswith('first ') and whole.endswith(' last')


def test_every_end_of_a_text_goes_out_again(copy, tmp_path):
  """From a release by way of a run, whose config has the first of them."""
  folder, name = copy('v2_lite'), 'generation_config.json'
  said = lambda folder, name: json.loads((folder / name).read_text())
  set_config(folder, eos_token_id=[7, 5, 6])
  config, variables = load_huggingface(folder)
  assert config.eos_id == 7
  save_huggingface(tmp_path / 'a', config, variables, extras=folder)
  run = tmp_path / 'run'
  run.mkdir()
  (run / name).write_bytes(save.extras_of(folder)[name])
  save_huggingface(tmp_path / 'b', config, variables, extras=run)
  (folder / name).write_text('{"eos_token_id": 8, "top_p": 0.9}')
  save_huggingface(tmp_path / 'c', config, variables, extras=folder)
  for out, ends in ('a', [7, 5, 6]), ('b', [7, 5, 6]), ('c', [7, 5, 6, 8]):
    for file in ('config.json', name):
      assert said(tmp_path / out, file)['eos_token_id'] == ends
  assert said(tmp_path / 'c', name)['top_p'] == 0.9
  set_config(folder, eos_token_id=7)
  assert save.extras_of(folder) == {name: folder / name}
  inner = {'text_config': {'eos_token_id': [3, 4]}}  # a model that sees
  (folder / 'config.json').write_text(json.dumps(inner))
  (folder / name).unlink()
  out = json.loads(save.extras_of(folder)[name])
  assert out['eos_token_id'] == [3, 4]
  assert ends_of.listed(folder) == {3, 4}
