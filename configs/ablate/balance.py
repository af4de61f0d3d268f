"""Balance by a bias (V3), by an auxiliary loss, or by nothing.

`bias` and `loss` have the best of five rates and of five weights, by held-out
loss, on seeds of their own (docs/ablate.md); `bias_low` and `loss_low` have the
paper's. MaxVio stands in the page's costs: how far the busiest expert was above
the mean load in the last chunk. The model is that of the second notebook.
"""

import dataclasses

from configs import ablate
from mla_moe import config as c


def get_ablation():
  """Returns ways of balance, at equal tokens."""
  return {
    'sizes': {'notebook': notebook()},
    'arms': {
      'nothing': lambda config: weighed(config, 0.0, 0.0),
      'bias': lambda config: weighed(config, 3e-3, 0.0),
      'loss': lambda config: weighed(config, 0.0, 0.1),
      'bias_low': lambda config: weighed(config, 1e-3, 0.0),
      'loss_low': lambda config: weighed(config, 0.0, 1e-3),
    },
    'equal': 'tokens',
    'paper': PAPER,
  }


def weighed(config, rate, weight):
  """Returns the config with a rate of the bias and a weight of the loss."""
  return ablate.of_optim(config, bias_rate=rate, balance_loss=weight)


def notebook():
  """Returns 200 steps of 1,024 bytes, AdamW, its rate falling to a tenth."""
  config = ablate.size(dim=64, layers=3, heads=2, width=32, steps=200)
  model = config.model
  mla = dataclasses.replace(model.mla, nope_dim=16, rope_dim=8, value_dim=16)
  moe = dataclasses.replace(model.moe, scale=1.0)
  own = dict(dense_width=128, init_std=0.05)
  model = dataclasses.replace(model, mla=mla, moe=moe, **own)
  optim = dataclasses.replace(
    config.optim,
    optimizer='adamw',
    learning_rate=6e-3,
    warmup_steps=20,
    phases=(('cosine', 200 * 1024, 0.1),),
    bias_tokens=1e12,
  )
  data = c.DataConfig(seq_len=128, batch_size=8)
  run = dataclasses.replace(config.run, eval_batches=48)
  config = dataclasses.replace(config, model=model, optim=optim)
  return dataclasses.replace(config, data=data, run=run)


PAPER = """\
Wang et al. 2024 (arXiv 2408.15664, table 2), validation perplexity and MaxVio:

                   perplexity   MaxVio
  1B, loss 0.001         9.56     0.72
  1B, bias 0.001         9.50     0.04
  3B, loss 0.001         7.97     0.52
  3B, bias 0.001         7.92     0.04

DeepSeek-V3 (arXiv 2412.19437, table 5), bits per byte of the Pile's test set:

                    loss    bias
  15.7B, 1.33T     0.727   0.724
  228.7B, 578B     0.656   0.652"""
