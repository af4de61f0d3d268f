"""Latent attention beside multi-head and grouped-query attention.

Each arm has as many parameters, within 1 %, and as many heads of queries: heads
of `mha` and `gqa` are as wide as MLA's matrices pay for. They rotate all their
features, as in Llama. `gqa` has half as many heads of keys and values, or one
where the heads are odd: at `s` and `m` it is multi-query attention.

The cache of a token and layer has at s, m and l 136, 201 and 264 numbers under
`mha`, 91, 100 and 176 under `gqa`, and 48, 64 and 80 under MLA.
"""

import dataclasses

from configs import ablate


def get_ablation():
  """Returns three kinds of attention, at equal tokens."""
  return {
    'sizes': ablate.sizes(),
    'arms': {
      'mha': lambda config: grouped(config, config.model.mla.heads),
      'gqa': fewer,
      'mla': lambda config: config,
    },
    'equal': 'tokens',
    'paper': PAPER,
  }


def fewer(config):
  """Returns the config with the largest part of its heads that divides them."""
  heads = config.model.mla.heads
  return grouped(config, max(n for n in range(1, heads) if heads % n == 0))


def grouped(config, kv_heads):
  """Returns the config with heads of as many parameters as MLA's."""
  dim, a = config.model.dim, config.model.mla
  query = a.nope_dim + a.rope_dim
  matrices = dim * a.heads * (query + a.value_dim)
  matrices += dim * (a.kv_rank + a.rope_dim)
  matrices += a.kv_rank * a.heads * (a.nope_dim + a.value_dim)
  # Of queries and values, and of keys and values: as wide as each other.
  both = round(matrices / (dim * (a.heads + kv_heads)))
  key = 2 * round(both / 4)
  mla = dataclasses.replace(a, nope_dim=0, rope_dim=key, value_dim=both - key)
  return ablate.of_model(config, attention='gqa', kv_heads=kv_heads, mla=mla)


PAPER = """\
DeepSeek-V2 (arXiv 2405.04434, tables 8 and 9). Dense models of 7B after 1.33T
tokens, their parameters made equal by the number of layers:

                   MQA   GQA, 8 groups    MHA
  parameters      7.1B            6.9B   6.9B
  BBH             33.2            35.6   37.0
  MMLU            37.9            41.2   45.2
  C-Eval          30.0            37.7   42.9
  CMMLU           34.6            38.4   43.5

Mixtures of experts after 1.33T and 420B tokens, all else the same:

                     small              large
                    MHA    MLA         MHA    MLA
  parameters      15.8B  15.7B      250.8B 247.4B
  active           2.5B   2.4B       25.0B  21.5B
  cache, a token 110.6K  15.6K      860.2K  34.6K   numbers
  BBH              37.9   39.0        46.6   50.7
  MMLU             48.7   50.0        57.5   59.0
  C-Eval           51.6   50.9        57.9   59.2
  CMMLU            52.3   53.4        60.7   62.5"""
