"""Moonlight-16B-A3B and its recipe (its report, section 3.3): V3's parts, Muon.

  python -m experiments.train --config=configs/moonlight_16b.py --workdir=DIR

Not run here. Variants: smoke. The batch doubles from 2048 to 4096 sequences
after 200B tokens in the report; here it rises linearly until then. The init
std is not published; 0.006 is V3's.
"""

from configs import variant
from mla_moe import config as c


def get_config(arg=''):
  """Returns V3 without groups, query compression, YaRN and MTP."""
  model = c.ModelConfig(
    vocab=163840,
    dim=2048,
    layers=27,
    dense_layers=1,
    dense_width=11264,
    norm_eps=1e-5,
    max_positions=8192,
    bos_id=163584,
    eos_id=163586,
    mla=c.MLAConfig(heads=16, query_rank=0, rope=c.RopeConfig(theta=50000.0)),
    moe=c.MoEConfig(
      experts=64,
      top_k=6,
      shared=2,
      width=1408,
      groups=1,
      top_groups=1,
      scale=2.446,
    ),
    mtp=c.MTPConfig(depth=0),
  )
  warm = 100 * 4096 * 8192.0  # the cooldown's own 100 steps of warm-up
  optim = c.OptimConfig(
    optimizer='muon',
    learning_rate=4.2e-4,
    phases=(
      ('cosine', 5.2e12, 0.1),
      ('linear', warm, 1e-4 / 4.2e-4),
      ('linear', 500e9 - warm, 0.0),
    ),
    bias_tokens=5.2e12,
  )
  data = c.DataConfig(
    seq_len=8192,
    batch_size=4096,
    batch_start=2048,
    ramp_tokens=200e9,
    micro_batch=256,
    fim_rate=0.0,
  )
  run = c.RunConfig(steps=172561)
  return c.thaw(
    variant(c.Config(model=model, optim=optim, data=data, run=run), arg)
  )
