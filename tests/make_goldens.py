"""Makes golden cases with transformers: a random model and what it computes.

  python tests/make_goldens.py --folder=DIR --kind=v3 --seed=1 n_group=1 topk_group=1

Writes a `save_pretrained` folder and expected.npz: tokens [2, 96], the logits
of the whole sequence and the greedy continuation of the first 24 tokens, by
repeated full forward. `name=value` pairs override the configuration. Needs
torch and transformers; the cases in tests/golden are of transformers 5.23.0.
"""

from __future__ import annotations

import argparse
import ast
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


def main() -> None:
  """Makes one case."""
  import torch
  import transformers

  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--folder', required=True, type=pathlib.Path)
  parser.add_argument('--kind', choices=sorted(KINDS), default='v3')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('overrides', nargs='*')
  flags = parser.parse_args()
  pairs = [pair.split('=', 1) for pair in flags.overrides]
  given = {key: ast.literal_eval(value) for key, value in pairs}
  v3 = flags.kind == 'v3'
  kind = transformers.DeepseekV3Config if v3 else transformers.DeepseekV2Config
  torch.manual_seed(flags.seed)
  config = kind(**{**SMALL, **KINDS[flags.kind], **given})
  model = transformers.AutoModelForCausalLM.from_config(
    config, dtype=torch.float32
  ).eval()
  for name, buffer in model.named_buffers():
    if name.endswith('e_score_correction_bias'):
      buffer.normal_(0, 0.05)
  tokens = np.random.default_rng(flags.seed).integers(
    0, config.vocab_size, (2, 96)
  )
  with torch.no_grad():
    logits = model(torch.from_numpy(tokens)).logits.numpy()
    greedy = torch.from_numpy(tokens[:, :24])
    for _ in range(24):
      last = model(greedy).logits[:, -1:].argmax(-1)
      greedy = torch.cat([greedy, last], 1)
  model.save_pretrained(flags.folder)
  np.savez_compressed(
    flags.folder / 'expected.npz',
    tokens=tokens.astype(np.int32),
    logits=logits,
    greedy=greedy.numpy().astype(np.int32),
  )


if __name__ == '__main__':
  main()
