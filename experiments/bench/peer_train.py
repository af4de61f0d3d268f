"""A training step of transformers' DeepSeek-V3 under torch, as a contender.

This program imports nothing of ours, so that any Python with torch and
transformers can run it. It answers each line of its standard input with the
seconds of one whole training step (forward, backward, AdamW); the first answer
comes after the warm-up.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time


def config(shape: dict, use_cache: bool):
  """Returns transformers' config of a shape."""
  import transformers

  return transformers.DeepseekV3Config(
    vocab_size=shape['vocab'],
    hidden_size=shape['dim'],
    intermediate_size=shape['dense_width'],
    moe_intermediate_size=shape['width'],
    num_hidden_layers=shape['layers'],
    first_k_dense_replace=shape['dense_layers'],
    num_attention_heads=shape['heads'],
    num_key_value_heads=shape['heads'],
    q_lora_rank=shape['query_rank'],
    kv_lora_rank=shape['kv_rank'],
    qk_nope_head_dim=shape['nope_dim'],
    qk_rope_head_dim=shape['rope_dim'],
    v_head_dim=shape['value_dim'],
    n_routed_experts=shape['experts'],
    num_experts_per_tok=shape['top_k'],
    n_group=shape['groups'],
    topk_group=shape['top_groups'],
    n_shared_experts=shape['shared'],
    max_position_embeddings=4096,
    use_cache=use_cache,
  )


def main() -> None:
  """The contender; a mode is 'float32', '... compile' or 'bf16 autocast'."""
  import torch
  import transformers

  job = json.loads(sys.stdin.readline())
  shape, mode = job['shape'], job['mode']
  torch.manual_seed(0)
  model = transformers.AutoModelForCausalLM.from_config(
    config(shape, use_cache=False), experts_implementation='grouped_mm'
  )
  model.train()
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
  size = (shape['batch'], shape['length'])
  tokens = torch.randint(0, shape['vocab'], size)
  run = torch.compile(model) if 'compile' in mode else model

  def step():
    began = time.perf_counter()
    autocast = contextlib.nullcontext()
    if 'bf16' in mode:
      autocast = torch.autocast('cpu', dtype=torch.bfloat16)
    with autocast:
      loss = run(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    loss.item()
    return time.perf_counter() - began

  for _ in range(2):
    step()
  versions = f'torch {torch.__version__}, transformers '
  print(json.dumps(versions + transformers.__version__), flush=True)
  for _ in sys.stdin:
    print(json.dumps(step()), flush=True)


if __name__ == '__main__':
  main()
