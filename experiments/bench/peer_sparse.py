"""A forward pass of transformers' DeepSeek-V3.2 under torch.

This program imports nothing of ours. It answers as `ours_sparse` does.
"""

from __future__ import annotations

import json
import pathlib
import sys
import time


def main() -> None:
  """The peer; its argument is 'eager' or 'sdpa'."""
  import torch
  import transformers

  mode, job = sys.argv[1], json.loads(sys.stdin.readline())
  torch.manual_seed(0)
  config = transformers.DeepseekV32Config(
    vocab_size=256,
    hidden_size=job['dim'],
    intermediate_size=job['dim'],
    num_hidden_layers=1,
    num_attention_heads=job['heads'],
    num_key_value_heads=job['heads'],
    q_lora_rank=job['query_rank'],
    kv_lora_rank=job['kv_rank'],
    qk_nope_head_dim=job['nope_dim'],
    qk_rope_head_dim=job['rope_dim'],
    v_head_dim=job['value_dim'],
    index_n_heads=job['index_heads'],
    index_head_dim=job['index_dim'],
    index_topk=job['topk'],
    mlp_layer_types=['dense'],
    max_position_embeddings=1 << 20,
    use_cache=False,
    attn_implementation=mode,
  )
  model = transformers.AutoModelForCausalLM.from_config(config).eval()
  tokens = torch.randint(0, 256, (1, job['length']))

  @torch.inference_mode()
  def once(tokens):
    began = time.perf_counter()
    model(tokens).logits.sum().item()
    return time.perf_counter() - began

  once(tokens[:, :64])
  clear = pathlib.Path('/proc/self/clear_refs')  # the peak is now
  clear.write_text('5', encoding='utf-8')
  before = _kib('VmRSS')
  seconds = min(once(tokens) for _ in range(3))
  versions = f'torch {torch.__version__}, transformers '
  versions += transformers.__version__
  answer = {
    'seconds': seconds,
    'mib': (_kib('VmHWM') - before) / 1024,
    'versions': versions,
  }
  print(json.dumps(answer))


def _kib(field: str) -> int:
  """Returns a size of this process: VmRSS, or VmHWM, its peak."""
  status = pathlib.Path('/proc/self/status').read_text(encoding='utf-8')
  lines = status.splitlines()
  return int(next(x for x in lines if x.startswith(field)).split()[1])


if __name__ == '__main__':
  main()
