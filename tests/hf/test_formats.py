"""Quantised weights: the right values from each format's definition."""

import json

import chex
import ml_dtypes
import numpy as np
import pytest
from releases import loaded, refused, rewrite, set_config

from mla_moe import load_huggingface
from mla_moe.checked import ConfigError
from mla_moe.hf import formats, safetensors

R, C = 40, 96
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]  # of the OCP's MX formats, then negative
RANDOM = np.random.default_rng(7)


def nibbles(codes):
  """Two four-bit codes in each byte, the first in the low half."""
  return (codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8)


def int32(codes, bits):
  """compressed-tensors: the first code in the lowest bits of an int32."""
  per = 32 // bits
  codes = np.pad(codes, [(0, 0), (0, -codes.shape[1] % per)]).astype(np.uint32)
  words = sum(codes[:, i::per] << np.uint32(bits * i) for i in range(per))
  return words.astype(np.uint32).view(np.int32)


def spread(scale, tile):
  """Scales of tiles, one for each number, in float64."""
  wide = np.repeat(np.repeat(scale.astype(np.float64), tile[0], 0), tile[1], 1)
  return wide[:R, :C]


def fp8(tile, name, dtype=np.float32):
  q = RANDOM.normal(0, 20, (R, C)).astype(ml_dtypes.float8_e4m3fn)
  shape = -(-R // tile[0]), -(-C // tile[1])
  scale = np.exp2(RANDOM.integers(-9, 3, shape)).astype(np.float32)
  if dtype is not np.uint8 and dtype != ml_dtypes.float8_e8m0fnu:
    scale = (scale * RANDOM.uniform(1, 2, shape)).astype(dtype)
    stored = scale
  else:
    stored = scale.astype(ml_dtypes.float8_e8m0fnu).view(dtype)
  right = q.astype(np.float64) * spread(scale, tile)
  return {'x.weight': q, name: stored}, right


def integers(bits, group, packed, dtype=ml_dtypes.bfloat16):
  low = -(2 ** (bits - 1))
  q = RANDOM.integers(low, -low, (R, C))
  scale = RANDOM.uniform(0.01, 0.1, (R, -(-C // group))).astype(dtype)
  right = q * spread(scale, (1, group))
  if not packed:
    return {'x.weight': q.astype(np.int8), 'x.weight_scale': scale}, right
  return {
    'x.weight_packed': int32(q - low, bits),
    'x.weight_scale': scale,
    'x.weight_shape': np.array([R, C]),
  }, right


def fp4(group, scale, names, second=None, times=1.0):
  codes = RANDOM.integers(0, 16, (R, C))
  values = np.array([*E2M1, *(-x for x in E2M1)], np.float64)[codes]
  right = values * spread(scale, (1, group)) * times
  tensors = {names[0]: nibbles(codes), names[1]: scale}
  if scale.dtype == ml_dtypes.float8_e8m0fnu:
    tensors[names[1]] = scale.view(np.uint8)
  return tensors | (second or {}), right


def nvfp4(divisor):
  scale = RANDOM.uniform(50, 400, (R, C // 16)).astype(ml_dtypes.float8_e4m3fn)
  number = np.array([3000.0 if divisor else 1 / 3000], np.float32)
  if divisor:  # compressed-tensors
    second = {'x.weight_global_scale': number}
    names, times = ('x.weight_packed', 'x.weight_scale'), 1 / 3000
  else:  # ModelOpt
    second = {'x.weight_scale_2': number.reshape(())}
    names, times = ('x.weight', 'x.weight_scale'), float(number[0])
  return fp4(16, scale, names, second, times)


def mxfp4(names):
  scale = np.exp2(RANDOM.integers(-8, 4, (R, C // 32)))
  return fp4(32, scale.astype(ml_dtypes.float8_e8m0fnu), names)


E8M0 = ml_dtypes.float8_e8m0fnu
CASES = {
  'fp8 blocks': (fp8((128, 128), 'x.weight_scale_inv'), ()),
  'fp8 small blocks': (fp8((32, 64), 'x.weight_scale_inv'), ((32, 64),)),
  'fp8 bf16 scales': (
    fp8((16, 16), 'x.weight_scale', ml_dtypes.bfloat16),
    ((16, 16),),
  ),
  'fp8 ue8m0 blocks': (fp8((32, 32), 'x.scale', E8M0), ((32, 32),)),
  'fp8 rows': (fp8((1, C), 'x.weight_scale'), ()),
  'fp8 tensor': (fp8((R, C), 'x.qscale_weight'), ()),
  'mxfp8': (fp8((1, 32), 'x.weight_scale', np.uint8), ()),
  'int8 rows': (integers(8, C, False), ()),
  'int8 groups, packed': (integers(8, 32, True), ((1, 32),)),
  'int4 groups of 32': (integers(4, 32, True), ((1, 32),)),
  'int4 groups of 128': (integers(4, 128, True), ((1, 128),)),
  'int4 groups of 36': (integers(4, 36, True, np.float16), ((1, 36),)),
  'int4 rows': (integers(4, C, True, np.float32), ()),
  'nvfp4': (nvfp4(True), ()),
  'nvfp4 of modelopt': (nvfp4(False), ()),
  'mxfp4': (mxfp4(('x.weight_packed', 'x.weight_scale')), ()),
  'mxfp4 in place': (mxfp4(('x.weight', 'x.scale')), ()),
}


def opened(tensors, shape=(R, C), tiles=()):
  entry = lambda n: safetensors.Entry(tensors[n].dtype, tensors[n].shape, 0, 0)
  return formats.find('x.weight', shape, tensors, entry, tiles)


@pytest.mark.parametrize('case', CASES)
def test_weights_are_those_of_the_definition(case):
  (tensors, right), tiles = CASES[case]
  stored = opened(tensors, tiles=tiles)
  assert {*stored.parts} == {*tensors}
  whole = (slice(None), slice(None))
  read = lambda part, dtype: formats.read(
    stored, part, tensors.__getitem__, np.dtype(dtype)
  )
  got = read(whole, np.float32)
  np.testing.assert_allclose(got, right, rtol=3e-7, atol=0)
  narrow = read(whole, ml_dtypes.bfloat16)
  np.testing.assert_array_equal(narrow, got.astype(ml_dtypes.bfloat16))
  part = slice(7, 35), slice(None)  # rows, as of a part of a fused tensor
  np.testing.assert_array_equal(read(part, np.float32), got[7:35])


def test_a_number_for_each_expert_of_a_fused_tensor():
  q = RANDOM.normal(0, 20, (3, R, C)).astype(ml_dtypes.float8_e4m3fn)
  scale = np.array([0.5, 2, 8], np.float32)
  for shape in ((3,), (3, 1, 1)):
    tensors = {'x.weight': q, 'x.weight_scale': scale.reshape(shape)}
    stored = opened(tensors, (3, R, C))
    for e in range(3):
      part = slice(e, e + 1), slice(0, 20), slice(None)
      got = formats.read(
        stored, part, tensors.__getitem__, np.dtype(np.float32)
      )
      np.testing.assert_array_equal(got, q[e, :20].astype('f4') * scale[e])


@pytest.mark.parametrize(
  'change, words',
  [
    (lambda t: t.update({'x.weight_scale': t['x.weight_scale'].T}), 'have [40'),
    (lambda t: t.update({'x.weight_packed': t['x.weight_packed'].T}), 'shape'),
    (lambda t: t.update({'x.weight_shape': np.array([C, R])}), '[96, 40]'),
    (
      lambda t: t.update({'x.weight_scale': np.full((R, 3), np.nan, 'f4')}),
      'NaN',
    ),
    (
      lambda t: t.update({'x.weight_scale': np.ones((R, 3), np.int32)}),
      'dtype I32',
    ),
  ],
)
def test_scales_and_codes_that_do_not_fit_are_named(change, words):
  tensors, _ = integers(4, 32, True)
  change(tensors)
  with pytest.raises(ConfigError) as caught:
    stored = opened(tensors, tiles=((1, 32),))
    whole = (slice(None), slice(None))
    formats.read(stored, whole, tensors.__getitem__, np.dtype(np.float32))
  assert words in str(caught.value) and 'x.weight' in str(caught.value)


def packed(values, config, group=16):
  """Packs the experts of a folder as Kimi-K2-Thinking's: int4 in groups."""
  right = {}
  for name in [n for n in values if '.mlp.experts.' in n]:
    x = values.pop(name)
    rows, columns = x.shape
    groups = -(-columns // group)
    padded = np.pad(x, [(0, 0), (0, groups * group - columns)])
    peak = np.abs(padded.reshape(rows, groups, group)).max(-1) / 7
    scale = peak.astype(ml_dtypes.bfloat16)
    wide = np.repeat(scale.astype('f4'), group, 1)[:, :columns]
    q = np.clip(np.round(x / wide), -8, 7).astype(np.int64)
    right[name] = (q * wide).astype(np.float32)
    values[f'{name}_packed'] = int32(q + 8, 4)
    values[f'{name}_scale'] = scale
    values[f'{name}_shape'] = np.array([rows, columns], np.int32)
  return right


QUANTIZATION = {
  'quant_method': 'compressed-tensors',
  'format': 'pack-quantized',
  'ignore': ['lm_head', 're:.*self_attn.*'],
  'config_groups': {
    'group_0': {
      'targets': ['Linear'],
      'weights': {
        **{'num_bits': 4, 'type': 'int', 'symmetric': True},
        **{'strategy': 'group', 'group_size': 16, 'dynamic': False},
      },
    }
  },
}


def test_a_folder_in_int4_loads_like_its_values(copy, tmp_path):
  case = 'families/glm4_moe_lite'
  config, _ = loaded(case)
  folder, plain = copy(case), tmp_path / 'plain'
  right = {}
  rewrite(folder, lambda v: right.update(packed(v, config)))
  set_config(folder, quantization_config=QUANTIZATION)
  again, variables = load_huggingface(folder)
  assert again == config
  folder.rename(plain)
  folder = copy(case)
  rewrite(folder, lambda v: v.update(right))
  chex.assert_trees_all_equal(variables, load_huggingface(folder)[1])
  values = json.loads((plain / 'config.json').read_text())
  group = values['quantization_config']['config_groups']['group_0']
  group['weights']['symmetric'] = False
  set_config(plain, **values)
  refused(plain, 'symmetric=False', 'True')
  set_config(plain, quantization_config=QUANTIZATION)
  stray = 'model.layers.1.mlp.experts.0.up_proj.weight_zero_point'
  rewrite(plain, lambda v: v.update({stray: np.zeros((16, 2), np.int8)}))
  refused(plain, 'left over', stray)
