"""MLA over each query's set of keys, and the loss of the indexer (V3.2).

Two forms are equal. 'masked' expands the latents to keys and values of all
heads and masks the logits: few FLOPs a pair, but of all pairs. 'gathered' folds
the up-projections into queries and outputs and takes the set's latents alone:
memory and time are linear in T * K. `choose_form` compares their FLOPs.

The indexer's own loss is the sum over queries of KL(p || softmax(I)), over the
set. p, a constant, is the mean of the heads' probabilities. Each head's softmax
is over the set, not over all keys and then cut to it: the paper allows both.
Queries go in blocks (`over_queries`). The backward pass, written by hand,
computes a block again and adds the gradients of its keys where they came from.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from mla_moe import fp8, kernels, sharding
from mla_moe.config import ModelConfig
from mla_moe.model import (
  attention,
  flash,
  indexer,
  products,
  rope,
  sequence,
  weights,
)
from mla_moe.types import Array, Float, Int, PyTree

_UP = ('rank', 'heads', 'head_dim')
_HEADS = ('batch', 'part', 'heads', 'head_dim')
_NUMBERS = 1 << 25  # of the temporary arrays of a block of queries
_SAMPLE = 16  # queries of a part of a sequence whose sets are measured


class Report(NamedTuple):
  """Measurements of one layer's indexer; `mass` and `sets` are of a sample."""

  kl: Array  # [] float32: the sum of KL(p || softmax(I)) of all tokens, nats
  mass: Array  # [] float32: attention in the sets over the most in K keys
  sets: Array  # [B, rows, K] int32, see `indexer.select`


def choose_form(keys: int, config: ModelConfig) -> str:
  """Returns the form with fewer FLOPs for a query that sees this many keys."""
  a, topk = config.mla, config.dsa.topk
  if config.dsa.attention == 'dense' or topk >= keys:
    return 'masked'
  absorbed = 2 * a.kv_rank + a.rope_dim  # times 2 N FLOPs a pair
  expanded = a.nope_dim + a.rope_dim + a.value_dim
  return 'gathered' if topk * absorbed < keys * expanded else 'masked'


def attend_latents(
  q: Float[Array, 'B T N qk'],
  latent: Float[Array, 'B T C'],
  k_rope: Float[Array, 'B T R'],
  ws: tuple,
  segments: Int[Array, 'B T'] | None,
  config: ModelConfig,
  recipe: fp8.Recipe,
  index: indexer.Index | None,
  sets: indexer.Sets | None,
) -> tuple[Float[Array, 'B T N U'], Report, indexer.Sets | None]:
  """Returns attention over sets, the Report, and the Sets for the next layer.

  The arguments up to `recipe` are those of `mla.attend_latents`. A stack of
  shared layers has no `index`; `sets` None are full layers alone. Devices along
  `tensor`, which split the heads, score the same keys.
  """
  form = choose_form(q.shape[1], config)
  axes = sharding.mesh_axes(_HEADS, q.shape)
  equal = tuple(a for a in sharding.auto_axes() if a not in sum(axes, ()))
  if form == 'gathered':  # its products are in bf16
    ws = tuple(getattr(w, 'master', w) for w in ws)
  full = indexer.is_full(sets, config.dsa)
  splits = tuple(weights.fsdp_split(w, _UP) for w in ws)
  split = jax.sharding.PartitionSpec(*(a or None for a in axes[:2]))
  row = lambda tree: jax.tree.map(lambda _: split, tree)
  selected = None if sets is None else sets.selected
  in_specs = (
    sharding.array_spec(_HEADS, q),
    *(split, split),
    tuple(weights.specs(w, _UP) for w in ws),
    *(row(segments), row(index), row(selected)),
    None if full is None else jax.sharding.PartitionSpec(),
  )
  out_specs = in_specs[0], *[split] * 3, row(selected)
  parts = sequence.parts(q.shape[1])
  args = config, recipe, form, axes, equal, parts, splits
  region = functools.partial(_region, *args)
  run = sharding.shard_map(region, in_specs, out_specs)
  args = q, latent, k_rope, ws, segments, index, selected, full
  y, kl, mass, sample, selected = run(*args)
  if segments is not None:
    kl = jnp.where(segments >= 0, kl, 0.0)
  real = (sample >= 0).any(-1)
  mass = jnp.sum(mass, where=real) / jnp.maximum(real.sum(), 1)
  if sets is not None:
    sets = indexer.Sets(selected, None if full is None else sets.layer + 1)
  return y, Report(kl.sum(), mass, sample), sets


def _region(config, recipe, form, axes, equal, parts, splits, *args):
  """Returns a device's outputs, KL, mass, sample, and sets to be shared."""
  q, latent, k_rope, ws, segments, index, prior, full = args
  ws = tuple(map(weights.gather, ws, splits, (q.dtype, q.dtype)))
  args = q, latent, k_rope, ws, segments, index, prior
  q, latent, k_rope, ws, segments, index, prior = sharding.pvary(args)
  keys = *(sequence.gather(x, parts) for x in (latent, k_rope)), ws
  if segments is not None:
    segments = segments, sequence.gather(segments, parts)
  if index is not None:
    index = index._replace(k=sequence.gather(index.k, parts))
  part, length = sequence.this_part(parts), keys[0].shape[1]
  size, selected = min(config.dsa.topk, length), prior
  selects = config.dsa.attention == 'sparse' and size < length
  if selects and index is not None:
    own = lambda: indexer.select(index, size, segments, part)
    selected = own() if full is None else jax.lax.cond(full, own, lambda: prior)
  args = q, keys, index, selected if selects else None
  y, kl = attend(config, recipe, axes[2], segments, part, form, *args)
  mass, sample = _measure(config, axes[2], segments, part, *args, size)
  if full is not None:
    kl, mass = jnp.where(full, kl, 0.0), jnp.where(full, mass, 0.0)
  selected = None if prior is None else selected
  own_axes = equal + axes[2]  # along which a set and the loss are equal
  if own_axes:
    most = lambda x: jax.lax.pmax(x, own_axes)
    selected, sample = jax.tree.map(most, (selected, sample))
  kl, mass = sharding.pmean((kl, mass), own_axes)
  return sharding.pmean(y, equal), kl, mass, sample, selected


def attend(
  config, recipe, axes, segments, part, form, q, keys, index, selected
) -> tuple[Float[Array, 'B T N U'], Float[Array, 'B T']]:
  """Returns attention over sets and each query's KL(p || softmax(I)), in nats.

  Mesh axes `axes` split the heads. `keys` are latent [B, S, C], rotated key
  [B, S, R] and (w_k_up, w_v_up). No `index` has no KL; `selected` None is all
  keys that a query sees. The rest is as in `indexer.select`.
  """
  latent, k_rope, ws = keys
  (b, t, heads), s = q.shape[:3], latent.shape[1]
  iq, w, ik = (None,) * 3 if index is None else index
  of_queries, of_keys = segments or (None, None)
  positions = jnp.broadcast_to(part.positions(t)[None], (b, t))
  rows, places = (q, iq, w), (selected, positions, of_queries)
  scale = rope.softmax_scale(config.mla)
  if form == 'gathered':
    wide = selected.shape[2] * (heads + latent.shape[2])
    f, whole = _gathered, ws
    gathered = jnp.concatenate([latent, k_rope], axis=-1), ik
  else:
    f, wide, gathered = _masked, s, ()  # of some heads at a time
    whole = (*attention.expand(latent, k_rope, ws, recipe), ik)
  block = max(1, min(128, _NUMBERS // (b * wide), t))
  f = functools.partial(f, scale, axes)
  y, kl = over_queries(f, block, rows, gathered, whole, places, of_keys)
  return checkpoint_name(y, flash.OUT), kl


def _masked(scale, axes, rows, gathered, whole, places, of_keys):
  """Returns a block's outputs [B, T, N, U] and KL [B, T]; see `attend`."""
  (q, iq, w), (k, v, ik) = rows, whole
  selected, positions, of_queries = places
  b, t, s = *q.shape[:2], k.shape[1]
  if selected is None:
    mask = flash.seen(positions, jnp.arange(s), of_queries, of_keys)
  else:
    row, query = jnp.arange(b)[:, None, None], jnp.arange(t)[None, :, None]
    mask = jnp.zeros((b, t, s + 1), bool)  # the last one for empty slots
    mask = mask.at[row, query, selected].set(True)[..., :s]

  def of_heads(q, k, v):
    probs = _softmax(products.dot('btnh,bsnh->btns', q, k) * scale, mask)
    y = products.dot('btns,bsnu->btnu', probs.astype(v.dtype), v)
    return jax.lax.stop_gradient(probs).sum(2), y.astype(v.dtype)

  total, y = _over_heads(of_heads, mask.shape, q, k, v)
  own = None
  if ik is not None:
    keys = ik.astype(jnp.float32)  # their gradient is summed over chunks
    scores = lambda *x: indexer.scores(*x, keys.astype(ik.dtype))
    of_index = lambda iq, w: (scores(iq, w), None)
    own, _ = _over_heads(of_index, mask.shape, iq, w)
  return y, _divergence(total, own, mask, axes)


def _over_heads(f, pairs, *arrays):
  """Returns f(*arrays): a sum over the heads [B, T, S], and outputs of each.

  Heads are axis 2 of arrays and outputs. `f` sees as many at a time as memory
  has room for their pairs; then the backward pass calls it again.
  """
  heads, most = arrays[0].shape[2], max(1, _NUMBERS // math.prod(pairs))
  chunks = (n for n in range(1, heads + 1) if heads % n == 0)
  count = next(n for n in chunks if heads <= n * most)
  if count == 1:
    return f(*arrays)
  again = jax.checkpoint(f, prevent_cse=False)

  def step(total, args):
    part, out = again(*args)
    return total + part, out

  chunks = [jnp.stack(jnp.split(x, count, axis=2)) for x in arrays]
  total, out = jax.lax.scan(step, sharding.pvary(jnp.zeros(pairs)), chunks)
  return total, jax.tree.map(lambda x: jnp.concatenate([*x], axis=2), out)


def _gathered(scale, axes, rows, gathered, whole, places, _):
  """Returns the same of the keys of a block's sets, [B, T, K, C + R]."""
  (q, iq, w), (w_k_up, w_v_up) = rows, whole
  (keys, ik), mask = gathered, places[0] >= 0
  # Keys first and as wide as they are: XLA's CPU would turn or copy them.
  dots = products.dot('btkw,btnw->btkn', keys, _fold(q, w_k_up)) * scale
  probs = jax.nn.softmax(jnp.where(mask[..., None], dots, kernels.MASKED), 2)
  y = products.dot('btkn,btkw->btnw', probs.astype(keys.dtype), keys)
  y = y[..., : len(w_v_up)].astype(keys.dtype)
  y, own = jnp.einsum('btnc,cnu->btnu', y, w_v_up), None
  if ik is not None:
    dots = jax.nn.relu(products.dot('btkd,bthd->btkh', ik, iq))
    own = jnp.einsum('btkh,bth->btk', dots, w, precision='highest')
  total = jax.lax.stop_gradient(probs).sum(-1)
  return y, _divergence(total, own, mask, axes)


def _softmax(logits, mask):
  """Returns probabilities over the keys of the mask [B, T, keys]."""
  return jax.nn.softmax(jnp.where(mask[:, :, None], logits, kernels.MASKED), -1)


def _divergence(total, scores, mask, axes):
  """Returns KL(p || softmax(scores)) of each query; see `_mean` of p."""
  if scores is None:
    return jnp.zeros(mask.shape[:2], jnp.float32)
  p = _mean(total, axes)
  log_q = jax.nn.log_softmax(jnp.where(mask, scores, kernels.MASKED), -1)
  gap = jnp.log(jnp.where(p > 0, p, 1.0)) - log_q
  return jnp.sum(jnp.where(mask & (p > 0), p * gap, 0.0), -1)


def _mean(total, axes):
  """Returns the mean over all heads of probabilities, from a device's sum."""
  p = sharding.psum(total, axes)
  return p / p.sum(-1, keepdims=True)


def _measure(config, axes, segments, part, q, keys, index, selected, size):
  """Returns `Report`'s mass [B, rows], sets [B, rows, K]; none of padding."""
  args = jax.lax.stop_gradient((q, keys, index))
  q, (latent, k_rope, (w_k_up, _)), index = args
  w_k_up = getattr(w_k_up, 'master', w_k_up)
  b, t = q.shape[:2]
  sample = np.linspace(0, t, min(t, _SAMPLE) + 1)[1:].astype(int) - 1
  of_queries, of_keys = segments or (None, None)
  positions = jnp.broadcast_to(part.positions(t)[None], (b, t))
  latents = jnp.concatenate([latent, k_rope], axis=-1)
  queries = index[:2] if index is not None and selected is None else None
  rows = q, queries, positions, of_queries, selected
  rows = jax.tree.map(lambda x: x[:, sample], rows)
  q, queries, positions, of_queries, ids = rows
  mask = flash.seen(positions, jnp.arange(latent.shape[1]), of_queries, of_keys)

  def one(args):
    q, queries, mask = args
    dots = products.dot('btnw,bsw->btns', _fold(q, w_k_up), latents)
    total = _softmax(dots * rope.softmax_scale(config.mla), mask).sum(2)
    return total, queries and indexer.scores(*queries, index.k)

  pairs = jax.lax.map(one, indexer.cut((q, queries, mask), 1))
  total, own = indexer.join(pairs, len(sample))
  p = jnp.where(mask, _mean(total, axes), 0.0)
  if ids is None:  # all keys: those that the index would select
    own = jnp.where(mask, p if own is None else own, -jnp.inf)
    values, ids = jax.lax.top_k(own, size)
    ids = jnp.where(values > -jnp.inf, ids, -1)
  mass = jnp.take_along_axis(p, jnp.maximum(ids, 0), -1)
  mass = jnp.sum(mass, -1, where=ids >= 0)
  if of_queries is not None:
    ids = jnp.where(of_queries[..., None] >= 0, ids, -1)
  return mass / jax.lax.top_k(p, size)[0].sum(-1), ids


def _fold(q, w_k_up):
  """Returns the queries for latents and rotated keys, [B, T, N, C + R]."""
  nope = w_k_up.shape[2]
  folded = jnp.einsum('btnh,cnh->btnc', q[..., :nope], w_k_up)
  return jnp.concatenate([folded, q[..., nope:]], axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def over_queries(f, block, rows, gathered, whole, places, fixed) -> PyTree:
  """Returns [B, T, ...] outputs of `f`, computed a block of queries at a time.

  f(rows, gathered, whole, places, fixed) sees a block of the float arrays
  `rows` [B, T, ...] and of the ints `places` [B, T, ...], the first of which
  are the sets; of `gathered` [B, S, ...] the set's keys [B, T, K, ...]; and
  `whole` (float) and `fixed` (int) as they are.
  """
  length = jax.tree.leaves(rows)[0].shape[1]

  def one(args):
    rows, places = args
    return f(rows, _take(gathered, places[0]), whole, places, fixed)

  outs = jax.lax.map(one, indexer.cut((rows, places), block))
  return indexer.join(outs, length)


def _forward(f, block, *args):
  return over_queries(f, block, *args), args


def _backward(f, block, residuals, grads):
  rows, gathered, whole, places, fixed = residuals
  length = jax.tree.leaves(rows)[0].shape[1]
  wide = lambda x: x.astype(jnp.float32)

  def one(sums, args):
    rows, places, grads = args
    run = lambda *inputs: f(*inputs, places, fixed)
    inputs = rows, _take(gathered, places[0]), whole
    drows, dtaken, dwhole = jax.vjp(run, *inputs)[1](grads)
    # An empty slot's key, the first one, gets zeros.
    scatter = lambda x, d: x.at[_places(x, places[0])].add(wide(d))
    dgathered = jax.tree.map(scatter, sums[0], dtaken)
    add = lambda total, d: total + wide(d)
    return (dgathered, jax.tree.map(add, sums[1], dwhole)), drows

  zeros = lambda x: jnp.zeros(x.shape, jnp.float32)
  start = sharding.pvary(jax.tree.map(zeros, (gathered, whole)))
  sums, drows = jax.lax.scan(
    one, start, indexer.cut((rows, places, grads), block)
  )
  like = lambda d, x: d.astype(x.dtype)
  dgathered, dwhole = jax.tree.map(like, sums, (gathered, whole))
  return indexer.join(drows, length), dgathered, dwhole, None, None


over_queries.defvjp(_forward, _backward)


def _take(keys: PyTree, selected: Array | None) -> PyTree:
  """Returns the keys [B, S, ...] of the sets, [B, T, K, ...]; any for -1."""
  return jax.tree.map(lambda x: x[_places(x, selected)], keys)


def _places(x, selected):
  return jnp.arange(len(x))[:, None, None], jnp.maximum(selected, 0)
