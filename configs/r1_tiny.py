"""A model that learns a verifiable task by reinforcement, on two CPU cores.

  make r1

or `python -m experiments.r1`: from nothing to a model that sorts eight digits.
Its first stage is `cold`, for `experiments.sft`; the others are for
`experiments.rl`, each a variant of the literature by its fields alone:

  zero   R1-Zero's GRPO at this size (the default)
  dr     Dr. GRPO: advantages not divided by their spread, a constant length
  dapo   DAPO: the mean over tokens, a higher upper clip, groups with a spread
  gspo   GSPO: one ratio an answer
  cispo  CISPO: the ratio is a capped weight, and no token loses its gradient
  v32    V3.2: no spread, the unbiased KL estimate, stale worse answers dropped,
         the rollout's experts
  distil V4's on-policy distillation: needs --teacher=RUN, learns from no reward
  anneal zero, whose rate falls to 0 in its second half: for countdown

One update follows each rollout: with four at this rate the policy collapses.
Adam's moments are fresh, hence the warm-up.
"""

import dataclasses

from configs import follow_run, variant
from mla_moe import config as c

TASK, STEPS = 'sort8', 150


def get_config(arg=''):
  """Returns the config of a stage or a variant."""
  zero = reinforced(model())
  change = lambda config, **fields: dataclasses.replace(
    config, rl=dataclasses.replace(config.rl, **fields)
  )
  several = change(zero, minibatches=4, clip_low=0.2, clip_high=0.2)
  several = dataclasses.replace(
    several,
    optim=dataclasses.replace(several.optim, learning_rate=1e-4),
    data=dataclasses.replace(several.data, batch_size=128),
    # In updates, of which a rollout has four.
    run=dataclasses.replace(
      several.run,
      steps=4 * STEPS,
      eval_every=100,
      sample_every=40,
      save_every=200,
      check_every=200,
    ),
  )
  variants = dict(
    cold=cold(model()),
    zero=zero,
    dr=change(zero, scale='none', aggregate='constant', beta=0.0),
    dapo=change(
      several, aggregate='token', clip_high=0.28, beta=0.0, dynamic=3
    ),
    gspo=change(several, ratio='sequence', clip_low=3e-4, clip_high=4e-4),
    cispo=change(
      several, surrogate='cispo', clip_high=5.0, aggregate='token', beta=0.0
    ),
    anneal=annealed(change(zero, heldout=1024)),
    distil=change(zero, beta=0.0, teachers=(('', 1.0),)),
    v32=change(
      several,
      scale='none',
      kl_form='unbiased',
      off_policy=0.5,
      replay='rollout',
    ),
  )
  return follow_run(c.thaw(variant(zero, arg, **variants)))


def model():
  """Returns a model of 0.35 M parameters that reads bytes."""
  return c.ModelConfig(
    vocab=0,  # the tokenizer's
    dim=64,
    layers=3,
    dense_layers=1,
    dense_width=192,
    max_positions=256,
    init_std=0.05,
    dtype='float32',
    compute=c.ComputeConfig(remat='none'),
    mla=c.MLAConfig(
      heads=4,
      query_rank=0,
      kv_rank=32,
      nope_dim=16,
      rope_dim=16,
      value_dim=16,
    ),
    moe=c.MoEConfig(experts=8, top_k=2, width=64, groups=1, top_groups=1),
    mtp=c.MTPConfig(0),
  )


def cold(model):
  """Returns the cold start: fine-tuning until some answers are right."""
  steps, batch, length = 100, 64, 20
  optim = c.OptimConfig(
    learning_rate=1e-3,
    warmup_steps=20,
    phases=(('constant', float(steps * batch * length), 1.0),),
    beta2=0.99,
    weight_decay=0.0,
  )
  data = c.DataConfig(
    source='cold.jsonl',
    packing='separate',
    seq_len=length,
    batch_size=batch,
    fim_rate=0.0,
  )
  run = c.RunConfig(
    steps=steps, eval_every=50, sample_every=100, save_every=100
  )
  return c.Config(model=model, optim=optim, data=data, run=run)


def reinforced(model):
  """Returns R1-Zero's loss: 32 questions, 16 answers each, one update."""
  rl = c.RLConfig(
    task=TASK,
    template='plain',
    rewards=(('accuracy', 1.0),),
    prompts=32,
    samples=16,
    minibatches=1,
    max_new=10,
    heldout=256,
  )
  optim = c.OptimConfig(
    learning_rate=3e-4,
    warmup_steps=10,
    phases=(('constant', float(STEPS * 512 * 20), 1.0),),
    beta2=0.99,
    weight_decay=0.0,
    balance_loss=0.0,
    bias_rate=0.0,
    mtp_loss=0.0,
  )
  data = c.DataConfig(
    packing='separate', seq_len=20, batch_size=512, fim_rate=0.0
  )
  run = c.RunConfig(
    steps=STEPS,
    log_every=1,
    eval_every=25,
    sample_every=10,
    save_every=50,
    check_every=50,
  )
  return c.Config(model=model, optim=optim, data=data, run=run, rl=rl)


def annealed(config):
  """Returns the config with a learning rate that ends at 0.

  Two of five groups have no spread at the end of countdown, and a constant rate
  follows the noise of the others: pass@1 moves by 6 points in 25 steps.
  """
  half = float(STEPS * 512 * 10)
  phases = (('constant', half, 1.0), ('linear', half, 0.0))
  optim = dataclasses.replace(config.optim, phases=phases)
  return dataclasses.replace(config, optim=optim)
