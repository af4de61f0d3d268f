"""Makes golden cases with transformers: a random model and its outputs.

  python tests/make_goldens.py --folder=DIR --kind=v3 --seed=1 n_group=1 \
    topk_group=1
  python tests/make_goldens.py --folder=DIR --kind=v3 --release hidden_size=192

Writes a `save_pretrained` folder and expected.npz: tokens [2, 96], their logits
and the greedy continuation of the first 24 tokens, by repeated full forward
passes. `name=value` pairs override the configuration.

The other kinds are families that differ little from V3. sarvam has the keys
that its release has, and large3 is Mistral Large 3 in its own layout:
params.json, other names of tensors, YaRN without a temperature. --tiny makes
the sizes of tests/golden/families. Those with sparse attention, deepseek_v32
and glm_moe_dsa, have logits_dense (every key is read), and selected [layers, 2,
96, 96], the keys of each query, too. The keys of V3.2's indexer are as small as
the epsilon of their norm, and some layers of GLM's share a selection.

--release writes V3 in DeepSeek's layout: FP8 tiles, shards with an index, the
older keys of config.json, and an MTP layer, which is made of transformers' own
parts and whose mtp_logits [2, 95] are added to expected.npz. V3.2's scales are
powers of two. --mtp adds such a
layer to glm4_moe_lite, as GLM-4.7-Flash has it.

Needs torch and transformers; the cases in tests/golden are from transformers
5.23.0, the families' from 5.24.0. Nothing here imports mla_moe.
"""

from __future__ import annotations

import argparse
import ast
import copy
import functools
import json
import pathlib

import numpy as np

SMALL = dict(
  vocab_size=259,
  hidden_size=96,
  intermediate_size=160,
  moe_intermediate_size=48,
  num_hidden_layers=3,
  first_k_dense_replace=1,
  num_attention_heads=4,
  num_key_value_heads=4,
  kv_lora_rank=40,
  qk_nope_head_dim=24,
  qk_rope_head_dim=16,
  v_head_dim=32,
  max_position_embeddings=512,
  initializer_range=0.08,
  bos_token_id=0,
  eos_token_id=None,
  rope_parameters=dict(
    rope_type='yarn',
    rope_theta=10000.0,
    factor=8.0,
    original_max_position_embeddings=64,
    beta_fast=32,
    beta_slow=1,
    mscale=1.0,
    mscale_all_dim=1.0,
  ),
)
KINDS = {
  'v3': dict(
    q_lora_rank=56,
    n_routed_experts=16,
    num_experts_per_tok=4,
    n_shared_experts=1,
    n_group=4,
    topk_group=2,
  ),
  'v2': dict(
    q_lora_rank=None,
    n_routed_experts=12,
    num_experts_per_tok=3,
    n_shared_experts=2,
    topk_method='greedy',
    n_group=1,
    topk_group=1,
    norm_topk_prob=False,
  ),
}
_EXPERTS = dict(
  n_routed_experts=8, num_experts_per_tok=3, n_shared_experts=1, n_group=1
)
_EXPERTS |= dict(topk_group=1, norm_topk_prob=True)
_PLAIN = dict(rope_type='default', rope_theta=1e6)
_LONG = SMALL['rope_parameters'] | dict(
  factor=16.0,
  original_max_position_embeddings=16,
  llama_4_scaling_beta=0.1,
)
KINDS |= {
  'glm4_moe_lite': dict(
    **_EXPERTS,
    q_lora_rank=24,
    rms_norm_eps=1e-5,
    routed_scaling_factor=1.8,
    rope_parameters=_PLAIN,
  ),
  'youtu': dict(
    q_lora_rank=24,
    tie_word_embeddings=True,
    rope_interleave=False,
    rope_parameters=_PLAIN,
  ),
  'mistral4': dict(
    **_EXPERTS | dict(n_group=4, topk_group=2),
    q_lora_rank=24,
    rope_parameters=_LONG,
  ),
  'sarvam_mla': dict(**_EXPERTS, q_lora_rank=None),
  'deepseek_v32': dict(
    **_EXPERTS | dict(n_group=4, topk_group=2),
    q_lora_rank=24,
    index_n_heads=8,
    index_head_dim=24,
    index_topk=12,
    rope_parameters=SMALL['rope_parameters'] | dict(factor=40.0),
  ),
  'glm_moe_dsa': dict(
    **_EXPERTS,
    q_lora_rank=24,
    rms_norm_eps=1e-5,
    index_n_heads=8,
    index_head_dim=24,
    index_topk=12,
    num_hidden_layers=4,
    first_k_dense_replace=2,
    indexer_types=['full', 'shared', 'full', 'shared'],
    rope_parameters=_PLAIN,
  ),
  'large3': dict(
    **_EXPERTS,
    q_lora_rank=24,
    rope_parameters={k: v for k, v in _LONG.items() if 'mscale' not in k}
    | dict(attention_factor=1.0),
  ),
}
TINY = dict(vocab_size=48, hidden_size=32, intermediate_size=48)
TINY |= dict(moe_intermediate_size=16, num_hidden_layers=2, kv_lora_rank=16)
TINY |= dict(qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=12)
TINY |= dict(num_attention_heads=2, num_key_value_heads=2)

TILE = 128


def quantised(weight, power_of_two=False):
  """Returns (float8_e4m3fn, scales of 128x128 tiles, dequantised float32)."""
  import torch

  rows, columns = weight.shape
  r, c = -(-rows // TILE), -(-columns // TILE)
  padded = torch.zeros(r * TILE, c * TILE)
  padded[:rows, :columns] = weight
  tiles = padded.reshape(r, TILE, c, TILE)
  scale = tiles.abs().amax((1, 3)) / 448
  scale = torch.where(scale == 0, 1.0, scale)
  if power_of_two:
    scale = torch.exp2(torch.ceil(torch.log2(scale)))
  q = (tiles / scale[:, None, :, None]).clamp(-448, 448)
  q = q.to(torch.float8_e4m3fn)
  unpadded = lambda x: x.reshape(padded.shape)[:rows, :columns].contiguous()
  wide = q.to(torch.float32) * scale[:, None, :, None]
  return unpadded(q), scale, unpadded(wide)


def views(prefix, module):
  """Yields (released name, view of a parameter) of a module's tensors.

  transformers has all experts of a layer in one tensor, a release has not.
  """
  for name, tensor in module.state_dict(keep_vars=True).items():
    tensor = tensor.detach()
    parent, _, last = name.rpartition('.')
    if last not in ('gate_up_proj', 'down_proj'):
      yield prefix + name, tensor
      continue
    for e, expert in enumerate(tensor):
      parts = {'down_proj': expert}
      if last == 'gate_up_proj':
        halves = expert.chunk(2)
        parts = dict(zip(('gate_proj', 'up_proj'), halves, strict=True))
      for part, view in parts.items():
        yield f'{prefix}{parent}.{e}.{part}.weight', view


def release(named, sparse=False):
  """Returns {name: released tensor}; rounds the model's views to the same."""
  import torch

  out = {}
  for name, view in named:
    linear = name.endswith(('_proj.weight', '_with_mqa.weight'))
    linear |= name.endswith(('indexer.wk.weight', 'indexer.wq_b.weight'))
    linear &= 'eh_proj' not in name and 'weights_proj' not in name
    if 'e_score_correction_bias' in name or 'k_norm' in name:
      out[name] = view.clone()
    elif linear:
      q, scale, wide = quantised(view, power_of_two=sparse)
      out[name], out[f'{name}_scale_inv'] = q, scale
      view.copy_(wide)
    else:
      out[name] = view.to(torch.bfloat16)
      view.copy_(out[name])
  return out


def mtp_module(model):
  """Returns a random MTP layer of transformers' modules.

  It has two norms, a projection, a decoder layer and the head's norm.
  """
  import torch

  config, dim = model.config, model.config.hidden_size
  norm = lambda: type(model.model.norm)(dim, config.rms_norm_eps)
  own = copy.deepcopy(config)
  if hasattr(own, 'mlp_layer_types'):  # GLM's, which end before this layer
    own.mlp_layer_types = [*own.mlp_layer_types, 'sparse']
  layer = type(model.model.layers[-1])(own, config.num_hidden_layers)
  layer.enorm, layer.hnorm = norm(), norm()
  layer.eh_proj = torch.nn.Linear(2 * dim, dim, bias=False)
  layer.shared_head = torch.nn.Module()
  layer.shared_head.norm = norm()
  for parameter in layer.parameters():
    if parameter.ndim > 1:
      parameter.data.normal_(0, config.initializer_range)
    else:
      parameter.data.uniform_(0.8, 1.2)
  layer.mlp.gate.e_score_correction_bias.normal_(0, 0.05)
  small_index_keys(layer)
  return layer.eval()


def small_index_keys(model):
  """Makes an indexer's keys as small as the epsilon of their norm."""
  for name, parameter in model.named_parameters():
    if name.endswith('indexer.wk.weight'):
      parameter.data *= 2e-3
    if name.endswith('indexer.k_norm.bias'):
      parameter.data -= 1


def selected(run):
  """Returns the keys of each query, [2, T, T], of each layer that run() runs.

  No row's last key may be nearly as good as the next one: 1e-5 of a score.
  """
  import torch

  sets, topk = [], torch.Tensor.topk

  def note(scores, k, **kwargs):
    out = topk(scores, k, **kwargs)
    if scores.shape[-1] == scores.shape[-2]:  # of tokens: an indexer's
      rows = torch.zeros_like(scores, dtype=torch.bool)
      rows.scatter_(-1, out.indices, True)
      sets.append((rows & scores.isfinite()).numpy())
      best = scores[:, k:].sort(-1, descending=True).values
      margin = (best[..., k - 1] - best[..., k]).min() / best[..., k - 1].std()
      assert margin > 1e-5, f'ties ({margin:g}): take another --seed'
    return out

  torch.Tensor.topk = note
  run()
  torch.Tensor.topk = topk
  return sets


def mtp_logits(model, layer, tokens):
  """Returns [B, T-1, V]: position i joins hidden state i with token i+1."""
  import torch

  hidden = model.model(tokens).last_hidden_state[:, :-1]
  embedded = model.model.embed_tokens(tokens[:, 1:])
  both = torch.cat([layer.enorm(embedded), layer.hnorm(hidden)], -1)
  x = layer.eh_proj(both)
  positions = torch.arange(x.shape[1])[None]
  angles = model.model.rotary_emb(x, positions)
  t = x.shape[1]
  mask = torch.full((t, t), float('-inf')).triu(1)[None, None]
  x = layer(
    x,
    attention_mask=mask,
    position_ids=positions,
    position_embeddings=angles,
  )
  x = x[0] if isinstance(x, tuple) else x
  return model.lm_head(layer.shared_head.norm(x))


def write_family(folder, config, tensors):
  """Writes one file, and config.json with an MTP layer."""
  from safetensors.torch import save_file

  folder.mkdir(parents=True, exist_ok=True)
  whole = {name: tensor.clone() for name, tensor in tensors.items()}
  save_file(whole, folder / 'model.safetensors')
  values = config.to_dict() | {
    'architectures': ['Glm4MoeLiteForCausalLM'],
    'dtype': 'float32',
    'num_nextn_predict_layers': 1,
  }
  (folder / 'config.json').write_text(json.dumps(values, indent=1))


def write_release(folder, config, tensors, shards=3):
  """Writes shards, their index, and config.json with the releases' keys."""
  from safetensors.torch import save_file

  folder.mkdir(parents=True, exist_ok=True)
  names, weight_map, total = sorted(tensors), {}, 0
  for number in range(shards):
    shard = names[number::shards]
    file = f'model-{number + 1:05d}-of-{shards:05d}.safetensors'
    save_file({n: tensors[n].contiguous() for n in shard}, folder / file)
    weight_map |= dict.fromkeys(shard, file)
    total += sum(tensors[n].numel() * tensors[n].itemsize for n in shard)
  index = {'metadata': {'total_size': total}, 'weight_map': weight_map}
  path = folder / 'model.safetensors.index.json'
  path.write_text(json.dumps(index, indent=1))
  values = config.to_dict()
  rope = dict(values.pop('rope_parameters'))
  values['rope_theta'] = rope.pop('rope_theta')
  rope['type'] = rope.pop('rope_type')
  values |= {
    'architectures': config.architectures,
    'rope_scaling': rope,
    'scoring_func': 'sigmoid',
    'topk_method': 'noaux_tc',
    'moe_layer_freq': 1,
    'num_nextn_predict_layers': 1,
    'quantization_config': {
      'activation_scheme': 'dynamic',
      'fmt': 'e4m3',
      'quant_method': 'fp8',
      'weight_block_size': [TILE, TILE],
    },
  }
  if config.model_type == 'deepseek_v32':
    for key in ('layer_types', 'mlp_layer_types', 'head_dim', 'qk_head_dim'):
      del values[key]
    values['quantization_config']['scale_fmt'] = 'ue8m0'
  else:
    name = 'configuration_deepseek.DeepseekV3Config'
    values['auto_map'] = {'AutoConfig': name}
  (folder / 'config.json').write_text(json.dumps(values, indent=1))


def as_sarvam(folder):
  """Writes config.json with the keys of sarvam-105b."""
  values = json.loads((folder / 'config.json').read_text())
  rope = dict(values.pop('rope_parameters'))
  values['rope_theta'] = rope.pop('rope_theta')
  del rope['rope_type']
  values['rope_scaling'] = rope | {'type': 'deepseek_yarn'}
  for ours, theirs in (
    ('n_routed_experts', 'num_experts'),
    ('n_shared_experts', 'num_shared_experts'),
  ):
    values[theirs] = values.pop(ours)
  rotary = values['qk_rope_head_dim']
  values |= {
    'architectures': ['SarvamMLAForCausalLM'],
    'head_dim': values['kv_lora_rank'] + rotary,
    'q_head_dim': values['qk_nope_head_dim'] + rotary,
    'auto_map': {'AutoConfig': 'configuration_sarvam.SarvamMLAConfig'},
    'score_function': 'sigmoid',
  }
  (folder / 'config.json').write_text(json.dumps(values, indent=1))


_LARGE3 = {
  'q_a_proj': 'wq_a',
  'q_b_proj': 'wq_b',
  'q_a_layernorm': 'q_a_norm',
  'kv_a_proj_with_mqa': 'wkv_a_with_mqa',
  'kv_a_layernorm': 'kv_a_norm',
  'kv_b_proj': 'wkv_b',
  'o_proj': 'wo',
  'self_attn': 'attention',
  'input_layernorm': 'attention_norm',
  'post_attention_layernorm': 'ffn_norm',
  'gate_proj': 'w1',
  'down_proj': 'w2',
  'up_proj': 'w3',
  'embed_tokens': 'tok_embeddings',
  'lm_head': 'output',
}


def as_large3(folder, model, config):
  """Writes params.json and one file with Mistral's names."""
  from safetensors.torch import save_file

  tensors = {}
  for name, view in views('', model):
    parts = name.removeprefix('model.').split('.')
    if 'mlp' in parts:  # experts and router stand in the layer
      place = parts.index('mlp')
      dense = parts[place + 1] in ('gate_proj', 'up_proj', 'down_proj')
      parts[place : place + 1] = ['feed_forward'] if dense else []
    tensors['.'.join(_LARGE3.get(p, p) for p in parts)] = view.contiguous()
  for path in folder.glob('*'):
    path.unlink()
  save_file(tensors, folder / 'consolidated.safetensors')
  c, rope = config, config.rope_parameters
  length = rope['original_max_position_embeddings']
  params = {
    'dim': c.hidden_size,
    'n_layers': c.num_hidden_layers,
    'head_dim': 128,
    'hidden_dim': c.intermediate_size,
    'n_heads': c.num_attention_heads,
    'n_kv_heads': c.num_attention_heads,
    'rope_theta': rope['rope_theta'],
    'norm_eps': c.rms_norm_eps,
    'vocab_size': c.vocab_size,
    'tied_embeddings': False,
    'max_position_embeddings': c.max_position_embeddings,
    'max_seq_len': c.max_position_embeddings,
    'llama_4_scaling': {
      'original_max_position_embeddings': length,
      'beta': rope['llama_4_scaling_beta'],
    },
    'q_lora_rank': c.q_lora_rank,
    'qk_rope_head_dim': c.qk_rope_head_dim,
    'qk_nope_head_dim': c.qk_nope_head_dim,
    'kv_lora_rank': c.kv_lora_rank,
    'v_head_dim': c.v_head_dim,
    'yarn': {
      'original_max_position_embeddings': length,
      'factor': rope['factor'],
      'apply_scale': False,
      'beta': rope['beta_fast'],
      'alpha': rope['beta_slow'],
    },
    'moe': {
      'expert_parallel': 1,
      'expert_model_parallel': 1,
      'route_every_n': 1,
      'first_k_dense_replace': c.first_k_dense_replace,
      'num_experts': c.n_routed_experts,
      'num_experts_per_tok': c.num_experts_per_tok,
      'num_expert_groups': c.n_group,
      'num_expert_groups_per_tok': c.topk_group,
      'routed_scale': c.routed_scaling_factor,
      'expert_hidden_dim': c.moe_intermediate_size,
      'num_shared_experts': c.n_shared_experts,
    },
  }
  (folder / 'params.json').write_text(json.dumps(params, indent=1))


def main() -> None:
  """Writes one case."""
  import torch
  import transformers

  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--folder', required=True, type=pathlib.Path)
  parser.add_argument('--kind', choices=sorted(KINDS), default='v3')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--release', action='store_true')
  parser.add_argument('--mtp', action='store_true')
  parser.add_argument('--tiny', action='store_true')
  parser.add_argument('overrides', nargs='*')
  flags = parser.parse_args()
  pairs = [pair.split('=', 1) for pair in flags.overrides]
  overrides = {key: ast.literal_eval(value) for key, value in pairs}
  sparse = 'index_topk' in KINDS[flags.kind]
  if flags.release and flags.kind not in ('v3', 'deepseek_v32'):
    parser.error('--release is for --kind=v3 and deepseek_v32')
  if flags.mtp and flags.kind != 'glm4_moe_lite':
    parser.error('--mtp is for --kind=glm4_moe_lite')
  names = {'v3': 'deepseek_v3', 'v2': 'deepseek_v2', 'large3': 'mistral4'}
  kind = transformers.CONFIG_MAPPING[names.get(flags.kind, flags.kind)]
  torch.manual_seed(flags.seed)
  sizes = SMALL | TINY if flags.tiny else SMALL
  config = kind(**{**sizes, **KINDS[flags.kind], **overrides})
  if config.model_type == 'mistral4':  # no "Auto" class knows it
    model = transformers.Mistral4ForCausalLM(config).eval()
  else:
    model = transformers.AutoModelForCausalLM.from_config(
      config, dtype=torch.float32
    ).eval()
  if flags.kind not in ('v2', 'v3'):  # goldens of those have plain norms
    for parameter in model.parameters():
      if parameter.ndim < 2:
        parameter.data.uniform_(0.8, 1.2)
  if flags.kind == 'deepseek_v32':
    small_index_keys(model)
  for name, buffer in model.named_buffers():
    if name.endswith('e_score_correction_bias'):
      buffer.normal_(0, 0.05)
  tokens = np.random.default_rng(flags.seed).integers(
    0, config.vocab_size, (2, 96)
  )
  expected = {'tokens': tokens.astype(np.int32)}
  ids = torch.from_numpy(tokens)
  with torch.no_grad():
    if flags.release or flags.mtp:
      layer = mtp_module(model)
      prefix = f'model.layers.{config.num_hidden_layers}.'
      config.architectures = [type(model).__name__]
      read = functools.partial(release, sparse=sparse)
      read = read if flags.release else dict
      tensors = read(views('', model)) | read(views(prefix, layer))
      for name, original in (
        ('embed_tokens.weight', 'model.embed_tokens.weight'),
        ('shared_head.head.weight', 'lm_head.weight'),
      ):
        tensors[prefix + name] = tensors[original].clone()
      write = write_release if flags.release else write_family
      write(flags.folder, config, tensors)
      run = lambda: mtp_logits(model, layer, ids).numpy()
      expected['mtp_logits'] = run()
      if sparse:
        expected['mtp_selected'] = selected(run)[-1]
    else:
      model.save_pretrained(flags.folder)
    if flags.kind == 'sarvam_mla':
      as_sarvam(flags.folder)
    if flags.kind == 'large3':
      as_large3(flags.folder, model, config)
    run = lambda: model(ids).logits.numpy()
    expected['logits'] = run()
    if sparse:
      expected['selected'] = np.stack(selected(run))
      indexers = [m for n, m in model.named_modules() if n.endswith('indexer')]
      for indexer in indexers:
        indexer.index_topk = len(tokens[0])
      expected['logits_dense'] = run()
      for indexer in indexers:
        indexer.index_topk = config.index_topk
    greedy = ids[:, :24]
    for _ in range(24):
      last = model(greedy).logits[:, -1:].argmax(-1)
      greedy = torch.cat([greedy, last], 1)
  expected['greedy'] = greedy.numpy().astype(np.int32)
  np.savez_compressed(flags.folder / 'expected.npz', **expected)


if __name__ == '__main__':
  main()
