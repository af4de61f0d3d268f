"""Families that share MLA: the same numbers, and their own words again."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from releases import GOLDEN, loaded, refused, rewrite, same_bytes, tensors

from mla_moe import Transformer, load_huggingface, save_huggingface
from mla_moe.checked import ConfigError, ConfigWarning
from mla_moe.config import ModelConfig, MoEConfig, MTPConfig, ReleaseConfig
from mla_moe.hf import config_json, dialects, names

FAMILIES = ('glm4_moe_lite', 'youtu', 'sarvam_mla', 'mistral4', 'large3')
FAMILIES += ('glm4_moe_lite_mtp',)  # as released: transformers has no MTP layer


def words(folder):
  """The object of config.json, or of the params.json in its place."""
  (path,) = [*folder.glob('config.json'), *folder.glob('params.json')]
  return json.loads(path.read_text())


SLOW = [pytest.param(case, marks=pytest.mark.slow) for case in FAMILIES[:-2]]


@pytest.mark.parametrize('case', [*SLOW, *FAMILIES[-2:]])
def test_logits_and_greedy_are_those_of_transformers(case):
  config, variables = loaded(f'families/{case}')
  expected = np.load(GOLDEN / 'families' / case / 'expected.npz')
  run = jax.jit(Transformer(config).apply)
  out = run(variables, expected['tokens'])
  chex.assert_trees_all_close(out.logits, expected['logits'], atol=2e-4)
  assert config.mtp.depth == ('mtp_logits' in expected)
  if config.mtp.depth:
    mtp = expected['mtp_logits'][None]
    chex.assert_trees_all_close(out.mtp_logits, mtp, atol=2e-4)
  greedy = expected['greedy']
  again = run(variables, np.pad(greedy, [(0, 0), (0, 48)])).logits.argmax(-1)
  np.testing.assert_array_equal(again[:, 23:47], greedy[:, 24:])


@pytest.mark.parametrize('case', FAMILIES)
def test_a_family_goes_out_in_its_own_words(case, tmp_path):
  source = GOLDEN / 'families' / case
  config, variables = loaded(f'families/{case}')
  save_huggingface(tmp_path / 'out', config, variables, shard_bytes=10**5)
  same_bytes(tensors(source), tensors(tmp_path / 'out'))
  ours, theirs = words(tmp_path / 'out'), words(source)
  mtp = 'num_nextn_predict_layers'
  for key in ('architectures', 'model_type', 'num_experts', 'moe', 'yarn', mtp):
    own = {'moe': {'expert_parallel': 1, 'expert_model_parallel': 1}}
    expected = theirs.get(key)
    if key == 'moe' and expected:
      assert ours[key] | own[key] == expected
    else:
      absent = 0 if key == mtp else None
      assert (ours.get(key) or absent) == (expected or absent), key
  again, back = load_huggingface(tmp_path / 'out')
  assert again == config
  chex.assert_trees_all_equal(back, variables)


def test_a_family_without_tiles_is_refused_in_fp8(tmp_path):
  config, variables = loaded('families/large3')
  with pytest.raises(ConfigError, match='no tiles of 128; write bfloat16'):
    save_huggingface(tmp_path / 'out', config, variables, fp8=True)
  assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
  ('kind', 'case'),
  [
    ('fp8', 'mistral4'),
    ('fp8', 'glm4_moe_lite_mtp'),
    ('bfloat16', 'large3'),
    *(
      pytest.param(kind, case, marks=pytest.mark.slow)
      for kind in ('fp8', 'bfloat16')
      for case in ('youtu', 'sarvam_mla', 'glm4_moe_lite')
    ),
  ],
)
def test_a_family_goes_out_in_fewer_bits_and_again_the_same(
  kind, case, tmp_path
):
  """Rounded as the format says, once: what comes back goes out unchanged."""
  config, variables = loaded(f'families/{case}')
  options = dict(fp8=True) if kind == 'fp8' else dict(dtype='bfloat16')
  save_huggingface(tmp_path / 'one', config, variables, **options)
  dtype = jnp.float32 if kind == 'fp8' else jnp.bfloat16
  again, back = load_huggingface(tmp_path / 'one', dtype)
  written = tensors(tmp_path / 'one')
  save_huggingface(tmp_path / 'two', again, back, fp8=kind == 'fp8')
  same_bytes(written, tensors(tmp_path / 'two'))
  assert words(tmp_path / 'one') == words(tmp_path / 'two')
  dtypes = {str(x.dtype) for x in written.values()}
  assert ('float8_e4m3fn' in dtypes) == (kind == 'fp8')
  for ours, right in zip(*map(jax.tree.leaves, (back, variables)), strict=True):
    ours, right = (np.asarray(x, np.float32) for x in (ours, right))
    # Half a step of four bits of a number, or of the smallest of a tile.
    step = 2**-4 if kind == 'fp8' else 2**-8
    bound = np.maximum(abs(right) * step, abs(right).max() * step * 2**-6)
    assert (abs(ours - right) <= bound).all()


@pytest.mark.parametrize(
  'family, inner, case',
  [('kimi_k25', 'kimi_k2', 'v3_yarn'), ('mistral3', 'mistral4', 'mistral4')],
)
def test_the_text_part_of_a_model_that_sees(family, inner, case, copy):
  """Kimi K2.5 and Mistral Small 4: nested config, a prefix, a vision tower."""
  case = case if case == 'v3_yarn' else f'families/{case}'
  config, variables = loaded(case)
  folder = copy(case)
  text = words(folder) | {'model_type': inner}
  outer = {
    'architectures': list(dialects.dialect(family).architectures),
    'model_type': family,
    'text_config': text,
    'vision_config': {'hidden_size': 8},
  }
  (folder / 'config.json').write_text(json.dumps(outer))

  def nest(values):
    for name in list(values):
      values[f'language_model.{name}'] = values.pop(name)
    values['vision_tower.encoder.layers.9.w'] = np.ones(3, np.float32)

  rewrite(folder, nest)
  with pytest.warns(ConfigWarning, match='the vision tower: vision_tower'):
    again, back = load_huggingface(folder)
  release = dataclasses.replace(config.release, family=family)
  assert again == dataclasses.replace(config, release=release)
  chex.assert_trees_all_equal(back, variables)
  save_huggingface(folder.parent / 'out', again, back)
  expected = tensors(folder)
  del expected['vision_tower.encoder.layers.9.w']
  same_bytes(tensors(folder.parent / 'out'), expected)
  assert load_huggingface(folder.parent / 'out')[0] == again
  outer['text_config'] = text | {'model_type': 'llama'}
  (folder / 'config.json').write_text(json.dumps(outer))
  refused(folder, "text_config model_type='llama'")


@pytest.mark.slow
def test_mtp_of_another_family_is_v3s(copy):
  """JoyAI and GLM-4.7-Flash keep V3's names, MTP layer included."""
  config, variables = loaded('v3_release')
  folder = copy('v3_release')
  for family in ('joyai_llm_flash', 'glm4_moe_lite'):
    values = words_of_release(folder) | {'model_type': family}
    values['architectures'] = list(dialects.dialect(family).architectures)
    (folder / 'config.json').write_text(json.dumps(values))
    again = config_json.read(values, 'float32')
    assert again.mtp.depth == 1 and again.release.family == family
    written = config_json.write(again, 'bfloat16')
    assert written['model_type'] == family
    assert written['num_nextn_predict_layers'] == 1
  assert written['mlp_layer_types'].count('dense') == config.dense_layers
  again, back = load_huggingface(folder)
  assert again.mtp.depth == 1
  chex.assert_trees_all_equal(back, variables)


def words_of_release(folder):
  return json.loads((folder / 'config.json').read_text())


def test_queries_grow_by_steps_of_their_length():
  """1 + beta ln(1 + floor(p / n)) on the queries, as logits of attention."""
  from mla_moe.config import RopeConfig
  from mla_moe.model import rope

  config = RopeConfig(query_beta=0.3, query_positions=10)
  positions = jnp.array([[0, 9, 10, 19, 20, 1000]], jnp.int32)
  angles = rope.angles(positions, 4, config)
  expected = 1 + 0.3 * np.log(1 + np.array([0, 0, 1, 1, 2, 100], np.float64))
  np.testing.assert_allclose(angles.growth[0], expected, rtol=1e-6)
  q = jax.random.normal(jax.random.key(0), (1, 6, 2, 8))
  plain = rope.angles(positions, 4, RopeConfig())
  assert plain.growth is None
  chex.assert_trees_all_equal(plain[:2], angles[:2])
  ours, theirs = rope.queries(q, 4, angles), rope.queries(q, 4, plain)
  times = lambda x: x * expected[None, :, None, None]
  chex.assert_trees_all_close(ours, [*map(times, theirs)], rtol=1e-5, atol=1e-6)


def test_groups_by_their_two_best_equal_v3s_without_a_bias():
  from mla_moe.model import router

  scores = jax.nn.softmax(jax.random.normal(jax.random.key(1), (50, 16)))
  sizes = dict(experts=16, top_k=4, groups=4, top_groups=2)
  with_bias = MoEConfig(method='noaux_tc', **sizes)
  without = MoEConfig(method='group_top2', scoring='softmax', **sizes)
  expected = router.select(scores, jnp.zeros(16), with_bias)
  chosen = router.select(scores, None, without)
  np.testing.assert_array_equal(chosen, expected)
  best = dataclasses.replace(without, method='group_limited_greedy')
  assert (chosen != router.select(scores, None, best)).any()


def test_a_family_that_does_not_compute_the_model_is_refused():
  config = ModelConfig(vocab=8, bos_id=0, eos_id=1)
  for family, reason in (
    ('youtu', 'youtu has no experts'),
    ('mistral4', 'mistral4 has softmax with group_top2'),
    ('gpt', 'must be one of deepseek_v2'),
  ):
    release = ReleaseConfig(family=family)
    with pytest.raises(ConfigError, match=reason):
      config_json.family_of(dataclasses.replace(config, release=release))
  rope = dataclasses.replace(config.mla.rope, query_beta=0.1, query_positions=4)
  grown = dataclasses.replace(
    config, mla=dataclasses.replace(config.mla, rope=rope)
  )
  with pytest.raises(ConfigError, match='deepseek_v3 has no query_beta'):
    config_json.family_of(grown)
  moe = dataclasses.replace(config.moe, scoring='softmax', method='group_top2')
  config = dataclasses.replace(config, moe=moe, mtp=MTPConfig(depth=0))
  # transformers would begin experts of their own tensors at random.
  with pytest.raises(ConfigError, match="mistral4 has release.experts='fused'"):
    config_json.family_of(config)
  fused = dataclasses.replace(config, release=ReleaseConfig(experts='fused'))
  assert config_json.family_of(fused) == 'mistral4'


def test_names_of_every_family_are_each_others():
  """No two tensors get one name, whatever the spelling."""
  moe = MoEConfig(experts=4, top_k=2, groups=1, top_groups=1)
  config = ModelConfig(
    vocab=8, layers=3, dense_layers=1, bos_id=0, eos_id=1, moe=moe
  )
  counts = set()
  for family in ('', *dialects.families()):
    release = ReleaseConfig(family=family)
    model = dataclasses.replace(config, release=release)
    spelled = {
      (row.tensor(index), row.layers)
      for row in names.rows(model)
      for index in row.indices()
    }
    counts.add(len(spelled))
  assert len(counts) == 1


def test_ids_that_params_json_cannot_say_are_refused():
  """Its exports would begin and end texts with other tokens."""
  config, _ = loaded('families/large3')
  assert config_json.family_of(config) == 'mistral_large_3'
  other = dataclasses.replace(config, bos_id=0)
  with pytest.raises(ConfigError, match='bos_id=1 and eos_id=2'):
    config_json.family_of(other)
