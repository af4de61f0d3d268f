"""Translates config.json of released models to ModelConfig and back.

Two dialects are read: that of the releases of DeepSeek, Moonshot and others
(`rope_scaling`, `scoring_func`, `topk_method`, `quantization_config`) and that
of transformers 5 (`rope_parameters`). The first is written, since all programs
read it. A key that would change the model's numbers in a way that this package
does not compute is refused. Other keys, such as `auto_map` with its remote
code, are never looked at.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from mla_moe.config import (
  ConfigError,
  MLAConfig,
  ModelConfig,
  MoEConfig,
  MTPConfig,
  RopeConfig,
)

INDEX = 'model.safetensors.index.json'
BF16 = np.dtype(ml_dtypes.bfloat16)
F32 = np.dtype(np.float32)

# our field, key of config.json
_MODEL = (
  ('vocab', 'vocab_size'),
  ('dim', 'hidden_size'),
  ('layers', 'num_hidden_layers'),
  ('dense_width', 'intermediate_size'),
  ('norm_eps', 'rms_norm_eps'),
  ('max_positions', 'max_position_embeddings'),
)
_MLA = (
  ('heads', 'num_attention_heads'),
  ('kv_rank', 'kv_lora_rank'),
  ('nope_dim', 'qk_nope_head_dim'),
  ('rope_dim', 'qk_rope_head_dim'),
  ('value_dim', 'v_head_dim'),
)
_MOE = (
  ('experts', 'n_routed_experts'),
  ('top_k', 'num_experts_per_tok'),
  ('width', 'moe_intermediate_size'),
)
# model_type: (architecture, default scoring, default method)
_KINDS = {
  'deepseek_v2': ('DeepseekV2ForCausalLM', 'softmax', 'greedy'),
  'deepseek_v3': ('DeepseekV3ForCausalLM', 'sigmoid', 'noaux_tc'),
}
# Fields that a ConfigError may name, with the keys that they come from.
_KEYS = dict((*_MODEL, *_MLA, *_MOE))
_KEYS |= {'query_rank': 'q_lora_rank', 'shared': 'n_shared_experts'}
_KEYS |= {'dense_layers': 'first_k_dense_replace', 'groups': 'n_group'}
_KEYS |= {'top_groups': 'topk_group', 'scale': 'routed_scaling_factor'}
_NO_YARN = ('default', 'none', None)
_MISSING = object()


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
  """Returns the ModelConfig of a config.json's object.

  Args:
    values: the object. Its number of MTP modules may be too large:
      transformers keeps the number when it drops the modules (`source`).
    dtype: of the activations.

  Raises:
    ConfigError: another architecture, a missing key, a value of the wrong type,
      or one whose meaning is not computed here.
  """
  v3 = _is_v3(values)
  routed = values.get('n_routed_experts') is not None
  _check_computed(values, v3, routed)

  def get(key: str, default: Any = _MISSING) -> Any:
    value = values.get(key)
    if value is None:
      value = default
    if value is _MISSING:
      raise ConfigError(f'{key}: is missing')
    return value

  take = lambda table: {field: get(key) for field, key in table}
  layers = get('num_hidden_layers')
  dense = get('first_k_dense_replace', 0) if routed else layers
  if type(dense) is type(layers) is int:
    dense = min(dense, layers)  # some files name more
  try:
    mla = MLAConfig(
      query_rank=get('q_lora_rank', 0), rope=_read_rope(values), **take(_MLA)
    )
    moe = _read_moe(get, take, v3) if routed else MoEConfig()
    return ModelConfig(
      **take(_MODEL),
      dense_layers=dense,
      tie_embeddings=get('tie_word_embeddings', False),
      init_std=get('initializer_range', 0.02),
      bos_id=_token(values.get('bos_token_id'), 0),
      eos_id=_token(values.get('eos_token_id'), 1),
      dtype=dtype,
      mla=mla,
      moe=moe,
      mtp=MTPConfig(depth=get('num_nextn_predict_layers', 0)),
    )
  except ConfigError as error:
    # The person has config.json: name its key, not our field.
    field, rest = str(error).split('=', 1) if '=' in str(error) else ('', '')
    if field in _KEYS:
      raise ConfigError(f'{_KEYS[field]}={rest}') from None
    raise


def _check_computed(values: dict[str, Any], v3: bool, routed: bool) -> None:
  """Refuses values whose meaning is not computed here."""

  def only(key: str, computed: Any, why: str):
    if values.get(key) is not None and values[key] != computed:
      raise ConfigError(f'{key}={values[key]!r}: {why}')

  only('hidden_act', 'silu', 'only silu is computed')
  for key in ('attention_bias', 'mlp_bias'):
    only(key, False, 'no projection has a bias here')
  heads = values.get('num_attention_heads')
  only('num_key_value_heads', heads, f'MLA has {heads}, one for each head')
  if routed:
    only('moe_layer_freq', 1, 'every layer after the dense ones has experts')
  if routed and not v3:
    only(
      'norm_topk_prob',
      False,
      "transformers ignores it for deepseek_v2 and DeepSeek's code does not",
    )


def _is_v3(values: dict[str, Any]) -> bool:
  """Returns whether the model is V3's (Kimi K2's, Moonlight's) or V2's."""
  names = values.get('architectures') or ()
  kind = values.get('model_type')
  kind = 'deepseek_v3' if kind == 'kimi_k2' else kind
  kinds = {architecture: kind for kind, (architecture, *_) in _KINDS.items()}
  known = ', '.join(kinds)
  if not isinstance(names, (list, tuple)) or len(names) > 1:
    raise ConfigError(f'architectures={names!r}: must name one of {known}')
  if names and str(names[0]) not in kinds:
    raise ConfigError(f'architectures={names[0]!r}: only {known} can be loaded')
  kind = kinds[names[0]] if names else kind
  if str(kind) not in _KINDS:
    raise ConfigError(f'model_type={kind!r}: only {known} can be loaded')
  return kind == 'deepseek_v3'


def _token(value: Any, default: int) -> Any:
  """Returns a token id, the first where a config has several."""
  if isinstance(value, list) and value:
    value = value[0]
  return default if value is None else value


def _read_moe(get, take, v3: bool) -> MoEConfig:
  _, scoring, method = _KINDS['deepseek_v3' if v3 else 'deepseek_v2']
  method = get('topk_method', method)
  groups = get('n_group', 1) if method != 'greedy' else 1
  return MoEConfig(
    **take(_MOE),
    shared=get('n_shared_experts', 0),
    groups=groups,
    top_groups=get('topk_group', 1) if groups != 1 else 1,
    scoring=get('scoring_func', scoring),
    method=method,
    normalize=get('norm_topk_prob', v3),
    scale=get('routed_scaling_factor', 2.5 if v3 else 1.0),
  )


def _read_rope(values: dict[str, Any]) -> RopeConfig:
  """Returns the rope of either dialect."""
  rope = values.get('rope_parameters') or values.get('rope_scaling') or {}
  if not isinstance(rope, dict):
    raise ConfigError(f'rope_scaling={rope!r}: must be an object')
  theta = rope.get('rope_theta', values.get('rope_theta') or 10000.0)
  kind = rope.get('rope_type', rope.get('type'))
  if kind in _NO_YARN:
    return RopeConfig(theta=theta)
  if kind != 'yarn':
    raise ConfigError(f'rope_scaling type={kind!r}: only yarn is computed')
  for key, computed in (('attention_factor', None), ('truncate', True)):
    if rope.get(key, computed) is not computed:
      raise ConfigError(f'rope_scaling {key}={rope[key]!r}: is not computed')
  # YaRN scales cos and sin by m(mscale) / m(mscale_all_dim) and the logits by
  # m(mscale_all_dim)^2. A file without both numbers means m(1) for cos and sin,
  # and 1 for the logits.
  mscale, all_dim = rope.get('mscale') or 0.0, rope.get('mscale_all_dim') or 0.0
  if all_dim and not mscale:
    raise ConfigError(
      f'rope_scaling mscale_all_dim={all_dim!r} without mscale: is not computed'
    )
  original = rope.get('original_max_position_embeddings')
  for key, value in (
    ('factor', rope.get('factor')),
    ('original_max_position_embeddings', original),
  ):
    if value is None:
      raise ConfigError(f'rope_scaling {key}: is missing')
  return RopeConfig(
    theta=theta,
    factor=rope['factor'],
    original_positions=original,
    beta_fast=rope.get('beta_fast') or 32.0,
    beta_slow=rope.get('beta_slow') or 1.0,
    mscale=mscale if all_dim else 1.0,
    mscale_all_dim=all_dim,
  )


def write(
  config: ModelConfig,
  dtype: str,
  fp8: bool = False,
  power_of_two: bool = False,
) -> dict[str, Any]:
  """Returns the object of a config.json, in the dialect of the releases.

  Args:
    config: the model.
    dtype: of the tensors that are not FP8.
    fp8: the blocks' matrices are FP8.
    power_of_two: all scales of FP8 are powers of two.

  Raises:
    ConfigError: a model that no released architecture computes.
  """
  moe, mla = config.moe, config.mla
  kind = _released_kind(config)
  values: dict[str, Any] = {
    'architectures': [_KINDS[kind][0]],
    'model_type': kind,
    'hidden_act': 'silu',
    'attention_bias': False,
    'attention_dropout': 0.0,
    'bos_token_id': config.bos_id if config.bos_id >= 0 else None,
    'eos_token_id': config.eos_id if config.eos_id >= 0 else None,
    'tie_word_embeddings': config.tie_embeddings,
    'initializer_range': config.init_std,
    'use_cache': True,
    'torch_dtype': dtype,
    'rope_theta': mla.rope.theta,
    'rope_scaling': _write_rope(mla.rope),
    'num_key_value_heads': mla.heads,
    'q_lora_rank': mla.query_rank or None,
    'first_k_dense_replace': config.dense_layers,
    'moe_layer_freq': 1,
    'n_shared_experts': moe.shared,
    'n_group': moe.groups,
    'topk_group': moe.top_groups,
    'scoring_func': moe.scoring,
    'topk_method': moe.method,
    'norm_topk_prob': moe.normalize,
    'routed_scaling_factor': moe.scale,
    'num_nextn_predict_layers': config.mtp.depth,
  }
  for part, table in ((config, _MODEL), (mla, _MLA), (moe, _MOE)):
    values |= {key: getattr(part, field) for field, key in table}
  if fp8:
    values['quantization_config'] = {
      'activation_scheme': 'dynamic',
      'fmt': 'e4m3',
      'quant_method': 'fp8',
      'weight_block_size': [128, 128],
    }
    if power_of_two:
      values['quantization_config']['scale_fmt'] = 'ue8m0'
  return values


def _released_kind(config: ModelConfig) -> str:
  """Returns the model_type that computes the same numbers as the config.

  Raises:
    ConfigError: none does.
  """
  moe = config.moe
  kinds = [
    kind
    for kind, (_, scoring, _) in _KINDS.items()
    if scoring == moe.scoring
    and (kind == 'deepseek_v3') == (moe.method == 'noaux_tc')
    and not (kind == 'deepseek_v2' and moe.normalize)
  ]
  if not kinds and config.moe_layers:
    raise ConfigError(
      f'moe.scoring={moe.scoring!r}, moe.method={moe.method!r}, moe.normalize='
      f'{moe.normalize}: no released architecture routes so; V3 has sigmoid '
      'with noaux_tc, V2 softmax with (group_limited_)greedy unnormalised'
    )
  if config.mla.norm_eps != 1e-6:
    raise ConfigError(
      f'mla.norm_eps={config.mla.norm_eps!r}: released models have 1e-06, '
      'which config.json cannot change'
    )
  return kinds[0] if kinds else 'deepseek_v3'


def _write_rope(rope: RopeConfig) -> dict[str, Any] | None:
  """Returns the object of `rope_scaling`; None without YaRN.

  Raises:
    ConfigError: temperatures that no released code computes.
  """
  if rope.factor == 1:
    return None
  plain = rope.mscale_all_dim == 0 and rope.mscale == 1
  if not plain and not rope.mscale * rope.mscale_all_dim:
    raise ConfigError(
      f'rope.mscale={rope.mscale!r}, rope.mscale_all_dim='
      f'{rope.mscale_all_dim!r}: no released code computes one without the '
      'other'
    )
  return {
    'type': 'yarn',
    'factor': rope.factor,
    'original_max_position_embeddings': rope.original_positions,
    'beta_fast': rope.beta_fast,
    'beta_slow': rope.beta_slow,
    'mscale': rope.mscale,
    'mscale_all_dim': rope.mscale_all_dim,
  }
