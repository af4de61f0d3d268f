"""Experts beside a dense model, at an equal clock: the claim of this project.

`dense` has layers of one feed-forward network as wide as a token's five experts
together: as many active parameters, but for the router. `wide` is 1.5 times as
wide, for a clock that charges a dense product less than experts of the same
size. All have the same attention and text, and the recipe of the ladder, whose
rate was chosen for experts: `dense_low` has half of it.

--equal=tokens compares at equal active parameters and equal tokens, as the
paper does; --equal=flops charges the router, too.
"""

from configs import ablate


def get_ablation():
  """Returns dense models and a mixture of experts, at equal seconds."""
  return {
    'sizes': ablate.sizes(),
    'arms': {
      'dense': dense,
      'dense_low': lambda config: ablate.of_optim(
        dense(config), learning_rate=4e-3
      ),
      'wide': wide,
      'moe': lambda config: config,
    },
    'equal': 'seconds',
    'paper': PAPER,
  }


def dense(config):
  """Returns the config with dense layers only, each of five experts' width."""
  return ablate.of_model(config, dense_layers=config.model.layers)


def wide(config):
  """Returns the config with dense layers only, 1.5 times as wide."""
  width = 3 * config.model.dense_width // 2
  return ablate.of_model(dense(config), dense_width=width)


PAPER = """\
DeepSeekMoE (arXiv 2401.06066, section 4 and tables 1 and 2), loss on the Pile
after 100B tokens, 2B parameters, 0.3B active:

  dense, 0.2B         2.060
  Hash layer          1.932
  Switch              1.881
  GShard              1.867
  DeepSeekMoE         1.808
  GShard, 1.5 times   1.808   experts 1.5 times as wide
  dense, 16 times     1.806   as many parameters in all, and all active

It compares at equal tokens. No table is at equal wall time."""
