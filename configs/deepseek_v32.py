"""DeepSeek-V3.2 671B-A37B: V3 with sparse attention, in two stages.

  python -m experiments.train --config=configs/deepseek_v32.py:warmup \
    --init=RUN_OF_V3 --workdir=DIR
  python -m experiments.plan --config=configs/deepseek_v32.py:warmup

and then `:sparse`, begun from the warm-up's run; not run here. Variants: warmup
(the indexers alone, from dense attention: 2.1B tokens), sparse (the default:
all parameters, 943.7B tokens) and smoke; `warmup,smoke` and `sparse,smoke` are
the stages at toy size. Rates, steps and batches are the report's (section
2.1.1). It does not print the losses' weights, the optimizer's other numbers or
whether MTP's indexer learns alike: those are V3's, a weight of 1, and yes.
"""

import dataclasses

from configs import variant
from mla_moe import config as c


def get_config(arg=''):
  """Returns V3 at 128K with an indexer of 64 heads, for one of the stages."""
  rope = c.RopeConfig(factor=40.0, original_positions=4096)
  model = c.ModelConfig(
    bos_id=0,
    eos_id=1,
    precision='fp8_block',
    mla=c.MLAConfig(rope=rope),
    dsa=c.DSAConfig(heads=64),
  )
  length, steps, batch = 131072, 15000, 480
  optim = c.OptimConfig(
    learning_rate=7.3e-6,
    warmup_steps=0,
    phases=(('constant', float(steps * batch * length), 1.0),),
    bias_tokens=0.0,
    mtp_tokens=0.0,
  )
  data = c.DataConfig(seq_len=length, batch_size=batch, micro_batch=16)
  run = c.RunConfig(steps=steps)
  sparse = c.Config(model=model, optim=optim, data=data, run=run)
  stages = {'warmup': warmup(sparse), 'sparse': sparse}
  return c.thaw(variant(sparse, arg, **stages))


def warmup(config):
  """Returns the dense warm-up: 1000 steps of 16 sequences, the trunk frozen."""
  change = dataclasses.replace
  dsa = change(config.model.dsa, attention='dense')
  optim = change(
    config.optim, trains='indexer', learning_rate=1e-3, bias_rate_final=0.0
  )
  return change(
    config,
    model=change(config.model, dsa=dsa),
    optim=optim,
    data=change(config.data, batch_size=16),
    run=change(config.run, steps=1000),
  )
