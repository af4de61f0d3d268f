"""Sources of questions: tasks of ours, a file of one's own, reasoning-gym.

A source has two sides, and a hash of a question's *text* decides which side it
is on: a generator's neighbouring seeds share questions, a file repeats lines,
and neither may put a question of the training into the test. Question `index`
of a side is the same in every process, so that a run that was killed draws the
same questions again.

`source(name, seed)` knows three kinds of names:

  sort8                 a task of `tasks`
  FILE.jsonl            one question a line: {"prompt", "answer"}; "question"
                        is another name of "prompt", and "messages" is a chat
                        that ends with the user. An "answer" in the form of
                        GSM8K counts from its last ####. "tests" are those of
                        `sandbox`, for an answer that is a program; "kind"
                        chooses the question's teacher.
  reasoning_gym:NAME    a generator of reasoning-gym (extra [gym])

Of reasoning-gym only questions and answers are used. Its scorers pay for an
answer that contains the right one, and evaluate 9**9**9: a policy learns that.
So a task with several right answers is refused: it has a scorer of its own, and
answers that are no numbers.
"""

from __future__ import annotations

import codecs
import difflib
import functools
import hashlib
import json
import pathlib
import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

from mla_moe import files
from mla_moe.config import ConfigError

from .. import cli
from ..data import encodings
from . import matching, sandbox, tasks
from .tasks import Question as Question

_GYM = 'reasoning_gym:'
_ITEMS = 2**31 - 1  # that a generator is asked for
_TRIES = 10_000  # draws for one question of a side
_LONGEST_LINE = 2**24  # bytes


class Source(NamedTuple):
  """Questions of two sides.

  `train(index)` and `held_out(index)` are defined for every index from 0: a
  file begins again, in another order. `size` and `held_out_size` are the
  numbers of questions, None without an end. `is_right(question, answer)` is
  None where `grading` compares an answer with the file's. `fingerprint` changes
  with any question.
  """

  name: str
  fingerprint: str
  train: Callable[[int], Question]
  held_out: Callable[[int], Question]
  size: int | None = None
  held_out_size: int | None = None
  is_right: Callable[[Question, str], bool] | None = None
  has_answers: bool = True
  has_tests: bool = False


def source(name: str, seed: int) -> Source:
  """Returns the source that a name stands for.

  Raises:
    ConfigError: there is none, or its questions are not fit to learn from.
  """
  if encodings.suffixes(name)[0] == '.jsonl':
    return _of_file(cli.path('rl.task', name), seed)
  if name.startswith(_GYM):
    return _of_gym(name.removeprefix(_GYM), seed)
  try:
    tasks.parse(name)
  except ConfigError as error:
    raise ConfigError(
      f'{error}; or FILE.jsonl with questions, or {_GYM}NAME'
    ) from None
  draw = functools.partial(tasks.question, name, seed)
  for side in (False, True):
    draw(0, side)  # a task that is too small has no such side
  return Source(
    name=name,
    fingerprint=_fingerprint(name, seed),
    train=draw,
    held_out=functools.partial(draw, held_out=True),
    is_right=functools.partial(tasks.is_right, name),
  )


def _fingerprint(*parts: object) -> str:
  return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _of_file(path: pathlib.Path, seed: int) -> Source:
  """Returns the questions of a file, shuffled anew in each pass."""
  digest = hashlib.sha256()
  sides: tuple[list[Question], list[Question]] = ([], [])
  with_tests = with_answers = total = 0
  for number, line in _lines(path):
    digest.update(line)
    if not line.strip():
      continue
    try:
      item = _question(line)
    except ConfigError as error:
      raise ConfigError(f'{path}, line {number}: {error}') from None
    sides[tasks.is_held_out(item.text)].append(item)
    total += 1
    with_tests += bool(item.tests)
    with_answers += bool(item.answer)
  if not total:
    raise ConfigError(f'{path}: has no questions')
  for side, which in zip(sides, ('for training', 'held out'), strict=True):
    if not side:
      raise ConfigError(
        f'{path}: none of its {total} questions is {which}: a hash of the text '
        f'holds out one of {tasks.HELD_OUT}; add questions'
      )
  train, held_out = map(tuple, sides)

  @functools.lru_cache(maxsize=2)
  def order(epoch: int) -> list[int]:
    rows = list(range(len(train)))
    random.Random(_fingerprint('order', seed, epoch)).shuffle(rows)
    return rows

  def question(index: int) -> Question:
    epoch, place = divmod(index, len(train))
    return train[order(epoch)[place]]

  return Source(
    name=str(path),
    fingerprint=_fingerprint(digest.hexdigest(), seed),
    train=question,
    held_out=lambda index: held_out[index % len(held_out)],
    size=len(train),
    held_out_size=len(held_out),
    has_answers=with_answers == total,
    has_tests=with_tests == total,
  )


def _lines(path: pathlib.Path) -> Iterator[tuple[int, bytes]]:
  """Yields the number and the bytes of each line of a file."""
  files.check_regular(path)
  with encodings.opened(str(path)) as file:
    number = 0
    while line := file.readline(_LONGEST_LINE + 1):
      number += 1
      if len(line) > _LONGEST_LINE:
        raise ConfigError(
          f'{path}, line {number}: has more than {_LONGEST_LINE} bytes'
        )
      yield number, line


def _question(line: bytes) -> Question:
  """Returns the question of a line; errors do not name the line."""
  try:
    row = json.loads(line.removeprefix(codecs.BOM_UTF8).decode('utf-8'))
  except (ValueError, RecursionError) as error:
    text = str(error).partition(': line 1 ')[0]
    raise ConfigError(f'is no JSON in UTF-8 ({text})') from None
  if not isinstance(row, dict):
    raise ConfigError('must be an object, {"prompt": ..., "answer": ...}')
  names = [n for n in ('prompt', 'question', 'messages') if n in row]
  if len(names) != 1:
    raise ConfigError(
      f'has {" and ".join(names) or "no prompt"}; needs one of "prompt", '
      '"question" and "messages"'
    )
  messages = ()
  text = row[names[0]]
  if names[0] == 'messages':
    messages = _messages(text)
    text = '\n'.join(content for _, content in messages)
  if not isinstance(text, str) or not text.strip():
    raise ConfigError(f'"{names[0]}" must be a text that is not empty')
  tests = sandbox.checked(row['tests']) if 'tests' in row else ()
  kind = row.get('kind', '')
  if not isinstance(kind, str):
    raise ConfigError('"kind" must be a text')
  return Question(text, _answer(row, tests), tests, messages, kind)


def _answer(row: dict, tests: tuple) -> str:
  """Returns the right answer as text, '' where tests stand for it."""
  answer = row.get('answer', '')
  if isinstance(answer, (int, float)) and not isinstance(answer, bool):
    answer = str(answer)
  if not isinstance(answer, str):
    raise ConfigError('"answer" must be a text or a number')
  answer = answer.rpartition('####')[2].strip()
  if not answer and not tests:
    raise ConfigError(
      'has an empty "answer"' if 'answer' in row else 'has no "answer"'
    )
  return answer


def _messages(rows: object) -> tuple[tuple[str, str], ...]:
  """Returns (role, text) of each message of a chat."""
  if not isinstance(rows, list) or not rows:
    raise ConfigError('"messages" must be a list of {"role", "content"}')
  for row in rows:
    if (
      not isinstance(row, dict)
      or row.get('role') not in ('system', 'user', 'assistant')
      or not isinstance(row.get('content'), str)
    ):
      raise ConfigError(
        'a message needs a "role", one of system, user and assistant, and a '
        'text as "content"'
      )
  if rows[-1]['role'] != 'user' or not rows[-1]['content'].strip():
    raise ConfigError('"messages" must end with a question of the user')
  return tuple((row['role'], row['content']) for row in rows)


def _of_gym(name: str, seed: int) -> Source:
  """Returns the questions of a generator of reasoning-gym.

  Item i of seed s is there item i - 1 of seed s + 1, so that an index of ours
  becomes an item's number by a hash.
  """
  try:
    import reasoning_gym
    from reasoning_gym.dataset import ProceduralDataset
    from reasoning_gym.factory import DATASETS
  except ImportError:
    raise ConfigError(
      f'{_GYM}{name}: reasoning-gym is not installed: '
      'pip install "mla_moe[gym]"'
    ) from None
  if name not in DATASETS:
    near = difflib.get_close_matches(name, DATASETS, 1)
    hint = f'; did you mean {near[0]}?' if near else ''
    raise ConfigError(f'{_GYM}{name}: there is no such task{hint}')
  scorer = DATASETS[name][0].score_answer
  items = reasoning_gym.create_dataset(name, seed=0, size=_ITEMS)

  @functools.lru_cache(maxsize=4096)
  def question(index: int, held_out: bool) -> Question:
    rng = random.Random(_fingerprint(name, seed, index, held_out))
    for _ in range(_TRIES):
      item = items[rng.randrange(_ITEMS)]
      if tasks.is_held_out(item['question']) == held_out:
        return Question(item['question'], str(item['answer']).strip())
    raise ConfigError(f'{_GYM}{name}: has too few questions for two sides')

  for side in (False, True):
    answer = question(0, side).answer
    is_single = scorer is ProceduralDataset.score_answer
    if not is_single and matching.number(answer) is None:
      raise ConfigError(
        f'{_GYM}{name}: takes several right answers, which only its own scorer '
        'knows; choose a task with one, such as chain_sum'
      )
  return Source(
    name=_GYM + name,
    fingerprint=_fingerprint(name, seed, reasoning_gym.__version__),
    train=functools.partial(question, held_out=False),
    held_out=functools.partial(question, held_out=True),
  )
