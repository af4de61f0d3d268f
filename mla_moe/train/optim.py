"""The optimizer and the recipe's schedules, which are keyed on tokens.

AdamW (Loshchilov and Hutter 2019) in float32 with gradients clipped by their
global norm; Muon as the second choice, with Moonlight's update scale
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

# Leaves that weight decay leaves alone when AdamW has the whole model.
_NOT_DECAYED = ('scale', 'bias')

# Contracted and produced axes of the matrices that Muon orthogonalises, from
# the end; axes before them (layers, experts, gate and up) are batches. Leaves
# that are not here (embedding, head, norms) are AdamW's.
_MATRICES = {
  'w_q_down': ((-2,), (-1,)),
  'w_q_up': ((-3,), (-2, -1)),
  'w_q': ((-3,), (-2, -1)),
  'w_kv_down': ((-2,), (-1,)),
  'w_k_rope': ((-2,), (-1,)),
  'w_k_up': ((-3,), (-2, -1)),
  'w_v_up': ((-3,), (-2, -1)),
  'w_out': ((-3, -2), (-1,)),
  'w_gate_up': ((-3,), (-1,)),
  'w_down': ((-2,), (-1,)),
  'w_router': ((-2,), (-1,)),
  'w_join': ((-2,), (-1,)),
}


class Rates(NamedTuple):
  """What one step takes from the schedules."""

  learning_rate: Array | float
  bias_rate: Array | float
  mtp_loss: Array | float


def rates(optim: OptimConfig, step: int, tokens: float) -> Rates:
  """The rates of step `step` (from 0), before which `tokens` were seen.

  Warm-up multiplies by (step + 1) / warmup_steps: the first step moves, too.
  """
  warm = min(1.0, (step + 1) / max(optim.warmup_steps, 1))
  late_bias = tokens >= optim.bias_tokens
  late_mtp = tokens >= optim.mtp_tokens
  return Rates(
    optim.learning_rate * warm * share(optim.phases, tokens),
    optim.bias_rate_final if late_bias else optim.bias_rate,
    optim.mtp_loss_final if late_mtp else optim.mtp_loss,
  )


def share(phases: tuple, tokens: float) -> float:
  """The learning rate at `tokens` as a share of the peak.

  A constant phase has its own target throughout; linear and cosine ones go
  from where the phase before ended (the first from 1) to their target, which
  also holds after the last phase.
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
  """Maps clipped gradients to the update at learning rate 1.

  Its update takes `accept`: where it is false the state stays as it was.
  Every moment is float32 and shaped like its parameter. Norms and biases do
  not decay under 'adamw'; under 'muon' they do, which Moonlight found that its
  stability needs (section 2.2).
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
    {'muon': _held_back(muon), 'adamw': adamw},
    lambda params: jax.tree_util.tree_map_with_path(label, params),
  )


def decayed(params: PyTree) -> PyTree:
  """True at every leaf that weight decay shrinks: all but norms and biases.

  By name, not by rank: a stacked norm is a matrix, too.
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, _: _name(path) not in _NOT_DECAYED, params
  )


def clipped(grads: PyTree, clip: float) -> tuple[PyTree, Array]:
  """Gradients of at most this global norm, and the norm that they had.

  Those of any float dtype are widened to float32 before anything is summed.
  """
  grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
  norm = optax.tree.norm(grads)
  factor = jnp.minimum(1.0, clip / (norm + 1e-12))
  return jax.tree.map(lambda g: g * factor, grads), norm


def apply(
  tx: optax.GradientTransformationExtraArgs,
  grads: PyTree,
  opt: PyTree,
  params: PyTree,
  learning_rate: Array | float,
  accept: Array | bool = True,
) -> tuple[PyTree, PyTree]:
  """New parameters and state, or the same ones where not `accept`."""
  updates, opt = tx.update(grads, opt, params, accept=accept)
  step = lambda p, u: jnp.where(accept, p + learning_rate * u, p)
  return jax.tree.map(step, params, updates), opt


def _adam(optim: OptimConfig):
  """optax's Adam, whose direction is computed from the moments as stored.

  As optax writes it, XLA computes the new moments twice, for the state and for
  the direction, and so cannot write over the old ones: it copied both whole,
  8 bytes a parameter. The barrier leaves the old moments one reader.
  """
  tx = optax.scale_by_adam(
    optim.beta1, optim.beta2, optim.eps, mu_dtype=jnp.float32
  )

  def update(grads, state, params=None, *, accept, **_):
    _, new = _held_back(tx).update(grads, state, params, accept=accept)
    new = jax.tree.map(jax.lax.optimization_barrier, new)
    mu = optax.tree.bias_correction(new.mu, optim.beta1, new.count)
    nu = optax.tree.bias_correction(new.nu, optim.beta2, new.count)
    direction = lambda m, v: m / (jnp.sqrt(v) + optim.eps)
    return jax.tree.map(direction, mu, nu), new

  return optax.GradientTransformationExtraArgs(tx.init, update)


def _held_back(tx: optax.GradientTransformation):
  """`tx`, whose state stays as it was where an update is not accepted."""

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
