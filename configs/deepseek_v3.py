"""DeepSeek-V3 671B-A37B and its published recipe (report, sections 4.1 to 4.3).

  python -m experiments.train --config=configs/deepseek_v3.py --workdir=DIR

2048 H800 and 2.664M GPU hours in the report; not run here. Variants: 4k (the
default: pre-training on 14.8T tokens, no YaRN), 32k and 128k (the context
extensions, YaRN on, 1000 steps each, continued from the one before), smoke.
Linear layers multiply in FP8 by tiles and blocks (section 3.3). The report says
that the batch rises gradually over 469B tokens; the linear shape is ours. So
are Adam's epsilon and the choice of leaves without weight decay.
"""

import dataclasses

from configs import variant
from mla_moe import config as c


def get_config(arg=''):
  """Returns mla_moe.config's defaults, which are V3's, in FP8."""
  data = c.DataConfig(
    seq_len=4096,
    batch_size=15360,
    batch_start=3072,
    ramp_tokens=469e9,
    micro_batch=512,
  )
  run = c.RunConfig(steps=243425)
  model = c.ModelConfig(bos_id=0, eos_id=1, precision='fp8_block')
  pretrain = c.Config(model=model, data=data, run=run)
  return c.thaw(
    variant(
      pretrain,
      arg,
      **{
        '4k': pretrain,
        '32k': extend(pretrain, 32768, 1920, 64),
        '128k': extend(pretrain, 131072, 480, 16),
      },
    )
  )


def extend(config, seq_len, batch, micro):
  """Returns an extension: YaRN, constant rate, final bias rate, MTP weight."""
  rope = c.RopeConfig(factor=40.0, original_positions=4096)
  mla = dataclasses.replace(config.model.mla, rope=rope)
  optim = dataclasses.replace(
    config.optim,
    learning_rate=7.3e-6,
    warmup_steps=0,
    phases=(('constant', 1000.0 * batch * seq_len, 1.0),),
    bias_tokens=0.0,
    mtp_tokens=0.0,
  )
  return dataclasses.replace(
    config,
    model=dataclasses.replace(config.model, mla=mla),
    optim=optim,
    data=c.DataConfig(seq_len=seq_len, batch_size=batch, micro_batch=micro),
    run=c.RunConfig(steps=1000),
  )
