"""A golden release with a layer of each kind, for tests of what is equal.

A layer more would be compiled in each program of a server, and show nothing.
"""

import dataclasses
import pathlib

import jax

from mla_moe import load_huggingface

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'


@jax.jit
def cut(variables):
  """The variables of a model whose second layer is the last."""
  first = lambda stack: jax.tree.map(lambda x: x[:1], stack)
  return {
    name: tree | {'moe': first(tree['moe'])} if 'moe' in tree else tree
    for name, tree in variables.items()
  }


def load(case='v2_lite'):
  """Returns the release's config and variables: a dense and a MoE layer."""
  config, variables = load_huggingface(GOLDEN / case)
  assert config.dense_layers == 1
  return dataclasses.replace(config, layers=2), cut(variables)
