"""FP8's three recipes beside bf16, and a control that rounds another way.

Two runs part by chance once any rounding differs. So `control` is bf16's
products once more, with bfloat16 activations for float32: a difference no
larger than the control's says nothing against FP8. The model is wide enough
for FP8's tiles, two of 128 numbers in each inner dimension, and has as few
weights as that allows.
"""

import dataclasses

from configs import ablate
from mla_moe import config as c


def get_ablation():
  """Returns bf16, its control and three recipes of FP8, at equal tokens."""
  return {
    'sizes': {'two_tiles': two_tiles()},
    'arms': {
      'bf16': lambda config: config,
      'control': lambda config: ablate.of_model(config, dtype='bfloat16'),
      'block': lambda config: ablate.of_model(config, precision='fp8_block'),
      'channel': lambda config: ablate.of_model(
        config, precision='fp8_channel'
      ),
      'tensor': lambda config: ablate.of_model(config, precision='fp8_tensor'),
    },
    'equal': 'tokens',
    'paper': PAPER,
  }


def two_tiles():
  """Returns a short run of a model 256 wide: AdamW, its rate falls to a tenth.

  So that the last losses are of models that have settled.
  """
  config = ablate.size(dim=256, layers=2, heads=4, width=128, steps=200)
  model = config.model
  model = dataclasses.replace(
    model,
    dense_width=256,
    init_std=0.03,
    moe=dataclasses.replace(model.moe, top_k=2, scale=1.0),
  )
  optim = dataclasses.replace(
    config.optim,
    optimizer='adamw',
    learning_rate=2e-3,
    warmup_steps=20,
    phases=(('cosine', 200 * 512, 0.1),),
    bias_rate=3e-3,
    bias_tokens=1e12,
  )
  data = c.DataConfig(seq_len=128, batch_size=4)
  run = dataclasses.replace(config.run, eval_batches=96)
  config = dataclasses.replace(config, model=model, optim=optim)
  return dataclasses.replace(config, data=data, run=run)


PAPER = """\
DeepSeek-V3 (arXiv 2412.19437, appendix B.1): the relative error of the training
loss in FP8 against bfloat16 stays below 0.25 %, for a 16B model over 1.33T
tokens and a 230B model over 0.9T, its losses smoothed by an exponential average
of 0.9. Its recipe is `block`: tiles of 1 x 128 activations, 128 x 128 weights.
Appendix B.2: blocks of 128 x 128 for activations' gradients, too, made a 16B
model diverge. There is no table of scales by channel or by tensor."""
