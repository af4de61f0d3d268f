"""DeepSeek-R1's stages on V3, with the published numbers. None is run here.

  python -m experiments.rl --config=configs/r1.py:zero --init=V3_BASE \
    --config.rl.task=questions.jsonl --workdir=DIR

The stages, in R1's order (report, sections 2.2 and 2.3 and the supplement):

  zero    R1-Zero: V3-Base, accuracy and format, 10,400 steps, T = 1
  long    zero after step 8,200: answers of 65,536 tokens
  cold    fine-tuning on thousands of long thoughts (`experiments.sft`)
  reason  the first reinforcement: also pays for one language
  reject  fine-tuning of V3-Base on 804,745 samples (`experiments.sft`), those
          of reasoning chosen from the model before (`experiments.reject`)
  all     the second one: T = 0.7, 1,700 steps

A step is an update by 32 questions with 16 answers each; 16 of them follow a
rollout of 8,192 answers. The reference is replaced every 400 steps. Of the
second reinforcement, preference models and their 400 last steps are not here:
a reward is any function of a question and a text. Not published: the form of
the standard deviation, R1-Zero's clip, warm-up, and whether biases move.
"""

import dataclasses

from configs import deepseek_v3, sft, variant
from mla_moe import config as c

QUESTIONS, SAMPLES, MINIBATCHES = 32, 16, 16


def get_config(arg=''):
  """Returns the config of a stage."""
  base = c.freeze(deepseek_v3.get_config('32k'))
  reward = (('accuracy', 1.0), ('format', 1.0))
  zero = stage(base, 10_400, 32_768, reward)
  reason = stage(base, 10_400, 32_768, (*reward, ('language', 1.0)), 'chat')
  final = stage(base, 1_700, 32_768, (*reward, ('language', 1.0)), 'chat')
  final = dataclasses.replace(
    final, rl=dataclasses.replace(final.rl, temperature=0.7)
  )
  tuned = c.freeze(sft.get_config('r1'))
  variants = dict(
    zero=zero,
    long=stage(base, 2_208, 65_536, reward),
    cold=tuned,
    reason=reason,
    reject=tuned,
    all=final,
  )
  return c.thaw(variant(zero, arg, **variants))


def stage(base, steps, max_new, rewards, template='r1_zero'):
  """Returns GRPO with R1's numbers for answers of `max_new` tokens."""
  rl = c.RLConfig(
    task='questions.jsonl',
    template=template,
    rewards=rewards,
    prompts=QUESTIONS * MINIBATCHES,
    samples=SAMPLES,
    minibatches=MINIBATCHES,
    max_new=max_new,
    rows=2048,
    # A record of routes would be 8,192 x 34,816 x 58 x 8 x 2 B = 265 GB.
    replay='none',
  )
  optim = dataclasses.replace(
    base.optim,
    learning_rate=3e-6,
    warmup_steps=0,
    phases=(('constant', float(steps * 512 * (max_new + 2048)), 1.0),),
    balance_loss=0.0,
    bias_rate=0.0,
    bias_rate_final=0.0,
    mtp_loss=0.0,
    mtp_loss_final=0.0,
  )
  data = dataclasses.replace(
    base.data,
    packing='separate',
    seq_len=max_new + 2048,  # and the prompt
    batch_size=QUESTIONS * SAMPLES,
    batch_start=0,
    ramp_tokens=0.0,
    micro_batch=64,
    fim_rate=0.0,
  )
  period = 10 * MINIBATCHES
  run = dataclasses.replace(
    base.run,
    steps=steps // MINIBATCHES * MINIBATCHES,
    log_every=1,
    eval_every=period,
    sample_every=period,
    save_every=period,
  )
  return dataclasses.replace(
    base, optim=optim, data=data, run=run, rl=rl,
    mesh=dataclasses.replace(base.mesh, stage=1, pipeline=0),
  )  # fmt: skip
