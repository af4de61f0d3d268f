"""Generation: transformers' continuations, ragged rows, samplers, drafts."""

import dataclasses
import functools
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_moe import (
  CacheConfig,
  ConfigError,
  generate,
  load_huggingface,
  rollout,
)
from mla_moe.config import ModelConfig
from mla_moe.decode import (
  forward,
  generation,
  latent_cache,
  loop,
  sampling,
  speculative,
)
from mla_moe.model import trace, transformer

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'
distribution = jax.jit(sampling.distribution)
propose, verify = jax.jit(speculative.propose), jax.jit(speculative.verify)


@functools.cache
def golden(case):
  config, variables = load_huggingface(GOLDEN / case)
  expected = np.load(GOLDEN / case / 'expected.npz')
  return config, variables, expected


@functools.cache
def weights(case):
  config, variables, _ = golden(case)
  return forward.layer_weights(config, variables)


@pytest.mark.parametrize(
  'case', ['v2_lite', pytest.param('v3_yarn', marks=pytest.mark.slow)]
)
def test_greedy_equals_transformers(case):
  config, variables, expected = golden(case)
  greedy = expected['greedy']
  laid_out = case == 'v2_lite'  # either form will do
  variables = weights(case) if laid_out else variables
  out = generate(config, variables, greedy[:, :24], greedy.shape[1] - 24)
  np.testing.assert_array_equal(out, greedy)


def test_drafts_change_no_greedy_token():
  config, _, expected = golden('v3_release')
  prompt, new = expected['greedy'][:, :24], expected['greedy'].shape[1] - 24
  out = rollout(config, weights('v3_release'), prompt, new, speculative=True)
  np.testing.assert_array_equal(out.tokens, expected['greedy'][:, 24:])
  assert out.passes + out.accepted >= 2 * (new - 1)
  assert 0 <= out.accepted <= out.passes


@pytest.mark.slow
@pytest.mark.parametrize('drafts', [False, True])
def test_the_routes_of_a_rollout_are_those_of_its_texts(drafts):
  """In float32, two prompts of other lengths, two samples each."""
  config, variables, expected = golden('v3_release')
  prompt, new = expected['greedy'][:2, :7], 5
  out = rollout(
    config,
    weights('v3_release'),
    prompt,
    new,
    lengths=[7, 4],
    samples=2,
    speculative=drafts,
    temperature=1.0,
    cache=CacheConfig(page=4, routes=True),
  )
  shape = 4, 7 + new - 1, config.moe_layers, config.moe.top_k
  assert out.routes.shape == shape and out.routes.dtype == np.int16
  for row, length in enumerate([7, 7, 4, 4]):
    ids = [*prompt[row // 2, :length], *out.tokens[row, : new - 1]]
    padded = np.zeros((1, 7 + new - 1), np.int32)
    padded[0, : len(ids)] = ids
    noted = traced(config, variables, padded)[:, 0, : len(ids)]
    want, got = np.sort(noted.swapaxes(0, 1)), out.routes[row]
    np.testing.assert_array_equal(np.sort(got[: len(ids)]), want)
    assert (got[len(ids) :] == -1).all()


@functools.partial(jax.jit, static_argnums=0)
def traced(config, variables, ids):
  return trace.trace(config, variables, ids).chosen


@pytest.mark.slow
def test_drafts_of_growing_queries_change_no_greedy_token():
  """The growth is that of positions, in prefill, drafts and their checks."""
  config, variables, expected = golden('v3_release')
  rope = dataclasses.replace(config.mla.rope, query_beta=0.5, query_positions=9)
  config = dataclasses.replace(
    config, mla=dataclasses.replace(config.mla, rope=rope)
  )
  prompt = expected['greedy'][:, :24]
  out = rollout(config, weights('v3_release'), prompt, 12, speculative=True)
  whole = np.concatenate([prompt, out.tokens], axis=1)
  apply = jax.jit(transformer.Transformer(config).apply)
  logits = apply(variables, whole).logits
  np.testing.assert_array_equal(logits.argmax(-1)[:, 23:-1], out.tokens)
  assert (out.tokens != expected['greedy'][:, 24:36]).any()


@pytest.mark.slow
def test_a_stream_with_drafts_compiles_its_round_once():
  """A round's result must be of the types that the round takes."""
  config, _, expected = golden('v3_release')
  prompt = expected['greedy'][:, :24]
  before = generation._advance._cache_size()
  rounds = generation.stream(
    config, weights('v3_release'), prompt, 8, speculative=True
  )
  streamed = np.concatenate([now.tokens for now in rounds], axis=-1)
  np.testing.assert_array_equal(streamed, expected['greedy'][:, 24:32])
  assert generation._advance._cache_size() == before + 1


def test_ragged_rows_equal_single_ones_and_streamed_ones():
  config, variables, expected = golden('v2_lite')
  prompt, lengths = expected['tokens'][:, :24], np.array([24, 9], np.int32)
  knobs = dict(temperature=[0.7, 0.0], top_p=0.9, seed=[5, 6])
  ragged = rollout(
    config, weights('v2_lite'), prompt, 20, lengths=lengths, **knobs
  )
  streamed = [[], []]
  for step in generation.stream(
    config, variables, prompt, 20, lengths=lengths, **knobs
  ):
    for row, tokens in zip(streamed, step.tokens, strict=True):
      row.extend(tokens)
  np.testing.assert_array_equal(ragged.tokens, streamed)
  # The same row beside another one, where it stands second.
  turned = rollout(
    config,
    weights('v2_lite'),
    prompt[::-1],
    20,
    lengths=lengths[::-1],
    temperature=[0.0, 0.7],
    top_p=0.9,
    seed=[6, 5],
  )
  np.testing.assert_array_equal(turned.tokens[::-1], ragged.tokens)


def test_log_probs_are_those_of_the_training_forward():
  config, variables, expected = golden('v2_lite')
  prompt = expected['tokens'][:, :24]
  out = rollout(config, weights('v2_lite'), prompt, 20, temperature=1.3, seed=3)
  whole = np.concatenate([prompt, out.tokens], axis=1)
  whole_forward = jax.jit(transformer.Transformer(config).apply)
  logits = whole_forward(variables, whole).logits
  wanted = jax.nn.log_softmax(logits[:, 23:-1])
  wanted = jnp.take_along_axis(wanted, out.tokens[..., None], -1)[..., 0]
  np.testing.assert_allclose(out.log_probs, wanted, atol=1e-4)
  wanted = jax.nn.log_softmax(logits[:, 23:-1] / 1.3)
  wanted = jnp.take_along_axis(wanted, out.tokens[..., None], -1)[..., 0]
  np.testing.assert_allclose(out.drawn, wanted, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
  'case, speculative', [('v2_lite', False), ('v3_release', True)]
)
def test_samples_of_a_prompt_are_rows_of_their_own(case, speculative):
  """The pass of a prompt is shared, and all its pages are copied."""
  config, _, expected = golden(case)
  prompt, lengths = expected['tokens'][:, :20], np.array([20, 9])
  options = dict(
    temperature=[1.0, 0.7] * 3,
    seed=np.arange(6) * 7,
    multiple=4,
    speculative=speculative,
  )
  alone = rollout(
    config,
    weights(case),
    np.repeat(prompt, 3, axis=0),
    12,
    lengths=np.repeat(lengths, 3),
    **options,
  )
  shared = rollout(
    config, weights(case), prompt, 12, lengths=lengths, samples=3, **options
  )
  np.testing.assert_array_equal(shared.tokens, alone.tokens)
  np.testing.assert_allclose(shared.drawn, alone.drawn, atol=1e-5)
  assert len(np.unique(shared.tokens[:3], axis=0)) == 3
  cold = np.array([0, 2, 4])  # at temperature 1 both arrays are the same
  np.testing.assert_array_equal(shared.drawn[cold], shared.log_probs[cold])
  with pytest.raises(ConfigError, match='samples=0: must be at least 1'):
    rollout(config, weights(case), prompt, 12, samples=0)


def test_stop_ids_end_rows_and_the_loop():
  config, _, expected = golden('v2_lite')
  greedy = expected['greedy'][:, 24:]
  stop = int(greedy[0, 5])
  at = [
    int(np.flatnonzero(row == stop)[0]) if stop in row else 19 for row in greedy
  ]
  out = rollout(
    config, weights('v2_lite'), expected['greedy'][:, :24], 20, stop_ids=[stop]
  )
  np.testing.assert_array_equal(out.counts, [min(i, 19) + 1 for i in at])
  assert (out.tokens[0, 6:] == config.eos_id).all()
  assert (out.log_probs[0, out.counts[0] :] == 0).all()
  assert out.passes == (out.counts - 1).sum()
  np.testing.assert_array_equal(out.ended, out.counts < 20)


@pytest.mark.parametrize(
  'case, speculative', [('v2_lite', False), ('v3_release', True)]
)
def test_logits_that_are_not_finite_are_named_by_step(case, speculative):
  config, _, expected = golden(case)
  greedy = expected['greedy']
  prompt, count = greedy[:, :24], greedy.shape[1] - 24
  # One of the prompt, and the third after it, which is emitted in step 2.
  for token, step in (greedy[0, 23], 0), (greedy[0, 26], 3):
    assert (token in prompt) == (step == 0)
    bad = dict(weights(case))
    bad['embedding'] = bad['embedding'].at[int(token)].set(jnp.nan)
    with pytest.raises(FloatingPointError, match=f'step {step} '):
      rollout(config, bad, prompt, count, speculative=speculative)


def test_a_step_is_broken_by_the_rows_that_count():
  logits = jnp.array([[1.0, 2.0], [1.0, jnp.inf]])
  broken = lambda *rows: int(loop._broken(logits, jnp.array(rows), 4))
  assert (broken(True, True), broken(True, False)) == (4, -1)


@pytest.mark.parametrize(
  'words, change',
  [
    ('empty', dict(prompt=np.zeros((1, 0), np.int32))),
    ('token ids', dict(prompt=np.zeros((1, 3)))),
    ('token 259', dict(prompt=np.array([[1, 259]]))),
    ('token -1', dict(prompt=np.array([[-1, 2]]))),
    ('max_new_tokens=False', dict(max_new_tokens=False)),
    ('max_new_tokens=-3', dict(max_new_tokens=-3)),
    ('positions', dict(max_new_tokens=10**6)),
    ('temperature=-1', dict(temperature=-1.0)),
    ('temperature=nan', dict(temperature=float('nan'))),
    ('top_p=0.0', dict(top_p=0.0)),
    ('top_p=1.1', dict(top_p=1.1)),
    ('min_p', dict(min_p=-0.1)),
    ('top_k', dict(top_k=-1)),
    ('repetition_penalty', dict(repetition_penalty=0.0)),
    ('3 values for 1', dict(seed=[1, 2, 3])),
    ('lengths', dict(lengths=np.array([4]))),
    ('stop_ids', dict(stop_ids=[300])),
    ('MTP', dict(speculative=True)),
  ],
)
def test_bad_input_is_one_line(words, change):
  config, variables, _ = golden('v2_lite')
  change = {'prompt': np.array([[1, 2, 3]]), **change}
  with pytest.raises(ConfigError, match=words) as error:
    rollout(config, variables, **change)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('rows, width', [(0, 3), (2, 0), (0, 0)])
def test_no_row_or_no_token_is_an_empty_result(rows, width):
  """And nothing is compiled; other mistakes are errors as before."""
  config, variables, _ = golden('v2_lite')
  prompt = np.full((rows, 5), 7)
  out = rollout(config, variables, prompt, width, temperature=1.0, stop_ids=[7])
  for array in out.tokens, out.log_probs, out.drawn:
    assert array.shape == (rows, width)
  assert out.counts.tolist() == [0] * rows and not out.ended.any()
  whole = generation.generate(config, variables, prompt, width)
  assert whole.shape == (rows, 5 + width)
  np.testing.assert_array_equal(whole[:, :5], prompt)
  assert not [*generation.stream(config, variables, prompt, width)]
  with pytest.raises(ConfigError, match='top_p'):
    rollout(config, variables, prompt, width, top_p=2.0)


def test_cache_config_checks_itself():
  with pytest.raises(ConfigError, match='page'):
    CacheConfig(page=0)
  with pytest.raises(ConfigError, match='int8'):
    CacheConfig(dtype='int4')


def probabilities(logits, seen=(), **knobs):
  """`distribution` of one row, as probabilities."""
  logits = jnp.asarray([logits], jnp.float32)
  marks = np.isin(np.arange(logits.shape[-1]), seen)[None]
  out = distribution(logits, marks, sampling.make_knobs(1, **knobs))
  return np.exp(np.asarray(out[0]))


def softmax(x):
  return np.exp(x) / np.exp(x).sum()


LOGITS = np.log(np.array([0.4, 0.3, 0.2, 0.06, 0.04]))


def test_samplers_follow_their_definitions():
  check = functools.partial(np.testing.assert_allclose, atol=1e-6)
  check(probabilities(LOGITS), [1, 0, 0, 0, 0])
  check(probabilities(LOGITS, temperature=2.0), softmax(LOGITS / 2))
  check(
    probabilities(LOGITS, temperature=1.0, top_k=2), [4 / 7, 3 / 7, 0, 0, 0]
  )
  # The smallest set whose mass reaches top_p, the token that reaches included.
  top = [4 / 9, 3 / 9, 2 / 9, 0, 0]
  check(probabilities(LOGITS, temperature=1.0, top_p=0.71), top)
  check(probabilities(LOGITS, temperature=1.0, min_p=0.45), top)
  both = probabilities(LOGITS, temperature=1.0, top_k=4, top_p=1e-6)
  check(both, [1, 0, 0, 0, 0])
  logits = np.array([1.0, 0.9, -1.0])
  wanted = softmax(np.array([0.5, 0.9, -2.0]))
  out = probabilities(
    logits, seen=[0, 2], temperature=1.0, repetition_penalty=2.0
  )
  check(out, wanted)
  check(probabilities(logits, seen=[0], repetition_penalty=2.0), [0, 1, 0])


def test_the_temperature_comes_before_top_p_and_min_p():
  # At T = 2 the roots .6325, .5477, .4472, .2449, .2 stand for .4 to .04, and
  # the first three of them are 78 % of their sum. At T = 1 two tokens are 70 %.
  roots = np.sqrt([0.4, 0.3, 0.2])
  wanted = [*roots / roots.sum(), 0, 0]
  check = functools.partial(np.testing.assert_allclose, atol=1e-4)
  check(wanted, [0.3886, 0.3366, 0.2748, 0, 0])
  check(probabilities(LOGITS, temperature=2.0, top_p=0.6), wanted)
  check(probabilities(LOGITS, temperature=2.0, min_p=0.7), wanted)


def test_top_p_stops_at_the_token_that_reaches_it():
  logits = np.log([0.5, 0.25, 0.125, 0.125])  # sums without rounding
  out = probabilities(logits, temperature=1.0, top_p=0.5)
  np.testing.assert_allclose(out, [1, 0, 0, 0], atol=1e-6)


def test_knobs_that_float32_cannot_hold_are_refused():
  for knob, value in [
    ('temperature', 1e-60), ('temperature', 10**400), ('temperature', 1e300),
    ('repetition_penalty', 1e-60), ('repetition_penalty', 1e300),
    ('top_p', 1e-60), ('top_k', 10**400), ('top_k', 2**31), ('top_k', True),
  ]:  # fmt: skip
    with pytest.raises(ConfigError, match=f'{knob}=.*: must be'):
      sampling.make_knobs(1, **{knob: value})
  # The ends of the ranges give numbers.
  for knobs in (
    dict(temperature=1e-4, repetition_penalty=1e4),
    dict(temperature=2**30, repetition_penalty=1e-4),
    dict(temperature=1.0, top_p=1e-29, min_p=1e-60),
  ):
    out = probabilities(LOGITS, seen=[0, 1], **knobs)
    np.testing.assert_allclose(out.sum(), 1.0, atol=1e-5)


def test_an_accepted_draft_is_penalised_in_the_token_after_it():
  # Greedy, token 0 is the draft and stands: 3 is the best. Then it is seen, and
  # its 1 falls to .5, below the .9 of token 1.
  logits = jnp.array([[[3.0, 0.0, 0.0], [1.0, 0.9, -1.0]]])
  knobs = sampling.make_knobs(1, repetition_penalty=2.0)
  zero, seen = jnp.zeros(1, jnp.int32), jnp.zeros((1, 3), bool)
  log_q = jnp.array([[0.0, -jnp.inf, -jnp.inf]])
  out = verify(logits, zero, log_q, seen, knobs, zero + 3)
  assert out.accepted.tolist() == [True]
  assert out.tokens.tolist() == [[0, 1]]


def test_a_pass_reads_what_is_recent_and_checks_the_draft(monkeypatch):
  """A main model that counts up modulo 4, and a module that repeats its input.

  Row 0 has two recent states, the last of which says 3; row 1 has one, which
  says 2; row 2 is done, so nothing of it is read or written.
  """

  def draft(weights, mtp, hidden, tokens, config, *, valid):
    return hidden, valid

  def hidden(weights, main, pair, config, *, valid):
    main = dataclasses.replace(main, table=valid)
    return jax.nn.one_hot((pair + 1) % 4, 4), main

  monkeypatch.setattr(forward, 'draft', draft)
  monkeypatch.setattr(forward, 'hidden', hidden)
  monkeypatch.setattr(forward, 'logits', lambda weights, x: x)
  recent = loop.Recent(
    hidden=np.eye(4, dtype=np.float32)[np.array([[1, 3], [2, 0], [1, 1]])],
    tokens=np.array([[1, 2], [0, 3], [1, 1]], np.int32),
    counts=np.array([2, 1, 1], np.int32),
  )
  main = latent_cache.Cache((), None, np.array([7, 5, 6], np.int32))
  knobs, seen = sampling.make_knobs(3), jnp.zeros((3, 4), bool)
  run = lambda recent, alive: loop.draft_and_verify(
    None, main, main, recent, seen, knobs, alive, ModelConfig()
  )
  attempt = jax.jit(run)(recent, np.array([True, True, False]))
  assert attempt.mtp.tolist() == [2, 1, 0]
  assert attempt.main.table.tolist() == [2, 2, 0]
  assert attempt.main.lengths.tolist() == [7, 5, 6]
  tokens, accepted = attempt.verdict
  assert accepted[:2].tolist() == [True, False]
  assert tokens[0].tolist() == [3, 0] and tokens[1, 0] == 1


def test_draws_depend_on_seed_and_position_alone():
  logits = jnp.asarray(np.tile(LOGITS, (256, 1)))
  seed = np.tile([1, 2, 1, 1], 64)
  knobs = sampling.make_knobs(256, temperature=1.0, seed=seed)
  at = np.repeat(np.arange(64) * 16, 4) + np.tile([7, 7, 7, 8], 64)
  at = at.astype(np.int32)
  out = sampling.draw(logits, knobs, at)
  keys = sampling._keys(knobs, at, sampling.TOKEN)
  oracle = jax.vmap(jax.random.categorical)(keys, logits)
  np.testing.assert_array_equal(out, oracle)
  out = out.reshape(64, 4)
  np.testing.assert_array_equal(out[:, 0], out[:, 2])
  assert (out[:, 0] != out[:, 1]).any()
  assert (out[:, 0] != out[:, 3]).any()


def chi_squared(counts, wanted):
  """p of the counts, by Wilson and Hilferty's normal approximation."""
  counts, wanted = np.asarray(counts, float), np.asarray(wanted, float)
  assert (counts[wanted == 0] == 0).all()
  some = wanted > 0
  expected = wanted[some] * counts.sum()
  x = ((counts[some] - expected) ** 2 / expected).sum()
  k = some.sum() - 1
  z = ((x / k) ** (1 / 3) - (1 - 2 / (9 * k))) / np.sqrt(2 / (9 * k))
  return 0.5 * jax.scipy.special.erfc(z / np.sqrt(2))


def test_drafts_keep_the_distribution():
  n, size = 20_000, 6
  draws = np.random.default_rng(0)
  q, p, after = draws.normal(size=(3, size)) * 1.5
  knobs = sampling.make_knobs(n, temperature=0.8, top_k=5, seed=0)
  rows = lambda x: jnp.asarray(np.tile(x, (n, 1)), jnp.float32)
  seen, at = jnp.zeros((n, size), bool), np.full(n, 3, np.int32)
  drafts, log_q = propose(rows(q), seen, knobs, at)
  both = jnp.stack([rows(p), rows(after)], axis=1)
  out = verify(both, drafts, log_q, seen, knobs, at)
  first, second = np.asarray(out.tokens).T
  accepted = np.asarray(out.accepted)
  wanted = probabilities(p, temperature=0.8, top_k=5)
  assert chi_squared(np.bincount(first, minlength=size), wanted) > 1e-3
  wanted = probabilities(after, temperature=0.8, top_k=5)
  counts = np.bincount(second[accepted], minlength=size)
  assert chi_squared(counts, wanted) > 1e-3
  # Neither all nor none, and the test would see what is drawn from q instead.
  assert 0.1 < accepted.mean() < 0.95
  drawn = np.bincount(np.asarray(drafts), minlength=size)
  assert chi_squared(drawn, probabilities(p, temperature=0.8, top_k=6)) < 1e-6


@pytest.mark.slow
def test_sampling_with_drafts_keeps_the_model_s_distribution():
  config, _, expected = golden('v3_release')
  prompt = np.tile(expected['tokens'][:1, :8], (64, 1))
  knobs = dict(temperature=1.0, top_k=3, seed=11)
  counts = {}
  for drafts in (False, True):
    out = [
      rollout(
        config, weights('v3_release'), prompt, 3, speculative=drafts,
        **knobs | {'seed': 64 * i},
      ).tokens
      for i in range(8)
    ]  # fmt: skip
    counts[drafts] = np.concatenate(out)
  for column in range(3):
    ids, where = np.unique(
      np.concatenate([counts[d][:, column] for d in counts]),
      return_inverse=True,
    )
    plain = np.bincount(where[:512], minlength=len(ids))
    drafted = np.bincount(where[512:], minlength=len(ids))
    # Two samples of 512: a token's counts differ by a few deviations at most.
    spread = np.sqrt(plain + drafted + 1)
    assert (np.abs(plain - drafted) < 4.5 * spread).all()


def test_half_of_the_rows_leave_down_to_the_fewest(monkeypatch):
  """Row i of nine ends after `ends[i]` steps, and says so in each column."""
  ends, sizes = np.array([5, 9, 1, 2, 8, 2, 7, 1, 6]), []
  rows = np.zeros((9, 3))
  page = latent_cache.Pages(np.arange(9)[:, None, None])
  table, length = np.arange(9)[:, None], rows[:, 0]
  state = loop.State(
    cache=latent_cache.Cache((page,), table, length),
    mtp_cache=None,
    last_token=ends,  # goes with its row
    recent=None,
    seen=rows,
    tokens=rows,
    log_probs=rows,
    drawn=rows,
    counts=length,
    done=length > 0,
    passes=0,
    accepted=0,
    step=0,
    broken=-1,
  )

  def until(weights, state, job, most):
    """Steps until at most so many rows go on."""
    own = state.last_token
    np.testing.assert_array_equal(job.knobs.seed, own)
    pages = state.cache.layers[0].values[state.cache.table[:, 0], 0, 0]
    np.testing.assert_array_equal(ends[pages], own)
    sizes.append(len(own))
    last = np.sort(own)[len(own) - most - 1]
    number = np.minimum(own, last)[:, None] + np.zeros(3)
    return state.replace(
      tokens=number,
      log_probs=number,
      drawn=number,
      counts=number[:, 0],
      done=own <= last,
      passes=last,
    )

  monkeypatch.setattr(generation, '_start', lambda *_: state)
  monkeypatch.setattr(generation, '_until', until)
  job = loop.Job(
    limit=16,
    stop_ids=(),
    knobs=sampling.make_knobs(9, seed=ends),
    config=ModelConfig(),
    cache_config=CacheConfig(),
    output_length=3,
    speculative=False,
    samples=1,
  )
  with jax.disable_jit():
    out, broken = generation._run({'layers': ()}, ((), ()), job, 2)
  assert (sizes, broken, out.passes) == ([9, 4, 2], -1, 9)
  np.testing.assert_array_equal(out.counts, ends)
  np.testing.assert_array_equal(out.tokens, np.tile(ends[:, None], 3))
  assert out.ended.all()


@pytest.mark.slow
@pytest.mark.parametrize('drafts', [False, True])
def test_rows_that_have_ended_leave_and_change_nothing(drafts, monkeypatch):
  """Programs of 8, 4 and 2 rows draw what one of 8 rows does."""
  case = 'v3_release' if drafts else 'v2_lite'
  config, _, expected = golden(case)
  counts = []
  take = generation._take
  monkeypatch.setattr(
    generation, '_take', lambda *x: counts.append(len(x[2])) or take(*x)
  )
  options = dict(
    samples=4,
    multiple=16,
    temperature=1.0,
    seed=np.arange(8),
    stop_ids=range(0, config.vocab, 7),
    cache=CacheConfig(routes=True, page=16),
    speculative=drafts,
  )
  args = config, weights(case), expected['greedy'][:2, :8], 16
  one, two = (rollout(*args, fewest=n, **options) for n in (0, 2))
  assert counts == [4, 2]
  assert one.ended.sum() > 4
  floats = lambda out: (out.log_probs, out.drawn)
  plain = lambda out: out._replace(log_probs=0, drawn=0)
  chex.assert_trees_all_equal(plain(one), plain(two))
  chex.assert_trees_all_close(floats(one), floats(two), atol=1e-5)
