"""GRPO's variants are tied by identities, in float64 where they are exact."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import r1_tiny
from experiments.rl import advantages as adv
from experiments.rl import episodes, objective
from mla_moe.config import freeze
from mla_moe.rl_config import RLConfig
from mla_moe.train import step

PLAIN = RLConfig(clip_low=0.2, clip_high=0.2, beta=0.0, minibatches=1)
INFINITE = 1e30
change = dataclasses.replace


@pytest.fixture(autouse=True)
def _double():
  with jax.enable_x64(True):
    yield


def _batch(seed=0, b=3, t=7, spread=0.5):
  """Two answers a row, after a prompt and with padding behind."""
  rng = np.random.default_rng(seed)
  answers = np.full((b, t), -1)
  answers[:, 1:3], answers[:, 4:6] = 0, 1
  draw = lambda: rng.normal(-1.0, spread, (b, t))
  advantage = np.where(answers == 0, rng.normal(size=(b, 1)), 0.7)
  return {
    'log_probs': draw(),
    'old': draw(),
    'rollout': draw(),
    'reference': draw(),
    'advantage': advantage,
    'answers': answers,
  }


def _loss_and_grad(batch, rl, weights=None):
  """The weighted loss, its gradient by the policy's, and the arrays."""
  weights = 1.0 if weights is None else weights
  others = {name: x for name, x in batch.items() if name != 'log_probs'}
  (loss, arrays), grad = _run(batch['log_probs'], others, weights, rl)
  return loss, grad, arrays


@functools.partial(jax.jit, static_argnums=3)
@functools.partial(jax.value_and_grad, has_aux=True)
def _run(log_probs, others, weights, rl):
  loss, arrays = objective.token_loss(log_probs=log_probs, **others, rl=rl)
  return jnp.sum(loss * weights), arrays


def test_equals_the_formula_by_hand():
  rl = change(PLAIN, beta=0.04)
  batch = _batch()
  lp, old, ref, a = (
    batch[k] for k in ('log_probs', 'old', 'reference', 'advantage')
  )
  ratio = np.exp(lp - old)
  want = -np.minimum(ratio * a, np.clip(ratio, 0.8, 1.2) * a)
  want = want + 0.04 * (np.exp(ref - lp) - (ref - lp) - 1)
  want = np.where(batch['answers'] >= 0, want, 0.0)
  loss, _, arrays = _loss_and_grad(batch, rl)
  np.testing.assert_allclose(loss, want.sum(), rtol=1e-12)
  assert 0 < arrays['clipped'].sum() < 12  # some are clipped, not all


def test_tokens_of_no_answer_have_no_gradient():
  outside = _batch()['answers'] < 0
  for rl in (PLAIN, change(PLAIN, beta=1.0, ratio='sequence')):
    _, grad, _ = _loss_and_grad(_batch(), rl)
    assert not np.asarray(grad)[outside].any()
    assert np.asarray(grad)[~outside].any()


def test_without_a_clip_it_is_reinforce_and_cispo_without_a_ceiling():
  free = change(PLAIN, clip_low=INFINITE, clip_high=INFINITE)
  _, a, _ = _loss_and_grad(_batch(), free)
  _, b, _ = _loss_and_grad(_batch(), change(free, surrogate='cispo'))
  chex.assert_trees_all_close(a, b, rtol=1e-12)


def test_on_policy_every_surrogate_is_the_weighted_likelihood():
  batch = _batch()
  batch['old'] = batch['log_probs']
  inside = batch['answers'] >= 0
  want = np.where(inside, -batch['advantage'], 0.0)
  for rl in (PLAIN, change(PLAIN, surrogate='cispo', clip_high=5.0)):
    loss, grad, arrays = _loss_and_grad(batch, rl)
    np.testing.assert_allclose(grad, want, rtol=1e-12)
    chex.assert_trees_all_equal(np.unique(arrays['ratio']), np.ones(1))


def test_cispo_stops_at_the_ceiling_itself():
  batch = _batch()
  batch['old'] = batch['log_probs'] - np.log(7.0)
  rl = change(PLAIN, surrogate='cispo', clip_high=5.0)
  _, grad, arrays = _loss_and_grad(batch, rl)
  inside = batch['answers'] >= 0
  want = np.where(inside, -5.0 * batch['advantage'], 0.0)
  np.testing.assert_allclose(grad, want, rtol=1e-12)
  assert arrays['clipped'].sum() == inside.sum()


def test_a_sequence_ratio_is_the_geometric_mean():
  batch = _batch()
  rl = change(PLAIN, ratio='sequence', clip_low=3e-4, clip_high=4e-4)
  _, _, arrays = _loss_and_grad(batch, rl)
  gap = batch['log_probs'] - batch['old']
  for row in range(3):
    for columns in (slice(1, 3), slice(4, 6)):
      want = np.exp(gap[row, columns].mean())
      np.testing.assert_allclose(arrays['ratio'][row, columns], want)


def test_a_sequence_of_one_token_has_the_token_ratio():
  batch = _batch()
  batch['answers'] = np.tile([-1, 0, -1, -1, 1, -1, -1], (3, 1))
  a = _loss_and_grad(batch, PLAIN)
  b = _loss_and_grad(batch, change(PLAIN, ratio='sequence'))
  chex.assert_trees_all_close(a[:2], b[:2], rtol=1e-12)


def test_answers_that_share_a_prompt_are_told_apart():
  """GSPO's ratios and V3.2's drifts are means of an answer, not of a prompt."""
  rng = np.random.default_rng(5)
  config = freeze(r1_tiny.get_config('gspo'))
  prompts = [np.array([1, 2, 3])] * 3 + [np.array([4])]
  texts = np.split(np.arange(10), np.cumsum([2, 3, 1]))
  answers = [
    episodes.Answer(p, ids, rng.normal(size=len(ids)), a, 0.25)
    for p, ids, a in zip(prompts, texts, [1, -1, -2, 0.5], strict=True)
  ]
  tables = rng.normal(size=(3, 10))  # of each token: policy, old, reference
  results = []
  for name in ('copied', 'shared'):
    packed = episodes.pack(answers, 20, 1, False, name)
    assert packed.count == 1
    micro = jax.tree.map(lambda x: x[0] if np.ndim(x) else x, packed)
    places = np.where(micro.targets < 0, 0.0, tables[:, micro.targets])
    micro = micro._replace(old=places[1], reference=places[2], fresh=0)
    out = step.Predictions(-places[:1], None, micro.targets[None], None)
    rl = change(config.rl, prompt=name, off_policy=0.5)
    whole = step.Whole(10.0, 1.0, 10.0, None)
    config = change(config, rl=rl)
    run = functools.partial(objective.grpo, whole=whole, config=config)
    results.append(jax.jit(run)(out, micro))
  chex.assert_trees_all_close(*results, rtol=1e-6)
  metrics = results[0][1]
  assert 0 < metrics['dropped'] < 1 and 0 < metrics['clipped'] < 1


def test_the_unbiased_divergence_on_policy_is_half_the_square():
  """V3.2's r * k3 has the gradient of (log p - log ref)^2 / 2 at r = 1."""
  batch = _batch()
  batch['old'], batch['advantage'] = batch['log_probs'], np.zeros((3, 7))
  rl = change(PLAIN, beta=1.0, kl_form='unbiased')
  _, grad, _ = _loss_and_grad(batch, rl)
  gap = batch['log_probs'] - batch['reference']
  want = np.where(batch['answers'] >= 0, gap, 0.0)
  np.testing.assert_allclose(grad, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('form', ['k3', 'unbiased'])
def test_the_expected_gradient_is_that_of_a_divergence(form):
  """Over all actions: r * k3 gives KL(p|ref)'s, k3 KL(ref|p)'s gradient."""
  rng = np.random.default_rng(1)
  logits, ref = rng.normal(size=7), jax.nn.log_softmax(rng.normal(size=7))
  rl = change(PLAIN, beta=1.0, kl_form=form)
  p = jax.nn.softmax(logits)

  def estimated(x):
    lp = jax.nn.log_softmax(x)[None]
    same = jax.lax.stop_gradient(lp)
    loss, _ = objective.token_loss(
      lp, same, same, ref[None], jnp.zeros((1, 7)), jnp.zeros((1, 7), int), rl
    )
    return jnp.sum(p * loss[0])

  def exact(x):
    lp = jax.nn.log_softmax(x)
    if form == 'unbiased':
      return jnp.sum(jnp.exp(lp) * (lp - ref))
    return jnp.sum(jnp.exp(ref) * (ref - lp))

  chex.assert_trees_all_close(
    *(jax.jit(jax.grad(f))(logits) for f in (estimated, exact)), rtol=1e-9
  )


def test_teachers_give_the_gradient_of_the_reverse_divergence():
  """Over all actions, from (weight, log-probabilities) of two teachers."""
  rng = np.random.default_rng(2)
  logits = rng.normal(size=7)
  lp, one, two = (
    jax.nn.log_softmax(x) for x in (logits, *rng.normal(size=(2, 7)))
  )
  weights = np.full((2, 7), [[0.6], [0.4]])
  pairs = list(zip(weights, (np.asarray(one), np.asarray(two)), strict=True))
  advantage, gap = adv.taught(np.full(7, 9.0), np.asarray(lp), pairs)
  p = np.exp(lp)

  def estimated(x):
    now = jax.nn.log_softmax(x)[None]
    same = jax.lax.stop_gradient(now)
    loss, _ = objective.token_loss(
      now, same, same, same, advantage[None], jnp.zeros((1, 7), int), PLAIN
    )
    return jnp.sum(p * loss[0])

  def exact(x):
    now = jax.nn.log_softmax(x)
    kl = lambda teacher: jnp.sum(jnp.exp(now) * (now - teacher))
    return 0.6 * kl(one) + 0.4 * kl(two)

  chex.assert_trees_all_close(
    *(jax.jit(jax.grad(f))(logits) for f in (estimated, exact)), rtol=1e-9
  )
  np.testing.assert_allclose(np.sum(p * gap), exact(logits), rtol=1e-12)


def test_a_teacher_that_is_the_policy_teaches_nothing():
  old = np.random.default_rng(3).normal(size=(2, 3)).astype(np.float32)
  reward = np.ones((2, 3), np.float32)
  nothing, gap = adv.taught(reward, old, [(np.ones((2, 3)), old)])
  assert not nothing.any() and not gap.any()
  half, _ = adv.taught(reward, old, [(np.full((2, 3), 0.5), old)])
  chex.assert_trees_all_equal(half, reward / 2)
  # Of three columns, two teachers have one each; the last has the reward alone.
  one, two = np.array([[1.0, 0, 0]] * 2), np.array([[0, 0.5, 0]] * 2)
  theirs = [(one, old + 2), (two, old - 3)]
  mixed, gap = adv.taught(reward, old, theirs)
  chex.assert_trees_all_close(mixed, np.tile([2, 0.5 - 1.5, 1], (2, 1)))
  chex.assert_trees_all_close(gap, np.tile([-2.0, 3, 0], (2, 1)))


def test_the_reference_itself_costs_nothing():
  batch = _batch()
  batch['reference'] = batch['log_probs']
  for form in ('k3', 'unbiased'):
    _, _, arrays = _loss_and_grad(batch, change(PLAIN, beta=1.0, kl_form=form))
    assert not np.asarray(arrays['kl']).any()


def test_off_policy_drops_worse_answers_that_have_fallen():
  batch = _batch()
  batch['rollout'] = batch['log_probs'] + 0.3  # all have fallen by 0.3
  rl = change(PLAIN, off_policy=0.2, beta=0.1)
  _, _, arrays = _loss_and_grad(batch, rl)
  worse = (batch['advantage'] < 0) & (batch['answers'] >= 0)
  assert worse.any() and not worse.all()
  chex.assert_trees_all_equal(np.asarray(arrays['dropped']) > 0, worse)
  on = _loss_and_grad(batch, change(rl, off_policy=0.4))
  off = _loss_and_grad(batch, change(rl, off_policy=0.0))
  chex.assert_trees_all_equal(on[:2], off[:2])
  # The divergence of a dropped answer stays.
  batch['advantage'] = np.full((3, 7), -1.0)
  loss, _, arrays = _loss_and_grad(batch, rl)
  np.testing.assert_allclose(loss, 0.1 * arrays['kl'].sum(), rtol=1e-12)


def test_a_correction_of_equal_programs_is_none_and_a_ceiling_holds():
  batch = _batch()
  batch['rollout'] = batch['old']
  want = _loss_and_grad(batch, PLAIN)[:2]
  for correct in ('truncate', 'mask'):
    got = _loss_and_grad(batch, change(PLAIN, correct=correct))[:2]
    chex.assert_trees_all_equal(got, want)
  batch['rollout'] = batch['old'] - np.log(3.0)  # every weight is 3
  double = _loss_and_grad(batch, change(PLAIN, correct='truncate'))
  chex.assert_trees_all_close(double[0], 2 * want[0], rtol=1e-12)
  none = _loss_and_grad(batch, change(PLAIN, correct='mask'))
  assert none[0] == 0 and not np.asarray(none[1]).any()


def test_advantages():
  rewards = np.array([[1, 0, 0, 0], [5, 4, 4, 4], [2, 2, 2, 2], [0, 0, 0, 0.1]])
  for scale in ('std', 'batch', 'none'):
    got, flat = adv.advantages(rewards, scale)
    assert flat.tolist() == [False, False, True, False]
    assert not got[2].any()  # exactly
    # Another mean of the group changes nothing.
    np.testing.assert_allclose(got[0], got[1], rtol=1e-12)
  got, _ = adv.advantages(rewards, 'std')
  k, g = 1, 4
  std = np.sqrt(k * (g - k) / (g * (g - 1)))
  np.testing.assert_allclose(got[0, 0], (1 - 0.25) / std, rtol=1e-12)
  one, _ = adv.advantages(rewards[:1], 'std')
  np.testing.assert_allclose(one, adv.advantages(rewards[:1], 'batch')[0])
  # 0.1 three times is not "no spread" by a rounding error, and 0.1 is.
  same, flat = adv.advantages(np.full((1, 3), 0.1), 'std')
  assert flat.all() and not same.any()


def test_weights_of_answers_of_one_length_are_all_alike():
  counts, used = np.full(6, 5), np.ones(6, bool)
  rows = [adv.token_weights(counts, used, a, 5) for a in AGGREGATES]
  for weights in rows:
    np.testing.assert_allclose(weights, 1 / 30, rtol=1e-12)


AGGREGATES = ('token', 'sequence', 'constant')


def test_weights_by_hand():
  counts, used = np.array([1, 4, 3]), np.array([True, True, False])
  by = lambda name: adv.token_weights(counts, used, name, 10)
  np.testing.assert_allclose(by('token'), [1 / 5, 1 / 5, 0])
  np.testing.assert_allclose(by('sequence'), [1 / 2, 1 / 8, 0])
  np.testing.assert_allclose(by('constant'), [1 / 20, 1 / 20, 0])
  for name in AGGREGATES:  # all dropped: 0, and no division by it
    none = adv.token_weights(counts, np.zeros(3, bool), name, 10)
    chex.assert_trees_all_equal(none, np.zeros(3))


def test_the_penalty_of_length():
  got = adv.overlong_penalty(np.array([80, 90, 100, 10]), 100, 20)
  np.testing.assert_allclose(got, [0, -0.5, -1, 0])
  assert not adv.overlong_penalty(np.array([100]), 100, 0).any()


def test_an_error_gives_an_equal_group_no_spread():
  """The mean of equal rewards is that reward to the bit, as 3 x 1.1 / 3 is not.

  Else a rounding error would be divided by its own standard deviation.
  """
  for value in (1.1, 0.1, 1 / 3, 0.7, 2.1, -0.3):
    for count in range(2, 17):
      rewards = np.full((1, count), value)
      rewards[0, count // 2] = np.nan
      filled = adv.without_errors(rewards)
      result, flat = adv.advantages(filled, 'std')
      assert flat[0] and not result.any(), (value, count)
  rewards = np.array([[np.nan, 1.0, 4.0], [np.nan] * 3])
  filled = adv.without_errors(rewards)
  chex.assert_trees_all_equal(filled, np.array([[2.5, 1, 4], [0, 0, 0]]))
