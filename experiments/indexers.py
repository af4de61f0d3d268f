"""A fresh indexer for a model that was trained with dense attention (V3.2).

V3.2 began as V3.1 with an indexer of random weights, which learned beside the
frozen model (the warm-up) before it chose any key. So a dense model may begin a
run whose config has an indexer: everything else is the dense model's.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mla_moe import sharding
from mla_moe.config import DSAConfig, ModelConfig, OptimConfig, ReleaseConfig
from mla_moe.train import stage
from mla_moe.types import PyTree


def added(dense: ModelConfig, dsa: DSAConfig) -> ModelConfig:
  """Returns a dense model with an indexer, or one that has its own unchanged.

  Of its own it takes from `dsa` only the attention's stage. With an indexer it
  is V3.2's architecture, whatever the dense one was.
  """
  if dense.dsa.heads or not dsa.heads:
    stage = dsa.attention if dsa.heads else dense.dsa.attention
    own = dataclasses.replace(dense.dsa, attention=stage)
    return dataclasses.replace(dense, dsa=own)
  release = ReleaseConfig(experts=dense.release.experts)
  return dataclasses.replace(dense, dsa=dsa, release=release)


def completed(
  variables: PyTree,
  config: ModelConfig,
  seed: int,
  trains: str,
  mesh: Any = None,
) -> PyTree:
  """Returns the variables with random indexers where the config's are absent.

  A run that is to train more than them (`trains`), or sparse, is given a hint.

  The indexers alone are computed: XLA leaves out the rest of the random model.
  """
  from mla_moe.model import transformer

  own = OptimConfig(trains='indexer')
  if not config.dsa.heads or stage.trained(variables['params'], own):
    return variables
  tokens = jnp.zeros((1, config.mtp.depth + 2), jnp.int32)
  init = transformer.Transformer(config).init

  def fresh(key):
    return stage.trained(nn.unbox(init(key, tokens)['params']), own)

  places = None
  if mesh is not None:
    boxed = jax.eval_shape(init, jax.random.key(0), tokens)['params']
    places = stage.trained(sharding.shardings(boxed, mesh), own)
  part = jax.jit(fresh, out_shardings=places)(jax.random.key(seed))
  count = sum(x.size for x in jax.tree.leaves(part))
  print(
    f'The model is dense: {count:,} parameters of its indexers are random.'
    + _hint(config.dsa.attention, trains)
  )
  return {**variables, 'params': stage.merged(part, variables['params'])}


def _hint(attention: str, trains: str) -> str:
  """Returns the flags that make a run the warm-up, or '' where it is one."""
  flags = [
    f' --config.{name}={warm}'
    for name, value, warm in (
      ('model.dsa.attention', attention, 'dense'),
      ('optim.trains', trains, 'indexer'),
    )
    if value != warm
  ]
  return ' The warm-up trains them alone:' * bool(flags) + ''.join(flags)
