"""Rejection sampling: right answers alone, in rows that fine-tuning reads."""

import dataclasses
import json
import pathlib
import shutil

import chex
import numpy as np
import pytest

from configs import r1_tiny
from experiments import cli, opened, reject
from experiments.data import tokenizer
from experiments.rl import prompts, questions, rollouts
from experiments.training import examples
from mla_moe.config import CacheConfig, ConfigError, RLConfig, freeze
from mla_moe.decode import generation

BYTES = tokenizer.ByteTokenizer()
CONFIG = freeze(r1_tiny.get_config('zero,smoke')).model
RL = RLConfig(
  task='sort4', template='plain', rewards=(('accuracy', 1.0),), prompts=5,
  samples=3, minibatches=1, max_new=6, rows=6, scale='none',
)  # fmt: skip


def answer(prompt, seed):
  """The text of an answer to a prompt, and whether it ends, by its seed."""
  digits = BYTES.decode(prompt)[:-1]
  draw = np.random.default_rng(seed)
  if draw.random() < 0.5:
    return ''.join(sorted(digits)), draw.random() < 0.7
  return digits[: draw.integers(1, 5)], True


@pytest.fixture(autouse=True)
def answers(monkeypatch):
  """A rollout of those answers; the list of its batches."""
  batches = []

  def rollout(config, variables, prompts, limit, *, lengths, seed, **options):
    assert options['stop_ids'] == (CONFIG.eos_id,)
    prompts = np.repeat(prompts, options['samples'], 0)
    lengths = np.repeat(lengths, options['samples'])
    batches.append(len(prompts))
    tokens = np.full((len(prompts), limit), CONFIG.eos_id, np.int32)
    counts, ended = np.zeros(len(prompts), int), np.zeros(len(prompts), bool)
    for i, ids in enumerate(prompts):
      text, ended[i] = answer(ids[: lengths[i]], seed[i])
      tokens[i, : len(text)] = BYTES.encode(text)
      counts[i] = len(text) + ended[i]
    zeros = np.zeros(tokens.shape, np.float32)
    return generation.Rollout(tokens, counts, zeros, zeros, ended, 0, 0)

  monkeypatch.setattr(generation, 'rollout', rollout)
  return batches


@pytest.fixture
def model():
  variables = {'params': {'head': np.ones((2, 2), np.float32)}}
  return opened.TextModel(CONFIG, variables, BYTES, None, (CONFIG.eos_id,))


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_are_the_right_answers_that_have_ended(model, tmp_path):
  seed = 1  # whose answers are of all kinds
  counts = reject.run(model, RL, tmp_path / 'chosen.jsonl', seed=seed)
  expected, right, cut, solved = [], 0, 0, 0
  for i in range(5):
    item = questions.source('sort4', seed).train(i)
    prompt = [BYTES.bos_id, *BYTES.encode(item.text)]
    drawn = [answer(prompt, s) for s in rollouts.seeds(seed, i, 3)]
    right += sum(text == item.answer for text, _ in drawn)
    cut += sum(not ended for _, ended in drawn)
    solved += item.answer in dict(drawn)
    if (item.answer, True) in drawn:
      expected.append({'prompt': item.text, 'completion': item.answer})
  assert lines(tmp_path / 'chosen.jsonl') == expected
  assert 0 < cut and 0 < len(expected) < right
  assert counts == {
    'right': right, 'rows': len(expected), 'cut': cut, 'errors': 0,
    'pass_at_1': right / 15, 'pass_at_k': pytest.approx(solved / 5),
  }  # fmt: skip


@pytest.mark.parametrize(('drawn', 'parts'), [(0, 3), (1, 3), (3, 2), (5, 0)])
def test_a_cut_run_goes_on_to_the_same_file(
  drawn, parts, model, answers, tmp_path
):
  """Of two questions a part, those that a kill left are drawn again."""
  whole, cut = tmp_path / 'whole.jsonl', tmp_path / 'cut.jsonl'
  reject.run(model, RL, whole)
  folder = shutil.copytree(f'{whole}.drawn', f'{cut}.drawn')
  (pathlib.Path(folder) / 'finished').unlink()
  journal = pathlib.Path(folder) / 'rows'
  rows = journal.read_bytes().splitlines(keepends=True)
  journal.write_bytes(b''.join(rows[:drawn]) + b'{"right": 1, "ro')
  answers.clear()
  reject.run(model, RL, cut)
  assert cut.read_text() == whole.read_text()
  assert journal.read_bytes().startswith(b''.join(rows))
  assert answers == [6] * parts
  # A finished file is left alone; other counts of questions go on from it.
  cut.write_text('by hand\n')
  reject.run(model, RL, cut)
  assert cut.read_text() == 'by hand\n' and answers == [6] * parts
  more, long = dataclasses.replace(RL, prompts=8), tmp_path / 'long.jsonl'
  reject.run(model, more, cut)
  reject.run(model, more, long)
  assert cut.read_text() == long.read_text()
  reject.run(model, RL, long)
  assert long.read_text() == whole.read_text()


def test_other_settings_have_another_file(model, tmp_path):
  out = tmp_path / 'chosen.jsonl'
  reject.run(model, RL, out)
  other = dataclasses.replace(RL, temperature=0.5)
  with pytest.raises(ConfigError, match='another temperature .*=1.0'):
    reject.run(model, other, out)
  double = {'params': {'head': 2 * model.variables['params']['head']}}
  with pytest.raises(ConfigError, match='another checkpoint'):
    reject.run(model._replace(variables=double), RL, out)
  few = model._replace(cache=CacheConfig(dtype='int8'))
  with pytest.raises(ConfigError, match='another cache'):
    reject.run(few, RL, out)
  with pytest.raises(ConfigError, match='another keep .*=1'):
    reject.run(model, RL, out, keep=2)
  # Without an answer yet, a command may change.
  (tmp_path / 'chosen.jsonl.drawn' / 'rows').unlink()
  reject.run(model, RL, out, keep=2)
  (tmp_path / 'mine.jsonl').write_text('{}\n')
  with pytest.raises(ConfigError, match='is there already'):
    reject.run(model, RL, tmp_path / 'mine.jsonl')


def test_a_model_without_right_answers_is_one_line(model, tmp_path):
  out = tmp_path / 'chosen.jsonl'
  wrong = dataclasses.replace(RL, task='add4', max_new=12)
  with pytest.raises(cli.Stopped, match='no right answer'):
    reject.run(model, wrong, out)
  assert not out.exists()


def test_the_shortest_different_answers_come_first():
  answers = [(3, 'abc'), (2, 'ab'), (2, 'xy'), (2, 'ab'), (1, '\ufffd')]
  assert reject._shortest(answers, 3) == ['ab', 'xy', 'abc']
  assert reject._shortest([*answers, (1, '')], 1) == ['ab']


def test_questions_are_different_ones(tmp_path):
  path = tmp_path / 'mine.jsonl'
  rows = [{'prompt': f'{i % 30}+1=', 'answer': i % 30 + 1} for i in range(90)]
  path.write_text(''.join(f'{json.dumps(row)}\n' for row in rows))
  source = questions.source(str(path), 0)
  items = reject.distinct(source, 1000)
  assert 0 < len(items) == len({item.text for item in items}) < 30
  assert reject.distinct(source, 7) == items[:7]
  sums = reject.distinct(questions.source('add1', 0), 150)
  assert 80 < len(sums) < 100  # a task without an end has few different ones


R1 = (
  "{{ bos_token }}{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}"
  '{% if m["role"] == "assistant" %}{{ eos_token }}{% endif %}{% endfor %}'
  '{% if add_generation_prompt %}assistant:<think>\n{% endif %}'
)


@pytest.mark.parametrize(
  ('name', 'own'),
  [
    ('plain', ''),
    ('r1_zero', ''),
    ('chat', R1),
    ('chat', R1.replace('<think>\n', '')),
  ],
)
def test_fine_tuning_reads_the_prompt_that_was_answered(name, own, tmp_path):
  """A row's ids are the prompt's, then the answer's, then the end token's."""
  if own:
    pytest.importorskip('jinja2')
  turns = (('system', 'Be brief.'), ('user', '2+3?'))
  maker = prompts.Prompts(name, BYTES, None, own)
  items = [
    questions.Question('1+1=', '2'),
    questions.Question('Be brief.\n2+3?', '5', (), turns),
  ]
  path = tmp_path / 'rows.jsonl'
  rows = [maker.row(item, 'so\n</think> 5') for item in items]
  path.write_text(''.join(f'{json.dumps(row)}\n' for row in rows))
  for item, read in zip(
    items, examples.read(str(path), BYTES, own), strict=True
  ):
    chex.assert_trees_all_equal(read.prompt, maker.ids(item))
    answer = [*BYTES.encode('so\n</think> 5'), BYTES.eos_id]
    chex.assert_trees_all_equal(read.completion, np.array(answer, np.int32))
  if name == 'chat':
    last = rows[1]['messages'][-1]['content']
    assert len(rows[1]['messages']) == 3
    assert last.startswith('<think>\n') == ('<think>' in own)
    assert maker.template == '{prompt}' + '<think>\n' * ('<think>' in own)


@pytest.mark.parametrize(
  ('words', 'error'),
  [
    ((), '--task: is empty'),
    (('--task=sort4',), '--out: is empty'),
    (('--task=sort4', '--out=x'), 'must end in .jsonl'),
    (('--task=sort4', '--out=x.jsonl'), '--checkpoint'),
    (('--task=sort4', '--out=x.jsonl', '--temperature=0'), 'temperature'),
  ],
)
def test_mistakes_are_one_line(call, words, error):
  code, _, err = call('reject', *words)
  assert code == 2 and error in err and err.count('\n') == 1
