"""The state of a run, whose parameters may be adapters alone.

`train.state` makes the state of a whole model. Of a config with `model.lora`
these functions make one with the adapters in the place of the parameters: the
moments are theirs, and so is the reference of reinforcement learning.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from mla_moe import sharding
from mla_moe.config import Config
from mla_moe.train import optim, state
from mla_moe.train.state import State
from mla_moe.types import Array

from . import lora


def abstract_state(config: Config) -> State:
  """Returns the state's shapes, each boxed with its logical axes."""
  whole = state.abstract_state(config)
  if not config.model.lora.rank:
    return whole
  key = jax.eval_shape(lambda: jax.random.key(0))
  make = functools.partial(_boxed, router=whole.router, config=config)
  return jax.eval_shape(make, key)


def placement(config: Config, mesh: jax.sharding.Mesh) -> State:
  """Returns the sharding of every leaf of the state."""
  if not config.model.lora.rank:
    return state.placement(config, mesh)
  boxed = abstract_state(config)
  places = sharding.shardings(boxed, mesh)
  if config.mesh.states == 'zero1':
    opt = sharding.shardings(boxed.opt, mesh, sharding.ZERO1)
    places = places.replace(opt=opt)
  return places


def init_state(
  key: Array, config: Config, mesh: jax.sharding.Mesh | None = None
) -> State:
  """Returns a fresh state; the biases of a run with adapters are zeros."""
  if not config.model.lora.rank:
    return state.init_state(key, config, mesh)
  router = nn.unbox(state.abstract_state(config).router)

  def fresh(key):
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), router)
    return nn.unbox(_boxed(key, zeros, config))

  places = {'out_shardings': placement(config, mesh)} if mesh else {}
  return jax.jit(fresh, **places)(key)


def _boxed(key: Array, router, config: Config) -> State:
  tx, params = optim.optimizer(config.optim), lora.boxed(key, config.model)
  opt = optax.tree_map_params(
    tx,
    lambda leaf, like: like.replace_boxed(leaf),
    tx.init(nn.unbox(params)),
    params,
  )
  zero, window = jnp.zeros((), jnp.int32), state.empty_window(config.optim)
  reference = state.reference_of(params, router, config)
  return State(zero, params, router, opt, window, reference)
