"""A V3 in small, for a single GPU or a patient CPU: 64 experts, 8 groups.

  python -m experiments.train --config=configs/small.py --workdir=runs/small

Not run to its end yet. Variants: smoke.
"""

from configs import follow_run, variant
from mla_moe import config as c


def get_config(arg=''):
  """Returns DeepSeek-V3's parts at width 512."""
  model = c.ModelConfig(
    vocab=0,  # the tokenizer's
    dim=512,
    layers=8,
    dense_layers=1,
    dense_width=1536,
    max_positions=8192,
    init_std=0.02,
    mla=c.MLAConfig(
      heads=8,
      query_rank=256,
      kv_rank=128,
      nope_dim=64,
      rope_dim=32,
      value_dim=64,
    ),
    moe=c.MoEConfig(experts=64, top_k=6, width=192),
  )
  steps, batch, length = 3000, 32, 1024
  tokens = steps * batch * length
  optim = c.OptimConfig(
    learning_rate=1e-3,
    warmup_steps=100,
    phases=(
      ('constant', 0.5 * tokens, 1.0),
      ('cosine', 0.4 * tokens, 0.1),
      ('constant', 0.1 * tokens, 0.03),
    ),
    bias_tokens=0.95 * tokens,
    mtp_tokens=0.7 * tokens,
  )
  data = c.DataConfig(seq_len=length, batch_size=batch, micro_batch=8)
  run = c.RunConfig(
    steps=steps, eval_every=250, sample_every=500, save_every=250
  )
  config = c.Config(model=model, optim=optim, data=data, run=run)
  values = c.thaw(variant(config, arg))
  return values if arg else follow_run(values)
