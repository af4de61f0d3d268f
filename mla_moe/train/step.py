"""A training step: pure, `(state, batch, rates) -> (state, metrics)`.

The loss is V3's: main next-token loss + mtp weight * MTP loss (section 2.2)
+ balance weight * sequence-wise balance loss (equation 17), and a z-loss where
a config asks for one. Gradients are summed in float32 over micro-batches, each
weighed by its tokens, so that the split into micro-batches does not change the
result. The number of micro-batches is a value, not a shape: the batch may grow
during the run without a new compilation. The router's biases move outside the
gradient, by the load of the whole step (section 2.1.2).

The loss is an argument, `objective`, a function of `Predictions`: the negative
log-likelihoods of the targets, without the logits. It returns a micro-batch's
part of the loss, and the parts are summed, so it divides by numbers of the
whole step (`Whole`, or arrays of the batch that the host has computed). So are
metrics, but for the largest of those whose names end in _max.

A step is rejected if its loss or gradient is not finite, or its main loss
is a spike. It is computed all the same, and a `where` over the arrays that the
update writes anyway keeps the old state. (optax.apply_if_finite applies a NaN
after some rejections in a row.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mla_moe.config import Config, ModelConfig
from mla_moe.model import block, moe, replay, router, sequence, transformer
from mla_moe.train import losses, optim, stage
from mla_moe.train.state import State
from mla_moe.types import Array, Int, PyTree


class Predictions(NamedTuple):
  """The log-likelihoods of a micro-batch, row 0 the model's, then the MTP's.

  On a mesh that splits sequences, tokens are in the order of its devices
  (`sequence.arrange`). In an objective, the means over sequences in `stats` are
  multiplied by `Whole.part`, so that their sum over micro-batches is a mean.
  """

  nll: Array  # [1 + depth, B, T] float32, nats; 0 where there is no target
  lse: Array  # [1 + depth, B, T] float32: the logits' logsumexp
  targets: Array  # [1 + depth, B, T] int32; -1 is none
  stats: moe.Stats  # with an axis of MoE layers, MTP modules last
  index: PyTree = None  # `sparse.Report` with an axis of all layers, likewise
  routes: Array | None = None  # [B, T, L, K]: the routers' own, if recorded


class Whole(NamedTuple):
  """Numbers of the whole step, by which an objective weighs a micro-batch."""

  tokens: Array  # [] float32: targets in all real micro-batches
  part: Array  # [] float32: a micro-batch's part of their sequences
  read: Array  # [] float32: their tokens, with and without a target
  rates: optim.Rates


def pretraining(
  out: Predictions, micro: PyTree, whole: Whole, config: Config
) -> tuple[Array, dict[str, Array]]:
  """Returns V3's loss of a micro-batch, and metrics: an `objective`."""
  z = jnp.where(out.targets[0] >= 0, jnp.square(out.lse[0]), 0)
  main = out.nll[0].sum() / whole.tokens
  mtp = out.nll[1:].sum() / max(len(out.nll) - 1, 1) / whole.tokens
  loss = (
    main
    + whole.rates.mtp_loss * mtp
    + config.optim.z_loss * (z.sum() / whole.tokens)
    + config.optim.balance_loss * out.stats.balance.sum()
  )
  return loss, {'main_loss': main, 'mtp_loss': mtp}


def train_step(
  state: State,
  batch: PyTree,
  rates: optim.Rates,
  base: PyTree = None,
  *,
  config: Config,
  objective: Callable = pretraining,
  functions: block.Functions = block.Functions(),
  assemble: Callable | None = None,
) -> tuple[State, dict[str, Array]]:
  """Returns the state after one update from a whole global batch, and metrics.

  A rejected update changes nothing but the count of steps.

  Args:
    batch: `types.Batch`, or a NamedTuple with more fields: [n, ...], scalars.
    objective: the loss, called as `pretraining` is.
    functions: of the layers.
    assemble: makes parameters of `base` and the state's (LoRA); None: as is.

  Metrics: those of the objective (`pretraining`: main_loss and mtp_loss in nats
  per token) and float32 scalars loss, balance_loss (mean over MoE layers; 1 is
  balanced), grad_norm, skipped (0: accepted; 1: not finite; 2: a spike); per
  MoE layer, MTP modules last: load [L, E] int32, entropy [L], bias_norm [L] and
  overflow [L] int32 (`moe.Stats`); those of indexers (`stage`).
  """
  whole = _whole(batch, rates)
  copies = None
  if config.model.precision != 'bf16':
    copies = transformer.fp8_copies(state.params, config.model)

  def part_of_loss(part, micro):
    params = stage.merged(part, state.params)
    if copies is not None:
      params = transformer.with_copies(params, copies)
    params = assemble(base, params) if assemble else params
    out = predictions(params, state.router, micro, config, functions)
    stats = out.stats._replace(
      balance=out.stats.balance * whole.part,
      entropy=out.stats.entropy * whole.part,
    )
    out = out._replace(stats=stats)
    loss, metrics = objective(out, micro, whole, config)
    index = stage.index_metrics(out.index, whole.read, whole.part)
    if index:
      loss = loss + config.optim.index_loss * index['index_kl'].sum()
    return loss, {'loss': loss, **metrics, **stats._asdict(), **index}

  part = stage.trained(state.params, config.optim)
  grads, metrics = _accumulate(part_of_loss, part, batch)
  grads, norms = stage.clipped(grads, config.optim.clip)
  norm = sum(norms.values())  # finite where all are
  skipped, window = _judge(state.loss_window, metrics, norm, config.optim)
  accept = skipped == 0
  tx, rate = optim.optimizer(config.optim), rates.learning_rate
  part, opt = optim.apply(tx, grads, state.opt, part, rate, accept)
  params = stage.merged(part, state.params)
  rows = _bias_rows(state.router, config.model)
  gamma = rates.bias_rate if config.optim.trains == 'all' else 0.0
  biases = _rebalance(state.router, rows, metrics['load'], gamma)
  biases, window = jax.tree.map(
    lambda new, old: jnp.where(accept, new, old),
    (biases, window),
    (state.router, state.loss_window),
  )
  metrics['balance_loss'] = jnp.mean(metrics.pop('balance'))
  metrics |= {**norms, 'skipped': skipped, **_norms(biases, rows)}
  number = state.step + 1
  latest = {'params': params, 'router': biases}
  reference = _refreshed(state.reference, latest, number, config.rl.refresh)
  return State(number, params, biases, opt, window, reference), metrics


def _refreshed(reference, latest, number, period) -> PyTree:
  """Returns the reference policy: every `period` steps it is the latest one."""
  if not (reference and period):
    return reference
  # No `where`: it would read and write the whole tree in each step.
  return jax.lax.cond(number % period == 0, lambda: latest, lambda: reference)


def _whole(batch, rates) -> Whole:
  used = jnp.arange(batch.tokens.shape[0]) < batch.count
  n = lambda x: jnp.sum((x >= 0) & used[:, None, None], dtype=jnp.float32)
  numbers = n(batch.targets), jnp.divide(1, batch.count), n(batch.segments)
  return Whole(*numbers, rates)


def _judge(window, metrics, norm, optim) -> tuple[Array, PyTree]:
  """Returns the metric `skipped`, and the window with this main loss in it.

  The window is of main losses: a schedule changes the weights of the whole. The
  caller drops it if the step is rejected: a NaN in it would condemn every step
  until it had left the ring again.
  """
  loss = metrics['loss']
  main_loss = metrics.get('main_loss', loss)  # an objective may have no other
  wrong = 1.0 - (jnp.isfinite(loss) & jnp.isfinite(norm)).astype(jnp.float32)
  if not window:
    return wrong, window
  losses, seen = window['losses'], window['seen']
  limit = losses.mean() + optim.spike_sigma * losses.std()
  spike = (seen >= losses.size) & (main_loss > limit)
  skipped = jnp.where(wrong > 0, wrong, 2.0 * spike)
  losses = losses.at[seen % losses.size].set(main_loss)
  return skipped, {'losses': losses, 'seen': seen + 1}


def _accumulate(part_of_loss, params, batch) -> tuple[PyTree, dict]:
  """Returns gradients and metrics, summed over the real micro-batches."""
  part = jax.jit(jax.value_and_grad(part_of_loss, has_aux=True))

  def micro(i):
    take = lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False)
    return jax.tree.map(lambda x: take(x) if jnp.ndim(x) else x, batch)

  if batch.tokens.shape[0] == 1:
    (_, metrics), grads = part(params, micro(0))
    return grads, metrics

  def add(i, sums):
    (_, metrics), grads = part(params, micro(i))
    total = jax.tree.map(jnp.add, sums, (grads, metrics))
    largest = [name for name in metrics if name.endswith('_max')]
    pairs = {name: (sums[1][name], metrics[name]) for name in largest}
    return total[0], total[1] | {k: jnp.maximum(*v) for k, v in pairs.items()}

  (_, metrics), grads = jax.eval_shape(part, params, micro(0))
  zeros = lambda x: jnp.zeros(x.shape, x.dtype)
  start = jax.tree.map(zeros, (grads, metrics))
  return jax.lax.fori_loop(0, batch.count, add, start)


def predictions(
  params: PyTree,
  biases: PyTree,
  micro: PyTree,
  config: Config,
  functions: block.Functions = block.Functions(),
) -> Predictions:
  """Returns the log-likelihoods of one micro-batch's targets, and statistics.

  `micro` has the fields of a `types.Batch` without the axis of micro-batches,
  and may have `routes` to replay (`replay`).
  """
  network = transformer.Transformer(config.model, functions)
  variables = {'params': params, 'router': biases}
  routes = replay.by_layer(getattr(micro, 'routes', None), config.rl.replay)
  joined = config.data.packing == 'joined'
  out = network.apply(
    variables,
    micro.tokens,
    micro.positions,
    None if joined else micro.segments,
    config.mesh.pipeline,
    arranged=True,
    routes=routes,
    method=network.features,
  )
  head = network.apply(variables, method=network.head)
  ahead = lambda k: sequence.arrange(_ahead(micro.targets, micro.segments, k))
  hidden = jnp.stack([out.hidden, *out.mtp_hidden])
  if config.rl.task:  # likelihoods at the temperature of the answers
    hidden = hidden / config.rl.temperature
  targets = jnp.stack([*map(ahead, range(len(hidden)))])
  nll, lse = losses.sharded_token_nll(hidden, head, targets)
  own = None if routes is None else replay.record(out.routes)
  return Predictions(nll, lse, targets, _joined_stats(out), out.index, own)


def _ahead(
  targets: Int[Array, 'B T'], segments: Int[Array, 'B T'], k: int
) -> Int[Array, 'B T']:
  """Returns the targets k tokens later; -1 past the row or the segment."""
  inside = (jnp.arange(targets.shape[1]) < targets.shape[1] - k)[None]
  same = jnp.roll(segments, -k, axis=1) == segments
  return jnp.where(inside & same, jnp.roll(targets, -k, axis=1), -1)


def _joined_stats(out: transformer.Features) -> moe.Stats:
  """Returns the statistics of the main layers, then of the MTP modules."""
  both = [s for s in (out.stats, out.mtp_stats) if s is not None]
  if not both:
    none, few = jnp.zeros((0,)), jnp.zeros((0,), jnp.int32)
    return moe.Stats(few[:, None], none, none, few)
  return jax.tree.map(lambda *x: jnp.concatenate(x), *both)


def _bias_rows(biases: PyTree, model: ModelConfig) -> dict[str, slice | int]:
  """Returns the rows of the load [L, E] of each module that has biases.

  The main layers come first, stacked in one module, then the MTP modules.
  """
  main = model.moe_layers
  rows = {'moe': slice(main)}
  rows |= {f'mtp_{k}': main + k for k in range(model.mtp.depth)}
  return {name: row for name, row in rows.items() if name in biases}


def _rebalance(biases, rows, load, rate) -> PyTree:
  """Returns the biases, each layer's moved by its row of the load."""
  moved = {}
  for name, row in rows.items():
    move = functools.partial(router.rebalance, load=load[row], rate=rate)
    moved[name] = jax.tree.map(move, biases[name])
  return moved


def _norms(biases, rows) -> dict[str, Array]:
  leaves = [x for name in rows for x in jax.tree.leaves(biases[name])]
  norms = [jnp.linalg.norm(x, axis=-1).reshape(-1) for x in leaves]
  return {'bias_norm': jnp.concatenate(norms)} if norms else {}
