"""Decoding of transformers' DeepSeek-V3 under torch, as a contender.

This program imports nothing of ours but its neighbour `peer_train`. It answers
each line of its standard input with the seconds of a prefill and of the greedy
steps after it; the first answer comes after the warm-up.
"""

from __future__ import annotations

import json
import sys
import time


def main() -> None:
  """The contender; a mode is 'static compile' (static cache) or 'plain'."""
  import peer_train  # as a script, whose folder is on the path
  import torch
  import transformers

  job = json.loads(sys.stdin.readline())
  shape, mode = job['shape'], job['mode']
  steps = shape['steps']
  torch.manual_seed(0)
  model = transformers.AutoModelForCausalLM.from_config(
    peer_train.config(shape, use_cache=True),
    experts_implementation='grouped_mm',
  )
  model.eval()
  size = (shape['batch'], shape['length'])
  prompts = torch.randint(0, shape['vocab'], size)
  longest = shape['length'] + steps
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
    logits = model(prompts, past_key_values=cache, logits_to_keep=1).logits
    tokens = logits[:, -1].argmax(-1, keepdim=True)
    tokens[0].item()
    between = time.perf_counter()
    for _ in range(steps):
      logits = run(tokens, past_key_values=cache).logits
      tokens = logits[:, -1].argmax(-1, keepdim=True)
    tokens[0].item()
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
