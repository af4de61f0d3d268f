"""Tasks, graders, rewards: right values, hostile text, a split that holds."""

import time
from fractions import Fraction

import pytest

from experiments.rl import arithmetic, rewards, tasks
from mla_moe.config import ConfigError

GOOD = '<think>3*7 is 21</think> <answer> 3*7+4 </answer>'


@pytest.mark.parametrize(
  'text, value, numbers',
  [
    ('3*7+4', 25, [3, 7, 4]),
    ('-(2-5)/2', Fraction(3, 2), [2, 5, 2]),
    (' 1/3 ', Fraction(1, 3), [1, 3]),
    ('0.1', None, None),
    ('2**3', None, None),
    ('1/0', None, None),
    ('x', None, None),
    ('True', None, None),
    ('f(1)', None, None),
    ('1 if 1 else 2', None, None),
    ('9' * 13, None, None),
    ('٣+٣', None, None),
    ('', None, None),
    ('1+1\x00', None, None),
  ],
)
def test_arithmetic(text, value, numbers):
  result = arithmetic.value(text)
  assert result == (None if value is None else (value, numbers))


@pytest.mark.parametrize(
  'text',
  ['9**9**9', '(' * 10**5, '-' * 250 + '1', '1' + '+1' * 10**5, '9**9' * 60],
)
def test_hostile_arithmetic_is_refused_at_once(text):
  start = time.process_time()
  assert arithmetic.value(text) is None
  assert time.process_time() - start < 1.0


@pytest.mark.parametrize('task', ['sort8', 'reverse5', 'count8', 'add2'])
def test_tasks_know_their_answers(task):
  item = tasks.question(task, 0, 7)
  assert item == tasks.question(task, 0, 7)
  assert item != tasks.question(task, 0, 8)
  assert tasks.is_right(task, item, item.answer)
  assert not tasks.is_right(task, item, item.answer + '0')
  digits = item.text[:-1]
  right = {
    'sort8': lambda: ''.join(sorted(digits)),
    'reverse5': lambda: digits[::-1],
    'count8': lambda: str(digits[:-1].count(item.text[-1])),
    'add2': lambda: str(sum(map(int, digits.split('+')))),
  }
  assert item.answer == right[task]()


def test_countdown_takes_any_expression_of_the_numbers():
  item = tasks.Question('3 4 7=25:', '3*7+4')
  right = lambda text: tasks.is_right('countdown3', item, text)
  assert right('3*7+4') and right('4+7*3') and right(' (7*3)+4 ')
  assert not right('25') and not right('21+4') and not right('3*7+4+0')
  assert not right('9**9**9') and not right('')
  for index in range(20):
    item = tasks.question('countdown3', 1, index)
    assert tasks.is_right('countdown3', item, item.answer)


def test_no_question_is_on_both_sides():
  train = {
    tasks.question('add2', s, i).text for s in (0, 1) for i in range(400)
  }
  test = {
    tasks.question('add2', s, i, True).text for s in (0, 1) for i in range(40)
  }
  assert not train & test and len(train) > 600
  assert all(map(tasks.is_held_out, test))
  assert not any(map(tasks.is_held_out, train))


@pytest.mark.parametrize('task', ['sort', 'sort0', 'sorts8', '8', 'sort99'])
def test_unknown_tasks(task):
  with pytest.raises(ConfigError, match='must be one of sort'):
    tasks.parse(task)


@pytest.mark.parametrize(
  'text, good',
  [
    (GOOD, True),
    (GOOD + '\n', True),
    (GOOD + ' 25', False),
    (GOOD + '</answer>', False),
    (GOOD.replace('<think>', '<think><think>'), False),
    ('<answer>1</answer>', False),
    ('<answer>1</answer><think></think>', False),
    ('', False),
  ],
)
def test_the_form(text, good):
  assert rewards.format_reward(text) == float(good)
  if good:
    assert rewards.parts(text) == ('3*7 is 21', '3*7+4')


def test_a_long_text_is_graded_at_once():
  start = time.process_time()
  for text in (
    *('<think>' * 10**5, '<think>' + 'x' * 10**6, '$' * 10**6),
    '<think>' + '</think><answer>' * 6 * 10**4,
  ):
    assert not rewards.format_reward(text)
    rewards.language_consistency(text)
  assert time.process_time() - start < 3.0


@pytest.mark.parametrize(
  'text, part',
  [
    ('so it is two', 1.0),
    ('so 它 is', 2 / 3),
    ('你好 `code` $x+y$ 12', 0.0),
    ('so слово', 0.5),
    ('12 + 5 = 17', 1.0),
  ],
)
def test_language(text, part):
  assert rewards.language_consistency(text) == pytest.approx(part)


def test_pass_at_k():
  assert rewards.pass_at_k(10, 3, 1) == pytest.approx(0.3)
  assert rewards.pass_at_k(10, 1, 10) == 1.0
  assert rewards.pass_at_k(4, 2, 2) == pytest.approx(1 - 1 / 6)
  assert rewards.pass_at_k(4, 0, 4) == 0.0


def test_the_template_is_published():
  assert tasks.R1_ZERO.endswith('User: {prompt}. Assistant:')
  assert len(tasks.R1_ZERO.replace('{prompt}', '')) == 418
