"""The peer of the decoding benchmark: transformers' DeepSeek-V3 under torch.

A program of its own, like `peer_transformers`. It answers each line of its
standard input with the seconds of a prefill and of the decoding steps after it,
greedy, over a static cache; the first answer comes after the warm-up.
"""

from __future__ import annotations

import json
import sys
import time

import peer_transformers


def main() -> None:
  """Reads {'shape': ..., 'mode': ...}, warms up, then measures at each line."""
  import torch
  import transformers

  job = json.loads(sys.stdin.readline())
  shape, mode = job['shape'], job['mode']
  new = shape['new']
  torch.manual_seed(0)
  model = transformers.AutoModelForCausalLM.from_config(
    peer_transformers.config(shape, use_cache=True),
    experts_implementation='grouped_mm',
  )
  model.eval()
  size = (shape['batch'], shape['length'])
  tokens = torch.randint(0, shape['vocab'], size)
  longest = shape['length'] + new
  if 'static' in mode:
    cache = transformers.StaticCache(config=model.config, max_cache_len=longest)
  run = torch.compile(model) if 'compile' in mode else model

  @torch.inference_mode()
  def once():
    nonlocal cache
    if 'static' in mode:
      cache.reset()
    else:
      cache = transformers.DynamicCache(config=model.config)
    began = time.perf_counter()
    logits = model(tokens, past_key_values=cache, logits_to_keep=1).logits
    newest = logits[:, -1].argmax(-1, keepdim=True)
    newest[0].item()
    between = time.perf_counter()
    for _ in range(new):
      logits = run(newest, past_key_values=cache).logits
      newest = logits[:, -1].argmax(-1, keepdim=True)
    newest[0].item()
    return between - began, time.perf_counter() - between

  cache = cache if 'static' in mode else None
  for _ in range(2):
    once()
  versions = f'torch {torch.__version__}, transformers '
  print(json.dumps(versions + transformers.__version__), flush=True)
  for _ in sys.stdin:
    print(json.dumps(once()), flush=True)


if __name__ == '__main__':
  main()
