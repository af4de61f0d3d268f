"""The router's score: sigmoid (V3) beside softmax (V2).

Both arms balance by the bias, choose by score plus bias, and divide a token's
gates by their sum. Only the function of the logits differs: a softmax makes the
experts compete before the choice.
"""

from configs import ablate


def get_ablation():
  """Returns the two scores, at equal tokens."""
  return {
    'sizes': ablate.sizes(),
    'arms': {'sigmoid': lambda config: config, 'softmax': softmax},
    'equal': 'tokens',
    'paper': PAPER,
  }


def softmax(config):
  """Returns the config with a softmax over all experts."""
  return ablate.of_moe(config, scoring='softmax')


PAPER = """\
Wang et al. 2024 (arXiv 2408.15664), validation perplexity of the 1B model
after 100B tokens:

                     sigmoid   softmax
  auxiliary loss        9.56     9.604
  loss-free bias        9.50     9.599

DeepSeek-V3 (arXiv 2412.19437, section 2.1.2) changed V2's softmax to a sigmoid
and gives no table."""
