"""GLM-4.7-Flash 30B-A3B: V3's parts with wide heads, and an MTP module.

  python -m experiments.train --config=configs/glm47_flash.py --workdir=DIR

Not run here. Variants: smoke. The network's numbers are those of transformers
5.24 (Glm4MoeLiteConfig), the token ids those of its tokenizer's end of text,
since there is no bos. Its training is not published: the optimizer, schedules
and sequences here are V3's, at a batch that the model's size allows.
"""

from configs import variant
from mla_moe import config as c


def get_config(arg=''):
  """Returns 47 layers of 20 heads, of which 46 have 64 experts."""
  model = c.ModelConfig(
    vocab=154880,
    dim=2048,
    layers=47,
    dense_layers=1,
    dense_width=10240,
    norm_eps=1e-5,
    max_positions=202752,
    init_std=0.02,
    bos_id=154820,
    eos_id=154820,
    mla=c.MLAConfig(
      heads=20,
      query_rank=768,
      nope_dim=192,
      value_dim=256,
      rope=c.RopeConfig(theta=1e6),
    ),
    moe=c.MoEConfig(
      experts=64,
      top_k=4,
      width=1536,
      groups=1,
      top_groups=1,
      scale=1.8,
    ),
    release=c.ReleaseConfig(family='glm4_moe_lite'),
  )
  data = c.DataConfig(batch_size=4096, micro_batch=256)
  run = c.RunConfig(steps=100_000)
  return c.thaw(variant(c.Config(model=model, data=data, run=run), arg))
