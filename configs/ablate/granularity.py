"""Fine experts beside coarse ones, of the same parameters and the same FLOPs.

`coarse` has 8 experts of which a token has 2, as GShard; `fine` splits each in
two, `finer` in four. No arm has a shared expert, whose width would be that of
the arm's own experts. The number of ways to choose a token's experts grows from
28 over 1,820 to 10,518,300, and the router from 8 columns to 32.
"""

from configs import ablate


def get_ablation():
  """Returns three granularities, at equal tokens."""
  return {
    'sizes': ablate.sizes(),
    'arms': {
      'coarse': lambda config: split(config, 0.5),
      'fine': lambda config: split(config, 1),
      'finer': lambda config: split(config, 2),
    },
    'equal': 'tokens',
    'paper': PAPER,
  }


def split(config, parts):
  """Returns the config with each of its experts in `parts`, none shared."""
  moe = config.model.moe
  return ablate.of_moe(
    config,
    experts=round(moe.experts * parts),
    top_k=round(moe.top_k * parts),
    width=round(moe.width / parts),
    shared=0,
  )


PAPER = """\
DeepSeekMoE (arXiv 2401.06066, section 4.4 and figure 3) compares, at equal
total and active parameters, 16 experts with 2 active (GShard) with a shared
expert beside 15, with each expert in 2 parts (3 of 31 and 1 shared) and in 4 (7
of 63 and 1 shared). Finer is better on most of its benchmarks. Of losses on the
Pile after 100B tokens its table 1 has:

  GShard, 2 of 16 experts                      1.867
  DeepSeekMoE, 7 of 63, a quarter as wide      1.808   and a shared expert"""
