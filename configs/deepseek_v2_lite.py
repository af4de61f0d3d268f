"""DeepSeek-V2-Lite 16B-A2.4B and its recipe (V2 report, appendix B).

  python -m experiments.train --config=configs/deepseek_v2_lite.py --workdir=DIR

Not run here. Variants: yarn (the released model's positions, 160K), smoke.
"""

import dataclasses

from configs import variant
from mla_moe import config as c

YARN = c.RopeConfig(
  factor=40.0, original_positions=4096, mscale=0.707, mscale_all_dim=0.707
)


def get_config(arg=''):
  """Returns a full query, greedy softmax routing and two shared experts."""
  model = c.ModelConfig(
    vocab=102400,
    dim=2048,
    layers=27,
    dense_layers=1,
    dense_width=10944,
    bos_id=100000,
    eos_id=100001,
    mla=c.MLAConfig(heads=16, query_rank=0),
    moe=c.MoEConfig(
      experts=64,
      top_k=6,
      shared=2,
      width=1408,
      groups=1,
      top_groups=1,
      scoring='softmax',
      method='greedy',
      normalize=False,
      scale=1.0,
    ),
    mtp=c.MTPConfig(depth=0),
  )
  optim = c.OptimConfig(
    learning_rate=4.2e-4,
    phases=(
      ('constant', 0.8 * 5.7e12, 1.0),
      ('constant', 0.1 * 5.7e12, 0.316),
      ('constant', 0.1 * 5.7e12, 0.316**2),
    ),
    balance_loss=0.001,
    bias_rate=0.0,
  )
  data = c.DataConfig(
    seq_len=4096, batch_size=4608, micro_batch=576, fim_rate=0.0
  )
  run = c.RunConfig(steps=301997)
  config = c.Config(model=model, optim=optim, data=data, run=run)
  mla = dataclasses.replace(model.mla, rope=YARN)
  yarn = dataclasses.replace(config, model=dataclasses.replace(model, mla=mla))
  return c.thaw(variant(config, arg, yarn=yarn))
