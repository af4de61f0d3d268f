"""The state of training: its fields, a fresh one, and its place on a mesh.

Parameters leave Flax's initialiser in boxes that carry their logical axes
('embed', 'vocab', ...). The optimizer's moments get the boxes of their
parameters, so one table, `sharding.RULES`, lays out the whole state. Then the
boxes go: from here on a leaf is a plain array.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct

from mla_moe import sharding
from mla_moe.config import Config, OptimConfig
from mla_moe.model import transformer
from mla_moe.train import optim, stage
from mla_moe.types import Array, PyTree

# Fields of State that older checkpoints have under another name: for
# `store.restore`, and for the leaves in a run's fingerprints.
RENAMED = {'guard': 'loss_window'}


@struct.dataclass
class State:
  """Everything that a training step changes, and that a checkpoint holds.

  The fields are trees, not arrays by type: the same structure also holds
  shapes or shardings. `step` counts rejected steps, too; `router` holds the
  routing biases; `loss_window` the last accepted main losses, by which a spike
  is recognised: {'losses': [W] float32, a ring; 'seen': their count in all}, or
  {} where no spikes are looked for; `reference` the {'params', 'router'} from
  which reinforcement learning measures its divergence, or {}.
  """

  step: PyTree
  params: PyTree
  router: PyTree
  opt: PyTree
  loss_window: PyTree = struct.field(default_factory=dict)
  reference: PyTree = struct.field(default_factory=dict)


def init_state(
  key: Array, config: Config, mesh: jax.sharding.Mesh | None = None
) -> State:
  """Returns a fresh state; each leaf is computed where it lies on `mesh`."""
  return _initialiser(config, mesh)(key)


def empty_window(optim: OptimConfig) -> PyTree:
  """Returns the loss window of a run that has taken no step."""
  if not optim.spike_sigma:
    return {}
  losses = jnp.zeros((optim.spike_window,), jnp.float32)
  return {'losses': losses, 'seen': jnp.zeros((), jnp.int32)}


def reference_of(params: PyTree, router: PyTree, config: Config) -> PyTree:
  """Returns the reference policy of a run at its first step, or {}."""
  if not (config.rl.task and config.rl.beta):
    return {}
  return {'params': params, 'router': router}


def placement(config: Config, mesh: jax.sharding.Mesh) -> State:
  """Returns the sharding of every leaf of the state.

  A jitted step needs them as `out_shardings`: without, the compiler may give
  the parameters the layout of the optimizer's moments.
  """
  boxed = abstract_state(config)
  places = sharding.shardings(boxed, mesh)
  if config.mesh.states == 'zero1':
    opt = sharding.shardings(boxed.opt, mesh, sharding.ZERO1)
    places = places.replace(opt=opt)
  return places


def abstract_state(config: Config) -> State:
  """Returns the state's shapes, each boxed with its logical axes.

  Nothing is computed and no mesh is needed: the plan of a run starts here.
  """
  key = jax.eval_shape(lambda: jax.random.key(0))
  return jax.eval_shape(lambda key: _boxed(key, config), key)


@functools.lru_cache(8)
def _initialiser(config, mesh):
  """The compiled `init_state`, cached: a second state compiles nothing."""
  fresh = lambda key: nn.unbox(_boxed(key, config))
  places = {} if mesh is None else {'out_shardings': placement(config, mesh)}
  return jax.jit(fresh, **places)


def _boxed(key: Array, config: Config) -> State:
  tx = optim.optimizer(config.optim)
  tokens = jnp.zeros((1, config.model.mtp.depth + 2), jnp.int32)
  boxed = transformer.Transformer(config.model).init(key, tokens)
  # Muon's state and AdamW's each leave out the other's parameters.
  masked = lambda leaf: isinstance(leaf, optax.MaskedNode)
  part = stage.trained(boxed['params'], config.optim)
  opt = tx.init(nn.unbox(part))
  opt = optax.tree_map_params(
    tx,
    lambda leaf, like: leaf if masked(leaf) else like.replace_boxed(leaf),
    opt,
    part,
    is_leaf=masked,
  )
  zero = jnp.zeros((), jnp.int32)
  biases = boxed.get('router', {})
  window = empty_window(config.optim)
  reference = reference_of(boxed['params'], biases, config)
  return State(zero, boxed['params'], biases, opt, window, reference)
