"""The router's score: sqrt(softplus(x)) of DeepSeek-V4 beside V3's sigmoid.

  python -m experiments.ablate --name=sqrt_softplus

An idea's ablation differs from one of configs/ablate in one thing: its arm is a
`Recipe`, a config with functions of its own.
"""

from __future__ import annotations

from mla_moe.config import Config
from mla_moe.model import block

from ...ablate.recipe import Recipe, with_functions
from . import router


def get_ablation() -> dict:
  """Returns the two scores on the ladder of configs/ablate, at equal tokens."""
  from configs import ablate

  return {
    'sizes': ablate.sizes(),
    'arms': {'sigmoid': lambda config: config, 'sqrt_softplus': own},
    'equal': 'tokens',
    'paper': 'DeepSeek-V4 has this score (its config.json); no table of it is '
    'known to us.',
  }


def own(config: Config) -> Recipe:
  """Returns the config's recipe with the router of this folder."""
  functions = block.Functions(route=router.route)
  return with_functions(config, functions)
