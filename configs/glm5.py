"""GLM-5 744B-A40B: sparse attention whose indexer rotates neighbours.

  python -m experiments.plan --config=configs/glm5.py

Not run here. Variants: shared and smoke. The network's numbers are those of its
config.json and, for `shared`, of GLM-5.2's: 21 of 78 layers have an indexer,
the others take the set of the last one that has. Optimizer and schedules are
V3.2's: GLM-5's own are not published whole.
"""

import dataclasses

from configs import variant
from mla_moe import config as c


def get_config(arg=''):
  """Returns 78 layers of 64 heads, each of which reads 2,048 keys."""
  model = c.ModelConfig(
    vocab=154880,
    dim=6144,
    layers=78,
    dense_width=12288,
    norm_eps=1e-5,
    max_positions=202752,
    init_std=0.02,
    bos_id=154820,
    eos_id=154820,
    mla=c.MLAConfig(
      heads=64,
      query_rank=2048,
      nope_dim=192,
      value_dim=256,
      rope=c.RopeConfig(theta=1e6),
    ),
    dsa=c.DSAConfig(heads=32, interleaved=True),
    moe=c.MoEConfig(groups=1, top_groups=1),
    release=c.ReleaseConfig(family='glm_moe_dsa'),
  )
  optim = c.OptimConfig(learning_rate=7.3e-6, warmup_steps=0)
  data = c.DataConfig(seq_len=131072, batch_size=480, micro_batch=16)
  run = c.RunConfig(steps=1000)
  config = c.Config(model=model, optim=optim, data=data, run=run)
  full = lambda i: i < 3 or i % 4 == 2
  types = tuple(('shared', 'full')[full(i)] for i in range(model.layers))
  rope = dataclasses.replace(model.mla.rope, theta=8e6)
  shared = dataclasses.replace(
    model,
    max_positions=1048576,
    mla=dataclasses.replace(model.mla, rope=rope),
    dsa=dataclasses.replace(model.dsa, types=types),
  )
  shared = dataclasses.replace(config, model=shared)
  return c.thaw(variant(config, arg, shared=shared))
