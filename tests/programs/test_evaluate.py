"""The lm-eval adapter: its numbers are the model's; a local task, offline."""

import dataclasses
import importlib.util
import json
import pathlib
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mla_moe
from configs import tiny
from experiments import evaluate, opened
from mla_moe import Transformer, rollout
from mla_moe.config import CacheConfig, ConfigError, freeze
from mla_moe.data import tokenizer


@pytest.fixture(scope='module')
def model():
  config = freeze(tiny.get_config('micro')).model
  config = dataclasses.replace(config, max_positions=128)
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
  assert evaluate.continuations(model, requests, 3) == out
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


@HAS_LM_EVAL
@pytest.mark.filterwarnings('ignore')  # of lm-eval and datasets
def test_a_task_that_no_network_brings_is_one_line(model, monkeypatch):
  import lm_eval

  def simple_evaluate(**_):
    raise ConnectionError("Couldn't reach 'allenai/ai2_arc' on the Hub")

  monkeypatch.setattr(lm_eval, 'simple_evaluate', simple_evaluate)
  flags = types.SimpleNamespace(
    batch=4, tasks=['arc_easy'], include='', limit=0, fewshot=-1
  )
  monkeypatch.setattr(evaluate, 'FLAGS', flags)
  with pytest.raises(ConfigError, match="tasks=arc_easy: Couldn't .*--include"):
    evaluate.run(model)


@HAS_LM_EVAL
@pytest.mark.filterwarnings('ignore')  # of lm-eval and datasets
def test_a_local_task_runs_offline(tmp_path, monkeypatch):
  """All of lm-eval's way; the likelihoods are the sums of the bytes."""
  words = tokenizer.ByteTokenizer()
  config = types.SimpleNamespace(bos_id=256, max_positions=99, vocab=264)
  model = opened.TextModel(config, None, words, None, (257,))
  seen = []

  def likelihoods(model, pairs, batch):
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
  flags = types.SimpleNamespace(
    batch=4, tasks=['capitals'], include=str(tmp_path), limit=0, fewshot=-1
  )
  monkeypatch.setattr(evaluate, 'FLAGS', flags)
  out = evaluate.run(model)['capitals']
  assert out['acc,none'] == 0.5  # ' bb' has the larger sum, and is right
  assert len(seen) == 12  # of half the rows
  context, continuation = seen[0]
  assert words.decode(context[1:]) == '0 and' and context[0] == 256
  assert words.decode(continuation) in (' a', ' bb')
