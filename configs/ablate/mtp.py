"""Multi-token prediction on and off; the module is dropped at evaluation.

At equal tokens the module is for free, as in the paper's table. It costs a
layer and a product with the head in each training step: --equal=flops and
--equal=seconds charge it.
"""

import dataclasses

from configs import ablate


def get_ablation():
  """Returns the model without and with one MTP module, at equal tokens."""
  return {
    'sizes': ablate.sizes(),
    'arms': {'none': lambda config: config, 'mtp': mtp},
    'equal': 'tokens',
    'paper': PAPER,
  }


def mtp(config):
  """Returns the config with one module, its weight V3's 0.3, then 0.1."""
  module = dataclasses.replace(config.model.mtp, depth=1)
  return ablate.of_model(config, mtp=module)


PAPER = """\
DeepSeek-V3 (arXiv 2412.19437, table 4), without and with MTP:

                   15.7B, 1.33T tokens    228.7B, 540B tokens
                      none      MTP          none      MTP
  Pile, bits/byte    0.729    0.729         0.658    0.657
  BBH                 39.0     41.4          70.0     70.7
  MMLU                50.0     53.3          67.5     66.6
  HumanEval           20.7     26.8          44.5     53.7
  GSM8K               25.4     31.4          72.3     74.0
  MATH                10.7     12.6          38.6     39.8

Its bits per byte do not change: by this measure none is to be expected here."""
