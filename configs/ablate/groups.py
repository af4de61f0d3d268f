"""Node-limited routing on and off: experts of two of four groups, or of any.

With groups a token's experts lie on few nodes, and fewer copies of it travel.
The limit buys nothing on one device: the question is its price in loss.
"""

from configs import ablate


def get_ablation():
  """Returns routing without and with a limit of groups, at equal tokens."""
  return {
    'sizes': ablate.sizes(),
    'arms': {'free': lambda config: config, 'limited': limited},
    'equal': 'tokens',
    'paper': PAPER,
  }


def limited(config):
  """Returns the config with 4 groups of experts, 2 of them for a token."""
  return ablate.of_moe(config, groups=4, top_groups=2)


PAPER = """\
DeepSeek-V3 (arXiv 2412.19437, section 2.1.2) sends a token to experts on at
most 4 of 8 nodes, V2 (arXiv 2405.04434, section 2.2.2) to at most 3 devices: it
says that from 3 on the limit performs about as free routing does. Neither has a
table of it."""
