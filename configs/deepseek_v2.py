"""DeepSeek-V2 236B-A21B and its recipe (report, section 3.1).

  python -m experiments.train --config=configs/deepseek_v2.py --workdir=DIR

Not run here. Variants: 32k (1000 steps, batch 576, YaRN on), smoke. Of V2's
balance losses only the experts' own (0.003) is here; those of devices and
communication are not, nor is the dropping of tokens.
"""

import dataclasses

from configs import variant
from mla_moe import config as c

YARN = c.RopeConfig(
  factor=40.0, original_positions=4096, mscale=0.707, mscale_all_dim=0.707
)


def get_config(arg=''):
  """Returns softmax routing, 3 of 8 groups by best expert, no bias, no MTP."""
  model = c.ModelConfig(
    vocab=102400,
    dim=5120,
    layers=60,
    dense_layers=1,
    dense_width=12288,
    bos_id=100000,
    eos_id=100001,
    moe=c.MoEConfig(
      experts=160,
      top_k=6,
      shared=2,
      width=1536,
      groups=8,
      top_groups=3,
      scoring='softmax',
      method='group_limited_greedy',
      normalize=False,
      scale=16.0,
    ),
    mtp=c.MTPConfig(depth=0),
  )
  optim = c.OptimConfig(
    learning_rate=2.4e-4,
    phases=(
      ('constant', 0.6 * 8.1e12, 1.0),
      ('constant', 0.3 * 8.1e12, 0.316),
      ('constant', 0.1 * 8.1e12, 0.316**2),
    ),
    balance_loss=0.003,
    bias_rate=0.0,
  )
  data = c.DataConfig(
    seq_len=4096,
    batch_size=9216,
    batch_start=2304,
    ramp_tokens=225e9,
    micro_batch=288,
    fim_rate=0.0,
  )
  run = c.RunConfig(steps=220017)
  config = c.Config(model=model, optim=optim, data=data, run=run)
  mla = dataclasses.replace(model.mla, rope=YARN)
  longer = dataclasses.replace(
    config,
    model=dataclasses.replace(model, mla=mla),
    data=c.DataConfig(
      seq_len=32768, batch_size=576, micro_batch=36, fim_rate=0.0
    ),
    optim=dataclasses.replace(
      optim,
      learning_rate=2.4e-4 * 0.316**2,
      warmup_steps=0,
      phases=(('constant', 576.0 * 32768 * 1000, 1.0),),
    ),
    run=c.RunConfig(steps=1000),
  )
  return c.thaw(variant(config, arg, **{'32k': longer}))
