"""Grades answers: from a question and a text to a number, by weighted rewards.

The rewards, by their names in `weights`:

  accuracy   1 for the right answer: as the task says, or equal to the file's
             (`matching`)
  format     1 where the text is <think>...</think> <answer>...</answer>
  language   the part of the thought that is in the question's script
  code       1 where the program in the answer passes the question's tests
             (`sandbox`)

and any functions of one's own. A weight of 0 only records the reward. Where the
template has <answer>, or format is a reward, an answer is read from a text of
that form alone, or else a model lists its guesses. Without the form a task of
ours grades the whole text, and a file's question the last \\boxed{}, or else
the last line.

A text is hostile. All work that can take long on it has a process of its own
and a deadline. A grader that fails makes an *error*, which the caller counts:
its reward is NaN, for which the caller takes the mean of the question's other
answers, so that the advantage is 0. It is never a 0, which would teach that the
answer was wrong.
"""

from __future__ import annotations

import concurrent.futures
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from mla_moe.config import ConfigError

from . import matching, rewards, sandbox
from .questions import Question, Source

NAMES = ('accuracy', 'format', 'language', 'code')
_WORKERS = 4
Own = Callable[[Question, str], float]  # a reward of one's own


class Graded(NamedTuple):
  """A reward, the rewards that it sums, unweighted, and '' or an error."""

  reward: float
  parts: dict[str, float]
  error: str


class Grader:
  """Grades the answers to a source's questions; a context.

  Args:
    source: of the questions.
    weights: of the rewards, by name.
    longest: tokens that an answer may have. A text without the form that has so
      many and no end token was cut off: its last line is no answer.
    deadline: seconds for a formula, or for a program with all its tests.
    allow_code: whether programs may run.
    template: of the prompts: it may ask for <answer>, or begin the answer.
    own: functions of (question, text) to a number, by name.

  Raises:
    ConfigError: weights that reward nothing, or rewards that cannot be given.
  """

  def __init__(
    self,
    source: Source,
    weights: Mapping[str, float],
    *,
    longest: int,
    deadline: float = 5.0,
    allow_code: bool = False,
    template: str = '{prompt}',
    own: Mapping[str, Own] | None = None,
  ):
    self._source, self._longest, self._own = source, longest, dict(own or {})
    self._weights = _checked(weights, self._own)
    self._deadline = deadline
    self._has_form = '<answer>' in template or bool(weights.get('format'))
    tail = template.rpartition('{prompt}')[2]
    self._begun = tail[tail.rfind('<think>') :] if '<think>' in tail else ''
    self._sandbox = self._verifiers = self._threads = None
    if 'code' in self._weights:
      self._check_code(allow_code)
    if 'accuracy' in self._weights and not source.has_answers:
      raise ConfigError(
        f'rewards.accuracy: {source.name} has questions without "answer"'
      )

  def _check_code(self, allow_code: bool) -> None:
    if not allow_code:
      raise ConfigError(
        'rewards.code: runs programs that the model wrote; --allow_code '
        'permits it (experiments/rl/sandbox.py has its limits)'
      )
    if not self._source.has_tests:
      raise ConfigError(
        f'rewards.code: {self._source.name} has questions without "tests"'
      )

  def __enter__(self) -> Grader:
    if 'code' in self._weights:
      self._sandbox = sandbox.Sandbox(self._deadline)
    count = min(_WORKERS, os.cpu_count() or 1)
    by_file = 'accuracy' in self._weights and self._source.is_right is None
    if by_file and matching.has_math_verify():
      self._verifiers = matching.Verifiers(count, self._deadline)
    if self._sandbox or self._verifiers:
      self._threads = concurrent.futures.ThreadPoolExecutor(count)
    return self

  def __exit__(self, *_) -> None:
    if self._threads:
      self._threads.shutdown(cancel_futures=True)
    if self._verifiers:
      self._verifiers.close()

  @property
  def about(self) -> str:
    """A line for people: which graders work here."""
    lines = []
    if self._verifiers:
      lines.append('formulas are compared by math-verify')
    elif 'accuracy' in self._weights and self._source.is_right is None:
      lines.append('answers are compared as text or number ([rl]: as formulas)')
    if self._sandbox:
      lines.append(self._sandbox.about)
    return '; '.join(lines)

  def grade(
    self,
    questions: Sequence[Question],
    texts: Sequence[str],
    lengths: Sequence[int],
  ) -> list[Graded]:
    """Returns the grade of each answer, in their order.

    `lengths` are the answers' tokens before an end token. The same answer to
    the same question is graded once.

    Raises:
      rewards.BadReward: a reward of one's own is not a finite number.
    """
    keys = [
      (repr(item), text, length >= self._longest)
      for item, text, length in zip(questions, texts, lengths, strict=True)
    ]
    items = dict(zip(keys, questions, strict=True))
    one = lambda key: self._one(items[key], *key[1:])
    work = self._threads.map if self._threads else map
    graded = dict(zip(items, work(one, items), strict=True))
    return [graded[key] for key in keys]

  def _one(self, item: Question, text: str, is_cut: bool) -> Graded:
    """Returns the grade of one answer; any failure is its error."""
    whole = self._begun + text
    form = rewards.parts(whole)
    parts: dict[str, float] = {}
    errors = []
    for name in self._weights:
      try:
        value = self._reward(name, item, whole, form, is_cut)
      except rewards.BadReward:
        raise
      except matching.Failed as error:
        errors.append(f'{name}: {error}')
      except Exception as error:  # of a function that is not ours, on any text
        errors.append(f'{name}: {type(error).__name__}: {error!s:.200}')
      else:
        parts[name] = value
    if errors:
      return Graded(math.nan, parts, ' '.join('; '.join(errors).split()))
    reward = sum(self._weights[name] * parts[name] for name in self._weights)
    return Graded(reward, parts, '')

  def _reward(self, name, item, whole, form, is_cut) -> float:
    if name in self._own:
      value = float(self._own[name](item, whole))
      if not math.isfinite(value):
        raise rewards.BadReward(
          f'reward {name!r}: is {value} for {whole[:80]!r}'
        )
      return value
    if name == 'format':
      return float(form is not None)
    if name == 'language':
      script = rewards.script(item.text)
      return rewards.language_consistency(form[0] if form else whole, script)
    answer = (form[1] if form else None) if self._has_form else whole
    if answer is None:
      return 0.0
    if name == 'code':
      program = sandbox.program(answer)
      return float(
        program is not None and self._sandbox.passes(program, item.tests)
      )
    if self._source.is_right is not None:
      return float(self._source.is_right(item, answer))
    return float(self._matches(item.answer, answer, is_cut))

  def _matches(self, gold: str, answer: str, is_cut: bool) -> bool:
    """Returns whether a final answer is the file's, as text or as a formula."""
    boxed = matching.last_boxed(answer)
    if boxed is not None:
      answer = boxed
    elif not self._has_form:
      lines = answer.strip().rpartition('\n')
      if is_cut:
        return False
      answer = answer if matching.equal(gold, answer) else lines[2]
    if matching.equal(gold, answer):
      return True
    formula = matching.formula(gold, answer)
    if formula is None or not self._verifiers:
      return False
    return self._verifiers.is_right(matching.bare(gold), formula)


def _checked(weights: Mapping[str, float], own: Mapping) -> dict[str, float]:
  """Returns the weights, which are finite and not all 0."""
  names = [*NAMES, *own]
  for name, weight in weights.items():
    if name not in names:
      raise ConfigError(
        f'rewards.{name}: there is no such reward; there are {", ".join(names)}'
      )
    if not math.isfinite(weight) or weight < 0:
      raise ConfigError(f'rewards.{name}={weight}: must be at least 0, finite')
  if not any(weights.values()):
    raise ConfigError(
      f'rewards: all weights are 0, so that nothing is learned; set one of '
      f'{", ".join(names)} above 0'
    )
  return dict(weights)
