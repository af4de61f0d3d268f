"""GigaChat3-10B-A1.8B (Lightning): a small V3 without query latents, with MTP.

  python -m experiments.train --config=configs/gigachat3_10b.py --workdir=DIR

Not run here, and not compared with the release, whose config.json was not at
hand. Published are 26 layers, MLA without a query latent, MTP, 256K positions,
10B parameters of which 1.8B are active, and 20T tokens of training. The widths,
the experts, the vocabulary, the token ids, theta and the scale were not found
published; the values here give 10.7B and 1.8B. Converting a release takes its
own numbers, and `experiments.inspect` prints them. The recipe is not published:
it is V3's here. Variants: smoke.
"""

from configs import variant
from mla_moe import config as c


def get_config(arg=''):
  """Returns 26 layers of 32 heads, of which 25 have 64 experts."""
  model = c.ModelConfig(
    vocab=128256,
    dim=1536,
    layers=26,
    dense_layers=1,
    dense_width=8960,
    max_positions=262144,
    bos_id=1,
    eos_id=2,
    mla=c.MLAConfig(
      heads=32,
      query_rank=0,
      value_dim=192,
      rope=c.RopeConfig(theta=1e5),
    ),
    moe=c.MoEConfig(
      experts=64, top_k=4, width=1280, groups=1, top_groups=1, scale=1.0
    ),
  )
  data = c.DataConfig(batch_size=4096, micro_batch=256)
  run = c.RunConfig(steps=1_192_093)  # 20T tokens
  return c.thaw(variant(c.Config(model=model, data=data, run=run), arg))
