"""A training step: pure, `(state, batch, rates) -> (state, metrics)`.

The loss is V3's: main next-token loss + mtp weight * MTP loss (section 2.2)
+ balance weight * sequence-wise balance loss (equation 17), and a z-loss where
a config asks for one. Gradients are summed in float32 over micro-batches, each
weighed by its tokens, so that the split into micro-batches does not change the
result. The number of micro-batches is a value, not a shape: the batch may grow
during the run without a new compilation. The router's biases move outside the
gradient, by the load of the whole step (section 2.1.2).

A step is rejected if its loss or gradient is not finite, or its main loss
is a spike. It is computed all the same, and a `where` over the arrays that the
update writes anyway keeps the old state. (optax.apply_if_finite applies a NaN
after some rejections in a row.)
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from mla_moe.config import Config, ModelConfig, MTPConfig
from mla_moe.data import batches
from mla_moe.model import moe, router, sequence, transformer
from mla_moe.train import losses, optim
from mla_moe.train.state import State
from mla_moe.types import Array, Int, PyTree


def train_step(
  state: State,
  batch: batches.Batch,
  rates: optim.Rates,
  *,
  config: Config,
) -> tuple[State, dict[str, Array]]:
  """Returns the state after one update from a whole global batch, and metrics.

  A rejected update changes nothing but the count of steps.

  Metrics: float32 scalars loss (the weighted sum), main_loss and mtp_loss (nats
  per token), balance_loss (mean over MoE layers; 1 is balanced), grad_norm,
  skipped (0: accepted; 1: not finite; 2: a spike); per MoE layer, MTP modules
  last: load [L, E] int32, entropy [L], bias_norm [L] and overflow [L] int32
  (`moe.Stats`).
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
    part = batch.tokens.shape[1] / sequences
    return _loss(terms, tokens, part, rates, config.optim)

  grads, metrics = _accumulate(objective, state.params, batch)
  grads, norm = optim.clipped(grads, config.optim.clip)
  window = state.loss_window
  both = metrics['loss'], metrics['main_loss']
  skipped, window = _judge(window, *both, norm, config.optim)
  accept = skipped == 0
  tx, rate = optim.optimizer(config.optim), rates.learning_rate
  params, opt = optim.apply(tx, grads, state.opt, state.params, rate, accept)
  rows = _bias_rows(state.router, config.model)
  biases = _rebalance(state.router, rows, metrics['load'], rates.bias_rate)
  biases, window = jax.tree.map(
    lambda new, old: jnp.where(accept, new, old),
    (biases, window),
    (state.router, state.loss_window),
  )
  leaves = [x for name in rows for x in jax.tree.leaves(biases[name])]
  norms = [jnp.linalg.norm(x, axis=-1).reshape(-1) for x in leaves]
  metrics.pop('z_loss')
  metrics['balance_loss'] = jnp.mean(metrics['balance_loss'])
  metrics |= {'grad_norm': norm, 'skipped': skipped}
  if norms:
    metrics['bias_norm'] = jnp.concatenate(norms)
  return State(state.step + 1, params, biases, opt, window), metrics


def eval_step(
  state: State, batch: batches.Batch, *, config: Config
) -> dict[str, Array]:
  """Returns sums over a batch: 'nll' in nats, and 'tokens' predicted."""
  # All hidden states go through the head at once: without the MTP modules'.
  main = dataclasses.replace(config.model, mtp=MTPConfig(depth=0))
  config = dataclasses.replace(config, model=main)

  def one(micro):
    terms = _terms(state.params, state.router, micro, config)
    return terms['main_loss'], jnp.sum(micro.targets >= 0)

  parts = batch._replace(count=jnp.zeros(len(batch.tokens)))
  nll, tokens = jax.lax.map(one, parts)
  return {'nll': nll.sum(), 'tokens': tokens.sum()}


def _loss(terms, tokens, part, rates, optim) -> tuple[Array, dict[str, Array]]:
  """Returns a micro-batch's part of the step's loss, and of its metrics.

  `tokens` are the whole step's; `part` is this micro-batch's part of its
  sequences.
  """
  for name in ('main_loss', 'mtp_loss', 'z_loss'):
    terms[name] = terms[name] / tokens
  for name in ('balance_loss', 'entropy'):
    terms[name] = terms[name] * part
  loss = (
    terms['main_loss']
    + rates.mtp_loss * terms['mtp_loss']
    + optim.z_loss * terms['z_loss']
    + optim.balance_loss * terms['balance_loss'].sum()
  )
  return loss, {'loss': loss, **terms}


def _judge(window, loss, main_loss, norm, optim) -> tuple[Array, PyTree]:
  """Returns the metric `skipped`, and the window with this main loss in it.

  The window is of main losses: a schedule changes the weights of the whole. The
  caller drops it if the step is rejected: a NaN in it would condemn every step
  until it had left the ring again.
  """
  wrong = 1.0 - (jnp.isfinite(loss) & jnp.isfinite(norm)).astype(jnp.float32)
  if not window:
    return wrong, window
  losses, seen = window['losses'], window['seen']
  limit = losses.mean() + optim.spike_sigma * losses.std()
  spike = (seen >= losses.size) & (main_loss > limit)
  skipped = jnp.where(wrong > 0, wrong, 2.0 * spike)
  losses = losses.at[seen % losses.size].set(main_loss)
  return skipped, {'losses': losses, 'seen': seen + 1}


def _accumulate(objective, params, batch) -> tuple[PyTree, dict[str, Array]]:
  """Returns gradients and metrics, summed over the real micro-batches."""
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


def _terms(params, biases, micro, config) -> dict[str, Array]:
  """Returns the parts of the loss, and statistics, of one micro-batch.

  main_loss, mtp_loss (mean over the modules) and z_loss are sums over tokens;
  balance_loss and entropy are means over sequences, and load and overflow
  counts, each with an axis of MoE layers.
  """
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
    'main_loss': nll[0].sum(),
    'mtp_loss': nll[1:].sum() / max(len(out.mtp_hidden), 1),
    'z_loss': jnp.where(targets[0] >= 0, jnp.square(lse[0]), 0).sum(),
    'balance_loss': stats.balance,
    'entropy': stats.entropy,
    'load': stats.load,
    'overflow': stats.overflow,
  }


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
    none = jnp.zeros((0,), jnp.float32)
    few = jnp.zeros((0,), jnp.int32)
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
