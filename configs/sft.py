"""Supervised fine-tuning: R1's recipe, and that of the models it taught.

  python -m experiments.sft --config=configs/sft.py:tiny --data=FILE.jsonl \\
    --init=runs/tiny --workdir=DIR

Variants: r1 (the default; DeepSeek-V3 on R1's 804,745 examples, two epochs);
lite and moonlight, which learn from a larger model's answers as R1's distilled
models did; tiny, for `configs/tiny.py`; smoke. All but tiny are not run here.

R1's report (2.3.3 and the supplement) has the lengths, batches and rates. Its
batch counts examples, ours counts rows, into which several examples fit: the
run's first line says how many epochs `run.steps` are, and schedules follow
`--config.run.steps`. Not published are warm-up, the bias rate and the weights
of the MTP and balance losses: they are those at the end of the model's recipe.
"""

import dataclasses

from configs import (
  deepseek_v2_lite,
  deepseek_v3,
  follow_run,
  moonlight_16b,
  variant,
)
from configs import tiny as base
from mla_moe import config as c

# The peak rate of a distilled model, by its parameters.
RATES = {1.5e9: 1e-4, 7e9: 8e-5, 14e9: 7e-5, 32e9: 6e-5, 70e9: 2e-5}


def get_config(arg=''):
  """Returns a model's own config with examples in place of its text."""
  v3 = c.freeze(deepseek_v3.get_config('32k'))
  lite = c.freeze(deepseek_v2_lite.get_config('yarn'))
  moonlight = c.freeze(moonlight_16b.get_config())
  tiny = c.freeze(base.get_config())
  steps = 2 * 804_745 // 128
  r1 = tuned(v3, 5e-5, steps, (32768, 128, 64))
  steps = 2 * 804_745 // 64
  variants = dict(
    r1=r1,
    lite=tuned(lite, RATES[14e9], steps, (32768, 64, 64)),
    moonlight=tuned(moonlight, RATES[14e9], steps, (8192, 64, 64)),
    tiny=tuned(tiny, 4e-3, 200, (256, 8, 0)),
  )
  return follow_run(c.thaw(variant(r1, arg, **variants)))


def tuned(config, rate, steps, sizes):
  """Returns the config with a cosine from `rate` to a tenth over `steps`.

  `sizes` are the columns of a row, the rows of a step and of a micro-batch.
  """
  length, batch, micro = sizes
  optim = dataclasses.replace(
    config.optim,
    learning_rate=rate,
    warmup_steps=0,
    phases=(('cosine', float(steps * batch * length), 0.1),),
    bias_tokens=0.0,
    mtp_tokens=0.0,
  )
  data = dataclasses.replace(
    config.data,
    packing='separate',
    seq_len=length,
    batch_size=batch,
    batch_start=0,
    ramp_tokens=0.0,
    micro_batch=micro,
    fim_rate=0.0,
  )
  period = max(steps // 20, 50)
  run = dataclasses.replace(
    config.run, steps=steps, eval_every=period, sample_every=period
  )
  run = dataclasses.replace(run, save_every=period)
  return dataclasses.replace(config, optim=optim, data=data, run=run)
