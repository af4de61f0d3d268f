"""Supervised fine-tuning: what is learned of an example, and nothing else."""

import dataclasses
import functools
import json
import types

import chex
import jax
import numpy as np
import pytest

from configs import tiny as base
from experiments import tokenizer as trained
from experiments import train, workdir
from experiments.checkpointing import store
from experiments.data import batches, packing, tokenizer
from experiments.serving import template
from experiments.training import example_source, examples, replay
from mla_moe.config import ConfigError, MeshConfig, MTPConfig, freeze
from mla_moe.decode import generation
from mla_moe.model import transformer
from mla_moe.train import optim, step
from mla_moe.train.state import init_state

BYTES = tokenizer.ByteTokenizer()
PLAIN = (
  "{{ bos_token }}{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}\n"
  '{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}'
)


@pytest.fixture(scope='module')
def words(tmp_path_factory):
  pytest.importorskip('tokenizers')
  path = tmp_path_factory.mktemp('bpe') / 'tokenizer.json'
  trained.write(path, ['hello world, hello'], 300)
  return tokenizer.load(str(path))


def write(folder, *rows):
  path = folder / 'examples.jsonl'
  lines = [r if isinstance(r, str) else json.dumps(r) for r in rows]
  path.write_text('\n'.join(lines))
  return str(path)


def chat(*texts, system=''):
  roles = ('user', 'assistant')
  turns = [{'role': roles[i % 2], 'content': t} for i, t in enumerate(texts)]
  start = [{'role': 'system', 'content': system}] if system else []
  return {'messages': start + turns}


def ids(text):
  return BYTES.encode(text).tolist()


def test_a_pair_is_bos_prompt_completion_and_eos(tmp_path):
  """Text that spells special tokens stays text; an empty prompt is bos."""
  spelt = f'a{tokenizer.EOS}{tokenizer.BOS}'
  pair = {'prompt': spelt, 'completion': tokenizer.EOS, 'id': 3}
  path = write(tmp_path, pair, '', {'prompt': '', 'completion': 'é'})
  first, second = examples.read(path, BYTES)
  assert first.prompt.tolist() == [256, *ids(spelt)]
  assert first.completion.tolist() == [*ids(tokenizer.EOS), 257]
  assert second.prompt.tolist() == [256]
  assert second.completion.tolist() == [*ids('é'), 257]
  assert [x.row for x in (first, second)] == [f'{path}:1', f'{path}:3']


def test_each_answer_of_a_chat_is_an_example(tmp_path, words):
  """The prompts are the server's; prompt and answer are the chat after it."""
  row = chat('hello', f'world{tokenizer.EOS}', 'a', 'b', 'c', system='hello')
  turns = [tuple(m.values()) for m in row['messages']]
  found = examples.read(write(tmp_path, row), words)
  assert len(found) == 2 and found[0].key == found[1].key
  for example, stop in zip(found, (2, 4), strict=True):
    prompt = template.encode(tmp_path, words, turns[:stop])
    np.testing.assert_array_equal(example.prompt, prompt)
    whole = template.encode(tmp_path, words, turns[: stop + 1])
    both = np.concatenate([prompt, example.completion])
    np.testing.assert_array_equal(both, whole[:-1])  # without <｜Assistant｜>
    assert (both == words.bos_id).sum() == 1
    assert example.completion[-1] == words.eos_id


def test_a_template_without_an_end_token_gets_eos(tmp_path):
  pytest.importorskip('jinja2')
  (found,) = examples.read(write(tmp_path, chat('q', 'x')), BYTES, PLAIN)
  assert found.prompt.tolist() == [256, *ids('user:q\nassistant:')]
  assert found.completion.tolist() == [*ids('x'), 257]


def test_a_thought_that_the_template_opens_is_not_opened_twice(words):
  pytest.importorskip('jinja2')
  opens = "{% for m in messages %}{{ m['content'] + '<e>' }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ '<think>\n' }}{% endif %}"
  )
  chat = template.Template(BYTES, opens, {}, {'<e>': 257}, ends={257})
  turns = [('user', 'q'), ('assistant', '<think>\nx</think>y')]
  assert chat.prompt(turns[:1]).tolist()[-8:] == ids('<think>\n')
  assert chat.answer(turns).tolist() == [*ids('x</think>y'), 257]
  turns[1] = ('assistant', 'x')
  assert chat.answer(turns).tolist() == [*ids('x'), 257]
  other = chat._replace(special={'<e>': 258})
  with pytest.raises(ConfigError, match='token 258, and the model stops after'):
    other.answer(turns)


WRONG = {
  'has no text "prompt"': {'text': 'x'},
  'has no text "completion"': {'prompt': 'x', 'completion': ['y']},
  'its completion is empty': {'prompt': 'x', 'completion': ''},
  'has both forms': {'prompt': 'x', 'completion': 'y', 'messages': []},
  'not JSON': '{"prompt": ',
  'no message is of the role assistant': chat('a'),
  'an answer is empty': chat('a', ''),
  'a message has a "role"': {'messages': [{'role': 'tool', 'content': 'x'}]},
  'the tokenizer has no token .* --chat_template': chat('a', 'b'),
}


@pytest.mark.parametrize('error', WRONG)
def test_a_wrong_row_is_named_with_its_line(tmp_path, error):
  path = write(tmp_path, {'prompt': '', 'completion': 'y'}, '', WRONG[error])
  with pytest.raises(ConfigError, match=f'examples.jsonl:3: .*{error}') as e:
    examples.read(path, BYTES)
  assert '\n' not in str(e.value)


def test_files_that_hold_no_examples(tmp_path):
  with pytest.raises(ConfigError, match='is no .jsonl'):
    examples.read('stdlib', BYTES)
  with pytest.raises(ConfigError, match='holds no rows'):
    examples.read(write(tmp_path, '\n'), BYTES)


def example(p, c, key=0):
  return examples.Example(np.zeros(p), np.ones(c), key, 'F:1')


def test_long_examples_are_left_out_but_not_many():
  """P + C - 1 columns: the last token is predicted, and not read."""
  lines = []
  fits = [example(3, 3)] * 99
  assert examples.fitting([*fits, example(3, 4)], 5, lines.append) == fits
  assert lines == [
    '1 of 100 examples have more than the 6 tokens of data.seq_len=5; the '
    'longest, F:1, has 7: left out.'
  ]
  with pytest.raises(ConfigError, match='1 of 99 .*--config.data.seq_len=6'):
    examples.fitting([*fits[1:], example(3, 4)], 5)


def test_the_prompt_decides_the_side(tmp_path):
  pairs = [{'prompt': f'{i % 50}', 'completion': f'{i}'} for i in range(200)]
  found = examples.read(write(tmp_path, *pairs), BYTES)
  train, heldout = examples.split(found, 0.3)
  sides = [{x.prompt.tobytes() for x in side} for side in (train, heldout)]
  assert not sides[0] & sides[1] and len(train) + len(heldout) == 200
  assert 24 <= len(heldout) <= 96
  two = [example(1, 1, 5), example(1, 1, 5), example(1, 1, 7)]
  for fraction in (1e-9, 1 - 1e-9):
    assert examples.split(two, fraction) == (two[2:], two[:2])
  with pytest.raises(ConfigError, match='all 2 examples have one prompt'):
    examples.split(two[:2], 0.5)


# One program: 8 rows of 16. The balance loss is of a row, and packing changes
# the rows: without it a step is a sum over examples.
MICRO = freeze(base.get_config('micro'))
DATA = dataclasses.replace(MICRO.data, packing='separate', fim_rate=0.0)
MICRO = dataclasses.replace(
  MICRO,
  model=dataclasses.replace(MICRO.model, layers=1, dense_layers=0),
  data=DATA,
  optim=dataclasses.replace(MICRO.optim, balance_loss=0.0),
)
RATES = optim.Rates(1e-3, 0.01, 0.3)
LENGTHS = ((1, 1), (3, 4), (5, 2), (2, 9), (8, 9), (4, 1), (1, 6))


@functools.cache
def compiled(config):
  return jax.jit(functools.partial(step.train_step, config=config))


@functools.cache
def start(config=MICRO):
  """A state of random numbers; to compile the initialisation takes seconds."""
  init = functools.partial(init_state, config=config)
  state = jax.eval_shape(init, jax.random.key(0))
  random = np.random.default_rng(0)
  draw = lambda x: random.normal(0, 0.3, x.shape).astype(x.dtype)
  params = jax.tree.map(draw, state.params)
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state)
  return zeros.replace(params=params)


def pairs_of_lengths():
  random = np.random.default_rng(0)
  return [
    tuple(random.integers(0, 256, n).astype(np.int32) for n in lengths)
    for lengths in LENGTHS
  ]


def filled(rows, micro=8):
  rows = [*rows, *[[]] * (8 - len(rows))]
  packed, _ = packing.fill(pairs_of_lengths(), rows, 16)
  arrays = [x.reshape(-1, micro, 16) for x in packed]
  return batches.Batch(*arrays, np.int32(len(arrays[0])))


def packed(micro=8):
  lengths = [packing.columns(*pair) for pair in LENGTHS]
  return filled(packing.best_fit(lengths, 16), micro)


def result(batch, config=MICRO):
  """The state after a step, and its metrics; Adam's moment is the gradient."""
  state, metrics = compiled(config)(start(config), batch, RATES)
  return (state.opt, state.router), metrics


def check_same(ours, theirs, **tolerance):
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    np.testing.assert_allclose(a, b, **tolerance)


def alone():
  return filled([[i] for i in range(len(LENGTHS))])


@functools.cache
def forward():
  return jax.jit(functools.partial(step.predictions, config=MICRO))


def likelihoods(batch):
  """The summed negative log-likelihood, and the experts' load."""
  micro = jax.tree.map(lambda x: x[0] if x.ndim else x, batch)
  out = forward()(start().params, start().router, micro)
  return out.nll.sum(), out.stats.load


def check_packed_is_alone(config):
  rows = packed()
  (ours, bias), metrics = result(rows, config)
  (theirs, alone_bias), alone_metrics = result(alone(), config)
  check_same(ours, theirs, rtol=1e-4, atol=1e-7)
  chex.assert_trees_all_equal(bias, alone_bias)
  for name in ('load', 'loss', 'grad_norm'):
    check_same(metrics[name], alone_metrics[name], rtol=1e-5)
  return metrics


def test_packed_examples_do_not_see_each_other():
  assert (packed().segments[0, :4] > 0).any()
  (ours, load), (theirs, other) = map(likelihoods, (packed(), alone()))
  np.testing.assert_allclose(ours, theirs, rtol=1e-5)
  np.testing.assert_array_equal(load, other)
  real = sum(packing.columns(*pair) for pair in LENGTHS)
  assert load.sum() == real * MICRO.model.moe.top_k


@pytest.mark.slow
def test_a_packed_step_is_that_of_each_example_alone():
  """The loss is the mean over all completion tokens, by the plain network."""
  metrics = check_packed_is_alone(MICRO)
  pairs = pairs_of_lengths()
  tokens = np.zeros((len(pairs), 18), np.int32)
  for row, pair in zip(tokens, pairs, strict=True):
    row[: sum(map(len, pair))] = np.concatenate(pair)
  variables = {'params': start().params, 'router': start().router}
  network = transformer.Transformer(MICRO.model)
  out = jax.jit(network.apply)(variables, tokens[:, :-1])
  log_probs = np.asarray(jax.nn.log_softmax(out.logits))
  terms = [
    log_probs[i, p + j - 1, tokens[i, p + j]]
    for i, (p, c) in enumerate(LENGTHS)
    for j in range(c)
  ]
  assert len(terms) == 32
  np.testing.assert_allclose(metrics['main_loss'], -np.mean(terms), rtol=1e-5)


def check_padding_is_counted_nowhere(result):
  """Bitwise: ids in the padding's place, and targets that none reads."""
  rows = packed()
  padding = rows.segments < 0
  assert 8 < padding.sum() < padding.size
  random = np.random.default_rng(1)
  ids = random.integers(0, 256, rows.tokens.shape)
  others = rows._replace(tokens=np.where(padding, ids, rows.tokens))
  others = others._replace(positions=np.where(padding, 3, rows.positions))
  others = others._replace(targets=np.where(rows.targets < 0, -7, rows.targets))
  others = jax.tree.map(lambda x: np.asarray(x, np.int32), others)
  chex.assert_trees_all_equal(result(rows), result(others))


def test_padding_and_prompts_targets_are_counted_nowhere():
  check_padding_is_counted_nowhere(likelihoods)


def with_mtp():
  model = dataclasses.replace(MICRO.model, mtp=MTPConfig(2))
  return dataclasses.replace(MICRO, model=model)


@pytest.mark.slow
def test_a_step_does_not_depend_on_the_padding():
  check_padding_is_counted_nowhere(result)


@pytest.mark.slow
def test_the_same_with_modules_that_predict_ahead():
  check_packed_is_alone(with_mtp())
  take = functools.partial(result, config=with_mtp())
  check_padding_is_counted_nowhere(take)


@pytest.mark.slow
def test_micro_batches_share_one_denominator():
  """Micro-batches have 0 to many targets; each token has the same weight."""
  (ours, bias), metrics = result(packed())
  for micro in (4, 1):
    (theirs, other_bias), others = result(packed(micro))
    check_same(ours, theirs, rtol=1e-4, atol=1e-7)
    chex.assert_trees_all_equal(bias, other_bias)
    check_same(metrics['loss'], others['loss'], rtol=1e-6)


def written(folder, count, seq_len=24, **changes):
  """A file of examples of many lengths, and a config for it."""
  rows = [
    {'prompt': f'{i * 7919 % 10 ** (1 + i % 4)}=', 'completion': 'x' * (i % 9)}
    for i in range(1, count + 1)
    if i % 9
  ]
  data = dataclasses.replace(
    DATA, source=write(folder, *rows), seq_len=seq_len, heldout=0.1, **changes
  )
  return dataclasses.replace(MICRO, data=data)


def opened(config):
  return example_source.Examples(config, BYTES, say=lambda line: None)


def members(batch):
  """The examples of a batch, as (ids read, ids learned)."""
  out = []
  for row in zip(
    *(x.reshape(-1, x.shape[-1]) for x in batch[:-1]), strict=True
  ):
    tokens, targets, segments, positions = row
    for i in range(segments.max() + 1):
      place = segments == i
      assert (positions[place] == np.arange(place.sum())).all()
      learned = targets[place][targets[place] >= 0]
      out.append((tuple(tokens[place]), tuple(learned)))
  return out


def test_an_epoch_has_each_example_once_in_any_process_and_at_any_time(
  tmp_path,
):
  """The parts of two processes are the batch; each epoch has another order."""
  config = written(tmp_path, 300, micro_batch=4)
  source, again = opened(config), opened(config)
  every = types.SimpleNamespace(rows=slice(None))
  step = lambda source, number, rows=every: source.batch(rows, number, None, 0)
  size = config.data.batch_size
  steps = source.rows  # so many epochs as a batch has rows
  rows = [step(source, i + 1) for i in range(steps)]
  epochs = np.concatenate([b.tokens.reshape(-1, 24) for b in rows])
  seen = sorted(x for b in rows for x in members(b))
  whole = examples.read(config.data.source, BYTES)
  train, heldout = examples.split(whole, 0.1)
  right = [
    (tuple([*x.prompt, *x.completion[:-1]]), tuple(x.completion)) for x in train
  ]
  assert seen == sorted(right * size)
  first, second = epochs[: source.rows], epochs[source.rows : 2 * source.rows]
  assert (first != second).any()
  assert sorted(map(tuple, first)) == sorted(map(tuple, second))
  parts = [types.SimpleNamespace(rows=np.arange(2) + i) for i in (0, 2)]
  for number in (1, steps):
    one = step(again, number)
    chex.assert_trees_all_equal(one, rows[number - 1])
    two = [step(again, number, part) for part in parts]
    both = np.concatenate([b.tokens for b in two], axis=1)
    np.testing.assert_array_equal(both, one.tokens)
  evaluated = [x for b in source.heldout for x in members(b)]
  assert len(evaluated) == len(heldout) and all(
    b.tokens.shape == (1, 4, 24) for b in source.heldout
  )
  assert source.fingerprint == again.fingerprint
  other = dataclasses.replace(config.data, heldout=0.2)
  other = opened(dataclasses.replace(config, data=other))
  assert other.fingerprint != source.fingerprint


def test_a_config_that_would_mix_examples_is_refused(tmp_path):
  config = written(tmp_path, 20)
  joined = dataclasses.replace(config.data, packing='joined', fim_rate=0.1)
  with pytest.raises(
    ConfigError, match='data.packing=separate --config.data.f'
  ):
    opened(dataclasses.replace(config, data=joined))
  text = dataclasses.replace(config.data, source='stdlib')
  with pytest.raises(ConfigError, match='name them by --data=FILE'):
    opened(dataclasses.replace(config, data=text))
  stages = dataclasses.replace(MeshConfig(), stage=2)
  staged = types.SimpleNamespace(data=config.data, mesh=stages, rl=config.rl)
  with pytest.raises(ConfigError, match='mesh.stage=2: a pipeline counts'):
    example_source.check(staged)
  rl = dataclasses.replace(config.rl, task='sort8')
  rewarded = types.SimpleNamespace(data=config.data, mesh=config.mesh, rl=rl)
  with pytest.raises(ConfigError, match="rl.task='sort8': is for"):
    example_source.check(rewarded)


def run_config(folder, steps, **changes):
  config = written(folder, 200)
  run = dataclasses.replace(
    config.run,
    steps=steps,
    save_every=3,
    check_every=3,
    eval_every=3,
    sample_every=6,
  )
  return dataclasses.replace(config, run=run, **changes)


@pytest.mark.slow
@pytest.mark.filterwarnings('default')
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, capsys):
  open_source = example_source.opened()
  begin = lambda name, steps: train.run(
    run_config(tmp_path, steps), tmp_path / name, open_source=open_source
  )
  whole = begin('whole', 6)
  begin('halves', 3)
  assert begin('halves', 6) == whole
  timing = ('tokens_per_s', 'mfu', 'memory_mib')
  rows, prints = (
    [
      [
        {k: v for k, v in row.items() if k not in timing}
        for row in workdir.rows(tmp_path / name / f'{kind}.jsonl')
      ]
      for name in ('whole', 'halves')
    ]
    for kind in ('metrics', 'fingerprints')
  )
  assert rows[0] == rows[1] and prints[0] == prints[1] and len(prints[0]) >= 2
  assert 'bits_per_byte' in whole
  samples = (tmp_path / 'whole' / 'samples.txt').read_text()
  assert samples.count('--- step 6') == samples.count('=== in the data') == 4
  page = (tmp_path / 'whole' / 'report.html').read_text()
  assert 'held-out bits per byte' in page and 'gzip' not in page
  assert 'bad rows' not in capsys.readouterr().out
  replay.replay(tmp_path / 'whole', 6, open_source=open_source)
  assert 'all' in capsys.readouterr().out
  config = run_config(tmp_path, 6)
  write(tmp_path, *({'prompt': f'{i}', 'completion': 'y'} for i in range(99)))
  with pytest.raises(ConfigError, match='the text has changed since step 6'):
    train.run(config, tmp_path / 'whole', open_source=open_source)


@pytest.mark.slow
@pytest.mark.filterwarnings('default')
def test_the_end_token_is_learned(tmp_path):
  """A copy of one to three letters: where it ends is in the prompt alone."""
  random = np.random.default_rng(0)
  words = [
    ''.join(random.choice(list('abcd'), random.integers(1, 4)))
    for _ in range(2000)
  ]
  path = write(tmp_path, *({'prompt': f'{w}=', 'completion': w} for w in words))
  config = freeze(base.get_config('smoke'))
  data = dataclasses.replace(
    config.data, packing='separate', fim_rate=0.0, seq_len=64, source=path
  )
  run = dataclasses.replace(
    config.run, steps=120, sample_every=0, eval_every=0, save_every=120
  )
  optim = dataclasses.replace(
    config.optim, phases=(('constant', 1e9, 1.0),), warmup_steps=5
  )
  model = dataclasses.replace(config.model, layers=2, mtp=MTPConfig(0))
  config = dataclasses.replace(
    config, data=data, run=run, optim=optim, model=model
  )
  train.run(config, tmp_path / 'run', open_source=example_source.opened())
  like = init_state(jax.random.key(0), config)
  state = store.restore(tmp_path / 'run' / 'checkpoints', like).state
  prompts = np.array(
    [[256, *ids(f'{w}=')] for w in ['ab', 'cd', 'ba', 'dc'] * 8]
  )
  rollout = generation.rollout(
    config.model,
    {'params': state.params, 'router': state.router},
    prompts,
    16,
    stop_ids=(257,),
    temperature=1.0,
    seed=1,
  )
  assert rollout.ended.mean() >= 0.95
