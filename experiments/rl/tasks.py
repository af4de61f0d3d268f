"""Questions whose answers can be checked, made from an index alone.

`question(task, seed, index)` is the same in every process and at every restart.
A question is held out if a hash of its *text* says so: neighbouring seeds of a
generator share questions, so a split by seed would train on the test. Tasks:

  sort8       "52719038>"      its digits in order
  reverse8    "52719038<"      from the last to the first
  count8      "52719038#9"     how often the last digit occurs among the others
  add2        "17+85="         their sum
  countdown3  "3 4 7=25:"      an expression of each number once: 3*7+4

The number at a task's end is its size.
"""

from __future__ import annotations

import hashlib
import random
import re
from typing import NamedTuple

from mla_moe.config import ConfigError

from . import arithmetic

# The prompt that DeepSeek-R1-Zero was trained with (report, table 1). The
# question goes in by concatenation: it may hold braces.
R1_ZERO = (
  'A conversation between User and Assistant. The user asks a question, and '
  'the Assistant solves it. The assistant first thinks about the reasoning '
  'process in the mind and then provides the user with the answer. The '
  'reasoning process and answer are enclosed within <think> </think> and '
  '<answer> </answer> tags, respectively, i.e., <think> reasoning process here '
  '</think> <answer> answer here </answer>. User: {prompt}. Assistant:'
)
NAMES = ('sort', 'reverse', 'count', 'add', 'countdown')
HELD_OUT = 16  # one question of so many


class Question(NamedTuple):
  """A question as text, and an answer that is right (countdown has others).

  A question for a program has `tests` (`sandbox`); `messages` are (role, text)
  of the chat that `text` joins, where the question is one. Teachers may be
  those of a `kind`.
  """

  text: str
  answer: str
  tests: tuple = ()
  messages: tuple[tuple[str, str], ...] = ()
  kind: str = ''


def parse(task: str) -> tuple[str, int]:
  """Returns a task's name and size: 'sort8' is ('sort', 8).

  Raises:
    ConfigError: there is no such task.
  """
  match = re.fullmatch(r'([a-z]+)(\d+)', task)
  if not match or match[1] not in NAMES or not 1 <= int(match[2]) <= 12:
    raise ConfigError(
      f'task {task!r}: must be one of {", ".join(NAMES)} and a size from 1 to '
      '12, as in sort8'
    )
  return match[1], int(match[2])


def is_held_out(text: str) -> bool:
  """Returns whether a question belongs to the test, by a hash of its text."""
  return _hash(text) % HELD_OUT == 0


def question(
  task: str, seed: int, index: int, held_out: bool = False
) -> Question:
  """Returns question `index` of a task, of the side that `held_out` names."""
  name, size = parse(task)
  rng = random.Random(_hash(f'{task} {seed} {index} {held_out}'))
  for _ in range(10_000):
    item = _MAKERS[name](rng, size)
    if is_held_out(item.text) == held_out:
      return item
  raise ConfigError(
    f'task {task!r}: has too few questions for a held-out side; make it larger'
  )


def is_right(task: str, item: Question, answer: str) -> bool:
  """Returns whether `answer` is a right one, to the letter.

  Countdown takes any expression of + - * / that uses each number once and has
  the value asked for.
  """
  if parse(task)[0] != 'countdown':
    return answer.strip() == item.answer
  numbers, target = item.text.rstrip(':').split('=')
  result = arithmetic.value(answer)
  if result is None:
    return False
  value, used = result
  return value == int(target) and sorted(used) == sorted(
    int(number) for number in numbers.split()
  )


def _hash(text: str) -> int:
  return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], 'big')


def _digits(rng, size):
  return ''.join(rng.choice('0123456789') for _ in range(size))


def _sort(rng, size):
  digits = _digits(rng, size)
  return Question(f'{digits}>', ''.join(sorted(digits)))


def _reverse(rng, size):
  digits = _digits(rng, size)
  return Question(f'{digits}<', digits[::-1])


def _count(rng, size):
  digits, one = _digits(rng, size), _digits(rng, 1)
  return Question(f'{digits}#{one}', str(digits.count(one)))


def _add(rng, size):
  a, b = rng.randrange(10**size), rng.randrange(10**size)
  return Question(f'{a}+{b}=', str(a + b))


def _countdown(rng, size):
  """Draws until the value of a random expression is from 1 to 99."""
  while True:
    numbers = [rng.randrange(1, 10) for _ in range(max(size, 2))]
    text = str(numbers[0])
    for number in numbers[1:]:
      text += rng.choice('+-*') + str(number)
    value, _ = arithmetic.value(text)
    if 0 < value < 100:
      rng.shuffle(numbers)
      return Question(f'{" ".join(map(str, numbers))}={value}:', text)


_MAKERS = {
  'sort': _sort,
  'reverse': _reverse,
  'count': _count,
  'add': _add,
  'countdown': _countdown,
}
