"""The lightning indexer, attention over its sets, and its training."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from experiments import mesh_check
from mla_moe import config as c
from mla_moe import sharding, types
from mla_moe.model import (
  attention,
  indexer,
  products,
  rope,
  sparse,
  transformer,
)
from mla_moe.train import optim, stage, step
from mla_moe.train.state import init_state

B, T, K = 2, 24, 5
MLA = c.MLAConfig(
  heads=2, query_rank=12, kv_rank=8, nope_dim=8, rope_dim=4, value_dim=6
)
DSA = c.DSAConfig(heads=3, dim=8, topk=K, types=('full', 'shared', 'full'))
MODEL = c.ModelConfig(
  vocab=64,
  dim=32,
  layers=3,
  dense_layers=1,
  dense_width=48,
  max_positions=T,
  init_std=0.2,
  dtype='float32',
  bos_id=0,
  eos_id=1,
  mla=MLA,
  dsa=DSA,
  moe=c.MoEConfig(
    experts=4, top_k=2, width=16, shared=0, groups=1, top_groups=1
  ),
  compute=c.ComputeConfig(remat='none', experts='dense'),
)
SEGMENTS = jnp.asarray(np.repeat([[0, 1], [2, 3]], [10, 14], axis=1), jnp.int32)


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def an_index(seed=0):
  q, w, k = (3, B, T, 3, 8), (B, T, 3), (B, T, 8)
  return indexer.Index(normal(seed, *q[1:]), normal(1, *w), normal(2, *k))


@functools.partial(jax.jit, static_argnums=1)
def select(index, topk=K, segments=None):
  pair = None if segments is None else (segments, segments)
  return indexer.select(index, topk, pair)


def sets(selected):
  return [[set(x[x >= 0].tolist()) for x in row] for row in np.array(selected)]


def oracle_scores(index):
  q, w, k = (np.asarray(x, np.float64) for x in index)
  dots = np.maximum(np.einsum('bthd,bsd->bths', q, k), 0)
  return np.einsum('bths,bth->bts', dots, w)


def test_a_set_is_the_top_k_of_all_scores(monkeypatch):
  """In blocks of 8 and tiles of 8, of the own document's past alone."""
  monkeypatch.setattr(indexer, '_QUERIES', 8)
  monkeypatch.setattr(indexer, '_KEYS', 8)
  selected = np.array(select(an_index(), segments=SEGMENTS))
  scores, ids = oracle_scores(an_index()), np.asarray(SEGMENTS)
  for b in range(B):
    for t in range(T):
      seen = [s for s in range(t + 1) if ids[b, s] == ids[b, t]]
      best = sorted(seen, key=lambda s: -scores[b, t, s])[:K]
      own = selected[b, t]
      assert own[: len(best)].tolist() == best
      assert (own[len(best) :] == -1).all()


def test_a_packed_row_has_the_sets_of_its_documents():
  packed = sets(select(an_index(), segments=SEGMENTS))
  for first, last in ((0, 10), (10, T)):
    alone = indexer.Index(*(x[:, first:last] for x in an_index()))
    alone = sets(select(alone))
    moved = [[{s + first for s in x} for x in row] for row in alone]
    assert moved == [row[first:last] for row in packed]


def test_equal_scores_go_to_the_lowest_index():
  index = an_index()._replace(k=np.zeros((B, T, 8), np.float32))
  expected = [[set(range(min(t + 1, K))) for t in range(T)]] * B
  assert sets(select(index)) == expected


def test_a_positive_factor_of_the_weights_keeps_the_sets():
  index = an_index()
  scaled = index._replace(w=index.w * np.float32(7.3))
  chex.assert_trees_all_equal(select(index), select(scaled))


def test_a_constant_added_to_the_scores_keeps_the_sets():
  """By a head more, whose feature is 1 in its query and in all keys."""
  index, wide = an_index(), ((0, 0), (0, 0), (0, 1), (0, 1))
  q = np.pad(index.q, wide)
  q[..., -1, -1] = 1.0
  w = np.pad(index.w, wide[:3], constant_values=2.0)
  more = indexer.Index(q, w, np.pad(index.k, wide[:3], constant_values=1.0))
  gap = oracle_scores(more) - oracle_scores(index)
  np.testing.assert_allclose(gap, 2.0, rtol=1e-6)
  chex.assert_trees_all_equal(select(more), select(index))


def hadamard(size):
  """Rows of +-1 that are orthogonal, of a power of two (Sylvester)."""
  if size == 1:
    return np.ones((1, 1), np.float32)
  half = hadamard(size // 2)
  return np.block([[half, half], [half, -half]])


def test_a_hadamard_rotation_changes_no_score():
  """Releases rotate queries and keys alike, which float32 does not need."""
  turn, index = hadamard(8) * np.float32(8**-0.5), an_index()
  np.testing.assert_allclose(turn @ turn.T, np.eye(8), atol=1e-6)
  turned = index._replace(q=index.q @ turn, k=index.k @ turn)
  assert np.abs(turned.k - index.k).max() > 1
  chex.assert_trees_all_close(
    oracle_scores(turned), oracle_scores(index), atol=1e-5
  )
  chex.assert_trees_all_equal(select(turned), select(index))


@pytest.mark.parametrize('source', ['latent', 'x'])
@pytest.mark.parametrize('first', [True, False])
def test_projections_have_layer_norm_halves_and_relu(source, first):
  """Keys are so small that the norm's eps is of their size."""
  dsa = c.DSAConfig(heads=3, dim=8, topk=K, q_from=source, rope_first=first)
  config = dataclasses.replace(MODEL, dsa=dsa)
  x, latent = normal(3, B, T, 32), normal(4, B, T, 12)
  params = {
    'w_query': normal(5, 12 if source == 'latent' else 32, 3, 8),
    'w_key': normal(6, 32, 8) * 3e-4,
    'w_heads': normal(7, 32, 3),
    'key_norm': {'scale': normal(8, 8), 'bias': normal(9, 8)},
  }
  positions = jnp.broadcast_to(jnp.arange(T)[None], (B, T))
  angles = rope.angles(positions, 4, MLA.rope)
  index = indexer.project(params, x, latent, angles, config)

  def turned(y):
    theta = np.arange(T)[:, None] * 10000.0 ** (-np.arange(0, 4, 2) / 4)
    factor = np.exp(1j * theta)[None]
    factor = factor[:, :, None] if y.ndim == 4 else factor
    pair = y[..., :4] if first else y[..., 4:]
    rest = y[..., 4:] if first else y[..., :4]
    z = (pair[..., :2] + 1j * pair[..., 2:]) * factor
    both = [np.concatenate([z.real, z.imag], -1), rest]
    return np.concatenate(both if first else both[::-1], -1)

  wide = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
  q = latent if source == 'latent' else x
  q = np.einsum('btq,qhd->bthd', q.astype(float), wide['w_query'])
  k = x.astype(float) @ wide['w_key']
  k = k - k.mean(-1, keepdims=True)

  def expected(eps):
    y = k / np.sqrt(np.square(k).mean(-1, keepdims=True) + eps)
    y = y * wide['key_norm']['scale'] + wide['key_norm']['bias']
    w = x.astype(float) @ wide['w_heads'] / np.sqrt(3 * 8)
    return oracle_scores((turned(q), w, turned(y)))

  scores = indexer.scores(*index)
  np.testing.assert_allclose(scores, expected(1e-6), atol=2e-4)
  assert np.abs(scores - expected(1e-5)).max() > 1


# ------------------------------------------------------- attention over sets


def attention_inputs():
  index = an_index()
  shapes = (B, T, 2, 12), (B, T, 8), (B, T, 4), (8, 2, 8), (8, 2, 6)
  q, latent, k_rope, *ws = (normal(i, *s) for i, s in enumerate(shapes, 10))
  return q, latent, k_rope, tuple(ws), index


@functools.partial(jax.jit, static_argnums=(1, 2))
def values_and_grads(inputs, form, topk):
  """Outputs, KL and the gradients of a sum of both; the oracle is a form."""
  pair = SEGMENTS, SEGMENTS
  selected = indexer.select(inputs[4], topk, pair)

  def run(inputs):
    q, latent, k_rope, ws, index = inputs
    keys = latent, k_rope, ws
    if form == 'oracle':
      return oracle(q, keys, index, selected)
    args = q, keys, index, selected
    core = functools.partial(sparse.attend, MODEL, products.NO_FP8, ())
    return core(pair, sparse.sequence.Part(), form, *args)

  def total(inputs):
    y, kl = run(inputs)
    return (y * jnp.asarray(normal(20, *y.shape), y.dtype)).sum() + kl.sum(), (
      y,
      kl,
    )

  (_, out), grads = jax.value_and_grad(total, has_aux=True)(inputs)
  return out, grads


def oracle(q, keys, index, selected):
  """One softmax over all pairs, masked by the sets; no blocks, no gathers."""
  latent, k_rope, (w_k_up, w_v_up) = keys
  mask = (selected[..., None] == jnp.arange(T)[None, None, None]).any(2)
  k = jnp.einsum('bsc,cnh->bsnh', latent, w_k_up)
  dots = jnp.einsum('btnh,bsnh->btns', q[..., :8], k)
  dots = dots + jnp.einsum('btnr,bsr->btns', q[..., 8:], k_rope)
  dots = jnp.where(mask[:, :, None], dots * 12**-0.5, -1e30)
  probs = jax.nn.softmax(dots, -1)
  y = jnp.einsum('btns,bsc,cnu->btnu', probs, latent, w_v_up)
  dots = jax.nn.relu(jnp.einsum('bthd,bsd->bths', index.q, index.k))
  scores = jnp.einsum('bths,bth->bts', dots, index.w)
  log_q = jax.nn.log_softmax(jnp.where(mask, scores, -1e30), -1)
  p = jax.lax.stop_gradient(probs.mean(2))
  return y, jnp.where(p > 0, p * (jnp.log(p) - log_q), 0.0).sum(-1)


def test_three_forms_and_their_gradients_are_equal(monkeypatch):
  """In blocks of three queries, against the oracle in float64."""
  monkeypatch.setattr(sparse, '_NUMBERS', 3 * B * 2 * T)
  inputs = attention_inputs()
  masked = values_and_grads(inputs, 'masked', K)
  gathered = values_and_grads(inputs, 'gathered', K)
  with jax.enable_x64(True):
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), inputs)
    expected = values_and_grads(wide, 'oracle', K)
  chex.assert_trees_all_equal_dtypes(masked, gathered)
  narrow = jax.tree.map(lambda x: np.asarray(x, np.float32), expected)
  chex.assert_trees_all_close(masked, narrow, atol=3e-5, rtol=2e-4)
  chex.assert_trees_all_close(gathered, narrow, atol=3e-5, rtol=2e-4)


def test_a_set_of_all_keys_is_dense_attention():
  """With K = T everywhere; with K = 5 in the first five rows of a document."""
  inputs = attention_inputs()
  q, latent, k_rope, ws, _ = inputs
  k, v = attention.expand(latent, k_rope, ws, products.NO_FP8)
  pair = SEGMENTS, SEGMENTS
  dense = attention.attend(
    q, k, v, scale=12**-0.5, segments=pair, impl='reference'
  )
  (whole, _), _ = values_and_grads(inputs, 'gathered', T)
  chex.assert_trees_all_close(whole, dense, atol=1e-5)
  (few, _), _ = values_and_grads(inputs, 'gathered', K)
  error = np.abs(few - dense).max((0, 2, 3))
  assert error[:K].max() < 1e-5 < 0.1 < error[K:10].max()


def shapes(jaxpr):
  """The shapes of all arrays of a program, those of its loops included."""
  for equation in jaxpr.eqns:
    yield from (v.aval.shape for v in equation.outvars)
    for value in jax.tree.leaves(list(equation.params.values())):
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns'):
        yield from shapes(inner)


def test_no_array_has_all_pairs(monkeypatch):
  """Neither of the scores nor of attention, in either direction."""
  monkeypatch.setattr(indexer, '_QUERIES', 8)
  monkeypatch.setattr(indexer, '_KEYS', 8)
  monkeypatch.setattr(sparse, '_NUMBERS', 256)
  length = 100
  q, latent, k_rope, ws, index = attention_inputs()
  long = lambda x: np.tile(x, (1, 5, *[1] * (x.ndim - 2)))[:, :length]
  q, latent, k_rope = map(long, (q, latent, k_rope))
  index = indexer.Index(*map(long, index))

  def all_shapes(form):
    def loss(q, latent, k_rope, ws, index):
      selected = None if form == 'dense' else indexer.select(index, 6)
      core = 'gathered' if form == 'gathered' else 'masked'
      args = core, q, (latent, k_rope, ws), index, selected
      run = functools.partial(sparse.attend, MODEL, products.NO_FP8, ())
      y, kl = run(None, sparse.sequence.Part(), *args)
      return y.sum() + kl.sum()

    args = q, latent, k_rope, ws, index
    grad = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2, 3, 4)))(*args)
    return list(shapes(grad.jaxpr))

  for form in ('gathered', 'masked', 'dense'):  # a block of queries at a time
    out = all_shapes(form)
    assert max(sum(n >= length for n in shape) for shape in out) == 1
    # Nor all heads of attention (2), of the index (3): one at a time.
    wide = {(B, 1, heads, length) for heads in (2, 3)} & {*out}
    assert not wide, (form, wide)
  assert (B, 1, 1, length) in out


def test_index_keys_have_their_gradient_in_float32_over_heads(monkeypatch):
  """Of 32 heads one at a time, in bfloat16, beside all at once in float32."""
  keys = jax.random.split(jax.random.key(0), 6)
  make = lambda key, *shape: jax.random.normal(key, shape, jnp.bfloat16)
  q, k, v = (make(key, 1, 16, 1, 8) for key in keys[:3])
  iq, w = make(keys[3], 1, 16, 32, 8), make(keys[4], 1, 16, 32)
  ik = make(keys[5], 1, 16, 8)
  places = None, jnp.arange(16)[None], None

  def loss(ik, dtype):
    rows = q.astype(dtype), iq.astype(dtype), w.astype(jnp.float32)
    whole = k.astype(dtype), v.astype(dtype), ik
    return sparse._masked(1.0, (), rows, (), whole, places, None)[1].sum()

  right = jax.grad(loss)(ik.astype(jnp.float32), jnp.float32)
  monkeypatch.setattr(sparse, '_NUMBERS', 16 * 16)
  ours = jax.jit(jax.grad(loss), static_argnums=1)(ik, jnp.bfloat16)
  error = jnp.linalg.norm(ours.astype(jnp.float32) - right)
  assert error < 0.004 * jnp.linalg.norm(right)


def test_the_gradient_of_the_scores_is_softmax_minus_p():
  probs = jax.nn.softmax(normal(0, 1, 3, 2, 7), -1)
  mask, scores = np.ones((1, 3, 7), bool), normal(1, 1, 3, 7)
  p = probs.mean(2)

  @jax.value_and_grad
  def loss(scores):
    return sparse._divergence(probs.sum(2), scores, mask, ()).sum()

  _, of_scores = loss(scores)
  chex.assert_trees_all_close(
    of_scores, jax.nn.softmax(scores, -1) - p, atol=1e-6
  )
  value, _ = loss(jnp.log(p) + 3.0)
  assert abs(value) < 1e-6


def test_the_form_is_chosen_by_arithmetic():
  """V3.2's numbers: 278,528 FLOPs a gathered pair, 81,920 a masked one."""
  model = c.ModelConfig(dsa=c.DSAConfig(heads=64))
  forms = [sparse.choose_form(s, model) for s in (2048, 6963, 6964, 131072)]
  assert forms == ['masked', 'masked', 'gathered', 'gathered']
  assert 2048 * 278528 // 81920 == 6963
  dense = dataclasses.replace(model.dsa, attention='dense')
  model = dataclasses.replace(model, dsa=dense)
  assert sparse.choose_form(131072, model) == 'masked'


# --------------------------------------------------------------- the model


@functools.cache
def variables():
  tokens = jnp.zeros((1, 3), jnp.int32)
  net = transformer.Transformer(MODEL)
  init = lambda key: nn.unbox(net.init(key, tokens))
  shapes = jax.eval_shape(init, jax.random.key(0))
  random = np.random.default_rng(0)

  def draw(path, x):
    name = path[-1].key
    if name in ('scale', 'bias'):
      return np.full(x.shape, name == 'scale', x.dtype)
    return random.normal(0, MODEL.init_std, x.shape).astype(x.dtype)

  return jax.tree_util.tree_map_with_path(draw, shapes)


def tokens():
  return np.random.default_rng(0).integers(2, 64, (B, T)).astype(np.int32)


@jax.jit
def gradients(weights):
  """Of weights[0] * the language model's loss + weights[1] * all KL."""
  net, own = transformer.Transformer(MODEL), variables()

  def loss(params):
    args = {**own, 'params': params}, jnp.asarray(tokens())
    out = net.apply(*args, method=net.features)
    hidden = out.hidden.sum() + sum(h.sum() for h in out.mtp_hidden)
    return weights[0] * hidden + weights[1] * out.index.kl.sum(), out.index

  return jax.grad(loss, has_aux=True)(own['params'])


def largest(tree):
  return {
    jax.tree_util.keystr(path): float(jnp.abs(leaf).max())
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


@pytest.mark.slow  # some 20 s of processor
def test_two_losses_have_disjoint_gradients():
  of_text = largest(gradients(jnp.array([1.0, 0.0]))[0])
  of_index = largest(gradients(jnp.array([0.0, 1.0]))[0])
  count = 0
  for name in of_text:
    is_index = "['indexer']" in name
    count += is_index
    assert (of_text[name] == 0) or not is_index, name
    assert (of_index[name] > 0) == is_index, name
  assert count == 3 * 5  # a dense, a MoE and an MTP layer; the third is shared


def test_a_shared_layer_has_the_set_of_the_last_full_layer():
  """And no parameters."""
  net = transformer.Transformer(MODEL)
  features = functools.partial(net.apply, method=net.features)
  report = jax.jit(features)(variables(), tokens()).index
  dense, shared, full, ahead = report.sets
  chex.assert_trees_all_equal(dense, shared)
  assert (dense != full).any() and (full != ahead).any()
  assert report.kl[1] == 0 and (report.kl[jnp.array([0, 2, 3])] > 0).all()
  indexer_of = lambda name: variables()['params'][name]['attention']['indexer']
  assert indexer_of('moe')['w_key'].shape == (1, 32, 8)
  assert indexer_of('dense')['w_key'].shape == (1, 32, 8)


def a_run(**changes):
  """A run whose layers are full, and whose attention is dense at first."""
  dsa = dataclasses.replace(DSA, types=(), attention='dense')
  model = dataclasses.replace(
    MODEL, dsa=dsa, mtp=c.MTPConfig(0), layers=2, dense_layers=0
  )
  fields = {'trains': 'indexer', 'learning_rate': 1.0, 'weight_decay': 0.0}
  return c.Config(
    model=model,
    optim=c.OptimConfig(**fields),
    data=c.DataConfig(seq_len=T, batch_size=B),
    **changes,
  )


@functools.cache
def stepping():
  return jax.jit(functools.partial(step.train_step, config=a_run()))


def a_batch():
  ones = np.zeros((1, B, T), np.int32)
  places = np.broadcast_to(np.arange(T, dtype=np.int32), (1, B, T))
  text = tokens()[None]
  return types.Batch(text, np.roll(text, -1, -1), ones, places, np.int32(1))


def test_the_warm_up_trains_the_indexer_alone():
  """The sets keep more of the attention; no other parameter has moments."""
  config = a_run()
  state = init_state(jax.random.key(0), config)
  train = stepping()
  rates = optim.Rates(5e-3, 1e-3, 0.0)
  before, rows = state, []
  for _ in range(60):
    state, metrics = train(state, a_batch(), rates)
    rows.append(jax.device_get(metrics))
  assert (rows[-1]['index_kl'] < 0.5 * rows[0]['index_kl']).all()
  assert (rows[-1]['index_mass'] > rows[0]['index_mass']).all()
  assert (rows[-1]['index_mass'] > 0.9).all()
  assert rows[0]['index_overlap'][0] == 1 > rows[0]['index_overlap'][1] > 0
  moved = jax.tree.map(lambda a, b: a - b, state.params, before.params)
  names = {name for name, change in largest(moved).items() if change > 0}
  everything = largest(state.params)
  assert names == {name for name in everything if "['indexer']" in name}
  moments = largest(state.opt[0].mu)
  assert moments.keys() == names
  chex.assert_trees_all_equal(state.router, before.router)
  assert rows[0]['grad_norm'] == 0 < rows[0]['index_grad_norm']


def test_the_loss_of_the_index_is_of_tokens_with_and_without_a_target():
  """A prompt's tokens have none, and count as those of its answer do."""
  config, batch = a_run(), a_batch()
  state = init_state(jax.random.key(0), config)
  train = stepping()
  answers = batch.targets.copy()
  answers[..., : T // 2] = -1
  half = batch._replace(targets=answers)
  rates = optim.Rates(5e-3, 1e-3, 0.0)
  both = [train(state, x, rates)[1]['index_kl'] for x in (batch, half)]
  np.testing.assert_array_equal(*both)
  assert (both[0] > 0).all()


def test_the_weights_of_heads_are_exact():
  """Also on devices whose products of float32 are rounded to less."""
  x, q = (
    jnp.zeros((B, T, n), jnp.bfloat16) for n in (MODEL.dim, MLA.query_rank)
  )
  angles = rope.angles(jnp.zeros((B, T), jnp.int32), MLA.rope_dim, MLA.rope)
  params = {
    'w_query': jnp.zeros((MLA.query_rank, DSA.heads, DSA.dim)),
    'w_key': jnp.zeros((MODEL.dim, DSA.dim)),
    'w_heads': jnp.zeros((MODEL.dim, DSA.heads)),
    'key_norm': {'scale': jnp.ones(DSA.dim), 'bias': jnp.zeros(DSA.dim)},
  }
  trace = jax.make_jaxpr(indexer.project, static_argnums=4)
  dots = [
    eqn
    for eqn in trace(params, x, q, angles, MODEL).eqns
    if eqn.primitive.name == 'dot_general'
    and eqn.outvars[0].aval.shape == (B, T, DSA.heads)
  ]
  assert [eqn.params['precision'] for eqn in dots] == [
    (jax.lax.Precision.HIGHEST,) * 2
  ]


def test_each_loss_is_clipped_by_its_own_norm():
  grads = {'w': jnp.full(1, 3.0), 'indexer': {'w_key': jnp.full(1, 400.0)}}
  out, norms = stage.clipped(grads, 2.0)
  assert norms == {'grad_norm': 3.0, 'index_grad_norm': 400.0}
  np.testing.assert_allclose(out['w'], 2.0, rtol=1e-6)
  np.testing.assert_allclose(out['indexer']['w_key'], 2.0, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize('rank, batched', [(8, 'fsdp'), (48, 'data')])
def test_a_mesh_changes_nothing(rank, batched, monkeypatch):
  """Sets, losses and gradients; short latents are gathered, long ones not.

  With the short ones a dense layer hands its sets on, and MTP has its own.
  """
  monkeypatch.setattr(sparse, '_SAMPLE', T)  # all queries are measured
  data = c.DataConfig(seq_len=T, batch_size=4)
  sizes = {'tensor': 2, 'context': 2, batched: 2}
  mla = dataclasses.replace(MLA, kv_rank=rank)
  dsa = dataclasses.replace(DSA, types=('full', 'shared'))
  model = dataclasses.replace(MODEL, mla=mla)
  if rank == 48:
    few = dict(layers=2, dense_layers=0, mtp=c.MTPConfig(0), dsa=dsa)
    model = dataclasses.replace(model, **few)
  optimizer = c.OptimConfig(clip=1e9)
  config = c.Config(model=model, data=data, optim=optimizer)
  text = np.random.default_rng(1).integers(2, 64, (1, 4, T)).astype(np.int32)
  places = np.broadcast_to(np.arange(T, dtype=np.int32), (1, 4, T))
  ids = np.repeat([0, 1], [9, 15])[None, None]
  ids = np.broadcast_to(ids, (1, 4, T)).astype(np.int32)
  batch = types.Batch(text, np.roll(text, -1, -1), ids, places, np.int32(1))
  assert sparse.choose_form(T, model) == {48: 'masked', 8: 'gathered'}[rank]

  def run(config, mesh):
    state = init_state(jax.random.key(0), config, mesh)
    train = jax.jit(functools.partial(step.train_step, config=config))
    state, metrics = train(state, batch, optim.Rates(1e-3, 0.0, 0.3))
    return jax.device_get((state.opt[0].mu, metrics))

  expected, m = run(config, None)
  sharded = dataclasses.replace(config, mesh=c.MeshConfig(**sizes))
  mesh_check.check(sharded)
  devices = jax.devices()[: sharded.mesh.devices]
  mesh = sharding.make_mesh(sharded.mesh, devices)
  with jax.set_mesh(mesh):
    moments, n = run(sharded, mesh)
  for name in ('index_kl', 'index_mass', 'index_overlap'):
    chex.assert_trees_all_close(m[name], n[name], rtol=1e-4)
  assert n['main_loss'] == pytest.approx(m['main_loss'], rel=1e-5)
  for own, other in zip(
    jax.tree.leaves(moments), jax.tree.leaves(expected), strict=True
  ):
    assert np.abs(own - other).max() <= 2e-4 * np.abs(other).max() + 1e-9


def test_padding_is_not_measured():
  """A row of padding leaves mass and KL as a copy of the other row does."""
  q, latent, k_rope, ws, index = attention_inputs()

  @functools.partial(jax.jit, static_argnums=3)
  def run(sequences, ws, ids, attention):
    dsa = dataclasses.replace(DSA, types=(), attention=attention)
    model = dataclasses.replace(MODEL, dsa=dsa)
    q, latent, k_rope, index = sequences
    args = q, latent, k_rope, ws, ids, model, products.NO_FP8, index
    return sparse.attend_latents(*args, None)[1]

  pair = lambda x: np.concatenate([x[:1]] * 2)
  rows = q, latent, k_rope, index
  padding = jnp.stack([SEGMENTS[0], jnp.full(T, -1)])
  for stage_of in ('sparse', 'dense'):
    report = run(rows, ws, padding, stage_of)
    twice = run(jax.tree.map(pair, rows), ws, pair(SEGMENTS), stage_of)
    np.testing.assert_allclose(report.mass, twice.mass, rtol=1e-5)
    np.testing.assert_allclose(2 * report.kl, twice.kl, rtol=1e-5)
    assert 0.3 < report.mass < 1
    np.testing.assert_array_equal(report.sets[0], twice.sets[0])
    assert (report.sets[1] == -1).all()


@pytest.mark.slow
@pytest.mark.parametrize('rank', [8, 48])
def test_eight_devices_give_ties_to_the_lowest_index(rank):
  """Sets of whole numbers, whose scores are exact, and of zeros alone."""
  model = dataclasses.replace(MODEL, mla=dataclasses.replace(MLA, kv_rank=rank))
  random = np.random.default_rng(1)
  whole = [random.integers(-2, 3, x.shape) for x in an_index()]
  index = indexer.Index(*(x.astype(np.float32) for x in whole))
  q, latent, k_rope, ws, _ = attention_inputs()
  latent = normal(0, B, T, rank)
  ws = tuple(normal(1, rank, *w.shape[1:]) for w in ws)
  sequences = q, latent, k_rope, SEGMENTS

  @jax.jit
  def run(sequences, ws, index):
    arrange = sparse.sequence.arrange
    q, latent, k_rope, ids = jax.tree.map(arrange, sequences)
    index = jax.tree.map(arrange, index)
    args = q, latent, k_rope, ws, ids, model, products.NO_FP8, index
    none = indexer.no_sets(ids, DSA)
    y, report, own = sparse.attend_latents(*args, none)
    return jax.tree.map(sparse.sequence.restore, (y, own.selected)), report.kl

  zeros = index._replace(k=np.zeros_like(index.k))
  expected = [run(sequences, ws, x) for x in (index, zeros)]
  sizes = c.MeshConfig(tensor=2, context=2, fsdp=2)
  mesh = sharding.make_mesh(sizes, jax.devices()[:8])
  with jax.set_mesh(mesh):
    for x, one in zip((index, zeros), expected, strict=True):
      (y, selected), kl = run(sequences, ws, x)
      np.testing.assert_array_equal(selected, one[0][1])
      chex.assert_trees_all_close(y, one[0][0], atol=1e-4)
      chex.assert_trees_all_close(kl, one[1], rtol=1e-4)
  seen = [
    [[s for s in range(t + 1) if row[s] == row[t]][:K] for t in range(T)]
    for row in np.asarray(SEGMENTS)
  ]
  assert sets(selected) == [[set(x) for x in row] for row in seen]


def test_stages_and_misfits_are_refused_in_a_line():
  staged = a_run(mesh=c.MeshConfig(stage=2))
  staged = dataclasses.replace(
    staged, model=dataclasses.replace(staged.model, dense_layers=0)
  )
  with pytest.raises(c.ConfigError, match='config.mesh.stage=2: .*use fsdp'):
    mesh_check.check(staged)
  for change, message in (
    ({'dim': 2}, 'dsa.dim=2: .*mla.rope_dim=4'),
    ({'types': ('full',)}, 'dsa.types=.*layers=3'),
  ):
    with pytest.raises(c.ConfigError, match=message):
      dataclasses.replace(MODEL, dsa=dataclasses.replace(DSA, **change))
  for fields, message in (
    ({'types': ('shared',), 'heads': 1}, "first layer must be 'full'"),
    ({'types': ('full', 'half'), 'heads': 1}, 'each is full or shared'),
    ({'types': ('full',)}, 'set heads, or types='),
    ({'topk': 0}, 'must be at least 1'),
  ):
    with pytest.raises(c.ConfigError, match=message):
      c.DSAConfig(**fields)
  with pytest.raises(c.ConfigError, match="dsa.q_from='latent'.*set"):
    dataclasses.replace(MODEL, mla=dataclasses.replace(MLA, query_rank=0))
  with pytest.raises(c.ConfigError, match='needs model.dsa.heads'):
    c.Config(optim=c.OptimConfig(trains='indexer'))
