"""The ladder of the shipped ablations: a small V3 at three sizes.

The files beside this one are ablations for `python -m experiments.ablate`: each
names its arms, functions from a size's config to the arm's. The numbers of a
paper stand in each file's `paper`.

Every size is V3 in miniature: a dense layer, then layers of 16 experts of which
a token has 4, and one shared expert; no groups, no MTP, which their ablations
add. The width of the dense layers is that of a token's five experts, so a model
of dense layers alone has as many active parameters (but for the router). The
recipe is that of `configs/tiny.py`: Muon, 8e-3, a fall to a thirtieth.
"""

import dataclasses

from configs import tiny
from mla_moe import config as c

# Name: dim, layers, heads, width of an expert, steps.
LADDER = {
  's': (64, 3, 2, 32, 400),
  'm': (96, 4, 3, 48, 600),
  'l': (128, 4, 4, 64, 900),
}


def sizes():
  """Returns {name: Config} of the ladder, smallest first."""
  return {name: size(*numbers) for name, numbers in LADDER.items()}


def size(dim, layers, heads, width, steps):
  """Returns a V3 of these sizes; a step reads 8 rows of 256 bytes."""
  model = c.ModelConfig(
    vocab=0,  # the tokenizer's
    dim=dim,
    layers=layers,
    dense_layers=1,
    dense_width=5 * width,
    max_positions=1024,
    init_std=0.04,
    dtype='float32',
    compute=c.ComputeConfig(remat='none'),
    mla=c.MLAConfig(
      heads=heads,
      query_rank=0,
      kv_rank=dim // 2,
      nope_dim=32,
      rope_dim=16,
      value_dim=32,
    ),
    moe=c.MoEConfig(
      experts=16, top_k=4, shared=1, width=width, groups=1, top_groups=1
    ),
    mtp=c.MTPConfig(0),
  )
  optim = tiny.recipe(steps * 8 * 256)
  data = c.DataConfig(seq_len=256, batch_size=8)
  run = c.RunConfig(steps=steps, eval_batches=24)
  return c.Config(model=model, optim=optim, data=data, run=run)


def of_model(config, **fields):
  """Returns the config with other fields of its model."""
  model = dataclasses.replace(config.model, **fields)
  return dataclasses.replace(config, model=model)


def of_moe(config, **fields):
  """Returns the config with other fields of its experts."""
  moe = dataclasses.replace(config.model.moe, **fields)
  return of_model(config, moe=moe)


def of_optim(config, **fields):
  """Returns the config with other fields of its optimizer."""
  optim = dataclasses.replace(config.optim, **fields)
  return dataclasses.replace(config, optim=optim)
