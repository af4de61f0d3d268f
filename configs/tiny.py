"""The smallest run that learns: a V3 in miniature on Python's own source files.

  make train

or `python -m experiments.train --config=configs/tiny.py --workdir=runs/tiny`.
It needs two CPU cores and no download; the README has its time and its result.
Muon, as Moonlight and Kimi K2 have it, learns much faster from so few tokens:
2.11 held-out bits per byte after 600 steps (2.09 after 640 at 4e-3), where 640
steps of AdamW at 3e-3 reached 2.39 (8e-3 was worse). Variants: smoke; micro,
with a dense and a MoE layer and steps of milliseconds, for fault tests.
"""

import dataclasses

from configs import follow_run, variant
from mla_moe import config as c


def recipe(tokens):
  """Returns the optimizer's config of a run of this many tokens."""
  return c.OptimConfig(
    optimizer='muon',
    learning_rate=8e-3,
    warmup_steps=30,
    phases=(
      ('constant', 0.4 * tokens, 1.0),
      ('cosine', 0.5 * tokens, 0.1),
      ('constant', 0.1 * tokens, 0.03),
    ),
    bias_rate=5e-3,
    bias_tokens=0.95 * tokens,
    mtp_tokens=0.7 * tokens,
  )


def get_config(arg=''):
  """Returns V3's parts at width 128: groups, bias, shared expert, MTP."""
  model = c.ModelConfig(
    vocab=0,  # the tokenizer's
    dim=128,
    layers=4,
    dense_layers=1,
    dense_width=384,
    max_positions=2048,
    init_std=0.04,
    dtype='float32',
    compute=c.ComputeConfig(remat='products'),
    mla=c.MLAConfig(
      heads=4,
      query_rank=96,
      kv_rank=64,
      nope_dim=32,
      rope_dim=16,
      value_dim=32,
    ),
    moe=c.MoEConfig(experts=16, top_k=4, width=64, groups=4, top_groups=2),
  )
  steps, batch, length = 600, 8, 256
  tokens = steps * batch * length
  optim = recipe(tokens)
  data = c.DataConfig(seq_len=length, batch_size=batch)
  run = c.RunConfig(
    steps=steps, eval_every=100, sample_every=300, save_every=200
  )
  config = c.Config(model=model, optim=optim, data=data, run=run)
  values = c.thaw(variant(config, arg, micro=micro(config)))
  return values if arg else follow_run(values)


def micro(config):
  """Returns one dense layer, one of experts, no MTP: a step of milliseconds."""
  change = dataclasses.replace
  model = change(
    config.model,
    dim=16,
    layers=2,
    dense_width=32,
    compute=c.ComputeConfig(remat='none'),
    mla=c.MLAConfig(
      heads=2, query_rank=0, kv_rank=8, nope_dim=8, rope_dim=4, value_dim=8
    ),
    moe=change(
      config.model.moe, experts=4, top_k=2, width=8, groups=1, top_groups=1
    ),
    mtp=c.MTPConfig(0),
  )
  optim = change(config.optim, optimizer='adamw', warmup_steps=5)
  run = change(
    config.run,
    steps=60,
    log_every=1,
    eval_every=0,
    sample_every=0,
    save_every=5,
    check_every=5,
    step_timeout=60.0,
  )
  data = change(config.data, seq_len=16, batch_size=8)
  return change(config, model=model, optim=optim, data=data, run=run)
