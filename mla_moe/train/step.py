"""A training step: pure, `(state, batch, rates) -> (state, metrics)`.

Gradients are accumulated in float32 over micro-batches, each weighed by its
tokens, so that the split into micro-batches does not change the result. The
number of micro-batches is a value, not a shape: the batch may grow during the
run without a new compilation. The router's biases move outside the gradient,
by the load of the whole step (V3 section 2.1.2).

A step that must not be taken (its loss or gradient is not finite, or its loss
is a spike) is computed all the same and then not chosen: a `where` over what
the update writes anyway. optax.apply_if_finite applies the last NaN in the end.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct

from mla_moe import sharding
from mla_moe.config import Config, MTPConfig, OptimConfig
from mla_moe.data import batches
from mla_moe.model import moe, router, sequence, transformer
from mla_moe.train import losses, optim
from mla_moe.types import Array, Int, PyTree


@struct.dataclass
class State:
  """All that training changes: saved whole, restored whole.

  Fields are trees and not arrays by type, since the same structure also holds
  shapes, shardings or None. `guard` holds the accepted losses that a spike is
  told by: {'losses': [W] float32, a ring; 'seen': how many}, or nothing.
  """

  step: PyTree
  params: PyTree
  router: PyTree
  opt: PyTree
  guard: PyTree = struct.field(default_factory=dict)


def init_state(
  key: Array, config: Config, mesh: jax.sharding.Mesh | None = None
) -> State:
  """A fresh state; on a `mesh`, every leaf is made where it will live."""
  return _maker(config, mesh)(key)


@functools.lru_cache(8)
def _maker(config, mesh):
  """`init_state`'s program, so that a second state is not compiled again."""
  make = lambda key: nn.unbox(_boxed_state(key, config))
  where = {} if mesh is None else {'out_shardings': placement(config, mesh)}
  return jax.jit(make, **where)


def placement(config: Config, mesh: jax.sharding.Mesh) -> State:
  """The sharding of every leaf of the state.

  What a jitted step hands out must be told so: left alone, parameters would
  drift to where the optimizer's state is.
  """
  boxed = layout(config)
  where = sharding.shardings(boxed, mesh)
  if config.mesh.states == 'zero1':
    opt = sharding.shardings(boxed.opt, mesh, sharding.ZERO1)
    where = where.replace(opt=opt)
  return where


def layout(config: Config) -> State:
  """Shapes of the state, each leaf with its logical axes (boxed), unmade.

  What is here can be laid on a mesh that does not exist: the plan of a run
  starts from it.
  """
  key = jax.eval_shape(lambda: jax.random.key(0))
  return jax.eval_shape(lambda key: _boxed_state(key, config), key)


def _boxed_state(key: Array, config: Config) -> State:
  tx = optim.optimizer(config.optim)
  tokens = jnp.zeros((1, config.model.mtp.depth + 2), jnp.int32)
  boxed = transformer.Transformer(config.model).init(key, tokens)
  # Muon's state and AdamW's each leave out the other's parameters.
  masked = lambda leaf: isinstance(leaf, optax.MaskedNode)
  opt = tx.init(nn.unbox(boxed['params']))
  opt = optax.tree_map_params(
    tx,
    lambda leaf, like: leaf if masked(leaf) else like.replace_boxed(leaf),
    opt,
    boxed['params'],
    is_leaf=masked,
  )
  zero = jnp.zeros((), jnp.int32)
  biases = boxed.get('router', {})
  return State(zero, boxed['params'], biases, opt, fresh_guard(config.optim))


def fresh_guard(optim: OptimConfig) -> PyTree:
  """The guard of a state that has seen no step."""
  if not optim.spike_sigma:
    return {}
  losses = jnp.zeros((optim.spike_window,), jnp.float32)
  return {'losses': losses, 'seen': jnp.zeros((), jnp.int32)}


def train_step(
  state: State,
  batch: batches.Batch,
  rates: optim.Rates,
  *,
  config: Config,
) -> tuple[State, dict[str, Array]]:
  """One update from a whole global batch, or none: the step is counted.

  Metrics: float32 scalars loss (all of it), main_loss and mtp_loss (nats per
  token), balance_loss (mean over MoE layers; 1 is balanced), grad_norm, skipped
  (0; 1: not finite; 2: a spike); per MoE layer, MTP modules last: load [L, E]
  int32, entropy [L], bias_norm [L] and overflow [L] int32 (`moe.Stats`).
  """
  used = jnp.arange(batch.tokens.shape[0]) < batch.count
  targets = batch.targets >= 0
  tokens = jnp.sum(targets & used[:, None, None], dtype=jnp.float32)
  sequences = batch.count * batch.tokens.shape[1]

  copies = None
  if config.model.precision != 'bf16':
    copies = transformer.fp8_copies(state.params, config.model)

  def objective(params, micro):
    if copies is not None:
      params = transformer.with_copies(params, copies)
    terms = _terms(params, state.router, micro, config)
    share = batch.tokens.shape[1] / sequences
    scaled = {
      'main_loss': terms.pop('main') / tokens,
      'mtp_loss': terms.pop('mtp') / tokens,
      'z_loss': terms.pop('z') / tokens,
      'balance_loss': terms.pop('balance') * share,
      'entropy': terms.pop('entropy') * share,
      **terms,
    }
    loss = (
      scaled['main_loss']
      + rates.mtp_loss * scaled['mtp_loss']
      + config.optim.z_loss * scaled['z_loss']
      + config.optim.balance_loss * scaled['balance_loss'].sum()
    )
    return loss, {'loss': loss, **scaled}

  grads, metrics = _accumulate(objective, state.params, batch)
  grads, norm = optim.clipped(grads, config.optim.clip)
  skipped, guard = _judge(state.guard, metrics['loss'], norm, config.optim)
  accept = skipped == 0
  params, opt = optim.apply(
    optim.optimizer(config.optim),
    grads,
    state.opt,
    state.params,
    rates.learning_rate,
    accept,
  )
  biases = _rebalance(state.router, metrics['load'], rates.bias_rate, config)
  biases, guard = jax.tree.map(
    lambda new, old: jnp.where(accept, new, old),
    (biases, guard),
    (state.router, state.guard),
  )
  norms = [jnp.linalg.norm(b, axis=-1).reshape(-1) for b in _leaves(biases)]
  metrics.pop('z_loss')
  metrics['balance_loss'] = jnp.mean(metrics['balance_loss'])
  metrics['grad_norm'] = norm
  metrics['skipped'] = skipped
  if norms:
    metrics['bias_norm'] = jnp.concatenate(norms)
  return State(state.step + 1, params, biases, opt, guard), metrics


def eval_step(
  state: State, batch: batches.Batch, *, config: Config
) -> dict[str, Array]:
  """Sums over a batch: 'nll' in nats, 'tokens' predicted. Moves nothing."""

  # All hidden states go through the head at once: without the modules'.
  main = dataclasses.replace(config.model, mtp=MTPConfig(depth=0))
  config = dataclasses.replace(config, model=main)

  def one(micro):
    terms = _terms(state.params, state.router, micro, config)
    return terms['main'], jnp.sum(micro.targets >= 0)

  parts = batch._replace(count=jnp.zeros(len(batch.tokens)))
  nll, tokens = jax.lax.map(one, parts)
  return {'nll': nll.sum(), 'tokens': tokens.sum()}


def _judge(guard, loss, norm, optim) -> tuple[Array, PyTree]:
  """(0, 1 or 2 as in the metric `skipped`, the guard if it is 0).

  Only accepted losses enter the ring: a NaN in it would condemn every step
  until it had left again.
  """
  wrong = 1.0 - (jnp.isfinite(loss) & jnp.isfinite(norm)).astype(jnp.float32)
  if not guard:
    return wrong, guard
  losses, seen = guard['losses'], guard['seen']
  limit = losses.mean() + optim.spike_sigma * losses.std()
  spike = (seen >= losses.size) & (loss > limit)
  skipped = jnp.where(wrong > 0, wrong, 2.0 * spike)
  losses = losses.at[seen % losses.size].set(loss)
  return skipped, {'losses': losses, 'seen': seen + 1}


def _accumulate(objective, params, batch) -> tuple[PyTree, dict[str, Array]]:
  """Gradients and metrics summed over the micro-batches that count."""
  part = jax.jit(jax.value_and_grad(objective, has_aux=True))

  def micro(i):
    take = lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False)
    return batches.Batch(*(take(x) for x in batch[:-1]), batch.count)

  if batch.tokens.shape[0] == 1:
    (_, metrics), grads = part(params, micro(0))
    return grads, metrics

  def add(i, sums):
    (_, metrics), grads = part(params, micro(i))
    return jax.tree.map(jnp.add, sums, (grads, metrics))

  (_, metrics), grads = jax.eval_shape(part, params, micro(0))
  zeros = lambda x: jnp.zeros(x.shape, x.dtype)
  start = jax.tree.map(zeros, (grads, metrics))
  return jax.lax.fori_loop(0, batch.count, add, start)


def _terms(params, biases, micro: batches.Batch, config) -> dict[str, Array]:
  """Sums over one micro-batch: nll, MTP nll, z; means: balance, entropy."""
  network = transformer.Transformer(config.model)
  variables = {'params': params, 'router': biases}
  joined = config.data.packing == 'joined'
  out = network.apply(
    variables,
    micro.tokens,
    micro.positions,
    None if joined else micro.segments,
    config.mesh.pipeline,
    method=network.features,
  )
  head = network.apply(variables, method=network.head)
  targets = [micro.targets]
  for k in range(1, 1 + len(out.mtp_hidden)):
    targets.append(_ahead(micro.targets, micro.segments, k))
  hidden = jnp.stack([out.hidden, *out.mtp_hidden])
  targets = jnp.stack([sequence.arrange(t) for t in targets])
  nll, lse = losses.sharded_token_nll(hidden, head, targets)
  stats = _joined_stats(out)
  return {
    'main': nll[0].sum(),
    'mtp': nll[1:].sum() / max(len(out.mtp_hidden), 1),
    'z': jnp.where(targets[0] >= 0, jnp.square(lse[0]), 0).sum(),
    'balance': stats.balance,
    'entropy': stats.entropy,
    'load': stats.load,
    'overflow': stats.overflow,
  }


def _ahead(
  targets: Int[Array, 'B T'], segments: Int[Array, 'B T'], k: int
) -> Int[Array, 'B T']:
  """Position i's target k tokens later, -1 past the row or the segment."""
  inside = (jnp.arange(targets.shape[1]) < targets.shape[1] - k)[None]
  same = jnp.roll(segments, -k, axis=1) == segments
  return jnp.where(inside & same, jnp.roll(targets, -k, axis=1), -1)


def _joined_stats(out: transformer.Features) -> moe.Stats:
  """Stats of the main layers, then of the MTP modules."""
  both = [s for s in (out.stats, out.mtp_stats) if s is not None]
  if not both:
    none = jnp.zeros((0,), jnp.float32)
    few = jnp.zeros((0,), jnp.int32)
    return moe.Stats(few[:, None], none, none, few)
  return jax.tree.map(lambda *x: jnp.concatenate(x), *both)


def _leaves(biases: PyTree) -> list[Array]:
  """Bias arrays in the order of the load's rows: main layers, then modules."""
  order = sorted(biases, key=lambda n: (n != 'moe', len(n), n))
  return [leaf for name in order for leaf in jax.tree.leaves(biases[name])]


def _rebalance(biases, load, rate, config) -> PyTree:
  """Every layer's bias moved by its row of `load` [L, E]."""
  if not biases:
    return biases
  main = config.model.moe_layers
  moved = {}
  for name, tree in biases.items():
    row = (
      int(name.removeprefix('mtp_')) + main if name != 'moe' else slice(main)
    )
    moved[name] = jax.tree.map(
      lambda b, row=row: router.rebalance(b, load[row], rate), tree
    )
  return moved
