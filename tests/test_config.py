"""Configs: published values, round trips, and one line for every mistake."""

import ast
import dataclasses
import importlib
import json
import pathlib

import pytest
import syntax

from configs import tiny
from experiments import cli, convert, workdir
from mla_moe import Config
from mla_moe.config import (
  ComputeConfig,
  ConfigError,
  ModelConfig,
  freeze,
)

ROOT = pathlib.Path(__file__).parent.parent
NAMES = sorted(p.stem for p in (ROOT / 'configs').glob('[a-z]*.py'))


def load(name, arg=''):
  module = importlib.import_module(f'configs.{name}')
  return freeze(module.get_config(arg))


@pytest.mark.parametrize('name', NAMES)
def test_every_config_loads_smokes_and_survives_json(name):
  for arg in ('', 'smoke'):
    config = load(name, arg)
    text = json.dumps(dataclasses.asdict(config))
    assert freeze(json.loads(text)) == config
  small = load(name, 'smoke')
  assert small.run.steps == 20 and small.run.log_every == 1
  assert small.model.moe.method == load(name).model.moe.method
  with pytest.raises(ConfigError, match='smoke'):
    load(name, 'nonsense')


# From the released config.json files (dim, layers, dense layers, dense width,
# heads, query rank, experts, top k, shared, width, groups, top groups, scale).
RELEASED = {
  'deepseek_v3': (7168, 61, 3, 18432, 128, 1536, 256, 8, 1, 2048, 8, 4, 2.5),
  'deepseek_v2': (5120, 60, 1, 12288, 128, 1536, 160, 6, 2, 1536, 8, 3, 16.0),
  'deepseek_v2_lite': (2048, 27, 1, 10944, 16, 0, 64, 6, 2, 1408, 1, 1, 1.0),
  'moonlight_16b': (2048, 27, 1, 11264, 16, 0, 64, 6, 2, 1408, 1, 1, 2.446),
  'kimi_k2': (7168, 61, 1, 18432, 64, 1536, 384, 8, 1, 2048, 1, 1, 2.827),
}


@pytest.mark.parametrize('name', RELEASED)
def test_released_shapes(name):
  m = load(name).model
  e = m.moe
  got = (m.dim, m.layers, m.dense_layers, m.dense_width)
  got += (m.mla.heads, m.mla.query_rank, e.experts, e.top_k, e.shared)
  got += (e.width, e.groups, e.top_groups, e.scale)
  assert got == RELEASED[name]
  heads = (m.mla.kv_rank, m.mla.nope_dim, m.mla.rope_dim, m.mla.value_dim)
  assert heads == (512, 128, 64, 128)


def test_defaults_are_those_of_v3():
  published = load('deepseek_v3').model
  assert published.precision == 'fp8_block'
  own = {'bos_id': -1, 'eos_id': -1}  # of the tokenizer, in the defaults
  plain = dataclasses.replace(published, precision='bf16', **own)
  assert plain == Config().model
  c = Config()
  assert (c.optim.bias_rate, c.optim.balance_loss) == (0.001, 1e-4)
  assert (c.model.moe.groups, c.model.mtp.depth) == (8, 1)
  assert c.model.mla.rope.factor == 1.0  # 4K pre-training has no YaRN
  for phase, length in (('32k', 32768), ('128k', 131072)):
    later = load('deepseek_v3', phase)
    assert later.model.mla.rope.factor == 40.0
    assert later.data.seq_len == length
    assert later.optim.learning_rate == 7.3e-6


BAD = [
  ('model.moe.topk', 8, 'top_k'),
  ('model.layres', 8, "did you mean 'layers'"),
  ('modell.layers', 8, "did you mean 'model'"),
  ('model.layers', '61', 'must be of type int'),
  ('model.layers', None, 'must be of type int'),
  ('model.layers', True, 'must be of type int'),
  ('model.layers', 2.5, 'must be of type int'),
  ('model.layers', -1, 'must not be negative'),
  ('model.layers', 0, 'must be at least 1'),
  ('model.dense_layers', 62, 'layers=61'),
  ('model.moe', 3, 'must be a group of keys'),
  ('model.dtype', 'float16', 'must be one of'),
  ('model.compute.remat', 'some', 'must be one of'),
  ('model.eos_id', 129280, 'below vocab'),
  ('model.bos_id', -2, 'must be -1 or more'),
  ('model.mla.rope_dim', 63, 'even'),
  ('model.mla.nope_dim', 0, 'at least 1'),
  ('model.attention', 'gqa', 'kv_heads=0: must be at least 1'),
  ('model.kv_heads', 8, 'kv_heads=8, mla.nope_dim=128: of MLA are 0'),
  ('model.compute.attention', 'magic', 'must be one of'),
  ('model.mla.rope.factor', 40.0, 'YaRN'),
  ('model.mla.rope.factor', 0.5, 'must be 1'),
  ('model.moe.groups', 7, 'must divide experts=256'),
  ('model.moe.groups', 256, 'hold 1'),
  ('model.moe.top_groups', 9, 'must not exceed groups=8'),
  ('model.moe.top_k', 129, 'leave 128'),
  ('model.moe.scoring', 'relu', 'must be one of'),
  ('model.moe.method', 'greedy', 'groups=1'),
  ('model.moe.scale', 0.0, 'above 0'),
  ('model.moe.top_k', 1, 'the router gets no gradient'),
  ('optim.learning_rate', float('nan'), 'finite'),
  ('optim.learning_rate', -1e-3, 'negative'),
  ('optim.learning_rate', 'fast', 'must be of type float'),
  ('optim.optimizer', 'sgd', 'must be one of'),
  ('optim.beta1', 1.0, 'below 1'),
  ('optim.phases', (), 'at least one'),
  ('optim.phases', (('square', 1, 1),), 'constant|linear|cosine'),
  ('data.seq_len', 163841, 'max_positions=163840'),
  ('data.seq_len', 1, 'at least 2'),
  ('data.micro_batch', 7, 'must divide batch_size'),
  ('data.batch_start', 1, 'multiple of micro_batch'),
  ('data.ramp_tokens', 1.0, 'both or neither'),
  ('data.fim_rate', 1.5, 'probability'),
  ('data.heldout', 0.0, 'between 0 and 1'),
  ('data.source', '', 'stdlib'),
  ('mesh.tensor', 3, 'model.mla.heads=128'),
  ('mesh.expert', 3, 'model.moe.experts=256'),
  ('mesh.data', 7, 'micro_batch'),
  ('mesh.data', 0, 'at least 1'),
  ('run.steps', 0, 'at least 1'),
]


@pytest.mark.parametrize('key, value, words', BAD)
def test_row31_a_mistake_is_one_line_with_key_and_rule(key, value, words):
  values = dataclasses.asdict(Config())
  *groups, name = key.split('.')
  inner = values
  for group in groups:
    inner = inner.setdefault(group, {})
  inner[name] = value
  with pytest.raises(ConfigError) as caught:
    freeze(values)
  message = str(caught.value)
  assert words in message and '\n' not in message
  assert groups[0] in message


def test_no_field_is_dead():
  """Every field is read outside the file that defines it."""
  read = set()
  for folder in ('mla_moe', 'experiments'):
    for path in (ROOT / folder).glob('**/*.py'):
      if path.name != 'config.py':
        tree = syntax.tree(path)
        read |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
        read |= {  # getattr(model, name) with the name in a table
          n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)
        }
  dead = set()

  def visit(config):
    for field in dataclasses.fields(config):
      value = getattr(config, field.name)
      if dataclasses.is_dataclass(value):
        visit(value)
      elif field.name not in read:
        dead.add(field.name)

  visit(Config())
  # A limit that Config itself checks.
  assert dead <= {'max_positions'}


def test_differences_name_the_fields():
  a = Config()
  b = dataclasses.replace(a, run=dataclasses.replace(a.run, steps=7))
  assert workdir.differences(a, b) == ['config.run.steps: 243425 != 7']


COMPUTE = ComputeConfig('full', 'xla', 'loop', 'padded', 'dequant')


def test_a_release_is_computed_as_the_recipe_says():
  """Every field of `compute`, whatever it is called; all else is released."""
  recipe = ModelConfig(dtype='float32', precision='fp8_block', compute=COMPUTE)
  for field in dataclasses.fields(ComputeConfig):
    assert getattr(COMPUTE, field.name) != field.default
  released = dataclasses.replace(ModelConfig(), dim=64, layers=5, vocab=300)
  combined = convert.combined(released, recipe)
  of_recipe = {'dtype', 'precision', 'compute'}
  for field in dataclasses.fields(ModelConfig):
    source = recipe if field.name in of_recipe else released
    assert getattr(combined, field.name) == getattr(source, field.name)


@pytest.mark.parametrize('key', list(cli.config_keys(ComputeConfig, 'compute')))
def test_a_run_goes_on_when_it_is_computed_otherwise(key, tmp_path):
  name = key.rpartition('.')[2]
  model = dataclasses.replace(load('tiny').model, precision='fp8_block')
  before = dataclasses.replace(load('tiny'), model=model)
  compute = dataclasses.replace(model.compute, **{name: getattr(COMPUTE, name)})
  after = dataclasses.replace(
    before, model=dataclasses.replace(model, compute=compute)
  )
  assert before != after and workdir.digest(before) == workdir.digest(after)
  with workdir.claim(tmp_path, before):
    (tmp_path / 'metrics.jsonl').write_text('{"step": 1}\n')
  with workdir.claim(tmp_path, after):
    assert workdir.read_config(tmp_path) == after


def test_a_digest_is_of_all_that_changes_a_run():
  base = load('tiny')
  seen = {workdir.digest(base)}
  data = dataclasses.replace(base.data, fim_rate=0.5)
  seeded = dataclasses.replace(base.run, seed=7)
  model = dataclasses.replace(base.model, precision='fp8_tensor')
  for change in ({'data': data}, {'run': seeded}, {'model': model}):
    seen.add(workdir.digest(dataclasses.replace(base, **change)))
  assert len(seen) == 4
  run = dataclasses.replace(base.run, steps=7, keep=9)
  assert workdir.digest(dataclasses.replace(base, run=run)) in seen
  assert workdir.of_another(base, 'fields:0')
  assert not workdir.of_another(base, '')
  assert not workdir.of_another(base, '0' * 64)  # an older version's


@pytest.mark.parametrize(
  'name, digest',
  [('tiny', 'f2e9fd5fcbbe06f8'), ('deepseek_v3', 'af3280b3324aeb60')],
)
def test_a_run_of_an_older_version_keeps_its_digest(name, digest):
  """Its ids and its vocabulary were numbers of the config."""
  assert workdir.digest(load(name)).startswith(f'fields:{digest}')


def test_configs_of_older_versions_are_read():
  """Where implementations stood among the architecture's numbers."""
  values = dataclasses.asdict(Config())
  model, data = values['model'], values['data']
  del model['compute']
  model |= {'remat': 'full', 'fp8_impl': 'auto'}
  model['mla']['impl'] = 'tokamax'
  model['moe'] |= {'impl': 'loop', 'exchange': 'padded'}
  data['loader'] = 'grain'
  config = freeze(json.loads(json.dumps(values)))
  assert config.model.compute == ComputeConfig('full', 'auto', 'loop', 'padded')
  assert dataclasses.replace(
    config, model=dataclasses.replace(config.model, compute=ComputeConfig())
  ) == freeze({})
  assert model['remat'] == 'full'  # the caller's dict is as it was


def test_schedules_of_the_small_configs_follow_the_run():
  whole = freeze(tiny.get_config())
  for changes, stretch in ((dict(steps=300), 0.5), (dict(batch_size=32), 4)):
    values = tiny.get_config()
    for group in (values.run, values.data):
      group.update({k: v for k, v in changes.items() if k in group})
    half = freeze(values)
    lengths = [length for _, length, _ in half.optim.phases]
    right = [length * stretch for _, length, _ in whole.optim.phases]
    assert lengths == right and sum(right) == 600 * 8 * 256 * stretch
    assert half.optim.warmup_steps == 30 * stretch
    assert half.optim.bias_tokens == whole.optim.bias_tokens * stretch
    assert half.optim.mtp_tokens == whole.optim.mtp_tokens * stretch
  values = tiny.get_config()
  values.optim.phases = (('constant', 7.0, 1.0),)
  values.run.steps = 3
  assert freeze(values).optim.phases == (('constant', 7.0, 1.0),)
