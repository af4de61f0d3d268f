"""The lm-eval adapter: its numbers are the model's; a local task, offline."""

import dataclasses
import importlib.util
import json
import pathlib
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mla_moe
from configs import tiny
from experiments import cli, ends, evaluate, fitted, opened
from experiments.data import tokenizer
from mla_moe import Transformer, rollout
from mla_moe.config import CacheConfig, ConfigError, freeze


@pytest.fixture(scope='module')
def model():
  config = freeze(tiny.get_config('micro')).model
  layer = dict(layers=1, dense_layers=0)
  config = dataclasses.replace(config, max_positions=128, **layer)
  tokens = jnp.zeros((1, 8), jnp.int32)
  variables = jax.jit(Transformer(config).init)(jax.random.key(0), tokens)
  from flax import linen as nn

  words = tokenizer.ByteTokenizer()
  return opened.TextModel(
    config, nn.unbox(variables), words, None, (config.eos_id,)
  )


def test_likelihoods_are_the_forward_passs(model):
  pairs = [([256, 5, 6], [7, 8, 9]), ([256], [1]), ([256, 3], [4, 4])]
  out = evaluate.likelihoods(model, pairs, 4)
  rows = np.zeros((4, 64), np.int32)
  for i, (context, continuation) in enumerate(pairs):
    rows[i, : len(context) + len(continuation)] = [*context, *continuation]
  apply = jax.jit(Transformer(model.config).apply)
  log_probs = jax.nn.log_softmax(apply(model.variables, rows).logits)
  log_probs = np.asarray(log_probs)
  for i, (context, continuation) in enumerate(pairs):
    at = len(context) - 1 + np.arange(len(continuation))
    total, greedy = out[i]
    expected = log_probs[i, at, continuation].sum()
    assert total == pytest.approx(float(expected), rel=1e-4)
    assert greedy == bool((log_probs[i, at].argmax(-1) == continuation).all())


def test_a_greedy_continuation_is_told_as_greedy(model):
  prompt = [256, 10, 20, 30]
  new = rollout(model.config, model.variables, np.array([prompt]), 4).tokens
  (pair,) = evaluate.likelihoods(model, [(prompt, new[0].tolist())], 4)
  assert pair[1]
  (words,) = evaluate.continuations(model, [(prompt, {'max_gen_toks': 4})], 1)
  assert words == model.tokenizer.decode(new[0])
  until = {'max_gen_toks': 4, 'until': [words[1]]}
  (cut,) = evaluate.continuations(model, [(prompt, until)], 1)
  assert cut == words[: words.index(words[1])]


def test_a_sample_depends_on_its_request_and_number_alone(model):
  prompt = [256, 10, 20, 30]
  drawn = {'temperature': 1.0, 'max_gen_toks': 8}
  requests = [(prompt, drawn)] * 4
  out = evaluate.continuations(model, requests, 1)
  assert len(set(out)) == 4  # equal requests, other samples
  assert evaluate.continuations(model, requests, 4) == out
  # Beside a greedy one, a shorter one, and one that wants many tokens.
  greedy = {'do_sample': False, 'temperature': 1.0, 'max_gen_toks': 8}
  long = {'max_gen_toks': model.config.max_positions - 2}
  mixed = [(prompt, drawn), (prompt, greedy), (prompt[:2], drawn)]
  mixed += [(prompt, drawn), (prompt, long)]
  mixed = evaluate.continuations(model, mixed, 5)
  assert [mixed[0], mixed[3]] == [out[0], out[3]]
  new = rollout(model.config, model.variables, np.array([prompt]), 8).tokens
  assert mixed[1] == model.tokenizer.decode(new[0])
  # top_k = 1 is greedy at any temperature.
  (first,) = evaluate.continuations(model, [(prompt, drawn | {'top_k': 1})], 1)
  assert first == mixed[1]
  with pytest.raises(ConfigError, match='num_beams=4 is not supported'):
    evaluate.continuations(model, [(prompt, {'num_beams': 4})], 1)


def test_texts_have_the_cache_of_the_model(model, monkeypatch):
  class Read(Exception):
    """A rollout has its options."""

  def read(*_, cache, **__):
    raise Read(cache.dtype)

  monkeypatch.setattr(mla_moe, 'rollout', read)
  few = model._replace(cache=CacheConfig(dtype='float8'))
  with pytest.raises(Read, match='float8'):
    evaluate.continuations(few, [([256, 10], {})], 1)


def test_every_end_of_both_files_ends_a_text(tmp_path):
  """Numbers that are no ids of the model are none of its ends."""
  config = types.SimpleNamespace(eos_id=7, vocab=99)
  stops = lambda: ends.of(tmp_path, config)
  assert stops() == (7,)
  for name, ids in ('config', [7, 5, 6]), ('generation_config', 8):
    text = json.dumps({'eos_token_id': ids})
    (tmp_path / f'{name}.json').write_text(text)
  assert stops() == (5, 6, 7, 8)
  odd = json.dumps({'eos_token_id': [True, -1, 99, '3', None, [4]]})
  (tmp_path / 'config.json').write_text(odd)
  assert stops() == (7, 8)


def test_without_lm_eval_the_extra_is_named(model, monkeypatch):
  monkeypatch.setitem(__import__('sys').modules, 'lm_eval.api.model', None)
  with pytest.raises(ConfigError, match=r'pip install "mla_moe\[eval\]"'):
    evaluate.adapter(model, 2)


# Without a network, as docs/evaluation.md has it.
PAGE = (pathlib.Path(__file__).parents[2] / 'docs/evaluation.md').read_text()
TASK = re.search(r'```yaml\n(.*?)```', PAGE, re.S)[1]
ROW = re.search(r'```json\n(.*?)```', PAGE, re.S)[1]
HAS_LM_EVAL = pytest.mark.skipif(
  importlib.util.find_spec('lm_eval') is None, reason='extra [eval]'
)


def flags_of(**values):
  values = {'include': '', 'truncate': False, 'out': '', 'limit': 0} | values
  return types.SimpleNamespace(batch=4, fewshot=-1, **values)


@HAS_LM_EVAL
@pytest.mark.filterwarnings('ignore')  # of lm-eval and datasets
def test_a_task_that_no_network_brings_is_one_line(model, monkeypatch):
  import lm_eval

  def simple_evaluate(**_):
    raise ConnectionError("Couldn't reach 'allenai/ai2_arc' on the Hub")

  monkeypatch.setattr(lm_eval, 'simple_evaluate', simple_evaluate)
  monkeypatch.setattr(evaluate, 'FLAGS', flags_of(tasks=['arc_easy']))
  error = evaluate.run(model)['arc_easy']['error']
  assert re.match("Couldn't reach .* on the Hub; .*--include=FOLDER", error)


@HAS_LM_EVAL
@pytest.mark.filterwarnings('ignore')  # of lm-eval and datasets
def test_a_local_task_runs_offline(tmp_path, monkeypatch):
  """All of lm-eval's way; the likelihoods are the sums of the bytes."""
  words = tokenizer.ByteTokenizer()
  config = types.SimpleNamespace(bos_id=256, max_positions=99, vocab=264)
  model = opened.TextModel(config, None, words, None, (257,))
  seen = []

  def likelihoods(model, pairs, batch, truncate):
    seen.extend(pairs)
    return [(float(sum(continuation)), False) for _, continuation in pairs]

  monkeypatch.setattr(evaluate, 'likelihoods', likelihoods)
  for name in ('HF_HUB_OFFLINE', 'HF_DATASETS_OFFLINE'):
    monkeypatch.setenv(name, '1')
  monkeypatch.setenv('HF_HOME', str(tmp_path / 'hf'))
  rows = [
    {'question': f'{i} and', 'choices': ['a', 'bb'], 'answer': i % 2}
    for i in range(6)
  ]
  assert rows[0].keys() == json.loads(ROW).keys()
  data = tmp_path / 'capitals.jsonl'
  data.write_text('\n'.join(map(json.dumps, rows)))
  (tmp_path / 'capitals.yaml').write_text(
    TASK.replace('texts/capitals.jsonl', str(data))
  )
  flags = flags_of(tasks=['capitals'], include=str(tmp_path))
  monkeypatch.setattr(evaluate, 'FLAGS', flags)
  out = evaluate.run(model)['capitals']
  assert out['acc,none'] == 0.5  # ' bb' has the larger sum, and is right
  assert len(seen) == 12  # of half the rows
  context, continuation = seen[0]
  assert words.decode(context[1:]) == '0 and' and context[0] == 256
  assert words.decode(continuation) in (' a', ' bb')


def harness(monkeypatch, tasks):
  """Puts a module in lm-eval's place; tasks are {name: rows or an error}."""
  called = []

  class TaskManager:
    all_tasks = [*tasks]

    def __init__(self, **_):
      pass

  def simple_evaluate(
    tasks,
    model,
    **_,
  ):
    (name,) = tasks
    called.append(name)
    if isinstance(answers[name], BaseException):
      raise answers[name]
    return {'results': answers[name]}

  answers = tasks
  api = types.SimpleNamespace(LM=object)
  for name, module in {
    'lm_eval': types.SimpleNamespace(simple_evaluate=simple_evaluate),
    'lm_eval.api': types.SimpleNamespace(model=api),
    'lm_eval.api.model': api,
    'lm_eval.tasks': types.SimpleNamespace(TaskManager=TaskManager),
  }.items():
    monkeypatch.setitem(sys.modules, name, module)
  return called


def test_a_failed_task_does_not_lose_the_others(
  model, monkeypatch, tmp_path, capsys
):
  """Results are on the disk when the next task begins; a rerun completes."""
  path = tmp_path / 'results.json'
  read = lambda: json.loads(path.read_text())['tasks']
  group = {'math': {'acc': 0.25, 'alias': 'math'}, 'math_easy': {'acc': 0.5}}
  tasks = {
    'math': group,
    'long': ConfigError('a question of 99 tokens leaves no room'),
    'odd': KeyError('answer'),
    'last': {'last': {'acc': 1.0}},
  }
  called = harness(monkeypatch, tasks)
  monkeypatch.setattr(opened, 'from_flags', lambda: model)
  flags = flags_of(tasks=[*tasks], out=str(path))
  monkeypatch.setattr(evaluate, 'FLAGS', flags)
  with pytest.raises(cli.Stopped, match='^2 of 5 tasks failed: long, odd$'):
    evaluate.main()
  assert called == [*tasks]
  assert read() == {
    'math': {'math': {'acc': 0.25}, 'math_easy': {'acc': 0.5}},
    'long': {'long': {'error': 'a question of 99 tokens leaves no room'}},
    'odd': {'odd': {'error': "KeyError: 'answer'"}},
    'last': {'last': {'acc': 1.0}},
  }
  out, err = capsys.readouterr()
  assert 'KeyError' in err and re.search('last +acc +1.0000', out)
  # The rest of a command that was stopped, and that alone.
  tasks['long'] = {'long': {'acc': 0.125}}
  tasks['odd'] = KeyboardInterrupt()
  called.clear()
  with pytest.raises(KeyboardInterrupt):
    evaluate.main()
  assert called == ['long', 'odd']
  assert read()['long'] == {'long': {'acc': 0.125}}
  tasks['odd'] = {'odd': {'acc': 0.75}}
  called.clear()
  evaluate.main()
  evaluate.main()
  assert called == ['odd'] and read()['odd'] == {'odd': {'acc': 0.75}}


def test_results_of_other_settings_are_not_completed(
  model, monkeypatch, tmp_path
):
  path = tmp_path / 'results.json'
  called = harness(monkeypatch, {'a': {'a': {'acc': 1.0}}})
  flags = flags_of(tasks=['a'], out=str(path))
  monkeypatch.setattr(evaluate, 'FLAGS', flags)
  evaluate.run(model)
  assert evaluate.run(model) == {'a': {'acc': 1.0}} and called == ['a']
  params = dict(model.variables['params'])
  params['embedding'] = params['embedding'].at[3, 4].add(1)
  other = model._replace(variables={**model.variables, 'params': params})
  cache = model._replace(cache=CacheConfig(dtype='float8'))
  ends = model._replace(stop_ids=(1, 2))
  for wrong, name in (other, 'model'), (cache, 'cache'), (ends, 'tokenizer'):
    with pytest.raises(ConfigError, match=f'has results with {name}='):
      evaluate.run(wrong)
  flags.limit = 10
  with pytest.raises(ConfigError, match='with limit=0, not 10; name another'):
    evaluate.run(model)
  path.write_text('{"acc": 1}')
  with pytest.raises(ConfigError, match='is no file of results'):
    evaluate.run(model)
  flags.out = str(tmp_path / 'absent' / 'results.json')
  with pytest.raises(ConfigError, match='cannot be written'):
    evaluate.run(model)
  assert called == ['a']


def test_an_answer_gets_shorter_and_a_question_is_never_cut(
  model, monkeypatch, capsys
):
  """Any max_gen_toks runs: the question whole, the answer as room is left."""
  calls = []

  def rollout(config, variables, prompts, limit, *, lengths, **_):
    rows = zip(prompts, lengths, strict=True)
    calls.append(([row[:n].tolist() for row, n in rows], limit))
    shape = len(prompts), limit
    counts = np.full(len(prompts), limit)
    return types.SimpleNamespace(tokens=np.full(shape, 65), counts=counts)

  monkeypatch.setattr(mla_moe, 'rollout', rollout)
  longest = model.config.max_positions
  ids = [256, *range(24)]
  for limit in (0, 1, longest - 25, longest - 24, longest, 10**9):
    calls.clear()
    room = min(limit, longest - 25)
    (words,) = evaluate.continuations(
      model, [(ids, {'max_gen_toks': limit})], 4
    )
    assert words == 'A' * room
    assert calls == ([([ids], room)] if limit else [])
    assert ('shorter than max_gen_toks' in capsys.readouterr().err) == (
      limit > room
    )
  # Rows of one limit share a batch, filled up to a power of two.
  calls.clear()
  three = [(ids, {'max_tokens': 5}), (ids[:9], {'max_new_tokens': '5'})]
  three.append((ids[:9], {'max_gen_toks': 5.0, 'until': None}))
  assert evaluate.continuations(model, three, 8) == ['AAAAA'] * 3
  assert calls == [([ids[:9], ids[:9], ids, ids[:9]], 5)]
  # A question without room for an answer: before the first is computed.
  calls.clear()
  long = [256] + [7] * (longest - 1)
  line = (
    f'{longest} tokens.*max_gen_toks=1.*max_positions={longest}.*--truncate'
  )
  with pytest.raises(ConfigError, match=line):
    evaluate.continuations(model, [(ids, {}), (long, {'max_gen_toks': 1})], 4)
  assert not calls
  evaluate.continuations(model, [(long, {})], 4, truncate=True)
  assert calls == [([long[-longest * 3 // 4 :]], longest // 4)]
  assert '1 of 1 questions lose their beginning' in capsys.readouterr().err


@pytest.mark.parametrize(
  'options, line',
  [
    ({'max_gen_toks': -1}, 'max_gen_toks=-1: must be a whole number'),
    ({'max_gen_toks': 1.5}, 'max_gen_toks=1.5: must be a whole number'),
    ({'max_gen_toks': 'many'}, "max_gen_toks='many': is no number"),
    ({'max_tokens': float('inf')}, 'max_tokens=inf: is no number'),
    ({'temperature': 'warm'}, "temperature='warm': is no number"),
    ({'top_p': True}, 'top_p=True: is no number'),
    ({'until': [3]}, r'until=\[3\]: must be texts'),
    ({'until': {'a': 1}}, 'until=.*: must be texts'),
  ],
)
def test_options_that_are_not_valid_are_one_line(options, line):
  few = types.SimpleNamespace(max_positions=9, vocab=9)
  few = opened.TextModel(few, None, None, None, ())
  with pytest.raises(ConfigError, match=line):
    evaluate.continuations(few, [([1], options)], 1)
  for ids, line in ([], 'without tokens'), ([-1], 'token -1'), ([9], 'token 9'):
    with pytest.raises(ConfigError, match=line):
      evaluate.continuations(few, [(ids, {})], 1)
    with pytest.raises(ConfigError, match=line):
      evaluate.likelihoods(few, [(ids, [1])], 1)


def test_likelihoods_of_long_and_of_empty_texts(model, monkeypatch, capsys):
  """A scorer in the model's place: a token's log-probability is the token."""
  score = lambda _, tokens, targets: (targets.astype(float), targets > 0)
  monkeypatch.setattr(evaluate, '_scorer', lambda config: score)
  longest = model.config.max_positions
  ids = [256, *([1, 2, 3, 4] * longest)][: longest + 3]
  line = f'{longest} tokens .* of 2: more than max_positions={longest}'
  with pytest.raises(ConfigError, match=line):
    evaluate.likelihoods(model, [(ids[:longest], [1, 2])], 2)
  with pytest.raises(ConfigError, match='max_positions'):  # whatever is cut
    evaluate.likelihoods(model, [([256], ids[: longest + 1])], 2, truncate=True)
  pairs = [(ids[:longest], [5, 6]), ([256], []), ([9], ids[2 : longest + 2])]
  cut, empty, whole = evaluate.likelihoods(model, pairs, 4, truncate=True)
  assert cut == (11.0, True) and empty == (0.0, True)
  assert whole == (float(sum(ids[2 : longest + 2])), True)
  assert '1 of 3 questions lose their beginning' in capsys.readouterr().err


@pytest.mark.parametrize('count', [0, 1, 4, 5, 8, 10])
def test_windows_predict_each_token_once(count):
  """Of lm-eval's documentation: BOS 0 1 2, then 3 4 5 6, then 5 6 7 8."""
  ids = list(range(count))
  pairs = fitted.windows([99], ids, 4)
  assert [token for _, part in pairs for token in part] == ids
  for i, (context, part) in enumerate(pairs):
    whole = [99, *ids][: 4 * i + len(part) + 1]  # all up to its end
    assert [*context, *part] == whole[-5:]
    assert context


def test_a_model_without_bos_begins_with_an_end(monkeypatch):
  harness(monkeypatch, {})
  seen = []
  record = lambda model, pairs, *_: seen.append(list(pairs)) or [(0.0, True)]
  monkeypatch.setattr(evaluate, 'likelihoods', record)
  config = types.SimpleNamespace(bos_id=-1, eos_id=257, max_positions=4)
  model = opened.TextModel(config, None, tokenizer.ByteTokenizer(), None, ())
  adapted = evaluate.adapter(model, 2)
  request = lambda *args: types.SimpleNamespace(args=args)
  adapted.loglikelihood([request('a', 'b'), request('', 'b')])
  assert seen.pop() == [([97], [98]), ([257], [98])]
  assert adapted.loglikelihood_rolling([request('abcdef')]) == [0.0]
  assert seen == [[([257], [97, 98, 99, 100]), ([98, 99, 100], [101, 102])]]
