"""Makes tests/golden/peft: an adapter that the library peft wrote.

  python tests/make_peft_golden.py

The base is tests/golden/v3_yarn. Attention's matrices have adapters, and those
of experts as parameters (`target_parameters`), with random A and B.
expected.npz has tokens [1, 32] and the logits of peft's own forward pass. Needs
torch, transformers (5.24.0 made the case) and peft (0.21.2); nothing here
imports mla_moe.
"""

from __future__ import annotations

import json
import pathlib

import numpy as np
import peft
import torch
import transformers

GOLDEN = pathlib.Path(__file__).parent / 'golden'
MODULES = 'q_a q_b kv_b o'.split()


def main():
  torch.manual_seed(0)
  base = transformers.AutoModelForCausalLM.from_pretrained(
    GOLDEN / 'v3_yarn', dtype=torch.float32
  )
  config = peft.LoraConfig(
    r=2,
    lora_alpha=3,
    target_modules=[*(f'{x}_proj' for x in MODULES), 'kv_a_proj_with_mqa'],
    target_parameters=['mlp.experts.gate_up_proj', 'mlp.experts.down_proj'],
    task_type='CAUSAL_LM',
  )
  model = peft.get_peft_model(base, config).eval()
  with torch.no_grad():
    for name, x in model.named_parameters():
      if 'lora_' in name:
        x.copy_(torch.randn(x.shape) * 0.1)
  tokens = torch.randint(0, base.config.vocab_size, (1, 32))
  with torch.no_grad():
    logits = model(tokens).logits
    with model.disable_adapter():
      print('adapters move logits by', (model(tokens).logits - logits).std())
  folder = GOLDEN / 'peft'
  model.save_pretrained(folder)
  (folder / 'README.md').unlink(missing_ok=True)
  path = folder / 'adapter_config.json'
  values = json.loads(path.read_text())
  values['base_model_name_or_path'] = 'v3_yarn'  # no path of a machine
  path.write_text(json.dumps(values, indent=1, sort_keys=True) + '\n')
  np.savez(
    folder / 'expected.npz', tokens=tokens.numpy(), logits=logits.numpy()
  )


if __name__ == '__main__':
  main()
