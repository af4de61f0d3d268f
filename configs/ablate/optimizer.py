"""Muon beside AdamW, each at its own learning rate, on an equal clock.

Muon orthogonalises each matrix's update, which costs products of its own: at
equal tokens they are free, at equal seconds they are paid. The rates are those
of `configs/tiny.py`, where few were tried: of AdamW 3e-3 was better than 8e-3;
Muon had 2.09 bits per byte at 4e-3 after 640 steps and 2.11 at 8e-3 after 600,
which does not say that 8e-3 is the better one. `adamw_low` has half of AdamW's
rate, to show if 3e-3 is too high.
"""

from configs import ablate


def get_ablation():
  """Returns AdamW at two rates, and Muon, at equal seconds."""
  return {
    'sizes': ablate.sizes(),
    'arms': {
      'adamw': lambda config: adamw(config, 3e-3),
      'adamw_low': lambda config: adamw(config, 1.5e-3),
      'muon': lambda config: config,
    },
    'equal': 'seconds',
    'paper': PAPER,
  }


def adamw(config, rate):
  """Returns the config with AdamW at this learning rate."""
  return ablate.of_optim(config, optimizer='adamw', learning_rate=rate)


PAPER = """\
Moonlight (arXiv 2502.16982, section 3.2): on its scaling law of dense models of
0.4B to 1.5B parameters, Muon reaches AdamW's loss with about 52 % of the
training FLOPs: at equal loss a speed-up of about 1.9. The cost of
orthogonalising is not in those FLOPs."""
