"""MLA over each query's set of keys, and the loss of the indexer (V3.2).

Two forms are equal. 'masked' expands the latents to keys and values of all
heads and masks the logits: few FLOPs a pair, but of all pairs. 'gathered' folds
the up-projections into queries and outputs and takes the set's latents alone:
memory and time are linear in T * K. `choose_form` compares their FLOPs.

The indexer learns from its own loss, sum over queries of KL(p || softmax(I)),
over the set. p is the mean over heads of the attention's probabilities, and
is a constant. Each head's softmax is over the set, not over all keys and then
cut to the set: the paper allows both, and only the first exists here.

Queries go in blocks (`over_queries`). The backward pass, written by hand,
computes a block again and adds the gradients of its keys where they came from.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
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


class Report(NamedTuple):
  """Measurements of one layer's indexer."""

  kl: Array  # [] float32: the sum of KL(p || softmax(I)) of all tokens, nats


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

  The arguments up to `recipe` are those of `mla.attend_latents`. `index` is the
  layer's own, None where all layers of its stack are shared; `sets` are those
  of the layer before, None where all layers are full. Each device of a mesh
  scores the keys of the whole sequence for its queries: those along `tensor`,
  which split the heads, find the same set.
  """
  parts = sequence.parts(q.shape[1])
  size = min(config.dsa.topk, q.shape[1])
  form = choose_form(q.shape[1], config)
  selects = config.dsa.attention == 'sparse' and size < q.shape[1]
  axes = sharding.mesh_axes(_HEADS, q.shape)
  if form == 'gathered':  # its products are in bf16
    ws = tuple(getattr(w, 'master', w) for w in ws)
  full = indexer.is_full(sets, config.dsa)
  equal = tuple(a for a in sharding.auto_axes() if a not in sum(axes, ()))
  own_axes = equal + axes[2]  # along which a set and the loss are equal

  def region(q, latent, k_rope, ws, segments, index, selected, full):
    pairs = zip(ws, splits, strict=True)
    ws = tuple(weights.gather(w, split, q.dtype) for w, split in pairs)
    args = q, latent, k_rope, ws, segments, index, selected
    q, latent, k_rope, ws, segments, index, selected = sharding.pvary(args)
    keys = (sequence.gather(x, parts) for x in (latent, k_rope))
    if segments is not None:
      segments = segments, sequence.gather(segments, parts)
    if index is not None:
      index = index._replace(k=sequence.gather(index.k, parts))
    part = sequence.this_part(parts)
    if selects and index is not None:
      own = lambda: indexer.select(index, size, segments, part)
      prior = lambda: selected
      selected = own() if full is None else jax.lax.cond(full, own, prior)
    of_set = selected if selects else None
    run = functools.partial(attend, form, config, recipe, axes[2])
    y, kl = run(q, (*keys, ws), index, of_set, segments, part)
    if full is not None:
      kl = jnp.where(full, kl, 0.0)
    if sets is None:
      selected = None
    elif own_axes:
      selected = jax.lax.pmax(selected, own_axes)
    return sharding.pmean(y, equal), sharding.pmean(kl, own_axes), selected

  spec = sharding.array_spec
  splits = tuple(weights.fsdp_split(w, _UP) for w in ws)
  row = lambda x: spec(('batch', 'part', *[None] * (len(x.shape) - 2)), x)
  selected = None if sets is None else sets.selected
  in_specs = (
    spec(_HEADS, q),
    spec(('batch', 'part', 'latent'), latent),
    spec(('batch', 'part', 'head_dim'), k_rope),
    tuple(weights.specs(w, _UP) for w in ws),
    spec(('batch', 'part'), segments),
    jax.tree.map(row, index),
    jax.tree.map(row, selected),
    jax.tree.map(lambda x: spec((), x), full),
  )
  tokens = jax.ShapeDtypeStruct(q.shape[:2], jnp.int32)
  out_specs = in_specs[0], row(tokens), in_specs[6]
  run = sharding.shard_map(region, in_specs, out_specs)
  args = q, latent, k_rope, ws, segments, index, selected, full
  y, kl, selected = run(*args)
  if segments is not None:
    kl = jnp.where(segments >= 0, kl, 0.0)
  if sets is not None:
    sets = indexer.Sets(selected, None if full is None else sets.layer + 1)
  return y, Report(kl.sum()), sets


def attend(
  form: str,
  config: ModelConfig,
  recipe: fp8.Recipe,
  axes: tuple[str, ...],
  q: Float[Array, 'B T N qk'],
  keys: tuple,
  index: indexer.Index | None,
  selected: Int[Array, 'B T K'] | None,
  segments: tuple | None = None,
  part: sequence.Part = sequence.Part(),
) -> tuple[Float[Array, 'B T N U'], Float[Array, 'B T']]:
  """Returns attention over sets and each query's KL(p || softmax(I)), in nats.

  Args:
    form: 'masked' or 'gathered'.
    config: the model's.
    recipe: of the products that expand latents.
    axes: mesh axes that split the heads.
    q: queries of a `part` of the sequence, their last R numbers rotated.
    keys: latent [B, S, C], rotated key [B, S, R], and w_k_up and w_v_up.
    index: its queries and its keys of the whole sequence; None has no KL.
    selected: `indexer.select`'s; None is all keys that a query sees.
    segments: numbers of documents of the queries [B, T] and of the keys [B, S].
    part: the part of the sequence that the queries are.
  """
  latent, k_rope, ws = keys
  (b, t, heads), s = q.shape[:3], latent.shape[1]
  scale = rope.softmax_scale(config.mla)
  iq, w, ik = (None,) * 3 if index is None else index
  of_queries, of_keys = (None, None) if segments is None else segments
  positions = jnp.broadcast_to(part.positions(t)[None], (b, t))
  rows, places = (q, iq, w), (selected, positions, of_queries)
  if form == 'gathered':
    wide = heads * selected.shape[2] + selected.shape[2] * latent.shape[2]
    gathered, whole, fixed = (latent, k_rope, ik), ws, None
  else:
    wide = heads * s
    gathered, whole, fixed = (
      (),
      (*attention.expand(latent, k_rope, ws, recipe), ik),
      of_keys,
    )
  block = max(1, min(128, _NUMBERS // (b * wide), t))
  f = functools.partial(
    {'gathered': _gathered, 'masked': _masked}[form], scale, axes
  )
  y, kl = over_queries(f, block, rows, gathered, whole, places, fixed)
  return checkpoint_name(y, flash.OUT), kl


def _masked(scale, axes, rows, gathered, whole, places, of_keys):
  """Returns a block's outputs [B, T, N, U] and KL [B, T]; see `attend`."""
  (q, iq, w), (k, v, ik) = rows, whole
  selected, positions, of_queries = places
  b, t, s = *q.shape[:2], k.shape[1]
  if selected is None:
    mask = jnp.arange(s) <= positions[..., None]
    if of_keys is not None:
      mask = mask & (of_queries[..., None] == of_keys[:, None])
  else:
    row, query = jnp.arange(b)[:, None, None], jnp.arange(t)[None, :, None]
    mask = jnp.zeros((b, t, s + 1), bool)  # the last one for empty slots
    mask = mask.at[row, query, selected].set(True)[..., :s]
  dots = products.dot('btnh,bsnh->btns', q, k)
  probs = _softmax(dots * scale, mask)
  y = products.dot('btns,bsnu->btnu', probs.astype(v.dtype), v)
  own = None if ik is None else indexer.scores(iq, w, ik)
  return y.astype(v.dtype), _divergence(probs, own, mask, axes)


def _gathered(scale, axes, rows, gathered, whole, places, _):
  """Returns the same of the latents of a block's sets, [B, T, K, C]."""
  (q, iq, w), (w_k_up, w_v_up) = rows, whole
  latent, k_rope, ik = gathered
  mask = places[0] >= 0
  nope = w_k_up.shape[2]
  absorbed = jnp.einsum('btnh,cnh->btnc', q[..., :nope], w_k_up)
  dots = products.dot('btnc,btkc->btnk', absorbed, latent)
  dots = dots + products.dot('btnr,btkr->btnk', q[..., nope:], k_rope)
  probs = _softmax(dots * scale, mask)
  y = products.dot('btnk,btkc->btnc', probs.astype(latent.dtype), latent)
  y = jnp.einsum('btnc,cnu->btnu', y.astype(latent.dtype), w_v_up)
  own = None
  if ik is not None:
    own = indexer.weigh(products.dot('bthd,btkd->bthk', iq, ik), w)
  return y, _divergence(probs, own, mask, axes)


def _softmax(logits, mask):
  """Returns probabilities over the keys of the mask [B, T, keys]."""
  return jax.nn.softmax(jnp.where(mask[:, :, None], logits, kernels.MASKED), -1)


def _divergence(probs, scores, mask, axes):
  """Returns KL(p || softmax(scores)) of each query, p the mean over heads."""
  if scores is None:
    return jnp.zeros(mask.shape[:2], jnp.float32)
  p = sharding.psum(jax.lax.stop_gradient(probs).sum(2), axes)
  p = p / p.sum(-1, keepdims=True)
  log_q = jax.nn.log_softmax(jnp.where(mask, scores, kernels.MASKED), -1)
  gap = jnp.log(jnp.where(p > 0, p, 1.0)) - log_q
  return jnp.sum(jnp.where(mask & (p > 0), p * gap, 0.0), -1)


# ------------------------------------------------------------------ blocks


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def over_queries(
  f: Callable,
  block: int,
  rows: PyTree,
  gathered: PyTree,
  whole: PyTree,
  places: PyTree,
  fixed: PyTree,
) -> PyTree:
  """Returns [B, T, ...] outputs of `f`, computed a block of queries at a time.

  Only a block's keys exist at a time, in either direction, and the backward
  pass writes no gradient but those of the keys of a set.

  Args:
    f: f(rows, gathered, whole, places, fixed) returns a block's outputs.
    block: queries of a block.
    rows: float arrays [B, T, ...], of queries.
    gathered: float arrays [B, S, ...]; `f` sees the set's, [B, T, K, ...].
    whole: float arrays, which each block sees.
    places: int arrays [B, T, ...], the first of which are the sets.
    fixed: int arrays that each block sees.
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

  def one(sums, args):
    rows, places, grads = args
    run = lambda *inputs: f(*inputs, places, fixed)
    inputs = rows, _take(gathered, places[0]), whole
    drows, dtaken, dwhole = jax.vjp(run, *inputs)[1](grads)
    dgathered = jax.tree.map(
      lambda total, d: _add(total, d, places[0]), sums[0], dtaken
    )
    add = lambda total, d: total + d.astype(jnp.float32)
    return (dgathered, jax.tree.map(add, sums[1], dwhole)), drows

  wide = lambda x: jnp.zeros(x.shape, jnp.float32)
  start = sharding.pvary(jax.tree.map(wide, (gathered, whole)))
  sums, drows = jax.lax.scan(
    one, start, indexer.cut((rows, places, grads), block)
  )
  like = lambda d, x: d.astype(x.dtype)
  dgathered, dwhole = jax.tree.map(like, sums, (gathered, whole))
  return indexer.join(drows, length), dgathered, dwhole, None, None


over_queries.defvjp(_forward, _backward)


def _take(keys: PyTree, selected: Array | None) -> PyTree:
  """Returns the keys [B, S, ...] of the sets, [B, T, K, ...]; any for -1."""
  row = lambda x: jnp.arange(x.shape[0])[:, None, None]
  return jax.tree.map(lambda x: x[row(x), jnp.maximum(selected, 0)], keys)


def _add(total: Array, grads: Array, selected: Array) -> Array:
  """Returns `total` [B, S, ...] plus the gradients of the sets' keys."""
  row = jnp.arange(total.shape[0])[:, None, None]
  # An empty slot's key has a gradient of 0.
  ids = jnp.maximum(selected, 0)
  return total.at[row, ids].add(grads.astype(jnp.float32))
