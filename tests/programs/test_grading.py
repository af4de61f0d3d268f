"""Graders: right values, errors that are no zeros, hostile answers."""

import importlib.util
import json
import math
import pathlib
import re
import runpy
import textwrap
import time

import pytest

from experiments.rl import grading, matching, questions, rewards, sandbox, tasks
from experiments.rl.questions import Question
from mla_moe.config import ConfigError

ROOT = pathlib.Path(__file__).parent.parent.parent
SORT = questions.source('sort8', 0)
FORM = '<think>so it is</think> <answer>{}</answer>'
NEEDS_VERIFY = pytest.mark.skipif(
  importlib.util.find_spec('math_verify') is None, reason='extra [rl]'
)
ADD = Question('Write add.', '', ({'call': 'add(2, 3)', 'returns': 5},))
# A worker that compares texts, and does as the answer says.
STUB = """
import json, os, sys, time
print('{}', flush=True)
for line in sys.stdin:
  request = json.loads(line)
  answer = request['answer']
  if answer == 'h':
    time.sleep(600)
  if answer == 'd':
    os._exit(1)
  if answer == 'e':
    print(json.dumps({'error': 'ValueError: no formula'}), flush=True)
  else:
    print(json.dumps({'right': answer == request['gold'] + '+0'}), flush=True)
"""


def of_file(**fields):
  """A source whose answers are compared by `matching`."""
  return SORT._replace(name='mine.jsonl', is_right=None, **fields)


def grade(source, weights, items, texts, lengths=None, **options):
  with grading.Grader(source, weights, longest=100, **options) as grader:
    return grader.grade(items, texts, lengths or [5] * len(texts))


def test_a_task_with_and_without_a_form():
  item = SORT.train(0)
  texts = [item.answer, FORM.format(item.answer), FORM.format('1'), '']
  plain = grade(SORT, {'accuracy': 1}, [item] * 4, texts)
  assert [row.reward for row in plain] == [1, 0, 0, 0]
  both = grade(SORT, {'accuracy': 1, 'format': 0.5}, [item] * 4, texts)
  assert [row.reward for row in both] == [0, 1.5, 0.5, 0]
  assert both[1].parts == {'accuracy': 1, 'format': 1} and not both[1].error
  asked = grade(
    SORT, {'accuracy': 1}, [item] * 4, texts, template=tasks.R1_ZERO
  )
  assert [row.reward for row in asked] == [0, 1, 0, 0]
  begun = grade(
    SORT,
    {'format': 1},
    [item],
    ['so</think><answer>1</answer>'],
    template='{prompt} Assistant: <think>\n',
  )
  assert begun[0].reward == 1


def test_language_is_the_questions():
  items = [Question('How many are there?', '2'), Question('有多少?', '2')]
  texts = ['<think>有两个</think><answer>2</answer>'] * 2
  rows = grade(of_file(), {'language': 2, 'format': 0}, items, texts)
  assert [row.reward for row in rows] == [0, 2]
  assert rows[1].parts == {'language': 1, 'format': 1}


@pytest.mark.parametrize(
  'gold, answer, right',
  [
    ('42', ' 42\n', True),
    ('42', '42.0', True),
    ('1,000', '1000', True),
    ('1000', '1,000.00', True),
    ('1/2', '0.5', True),
    ('0.5', '$\\boxed{1/2}$', True),
    ('Paris', 'paris', True),
    ('42', '41 or 42', False),
    ('42', '4 2', False),
    ('42', '٤٢', False),
    ('1', '1/0', False),
    ('10', '1e1', False),
    ('1000', '10,00', False),
    ('42', '9' * 10**6, False),
    ('', '0', False),
  ],
)
def test_equal_texts_and_numbers(gold, answer, right):
  assert matching.equal(gold, answer) == right


@pytest.mark.parametrize(
  'gold, answer, formula',
  [
    ('42', '$x = 40+2$', '40+2'),
    ('x=42', 'x=42', 'x=42'),
    ('3\\text{ cm}', '\\frac{6}{2}\\text{ cm}', '\\frac{6}{2}\\text{ cm}'),
    ('42', '41 or 42', None),
    ('42', '41=42', None),
    ('42', 'x=41=42', None),
    ('42', '41$ $42', None),
    ('42', '\\boxed{41}\\boxed{42}', None),
    ('42', '42\x00', None),
    ('42', '<br>42', None),
    ('42', '9^{9^{9^9}}', None),
    ('42', '9**9**9', None),
    ('42', '(' * 400, None),
    ('42', '(' * 10**5, None),
    ('42', '', None),
  ],
)
def test_formulas_that_are_judged(gold, answer, formula):
  assert matching.formula(gold, answer) == formula


def test_the_final_answer_of_a_text(monkeypatch):
  monkeypatch.setattr(matching, 'has_math_verify', lambda: False)
  item = Question('6*7?', '42')
  texts = ['6*7\n42', '42\nor so', 'it is \\boxed{42}.', '\\boxed{4', '42']
  rows = grade(of_file(), {'accuracy': 1}, [item] * 5, texts)
  assert [row.reward for row in rows] == [1, 0, 1, 0, 1]
  rows = grade(of_file(), {'accuracy': 1}, [item] * 5, texts, [100] * 5)
  assert [row.reward for row in rows] == [0, 0, 1, 0, 0]  # may be cut off
  assert (
    matching.last_boxed('\\boxed{1} \\boxed{\\frac{1}{2}}') == '\\frac{1}{2}'
  )


def test_a_grader_that_fails_is_an_error_and_goes_on(monkeypatch, tmp_path):
  stub = tmp_path / 'stub.py'
  stub.write_text(STUB)
  monkeypatch.setattr(matching.verifier, '__file__', str(stub))
  monkeypatch.setattr(matching, 'has_math_verify', lambda: True)
  monkeypatch.setattr(grading.os, 'cpu_count', lambda: 1)
  item = Question('?', '7')
  texts = ['h', '7+0', 'd', '7+0', 'e', '7+1', '7', 'h', 'h']
  start = time.monotonic()
  rows = grade(of_file(), {'accuracy': 1}, [item] * 9, texts, deadline=0.3)
  assert time.monotonic() - start < 30  # and not 600
  rewarded = [row.reward for row in rows]
  assert [r for r in rewarded if not math.isnan(r)] == [1, 1, 0, 1]
  assert (
    [math.isnan(r) for r in rewarded]
    == [bool(row.error) for row in rows]
    == [True, False, True, False, True, False, False, True, True]
  )
  assert rows[0].error == 'accuracy: math-verify: no answer in 0.3 s'
  assert rows[2].error == 'accuracy: math-verify: its process has ended'
  assert rows[4].error == 'accuracy: math-verify: ValueError: no formula'
  assert rows[8] is rows[0]  # the same answer is graded once


def test_questions_of_one_text_are_graded_each_by_its_own_answer():
  items = [Question('Half of 1?', '0.5'), Question('Half of 1?', '1/2')]
  rows = grade(of_file(), {'accuracy': 1}, items, ['1/2', '1/2'])
  assert rows[1].reward == 1
  items = [Question('A digit?', '1'), Question('A digit?', '2')]
  rows = grade(of_file(), {'accuracy': 1}, items, ['1', '1'])
  assert [row.reward for row in rows] == [1, 0]


def test_rewards_of_ones_own():
  item = SORT.train(0)
  length = lambda question, text: len(text) / len(question.text)
  rows = grade(SORT, {'mine': 9}, [item], ['abc'], own={'mine': length})
  assert rows[0].reward == pytest.approx(3)
  broken = lambda question, text: 1 / 0
  rows = grade(
    SORT,
    {'mine': 1, 'accuracy': 1},
    [item],
    [item.answer],
    own={'mine': broken},
  )
  assert math.isnan(rows[0].reward) and rows[0].parts == {'accuracy': 1}
  assert rows[0].error == 'mine: ZeroDivisionError: division by zero'
  bad = lambda question, text: math.nan
  with pytest.raises(rewards.BadReward, match="'mine': is nan for 'ab'"):
    grade(SORT, {'mine': 1}, [item], ['ab'], own={'mine': bad})


@pytest.mark.parametrize(
  'source, weights, message',
  [
    (
      SORT,
      {'acuracy': 1},
      'rewards.acuracy: there is no such reward; there are',
    ),
    (SORT, {'accuracy': 0, 'format': 0}, 'all weights are 0'),
    (SORT, {}, 'all weights are 0'),
    (SORT, {'accuracy': -1}, 'must be at least 0'),
    (SORT, {'accuracy': math.nan}, 'must be at least 0'),
    (SORT, {'code': 1}, '--allow_code permits it'),
    (of_file(has_answers=False), {'accuracy': 1}, 'without "answer"'),
  ],
)
def test_bad_rewards(source, weights, message):
  with pytest.raises(ConfigError) as error:
    grading.Grader(source, weights, longest=10)
  assert message in str(error.value) and '\n' not in str(error.value)
  with pytest.raises(ConfigError, match='questions without "tests"'):
    grading.Grader(SORT, {'code': 1}, longest=10, allow_code=True)


def code(text):
  return f'```python\n{textwrap.dedent(text)}\n```'


def grade_code(texts, deadline=5.0, item=ADD):
  """Grades programs, where the system has a sandbox."""
  try:
    sandbox.Sandbox(deadline)
  except ConfigError as error:
    pytest.skip(str(error))
  source = of_file(has_answers=False, has_tests=True)
  return grade(
    source,
    {'code': 1},
    [item] * len(texts),
    texts,
    deadline=deadline,
    allow_code=True,
  )


def test_programs_are_graded_by_their_tests():
  right = 'from __future__ import annotations\ndef add(a, b):\n  return a + b'
  texts = [
    code(right),
    f'{code("1/0")} no, {code(right)}',
    right,
    code('def add(a, b):\n  return a - b'),
    code(
      'class Any(int):\n  __eq__ = lambda *a: True\nadd = lambda *a: Any(6)'
    ),
    code('import os\nos._exit(0)'),
    code('add = 1 +'),
    code('add = "\x00"'),
  ]
  rows = grade_code(texts)
  assert [row.reward for row in rows] == [1, 1, 0, 0, 0, 0, 0, 0]
  assert not any(row.error for row in rows)
  item = Question(
    'Add two numbers.', '', ({'input': '3 4\n', 'output': '7\n'},)
  )
  texts = [code('print(sum(map(int, input().split())))'), code('print(8)')]
  assert [row.reward for row in grade_code(texts, item=item)] == [1, 0]


def test_a_system_that_cannot_contain_a_program_is_refused(monkeypatch):
  monkeypatch.setattr(sandbox, '_wrappers', lambda: [['false']])
  with pytest.raises(ConfigError, match='does not run in the sandbox'):
    sandbox.Sandbox(1.0)
  monkeypatch.setattr(sandbox, '_wrappers', lambda: [[]])
  monkeypatch.setattr(sandbox.os, 'geteuid', lambda: 1000)
  with pytest.raises(ConfigError, match='permits no process namespace'):
    sandbox.Sandbox(1.0)


HOSTILE = {
  'fork bomb': 'import os\nwhile True:\n  os.fork()',
  'loop': 'while True:\n  pass',
  'sleep': 'import time\ntime.sleep(600)',
  'memory': 'x = [0] * 10**9',
  'output': "while True:\n  print('x' * 1000)",
  'all processes': 'import os\nos.kill(-1, 9)\nadd = lambda a, b: 5',
  'parent process': 'import os\nos.kill(os.getppid(), 9)\nadd = lambda a, b: 5',
  'program': "import subprocess\nsubprocess.run(['true'])\n"
  'add = lambda a, b: 5',
  'thread': 'import threading\nthreading.Thread(target=print).start()\n'
  'add = lambda a, b: 5',
}


@pytest.mark.slow
def test_hostile_programs_earn_nothing_and_the_caller_lives():
  texts = [code(text) for text in HOSTILE.values()]
  start = time.monotonic()
  rows = grade_code(texts, deadline=2.0)
  assert time.monotonic() - start < 60
  for name, row in zip(HOSTILE, rows, strict=True):
    # Alone in its namespace it may signal itself, and then be right.
    assert row.reward == 0 and not row.error or 'process' in name, name
  one = time.monotonic()
  assert grade_code([texts[1]], deadline=5.0)[0].reward == 0
  assert time.monotonic() - one < 12  # with a first program of ours


@pytest.mark.slow
def test_a_program_has_no_network_environment_or_privilege(monkeypatch):
  monkeypatch.setenv('TOKEN', 'secret')
  box = sandbox.Sandbox(5.0)
  assert 'secret' not in box.output('import os\nprint(os.environ)', '', 5)
  if 'no network' in box.about:
    text = "import socket\nsocket.create_connection(('127.0.0.1', 22), 1)"
    assert box.output(text, '', 5) is None
  assert box.output("open('/etc/shadow').read()", '', 5) is None
  assert box.output("open('big', 'w').write('x' * 2**21)", '', 5) is None
  assert box.output('import os\nprint(os.listdir())', '', 5).split()[:1]


TEXTS = [
  '9**9**9',
  '(' * 10**5,
  'x' * 10**6,
  '4\x002',
  FORM.format('42') + '</answer>',
  '<img src=x onerror=alert(1)>',
  '</think><answer>' * 6 * 10**4,
  '\ud800',
  '9^{9^{9^9}}',
]


def test_hostile_texts_earn_nothing(monkeypatch):
  monkeypatch.setattr(matching, 'has_math_verify', lambda: False)
  for source in (of_file(), questions.source('countdown3', 0)):
    item = source.train(0)._replace(answer='42')
    weights = {'accuracy': 1, 'format': 1, 'language': 0}
    for template in ('{prompt}', tasks.R1_ZERO):
      rows = grade(
        source, weights, [item] * len(TEXTS), TEXTS, template=template
      )
      assert [(row.reward, row.error) for row in rows] == [(0, '')] * len(TEXTS)


@NEEDS_VERIFY
@pytest.mark.slow
def test_math_verify():
  golds = ['\\frac{1}{2}', '2\\sqrt{2}', '(1, 2)', 'x^2+1', '42', '42', '42']
  texts = ['0.5', '\\sqrt8', '(1,2)', '1+x^2', '43', '<b>42</b>', '41, 42']
  items = [Question('?', gold) for gold in golds]
  rows = grade(of_file(), {'accuracy': 1}, items, texts)
  assert [row.reward for row in rows] == [1, 1, 1, 1, 0, 0, 0]
  assert not any(row.error for row in rows)
  start = time.monotonic()
  item = Question('?', '42')
  texts = [*TEXTS, '9^{999999999}', '41+1']
  rows = grade(of_file(), {'accuracy': 1}, [item] * len(texts), texts)
  assert time.monotonic() - start < 40
  assert [row.reward for row in rows if not row.error] == [0] * (
    sum(not row.error for row in rows) - 1
  ) + [1]
  assert sum(bool(row.error) for row in rows) <= 1


def test_the_page_is_right(tmp_path, capsys):
  """Its lines are read; its reward of one's own gives what it says."""
  page = (ROOT / 'docs' / 'rewards.md').read_text(encoding='utf-8')
  lines = re.search(r'```json\n(.*?)```', page, re.S)[1]
  lines += ''.join(
    json.dumps({'prompt': f'{i}?', 'answer': i}) + '\n' for i in range(40)
  )
  (tmp_path / 'page.jsonl').write_text(lines)
  source = questions.source(str(tmp_path / 'page.jsonl'), 0)
  assert source.size + source.held_out_size == 45
  program = re.search(r'```python\n(.*?)```', page, re.S)[1]
  names = [row.split('`')[1] for row in page.splitlines() if row[:3] == '| `']
  assert set(grading.NAMES) <= set(names)
  (tmp_path / 'own.py').write_text(program)
  runpy.run_path(str(tmp_path / 'own.py'))
  assert f'`{capsys.readouterr().out.strip()}`' in page
