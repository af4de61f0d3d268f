"""Loads the golden Hugging Face checkpoints in the simplest way, for tests.

Every tensor is read by hand from the safetensors files (whose numpy loader
does not know float8) and placed into our parameter tree: out x in becomes in x
out, heads are split, rope rows go from neighbouring pairs to halves.
"""

from __future__ import annotations

import json
import pathlib

import ml_dtypes
import numpy as np

from mla_moe import config as config_lib

ROOT = pathlib.Path(__file__).parent / 'golden'
_DTYPES = {'F32': np.float32, 'BF16': ml_dtypes.bfloat16}
_DTYPES['F8_E4M3'] = ml_dtypes.float8_e4m3fn


def tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
  """Every tensor of a folder in float32, FP8 blocks dequantised."""
  raw = {}
  for path in sorted(folder.glob('*.safetensors')):
    blob = path.read_bytes()
    size = int.from_bytes(blob[:8], 'little')
    header = json.loads(blob[8 : 8 + size])
    for name, info in header.items():
      if name != '__metadata__':
        start, end = (8 + size + x for x in info['data_offsets'])
        value = np.frombuffer(blob[start:end], _DTYPES[info['dtype']])
        raw[name] = value.reshape(info['shape']).astype(np.float32)
  out = {}
  for name, value in raw.items():
    scale = raw.get(name + '_scale_inv')
    if scale is not None:
      wide = scale.repeat(128, 0).repeat(128, 1)
      value = value * wide[: value.shape[0], : value.shape[1]]
    if not name.endswith('_scale_inv'):
      out[name] = value
  return out


def model_config(folder: pathlib.Path) -> config_lib.ModelConfig:
  """Our config of a released config.json, old or new."""
  c = json.loads((folder / 'config.json').read_text())
  rope = c.get('rope_parameters') or c['rope_scaling']
  v3 = c['model_type'] == 'deepseek_v3'
  groups = c['n_group']
  return config_lib.ModelConfig(
    vocab=c['vocab_size'],
    dim=c['hidden_size'],
    layers=c['num_hidden_layers'],
    dense_layers=c['first_k_dense_replace'],
    dense_width=c['intermediate_size'],
    norm_eps=c['rms_norm_eps'],
    max_positions=c['max_position_embeddings'],
    dtype='float32',
    remat='none',
    mla=config_lib.MLAConfig(
      heads=c['num_attention_heads'],
      query_rank=c['q_lora_rank'] or 0,
      kv_rank=c['kv_lora_rank'],
      nope_dim=c['qk_nope_head_dim'],
      rope_dim=c['qk_rope_head_dim'],
      value_dim=c['v_head_dim'],
      rope=config_lib.RopeConfig(
        theta=rope.get('rope_theta', c.get('rope_theta', 1e4)),
        factor=rope['factor'],
        original_positions=rope['original_max_position_embeddings'],
        beta_fast=rope['beta_fast'],
        beta_slow=rope['beta_slow'],
        mscale=rope['mscale'],
        mscale_all_dim=rope['mscale_all_dim'],
      ),
    ),
    moe=config_lib.MoEConfig(
      experts=c['n_routed_experts'],
      top_k=c['num_experts_per_tok'],
      shared=c['n_shared_experts'],
      width=c['moe_intermediate_size'],
      groups=groups,
      top_groups=c['topk_group'],
      scoring='sigmoid' if v3 else 'softmax',
      method='noaux_tc' if v3 else 'greedy',
      normalize=c['norm_topk_prob'],
      scale=c['routed_scaling_factor'],
    ),
    mtp=config_lib.MTPConfig(
      depth=c['num_nextn_predict_layers'] if 'scoring_func' in c else 0
    ),
  )


def variables(folder: pathlib.Path, config: config_lib.ModelConfig) -> dict:
  """{'params': ..., 'router': ...} of a folder."""
  raw = tensors(folder)
  layers = [_layer(raw, i, config) for i in range(config.layers)]
  k = config.dense_layers
  params = {
    'embedding': raw['model.embed_tokens.weight'],
    'w_head': raw['lm_head.weight'].T,
    'final_norm': {'scale': raw['model.norm.weight']},
    'dense': _stack([p for p, _ in layers[:k]]),
    'moe': _stack([p for p, _ in layers[k:]]),
  }
  router = {}
  if config.moe.method == 'noaux_tc':
    biases = np.stack([b for _, b in layers[k:]])
    router = {'moe': {'ffn': {'bias': biases}}}
  for d in range(config.mtp.depth):
    i = config.layers + d
    at = f'model.layers.{i}.'
    block, bias = _layer(raw, i, config)
    params[f'mtp_{d}'] = {
      'block': block,
      'embed_norm': {'scale': raw[at + 'enorm.weight']},
      'hidden_norm': {'scale': raw[at + 'hnorm.weight']},
      'final_norm': {'scale': raw[at + 'shared_head.norm.weight']},
      'w_join': raw[at + 'eh_proj.weight'].T,
    }
    router[f'mtp_{d}'] = {'block': {'ffn': {'bias': bias}}}
  return {'params': params, 'router': router}


def _stack(trees: list[dict]) -> dict:
  if not isinstance(trees[0], dict):
    return np.stack(trees)
  return {key: _stack([tree[key] for tree in trees]) for key in trees[0]}


def _halves(x: np.ndarray) -> np.ndarray:
  return np.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1)


def _swiglu(raw: dict, at: str) -> dict:
  gate, up = (raw[f'{at}{name}_proj.weight'].T for name in ('gate', 'up'))
  return {
    'w_gate_up': np.stack([gate, up], axis=1),
    'w_down': raw[at + 'down_proj.weight'].T,
  }


def _layer(raw: dict, i: int, config: config_lib.ModelConfig):
  at, mla = f'model.layers.{i}.', config.mla
  get = lambda name: raw[f'{at}self_attn.{name}.weight']
  q = get('q_b_proj' if mla.query_rank else 'q_proj').T
  q = q.reshape(q.shape[0], mla.heads, -1)
  q_nope, q_rope = np.split(q, [mla.nope_dim], axis=-1)
  q = np.concatenate([q_nope, _halves(q_rope)], axis=-1)
  down, k_rope = np.split(get('kv_a_proj_with_mqa').T, [mla.kv_rank], axis=1)
  up = get('kv_b_proj').T.reshape(mla.kv_rank, mla.heads, -1)
  k_up, v_up = np.split(up, [mla.nope_dim], axis=-1)
  out = get('o_proj').T.reshape(mla.heads, mla.value_dim, config.dim)
  attention = {
    'w_kv_down': down,
    'w_k_rope': _halves(k_rope),
    'kv_norm': {'scale': get('kv_a_layernorm')},
    'w_k_up': k_up,
    'w_v_up': v_up,
    'w_out': out,
  }
  if mla.query_rank:
    attention['w_q_down'] = get('q_a_proj').T
    attention['q_norm'] = {'scale': get('q_a_layernorm')}
    attention['w_q_up'] = q
  else:
    attention['w_q'] = q
  bias = None
  if i < config.dense_layers:
    ffn = _swiglu(raw, at + 'mlp.')
  else:
    ffn = _experts(raw, at + 'mlp.', config.moe.experts)
    ffn['w_router'] = raw[at + 'mlp.gate.weight'].T
    ffn['shared'] = _swiglu(raw, at + 'mlp.shared_experts.')
    bias = raw.get(at + 'mlp.gate.e_score_correction_bias')
  tree = {
    'attention_norm': {'scale': raw[at + 'input_layernorm.weight']},
    'ffn_norm': {'scale': raw[at + 'post_attention_layernorm.weight']},
    'attention': attention,
    'ffn': ffn,
  }
  return tree, bias


def _experts(raw: dict, at: str, count: int) -> dict:
  if at + 'experts.gate_up_proj' in raw:  # transformers 5 keeps them fused
    both = raw[at + 'experts.gate_up_proj']
    gate, up = np.split(both.swapaxes(1, 2), 2, axis=-1)
    down = raw[at + 'experts.down_proj'].swapaxes(1, 2)
    return {'w_gate_up': np.stack([gate, up], axis=2), 'w_down': down}
  return _stack([_swiglu(raw, f'{at}experts.{e}.') for e in range(count)])
