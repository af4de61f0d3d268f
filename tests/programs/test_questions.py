"""Sources of questions: two sides that share none, files with their errors."""

import codecs
import importlib.util
import json

import pytest

from experiments.rl import questions, tasks
from mla_moe.config import ConfigError

ADD = [
  {'prompt': f'{a}+{b}=', 'answer': a + b} for a in range(9) for b in (1, 7)
]
NEEDS_GYM = pytest.mark.skipif(
  importlib.util.find_spec('reasoning_gym') is None, reason='extra [gym]'
)


@pytest.fixture
def write(tmp_path):
  def write(rows, name='mine.jsonl'):
    path = tmp_path / name
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text('\n'.join(lines) + '\n', encoding='utf-8')
    return str(path)

  return write


def test_a_task_of_ours():
  source = questions.source('add2', 3)
  assert source.train(5) == tasks.question('add2', 3, 5)
  assert source.held_out(5) == tasks.question('add2', 3, 5, True)
  assert source.is_right(source.train(0), source.train(0).answer)
  assert source.size is None
  others = {questions.source(*words).fingerprint for words in (
    ('add2', 3), ('add2', 4), ('add3', 3)
  )}  # fmt: skip
  assert len(others) == 3 and source.fingerprint in others


def test_a_file_has_two_sides_and_passes_in_other_orders(write):
  source = questions.source(write([*ADD, '', *ADD[:3]]), 0)
  count = source.size
  assert count + source.held_out_size == len(ADD) + 3
  passes = [
    [source.train(i) for i in range(n * count, (n + 1) * count)] for n in (0, 1)
  ]
  assert passes[0] != passes[1] and sorted(passes[0]) == sorted(passes[1])
  held_out = {source.held_out(i).text for i in range(source.held_out_size)}
  train = {item.text for item in passes[0]}
  assert train | held_out == {row['prompt'] for row in ADD}
  assert not train & held_out
  assert source.held_out(source.held_out_size) == source.held_out(0)
  again = questions.source(source.name, 0)
  assert again.fingerprint == source.fingerprint
  assert again.train(1) == source.train(1)
  other = questions.source(source.name, 1)
  assert other.fingerprint != source.fingerprint
  assert [other.train(i) for i in range(count)] != passes[0]


def test_the_forms_of_a_line(write):
  rows = [
    {'question': 'Tom has {2} pens?', 'answer': '2 and 3 are 5\n#### 5'},
    {'messages': [{'role': 'system', 'content': 'Be brief.'},
                  {'role': 'user', 'content': '2+3?'}], 'answer': '5'},
    {'prompt': 'Add.', 'tests': [{'call': 'f(2, 3)', 'returns': 5}]},
  ]  # fmt: skip
  lines = [json.dumps(row).encode() for row in rows]
  items = [questions._question(line) for line in lines]
  assert questions._question(codecs.BOM_UTF8 + lines[0]) == items[0]
  assert [item.answer for item in items] == ['5', '5', '']
  assert items[0].text == 'Tom has {2} pens?'
  assert items[1].messages == (('system', 'Be brief.'), ('user', '2+3?'))
  assert items[1].text == 'Be brief.\n2+3?'
  assert items[2].tests == ({'call': 'f(2, 3)', 'returns': 5},)
  source = questions.source(write([*ADD, rows[2]]), 0)
  assert not source.has_answers and not source.has_tests


@pytest.mark.parametrize(
  'row, message',
  [
    ('{"prompt": ', 'line 2: is no JSON in UTF-8'),
    ('[' * 10**5, 'line 2: is no JSON in UTF-8'),
    ('3', 'line 2: must be an object'),
    ({'answer': '1'}, 'line 2: has no prompt; needs one of "prompt"'),
    ({'prompt': 'a', 'question': 'b', 'answer': '1'},
     'has prompt and question'),
    ({'prompt': ' ', 'answer': '1'}, '"prompt" must be a text that is not'),
    ({'prompt': 7, 'answer': '1'}, '"prompt" must be a text that is not'),
    ({'prompt': 'a'}, 'line 2: has no "answer"'),
    ({'prompt': 'a', 'answer': ' '}, 'line 2: has an empty "answer"'),
    ({'prompt': 'a', 'answer': True}, '"answer" must be a text or a number'),
    ({'prompt': 'a', 'tests': []}, '"tests" must be a list that is not empty'),
    ({'prompt': 'a', 'tests': [{'input': 'a'}]}, 'a test must be {"input"'),
    ({'prompt': 'a', 'tests': [{'call': 1, 'returns': 1}]}, 'a test must be'),
    ({'messages': [], 'answer': '1'}, '"messages" must be a list'),
    ({'messages': [{'role': 'user'}], 'answer': '1'},
     'a message needs a "role"'),
    ({'messages': [{'role': 'assistant', 'content': 'a'}], 'answer': '1'},
     'must end with a question of the user'),
  ],
)  # fmt: skip
def test_a_bad_line_has_its_number(write, row, message):
  with pytest.raises(ConfigError) as error:
    questions.source(write([ADD[0], row]), 0)
  assert message in str(error.value) and 'line 2' in str(error.value)
  assert '\n' not in str(error.value)


def test_bad_files_and_names(write, tmp_path):
  with pytest.raises(ConfigError, match='has no questions'):
    questions.source(write(['', '']), 0)
  held_out = [row for row in ADD if tasks.is_held_out(row['prompt'])]
  train = [row for row in ADD if not tasks.is_held_out(row['prompt'])]
  with pytest.raises(ConfigError, match=f'none of its {len(train)} .* is held'):
    questions.source(write(train), 0)
  with pytest.raises(ConfigError, match='questions is for training'):
    questions.source(write(held_out[:1]), 0)
  with pytest.raises(ConfigError, match='cannot be read'):
    questions.source(str(tmp_path / 'none.jsonl'), 0)
  (tmp_path / 'latin.jsonl').write_bytes(b'{"prompt": "\xe9"}\n')
  with pytest.raises(ConfigError, match='line 1: is no JSON in UTF-8'):
    questions.source(str(tmp_path / 'latin.jsonl'), 0)
  with pytest.raises(ConfigError, match='sort99.*or FILE.jsonl with questions'):
    questions.source('sort99', 0)
  with pytest.raises(ConfigError, match='has too few questions'):
    questions.source('sort1', 0)


def test_without_reasoning_gym_the_extra_is_named(monkeypatch):
  monkeypatch.setitem(__import__('sys').modules, 'reasoning_gym', None)
  with pytest.raises(ConfigError, match=r'pip install "mla_moe\[gym\]"'):
    questions.source('reasoning_gym:chain_sum', 0)


@NEEDS_GYM
@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')  # of its libraries
def test_reasoning_gym():
  source = questions.source('reasoning_gym:chain_sum', 0)
  train = [source.train(i) for i in range(40)]
  assert len({item.text for item in train}) >= 39
  assert not any(tasks.is_held_out(item.text) for item in train)
  assert all(tasks.is_held_out(source.held_out(i).text) for i in range(4))
  other = questions.source('reasoning_gym:chain_sum', 1)
  shared = {item.text for item in train} & {
    other.train(i).text for i in range(40)
  }
  assert len(shared) <= 1  # neighbouring seeds share none but by chance
  assert questions.source('reasoning_gym:chain_sum', 0).train(7) == train[7]
  assert questions.source('reasoning_gym:gcd', 0).train(0).answer.isdigit()
  with pytest.raises(ConfigError, match='takes several right answers'):
    questions.source('reasoning_gym:countdown', 0)
  with pytest.raises(ConfigError, match='did you mean chain_sum'):
    questions.source('reasoning_gym:chainsum', 0)
