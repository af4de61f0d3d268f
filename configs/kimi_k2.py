"""Kimi K2 1T-A32B and the published parts of its recipe.

  python -m experiments.train --config=configs/kimi_k2.py --workdir=DIR

Not run here. Variants: 32k (the last 60B tokens), 128k (YaRN, as released),
smoke. Muon takes the place of MuonClip, whose clip of attention logits is not
built. The init std is V3's.
"""

import dataclasses

from configs import variant
from mla_moe import config as c

YARN = c.RopeConfig(
  theta=50000.0,
  factor=32.0,
  original_positions=4096,
  beta_fast=1.0,
  beta_slow=1.0,
)


def get_config(arg=''):
  """Returns V3 with 384 experts, half of the heads, no groups, no MTP."""
  model = c.ModelConfig(
    vocab=163840,
    dense_layers=1,
    max_positions=131072,
    bos_id=163584,
    eos_id=163585,
    mla=c.MLAConfig(heads=64, rope=c.RopeConfig(theta=50000.0)),
    moe=c.MoEConfig(experts=384, groups=1, top_groups=1, scale=2.827),
    mtp=c.MTPConfig(depth=0),
  )
  optim = c.OptimConfig(
    optimizer='muon',
    learning_rate=2e-4,
    warmup_steps=500,
    phases=(
      ('constant', 10e12, 1.0),
      ('cosine', 5.5e12, 0.1),
      ('linear', 400e9, 7e-6 / 2e-4),
    ),
    bias_tokens=15.5e12,
  )
  data = c.DataConfig(
    seq_len=4096, batch_size=16384, micro_batch=512, fim_rate=0.0
  )
  run = c.RunConfig(steps=236929)
  config = c.Config(model=model, optim=optim, data=data, run=run)
  final = dataclasses.replace(
    optim, learning_rate=7e-6, warmup_steps=0, bias_tokens=0.0
  )
  longer = dataclasses.replace(
    config,
    optim=dataclasses.replace(final, phases=(('constant', 60e9, 1.0),)),
    data=c.DataConfig(
      seq_len=32768, batch_size=2048, micro_batch=64, fim_rate=0.0
    ),
    run=c.RunConfig(steps=895),
  )
  mla = dataclasses.replace(model.mla, rope=YARN)
  longest = dataclasses.replace(
    longer,
    model=dataclasses.replace(model, mla=mla),
    data=c.DataConfig(
      seq_len=131072, batch_size=512, micro_batch=16, fim_rate=0.0
    ),
  )
  return c.thaw(variant(config, arg, **{'32k': longer, '128k': longest}))
