"""Makes tests/golden/llama with transformers: a random Llama and its logits.

  python tests/make_llama_golden.py --folder=tests/golden/llama

Writes expected.npz: the tensors by their names in a release, `tokens` [2, 24],
their `logits`, and the `greedy` continuation of the first 8 tokens. Four heads
share two heads of keys and values, and all their features are rotated.

Needs torch and transformers; the case here is from torch 2.13.0 and
transformers 5.24.0. Nothing here imports mla_moe.
"""

from __future__ import annotations

import argparse
import pathlib

import numpy as np

SIZES = dict(
  vocab_size=64,
  hidden_size=32,
  intermediate_size=48,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  head_dim=8,
  max_position_embeddings=64,
  rms_norm_eps=1e-5,
  initializer_range=0.2,
  tie_word_embeddings=False,
  rope_parameters=dict(rope_type='default', rope_theta=500.0),
)


def main():
  import torch
  import transformers

  parser = argparse.ArgumentParser()
  parser.add_argument('--folder', required=True, type=pathlib.Path)
  folder = parser.parse_args().folder
  torch.manual_seed(0)
  config = transformers.LlamaConfig(**SIZES, attn_implementation='eager')
  model = transformers.LlamaForCausalLM(config).eval()
  generator = np.random.default_rng(0)
  for name, w in model.named_parameters():
    if 'norm' in name:  # a release's are not 1
      noise = generator.uniform(0.5, 1.5, w.shape)
      w.data = torch.tensor(noise, dtype=torch.float32)
  tokens = generator.integers(0, SIZES['vocab_size'], (2, 24))
  greedy = torch.tensor(tokens[:, :8])
  with torch.no_grad():
    logits = model(torch.tensor(tokens)).logits.numpy()
    for _ in range(16):
      last = model(greedy).logits[:, -1].argmax(-1, keepdim=True)
      greedy = torch.cat([greedy, last], dim=1)
  tensors = {k: w.numpy() for k, w in model.state_dict().items()}
  folder.mkdir(parents=True, exist_ok=True)
  np.savez_compressed(
    folder / 'expected.npz',
    tokens=tokens.astype(np.int32),
    logits=logits,
    greedy=greedy.numpy().astype(np.int32),
    **tensors,
  )


if __name__ == '__main__':
  main()
