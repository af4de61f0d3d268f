"""Fine-tuning by adapters over a frozen release, one device at a time.

  python -m experiments.sft --config=configs/lora.py:lite_l4 \\
    --data=FILE.jsonl --config.run.base=DIR --workdir=DIR2

Variants name the model and the device: lite_l4 (the default; V2-Lite in int4 on
an L4 of 24 GB), lite_a100 (int8, 40 GB), lite_h100 (its own bfloat16, 80 GB),
lite_v5e8, flash_h100 (GLM-4.7-Flash, int8), flash_v6e4, moonlight_a100 (int8);
tiny, for `configs/tiny.py`; smoke. None but tiny is run here: docs/lora.md has
the plan's memory.

The rates are no paper's. 2e-4 with rank 16 is the usual start of LoRA, a tenth
of it for A by LoRA+ is not taken (`plus` is 1). The router is frozen
with the rest, and so is its bias: with `optim.bias_rate` above 0 it would move
tokens to experts that were not trained for them.
"""

import dataclasses

from configs import (
  deepseek_v2_lite,
  follow_run,
  glm47_flash,
  moonlight_16b,
  variant,
)
from configs import tiny as small
from mla_moe import config as c


def get_config(arg=''):
  """Returns a model's config with adapters over its release."""
  lite = c.freeze(deepseek_v2_lite.get_config('yarn'))
  flash = c.freeze(glm47_flash.get_config())
  moonlight = c.freeze(moonlight_16b.get_config())
  tiny = c.freeze(small.get_config())
  base = adapted(lite, 'int4', 16, (2048, 16, 1))
  variants = dict(
    lite_l4=base,
    lite_a100=adapted(lite, 'int8', 16, (4096, 16, 1)),
    lite_h100=adapted(lite, 'trained', 16, (4096, 16, 2)),
    lite_v5e8=adapted(lite, 'int8', 16, (4096, 32, 8), expert=8),
    flash_h100=adapted(flash, 'int8', 16, (4096, 16, 1)),
    flash_v6e4=adapted(flash, 'int8', 16, (4096, 32, 4), expert=4),
    moonlight_a100=adapted(moonlight, 'int8', 16, (4096, 16, 1)),
    tiny=adapted(tiny, 'int8', 4, (256, 8, 0)),
  )
  return follow_run(c.thaw(variant(base, arg, **variants)))


def adapted(config, base, rank, sizes, expert=1):
  """Returns the config with adapters; `sizes`: columns, rows, micro-batch."""
  length, batch, micro = sizes
  replace = dataclasses.replace
  lora = c.LoRAConfig(rank=rank, alpha=2.0 * rank)
  model = replace(config.model, base=base, lora=lora, precision='bf16')
  steps = 1000
  optim = replace(
    config.optim,
    optimizer='adamw',
    learning_rate=2e-4,
    warmup_steps=20,
    phases=(('cosine', float(steps * batch * length), 0.1),),
    weight_decay=0.0,
    bias_rate=0.0,
    bias_rate_final=0.0,
    mtp_loss=0.0,
    mtp_loss_final=0.0,
  )
  data = replace(
    config.data,
    packing='separate',
    seq_len=length,
    batch_size=batch,
    batch_start=0,
    ramp_tokens=0.0,
    micro_batch=micro,
    fim_rate=0.0,
  )
  run = replace(config.run, steps=steps, eval_every=100, sample_every=100)
  run = replace(run, save_every=100, check_every=0)
  mesh = replace(config.mesh, expert=expert)
  return replace(
    config, model=model, optim=optim, data=data, run=run, mesh=mesh
  )
