"""The optimizer and the recipe's schedules, which are keyed on tokens.

There are two: AdamW (Loshchilov and Hutter 2019) in float32, with gradients
clipped by their global norm; and Muon with Moonlight's update scale
0.2 * sqrt(max(rows, columns)), so that AdamW's learning rates carry over
(section 2.2 of its report). The learning rate is no part of the optimizer:
`rates` computes it on the host in float64 from the tokens seen, because steps
do not measure progress while the batch grows, and `apply` multiplies it in.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mla_moe.config import OptimConfig
from mla_moe.types import Array, PyTree

# Parameters without weight decay under AdamW: norms and biases.
_NOT_DECAYED = ('scale', 'bias')

# Input and output axes of the matrices that Muon orthogonalises, counted from
# the end; the axes before them (layers, experts, gate and up) are batches.
# AdamW updates the other parameters (embedding, head, norms).
_PLAIN = 'w_q_down', 'w_kv_down', 'w_k_rope', 'w_down', 'w_router', 'w_join'
_TO_HEADS = 'w_q', 'w_q_up', 'w_k', 'w_v', 'w_k_up', 'w_v_up'
_MATRICES = {
  **dict.fromkeys(_PLAIN, ((-2,), (-1,))),
  **dict.fromkeys(_TO_HEADS, ((-3,), (-2, -1))),
  'w_out': ((-3, -2), (-1,)),
  'w_gate_up': ((-3,), (-1,)),
}


class Rates(NamedTuple):
  """The values of the schedules at one step; `mtp_loss` is the MTP weight."""

  learning_rate: Array | float
  bias_rate: Array | float
  mtp_loss: Array | float


def rates(optim: OptimConfig, step: int, tokens: float) -> Rates:
  """Returns the rates of step `step` (from 0), after `tokens` of text.

  Warm-up multiplies by (step + 1) / warmup_steps, so the first rate is not 0.
  """
  warm = min(1.0, (step + 1) / max(optim.warmup_steps, 1))
  late_bias = tokens >= optim.bias_tokens
  late_mtp = tokens >= optim.mtp_tokens
  return Rates(
    optim.learning_rate * warm * decay(optim.phases, tokens),
    optim.bias_rate_final if late_bias else optim.bias_rate,
    optim.mtp_loss_final if late_mtp else optim.mtp_loss,
  )


def decay(phases: tuple, tokens: float) -> float:
  """Returns the learning rate at `tokens` as a fraction of its peak.

  A constant phase has its own target throughout. A linear or cosine phase goes
  from the target of the phase before (the first phase: from 1) to its own. The
  last target holds for ever.
  """
  start, before = 0.0, 1.0
  for shape, length, target in phases:
    if tokens < start + length:
      if shape == 'constant':
        return target
      done = (tokens - start) / length
      if shape == 'cosine':
        done = 0.5 - 0.5 * math.cos(math.pi * done)
      return before + (target - before) * done
    start, before = start + length, target
  return before


def optimizer(optim: OptimConfig) -> optax.GradientTransformation:
  """Returns the map from clipped gradients to the update at learning rate 1.

  Its `update` takes `accept`: where that is false the state does not change.
  Every moment is float32 and shaped like its parameter. Norms and biases do
  not decay under 'adamw'. Under 'muon' they do: Moonlight's training was not
  stable without (section 2.2).
  """
  adamw = optax.chain(
    _adam(optim),
    optax.add_decayed_weights(
      optim.weight_decay, decayed if optim.optimizer == 'adamw' else None
    ),
    optax.scale_by_learning_rate(1.0),
  )
  if optim.optimizer == 'adamw':
    return adamw
  muon = optax.contrib.muon(
    1.0,
    weight_decay=optim.weight_decay,
    muon_weight_dimension_numbers=_dimensions,
    consistent_rms=0.2,
    mu_dtype=jnp.float32,
  )
  label = lambda path, _: 'muon' if _name(path) in _MATRICES else 'adamw'
  return optax.partition(
    {'muon': _unless_rejected(muon), 'adamw': adamw},
    lambda params: jax.tree_util.tree_map_with_path(label, params),
  )


def decayed(params: PyTree) -> PyTree:
  """Returns True for every parameter with weight decay under AdamW.

  Names decide, not ranks: the norms of stacked layers are a matrix.
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, _: _name(path) not in _NOT_DECAYED, params
  )


def apply(
  tx: optax.GradientTransformationExtraArgs,
  grads: PyTree,
  opt: PyTree,
  params: PyTree,
  learning_rate: Array | float,
  accept: Array | bool = True,
) -> tuple[PyTree, PyTree]:
  """Returns the new parameters and `opt`; the old ones where not `accept`."""
  updates, opt = tx.update(grads, opt, params, accept=accept)
  step = lambda p, u: jnp.where(accept, p + learning_rate * u, p)
  return jax.tree.map(step, params, updates), opt


def _adam(optim: OptimConfig):
  """Returns optax's Adam, its direction computed from the stored moments.

  From optax's own form XLA computes the new moments twice, for the state and
  for the direction. It then cannot overwrite the old ones and copies both, 8
  bytes a parameter. The barrier leaves the old moments one reader.
  """
  tx = optax.scale_by_adam(
    optim.beta1, optim.beta2, optim.eps, mu_dtype=jnp.float32
  )

  def update(grads, state, params=None, *, accept, **_):
    _, new = _unless_rejected(tx).update(grads, state, params, accept=accept)
    new = jax.tree.map(jax.lax.optimization_barrier, new)
    mu = optax.tree.bias_correction(new.mu, optim.beta1, new.count)
    nu = optax.tree.bias_correction(new.nu, optim.beta2, new.count)
    direction = lambda m, v: m / (jnp.sqrt(v) + optim.eps)
    return jax.tree.map(direction, mu, nu), new

  return optax.GradientTransformationExtraArgs(tx.init, update)


def _unless_rejected(tx: optax.GradientTransformation):
  """Wraps `tx`: a rejected update leaves the optimizer's state unchanged."""

  def update(grads, state, params=None, *, accept, **_):
    updates, new = tx.update(grads, state, params)
    choose = lambda new, old: jnp.where(accept, new, old)
    return updates, jax.tree.map(choose, new, state)

  return optax.GradientTransformationExtraArgs(tx.init, update)


def _name(path: tuple) -> str:
  return path[-1].key


def _dimensions(params: PyTree) -> PyTree:
  def one(path, _):
    return optax.contrib.MuonDimensionNumbers(*_MATRICES[_name(path)])

  return jax.tree_util.tree_map_with_path(one, params)
