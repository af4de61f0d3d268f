"""Translates config.json of released models to ModelConfig and back.

`dialects` brings each family's words to DeepSeek's, which are read here. Rope
has two spellings: that of the releases (`rope_scaling`, beside `rope_theta`)
and that of transformers 5 (`rope_parameters`, with the theta). The first is
written, since all programs read it. A value that would change the model's
numbers in a way that this package does not compute is refused.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from mla_moe.config import (
  ConfigError,
  DSAConfig,
  MLAConfig,
  ModelConfig,
  MoEConfig,
  MTPConfig,
  ReleaseConfig,
  RopeConfig,
)
from mla_moe.hf import dialects
from mla_moe.hf.dialects import Dialect

BF16 = np.dtype(ml_dtypes.bfloat16)
F32 = np.dtype(np.float32)

_DEDUCED = ('deepseek_v2', 'deepseek_v3', 'deepseek_v32')  # by `family_of`
_NO_YARN = ('default', 'none', None)
_ROPE = ('rope_theta', 'rope_type', 'type', 'max_position_embeddings')
_LENGTH = 'original_max_position_embeddings'
_ONES = ('partial_rotary_factor', 'factor', 'attention_factor', 'truncate')


def parameter_dtype(dtype: Any) -> np.dtype:
  """Returns the numpy dtype of parameters.

  Raises:
    ConfigError: it is neither float32 nor bfloat16.
  """
  try:
    parsed = np.dtype(dtype)
  except TypeError:
    parsed = None
  if parsed not in (F32, BF16):
    raise ConfigError(f'dtype={dtype!r}: must be float32 or bfloat16')
  return parsed


def read(values: dict[str, Any], dtype: str) -> ModelConfig:
  """Returns the ModelConfig of the object of a config.json or a params.json.

  Args:
    values: the object. Its number of MTP modules may be too large:
      transformers keeps the number when it drops the modules (`source`).
    dtype: of the activations.

  Raises:
    ConfigError: another architecture, a missing key, a value of the wrong type,
      or one whose meaning is not computed here.
  """
  family, values = dialects.of(values)
  own, fields = dialects.dialect(family), dialects.tables()['fields']
  routed = values.get('n_routed_experts') is not None
  try:
    mla = _fields('mla', values, own)
    mla = MLAConfig(**mla, rope=_read_rope(values, family))
    _check_computed(values, family, routed)
    model = _fields('model', values, own)
    model['dense_layers'] = _dense_layers(values, model, routed)
    for key in ('bos_id', 'eos_id'):
      several = isinstance(model[key], list) and model[key]
      model[key] = model[key][0] if several else model[key]
    return ModelConfig(
      **model,
      dtype=dtype,
      mla=mla,
      moe=_read_moe(values, family, own) if routed else MoEConfig(),
      mtp=MTPConfig(**_fields('mtp', values, own)),
      dsa=_read_dsa(values, own),
      release=ReleaseConfig(
        family='' if family in _DEDUCED else family,
        rotary='halves' if values.get('rope_interleave') is False else 'pairs',
      ),
    )
  except ConfigError as error:
    # The person has config.json: name its key, not our field.
    field, rest = str(error).split('=', 1) if '=' in str(error) else ('', '')
    part, _, field = field.rpartition('.')
    for table in [fields[part]] if part in fields else fields.values():
      if field in table:
        key = own.keys.get(table[field], table[field])
        raise ConfigError(f'{key}={rest}') from None
    raise


def _fields(part: str, values: dict[str, Any], own: Dialect) -> dict[str, Any]:
  """Returns {our field: value} of a part of the config."""
  tables, out = dialects.tables(), {}
  for field, key in tables['fields'][part].items():
    value = values.get(key)
    if value is None and key not in tables['null']:
      raise ConfigError(f'{own.keys.get(key, key)}: is missing')
    out[field] = tables['null'][key] if value is None else value
  return out


def _check_computed(values: dict[str, Any], family: str, routed: bool) -> None:
  """Refuses values whose meaning is not computed here."""
  keys = dialects.dialect(family).keys

  def only(key: str, computed: tuple, why: str):
    if values.get(key) is not None and values[key] not in computed:
      raise ConfigError(f'{keys.get(key, key)}={values[key]!r}: {why}')

  heads = values.get('num_attention_heads')
  only('num_key_value_heads', (heads,), f'MLA has {heads}, one for each head')
  nope, rotary = values['qk_nope_head_dim'], values['qk_rope_head_dim']
  for key in ('qk_head_dim', 'q_head_dim'):
    rule = f'qk_nope_head_dim + qk_rope_head_dim is {nope + rotary}'
    only(key, (nope + rotary,), rule)
  sizes = rotary, nope, nope + rotary, values['kv_lora_rank'] + rotary
  part = values.get('partial_rotary_factor')
  if part in (None, 1):
    if family != 'mistral_large_3':  # its head_dim is another size
      rule = f'is no size of MLA: a head rotates qk_rope_head_dim={rotary}'
      only('head_dim', sizes, rule)
  elif abs(part * (values.get('head_dim') or nope + rotary) - rotary) >= 0.5:
    raise ConfigError(
      f'partial_rotary_factor={part!r}: a head rotates qk_rope_head_dim='
      f'{rotary} of its numbers here; set it to 1, or head_dim to fit'
    )
  if dialects.dialect(family).own:
    rule = 'transformers rotates pairs in this attention, whatever this says'
    only('rope_interleave', (True,), rule)
    kinds = ('indexed_attention', 'deepseek_sparse_attention')
    same = (*([kind] * values['num_hidden_layers'] for kind in kinds),)
    only('layer_types', same, f'each layer must be an {kinds[0]}')
  if 'rope_interleave' in values and values['rope_interleave'] is None:
    raise ConfigError(
      'rope_interleave=None: means halves in transformers and pairs in '
      "DeepSeek's code; set true (pairs) or false (halves)"
    )
  if routed and family == 'deepseek_v2':
    rule = "transformers ignores it for deepseek_v2, DeepSeek's code does not"
    only('norm_topk_prob', (False,), rule)


def _read_dsa(values: dict[str, Any], own: Dialect) -> DSAConfig:
  """Returns the indexer; of a family without, none."""
  if not own.own:
    return DSAConfig()
  types = _index_types(values, values['num_hidden_layers'])
  try:
    return DSAConfig(
      **_fields('dsa', values, own),
      interleaved=values['indexer_rope_interleave'],
      q_from='latent' if values.get('q_lora_rank') else 'x',
      types=types if 'shared' in types else (),
    )
  except ConfigError as error:
    raise ConfigError(f'dsa.{error}') from None


def _index_types(values: dict[str, Any], layers: int) -> tuple[str, ...]:
  """Returns each layer's type by the keys that are there, which must agree.

  With `index_topk_freq` F and `index_skip_topk_offset` O, layer i is full where
  F divides max(i - O + 1, 0).
  """
  words, named = {'F': 'full', 'S': 'shared'}, {}
  for key in ('indexer_types', 'index_topk_pattern'):
    if values.get(key):
      named[key] = tuple(words.get(str(x), str(x)) for x in values[key])
  if (period := values.get('index_topk_freq')) is not None:
    skip = 2 if (n := values.get('index_skip_topk_offset')) is None else n
    ends = (max(i - skip + 1, 0) % max(period, 1) for i in range(layers))
    kinds = ('shared' if end else 'full' for end in ends if period > 0)
    named['index_topk_freq'] = tuple(kinds)
  for key, types in named.items():
    valid = len(types) == layers and {*types} <= {'full', 'shared'}
    if not valid or types[0] != 'full' or types != next(iter(named.values())):
      raise ConfigError(
        f'{key}={str(values[key])[:60]}: must name "full" or "shared" for each '
        f'of num_hidden_layers={layers}, "full" for the first, and the same as '
        f'{" and ".join(named)}'
      )
  return next(iter(named.values()), ())


def _dense_layers(values: dict[str, Any], model: dict, routed: bool) -> Any:
  """Returns the number of dense layers, by either of two keys."""
  dense, layers = model['dense_layers'], model['layers']
  if not routed:
    return layers
  types = values.get('mlp_layer_types')
  if types is not None:
    dense = types.count('dense')
    sorted_types = ['dense'] * dense + ['sparse'] * (len(types) - dense)
    if len(types) != layers or types != sorted_types:
      raise ConfigError(
        f'mlp_layer_types={str(types)[:60]}…: must be "dense" for the first of '
        f'num_hidden_layers={layers} and "sparse" for the others'
      )
  return min(dense, layers)  # some files name more than there are


def _read_moe(values: dict[str, Any], family: str, own: Dialect) -> MoEConfig:
  computed = {'scoring_func': (own.scoring,), 'topk_method': own.methods}
  values = dict(values)
  for key, names in computed.items():
    if (values.get(key) or names[0]) not in names:
      raise ConfigError(
        f'{key}={values[key]!r}: {family} computes {" or ".join(names)}, '
        'whatever this says; set it so, or name the architecture of the model'
      )
    values[key] = values.get(key) or names[0]
  if values.get('norm_topk_prob') is None:
    values['norm_topk_prob'] = own.defaults['norm_topk_prob']
  if values['topk_method'] == 'greedy' or values.get('n_group') in (None, 1):
    values |= {'n_group': 1, 'topk_group': 1}
  return MoEConfig(**_fields('moe', values, own))


def _read_rope(values: dict[str, Any], family: str) -> RopeConfig:
  """Returns the rope, from any of its places."""
  ropes = {}
  for name in ('rope_scaling', 'rope_parameters'):
    rope = values.get(name)
    if rope:
      ropes[name] = _rope(name, rope, values, family)
  if len(set(ropes.values())) > 1:
    raise ConfigError(
      f'rope_scaling={values["rope_scaling"]!r}: differs from rope_parameters='
      f'{values["rope_parameters"]!r}; transformers obeys the first, vLLM the '
      'second: leave one of them out'
    )
  plain = _rope('rope_scaling', {}, values, family)
  return next(iter(ropes.values()), plain)


def _rope(
  name: str, rope: dict[str, Any], values: dict[str, Any], family: str
) -> RopeConfig:
  """Returns the rope of one object; `name` is its key."""
  theta = rope.get('rope_theta', values.get('rope_theta') or 10000.0)
  if values.get('rope_theta', theta) not in (theta, None):
    raise ConfigError(
      f'rope_theta={values["rope_theta"]!r}: differs from the {theta!r} of '
      f'{name}; leave one of them out'
    )
  kind = rope.get('rope_type', rope.get('type'))
  kind = 'yarn' if (kind, family) == ('deepseek_yarn', 'sarvam_mla') else kind
  if family == 'mistral_large_3' and rope.get('factor'):
    # Its YaRN multiplies the logits by m^2, unless apply_scale is false.
    scale = rope.get('apply_yarn_scaling') in (None, True)
    kind, rope = 'yarn', rope | {'mscale_all_dim': float(scale)}
    rope |= {'attention_factor': 1.0, 'apply_yarn_scaling': None}
  growth, beta = {}, rope.get('llama_4_scaling_beta')
  if 'mistral' in family and beta:
    length = rope.get('llama_4_scaling_length', rope.get(_LENGTH, 0))
    growth = {'query_beta': beta, 'query_positions': length}
  _check_rope(name, rope, values, family, kind, bool(growth))
  if kind in _NO_YARN:
    return RopeConfig(theta=theta, **growth)
  if kind != 'yarn':
    raise ConfigError(f'{name} type={kind!r}: only yarn is computed')
  # YaRN scales cos and sin by m(mscale) / m(mscale_all_dim) and the logits by
  # m(mscale_all_dim)^2. A file without both numbers means m(1) for cos and sin,
  # and 1 for the logits; attention_factor is a factor for cos and sin.
  fields = _fields('rope', rope, dialects.dialect(family))
  all_dim = fields['mscale_all_dim']
  if rope.get('attention_factor'):
    fields['mscale'] = all_dim
  elif all_dim and not fields['mscale']:
    raise ConfigError(
      f'{name} mscale_all_dim={all_dim!r} without mscale: is not computed'
    )
  elif not all_dim:
    fields['mscale'] = 1.0
  return RopeConfig(theta=theta, **fields, **growth)


def _check_rope(
  name: str, rope: dict, values: dict, family: str, kind: Any, grows: bool
) -> None:
  """Refuses keys of a rope that are not computed for its kind."""
  yarn = dialects.tables()['fields']['rope'].values()
  nope, rotary = values['qk_nope_head_dim'], values['qk_rope_head_dim']
  for key, value in rope.items():
    if key == 'partial_rotary_factor' and isinstance(value, float):
      value = 1 if abs(value * (nope + rotary) - rotary) < 0.5 else value
    known = key in _ROPE or (key in yarn and (kind == 'yarn' or grows))
    known = known or (grows and key.startswith('llama_4_scaling'))
    if known or value in (None, False, 1 if key in _ONES else None):
      continue
    if key in yarn and kind is None:
      raise ConfigError(
        f'{name} {key}={value!r}: stands without a type, so that transformers '
        'ignores it; add "type": "yarn", or take it out'
      )
    raise ConfigError(f'{name} {key}={value!r}: is not computed for {family}')


def write(
  config: ModelConfig, dtype: str, fp8: bool = False, power_of_two: bool = False
) -> dict[str, Any]:
  """Returns the object of a config.json, in the dialect of the family.

  `dtype` is that of the tensors that are not FP8; with `power_of_two` all
  scales of FP8 are powers of two.

  Raises:
    ConfigError: a model that no released architecture computes.
  """
  mla, family, tables = config.mla, family_of(config), dialects.tables()
  rope = mla.rope
  values: dict[str, Any] = {
    'architectures': [dialects.dialect(family).architectures[0]],
    'model_type': family,
    'torch_dtype': dtype,
    'rope_theta': rope.theta,
    'rope_scaling': _write_rope(rope),
    'num_key_value_heads': mla.heads,
  } | tables['written']
  parts = {'model': config, 'mla': mla, 'moe': config.moe, 'mtp': config.mtp}
  parts |= {'dsa': config.dsa} if config.dsa.heads else {}
  for name, part in parts.items():
    for field, key in tables['fields'][name].items():
      values[key] = getattr(part, field)
  for key in ('bos_token_id', 'eos_token_id'):
    values[key] = values[key] if values[key] >= 0 else None
  values['q_lora_rank'] = values['q_lora_rank'] or None
  if config.release.rotary == 'halves':
    values['rope_interleave'] = False
  if family == 'glm_moe_dsa':
    types = config.dsa.types or ('full',) * config.layers
    values |= {'indexer_types': [*types], 'indexer_rope_interleave': True}
    values['index_topk_pattern'] = ''.join(kind[0].upper() for kind in types)
  if family == 'glm4_moe_lite':  # transformers reads no other key
    values['mlp_layer_types'] = ['dense'] * config.dense_layers
    values['mlp_layer_types'] += ['sparse'] * config.moe_layers
  if 'mistral' in family:
    values |= _mistral_rope(rope, family)
  if fp8 and family == 'mistral_large_3':
    raise ConfigError(f'--fp8: {family} has no tiles of 128; write bfloat16')
  if fp8:
    scales = {'scale_fmt': 'ue8m0'} if power_of_two else {}
    values['quantization_config'] = tables['written_fp8'] | scales
  return dialects.spelled(values, family)


def _mistral_rope(rope: RopeConfig, family: str) -> dict[str, Any]:
  """Returns the rope's keys of Mistral's models, growth included."""
  values = {'rope_type': 'default'} | (_write_rope(rope) or {})
  values['rope_type'] = values.pop('type', 'default')
  if rope.query_beta or family != 'mistral_large_3':
    values['llama_4_scaling_beta'] = rope.query_beta
  length = rope.query_positions or rope.original_positions or 1
  if family != 'mistral_large_3':  # its code asks for both, and this spelling
    values |= {'rope_theta': rope.theta, _LENGTH: length}
    return {'rope_parameters': values, 'rope_scaling': None, 'rope_theta': None}
  for key in ('rope_type', 'mscale', 'mscale_all_dim', 'attention_factor'):
    values.pop(key, None)
  if rope.factor > 1:
    values['apply_yarn_scaling'] = bool(rope.mscale)
  if rope.query_beta:
    values['llama_4_scaling_length'] = length
  return {'rope_scaling': values}


def family_of(config: ModelConfig) -> str:
  """Returns the family that computes the config's numbers, or refuses it."""
  name = config.release.family
  if config.attention != 'mla':
    kind = f'attention={config.attention!r}'
    raise ConfigError(f'{kind}: no released architecture of MLA computes this')
  if name and name not in dialects.families():
    known = ', '.join(dialects.families())
    raise ConfigError(f'release.family={name!r}: must be one of {known}')
  if (eps := config.mla.norm_eps) != 1e-6:
    raise ConfigError(f'mla.norm_eps={eps!r}: config.json can only mean 1e-06')
  reasons = {f: _unlike(config, f) for f in [name] if f} or {
    f: _unlike(config, f) for f in (*_DEDUCED, 'glm_moe_dsa', 'mistral4')
  }
  fitting = [family for family, reason in reasons.items() if not reason]
  if not fitting:
    moe, rope = config.moe, config.mla.rope
    raise ConfigError(
      f'moe.scoring={moe.scoring!r}, moe.method={moe.method!r}, moe.normalize='
      f'{moe.normalize}, rope.query_beta={rope.query_beta:g}, dsa.heads='
      f'{config.dsa.heads}: no released architecture computes this; '
      + ', '.join(f'{f} has {reason}' for f, reason in reasons.items())
    )
  any_fits = not config.moe_layers and 'deepseek_v3' in fitting
  return 'deepseek_v3' if any_fits else fitting[0]


def _unlike(config: ModelConfig, family: str) -> str:
  """Returns the thing in which a family differs from a model; '' if none."""
  moe, rope, dialect = config.moe, config.mla.rope, dialects.dialect(family)
  if config.moe_layers:
    if 'n_routed_experts' in dialect.absent.split():
      return 'no experts'
    if moe.scoring != dialect.scoring or moe.method not in dialect.methods:
      return f'{dialect.scoring} with {" or ".join(dialect.methods)}'
    if moe.normalize and family == 'deepseek_v2':
      return 'gates that are not normalised'
  if reason := _unlike_indexer(config, family):
    return reason
  mistral = 'mistral' in family
  if rope.query_beta and not mistral:
    return 'no query_beta'
  if config.mtp.depth and 'num_nextn_predict_layers' in dialect.absent.split():
    return 'no MTP'
  lengths = {rope.query_positions, rope.original_positions} - {0}
  if family == 'mistral_large_3':
    if (config.bos_id, config.eos_id) != (1, 2):  # its file has no place
      return 'bos_id=1 and eos_id=2'
    both = rope.mscale, rope.mscale_all_dim
    if rope.factor > 1 and both not in ((0, 0), (1, 1)):
      return 'mscale and mscale_all_dim both 0 or 1'
  elif mistral and len(lengths) > 1:
    return 'query_positions equal to original_positions'
  single = family == 'mistral4' and config.release.experts == 'single'
  return "release.experts='fused'" if single else ''


def _unlike_indexer(config: ModelConfig, family: str) -> str:
  """Returns the thing in which a family's indexer is not the model's."""
  dsa, own = config.dsa, dialects.dialect(family)
  if not dsa.heads or not own.own:
    has = 'an' if own.own else 'no'
    return f'{has} indexer' if dsa.heads or own.own else ''
  if dsa.types and family == 'deepseek_v32':
    return 'an indexer in each layer'
  usual = {'interleaved': own.defaults['indexer_rope_interleave']}
  usual |= {'q_from': 'latent' if config.mla.query_rank else 'x'}
  for field, value in (usual | dict(rope_first=True, k_norm_eps=1e-6)).items():
    if getattr(dsa, field) != value:
      return f'dsa.{field}={value!r}'
  return '' if config.release.rotary == 'pairs' else "release.rotary='pairs'"


def _write_rope(rope: RopeConfig) -> dict[str, Any] | None:
  """Returns the object of `rope_scaling`; None without YaRN."""
  if rope.factor == 1:
    return None
  fields = dialects.tables()['fields']['rope'].items()
  values = {key: getattr(rope, field) for field, key in fields}
  if rope.mscale == rope.mscale_all_dim == 0:
    values['attention_factor'] = 1.0
  elif not rope.mscale * rope.mscale_all_dim and rope.mscale != 1:
    raise ConfigError(
      f'rope.mscale={rope.mscale!r}, rope.mscale_all_dim='
      f'{rope.mscale_all_dim!r}: no release has one without the other'
    )
  return {'type': 'yarn'} | values
