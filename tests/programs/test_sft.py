"""Supervised fine-tuning: what is learned of an example, and nothing else."""

import json

import numpy as np
import pytest

from experiments import tokenizer as trained
from experiments.serving import template
from experiments.training import examples
from mla_moe.config import ConfigError
from mla_moe.data import tokenizer

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
  chat = template.Template(BYTES, opens, '', '', {'<e>': 257})
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
