"""A shared expert beside one more routed expert of the same width.

`shared` gives each token 4 of 16 routed experts and the shared one, `none` 5 of
17 routed ones: parameters in all and active are the same, but for the router's
row. `two` has 2 shared ones and 3 of 15.
"""

from configs import ablate


def get_ablation():
  """Returns one, no and two shared experts, at equal tokens."""
  return {
    'sizes': ablate.sizes(),
    'arms': {'shared': lambda config: config, 'none': none, 'two': two},
    'equal': 'tokens',
    'paper': PAPER,
  }


def none(config):
  """Returns the config with the shared expert among the routed ones."""
  return _moved(config, 1)


def two(config):
  """Returns the config with one routed expert made a shared one."""
  return _moved(config, -1)


def _moved(config, count):
  """Returns the config with `count` shared experts turned into routed ones."""
  moe = config.model.moe
  return ablate.of_moe(
    config,
    experts=moe.experts + count,
    top_k=moe.top_k + count,
    shared=moe.shared - count,
  )


PAPER = """\
DeepSeekMoE (arXiv 2401.06066, section 4.4), loss on the Pile by the number of
shared experts, 64 experts in all of which 8 are active:

  1 shared   1.808
  2 shared   1.806
  4 shared   1.811

Section 4.5: with the shared expert switched off after training and one more
routed expert in its place, the loss rises from 1.808 to 2.414. That is no model
trained without one, which figure 3 has, by benchmarks alone."""
