"""Whether a final answer equals that of a file: as text, number or formula.

An answer is by a policy that is paid for it, so that the rules are narrow. Text
is equal but for case and blanks; numbers are equal in value, 1,000 = 1000.0 =
2000/2. Where math-verify is installed (extra [rl]) formulas are equal, too:
\\frac12 = 0.5. It would take the last number of "41 or 42", the right side of
"41 = 42" and the last of "$41$ $42$", so that `formula` refuses an answer with
words that the right one lacks, with equations, with a second formula, and with
towers of powers and brackets, on which sympy would spend its whole deadline.

`Verifiers` are its worker processes. One that does not answer in time is
killed: that is an error of the grader, which is counted, and no wrong answer.
"""

from __future__ import annotations

import importlib.util
import queue
import re
from fractions import Fraction

from mla_moe.config import ConfigError

from .. import child
from . import verifier

LONGEST = 500  # characters of a final answer
_START = 120.0  # seconds that a worker may take to import sympy
_NUMBER = re.compile(r'([+-]?\d{1,40})(?:\.(\d{1,40}))?(?:/(\d{1,40}))?')
_THOUSANDS = re.compile(r'(?<=\d),(?=\d{3}(?!\d))')
_WRAPPED = re.compile(
  r'\$\$?([^$]*)\$\$?|\\\((.*)\\\)|\\\[(.*)\\\]|\\boxed\{(.*)\}', re.DOTALL
)
_COMMAND = re.compile(r'\\[A-Za-z]+')
_WORD = re.compile(r'[^\W\d_]{2,}')
_TOWER = re.compile(r'\^\s*\{[^{}]*\^|\*\*[^*]*\*\*')
_DEPTH = 12  # brackets in brackets
_VARIABLE = re.compile(r'\s*\\?[A-Za-z]\w*\s*=(?!=)')


class Failed(RuntimeError):
  """A grader that could not judge; the message is one line."""


def last_boxed(text: str) -> str | None:
  r"""Returns the content of the last \boxed{...}, None without a whole one."""
  start = text.rfind('\\boxed{')
  if start < 0:
    return None
  start += len('\\boxed{')
  depth = 1
  for place in range(start, min(len(text), start + LONGEST + 1)):
    depth += {'{': 1, '}': -1}.get(text[place], 0)
    if depth == 0:
      return text[start:place]
  return None


def bare(text: str) -> str:
  r"""Returns an answer without blanks, $ $, \( \) and \boxed{} around it."""
  text = text.strip()
  for _ in range(4):
    match = _WRAPPED.fullmatch(text)
    if not match:
      break
    text = next(part for part in match.groups() if part is not None).strip()
  return text


def equal(gold: str, answer: str) -> bool:
  """Returns whether two answers are the same text or the same number."""
  if len(answer) > LONGEST:
    return answer.strip() == gold.strip()
  gold, answer = bare(gold), bare(answer)
  if ' '.join(gold.casefold().split()) == ' '.join(answer.casefold().split()):
    return True
  value = number(gold)
  return value is not None and value == number(answer)


def number(text: str) -> Fraction | None:
  """Returns the value of 1,000 or -3.5 or 2/3; None of other text."""
  match = _NUMBER.fullmatch(_THOUSANDS.sub('', text))
  if not match or not text.isascii():
    return None
  whole, decimals, divisor = match.groups()
  value = Fraction(f'{whole}.{decimals or 0}')
  if divisor is None:
    return value
  return value / int(divisor) if int(divisor) else None


def formula(gold: str, answer: str) -> str | None:
  """Returns an answer that math-verify may judge, None where it is wrong."""
  if len(answer) > LONGEST:
    return None
  gold, answer = bare(gold), bare(answer)
  if not answer or '$' in answer or '\\boxed' in answer:
    return None
  if not all(c.isprintable() or c.isspace() for c in answer):
    return None
  if _TOWER.search(answer) and not _TOWER.search(gold):
    return None
  if _depth(answer) > max(_DEPTH, _depth(gold)):
    return None
  words = lambda text: set(_WORD.findall(_COMMAND.sub(' ', text)))
  if words(answer) - words(gold):
    return None
  if '=' in answer and '=' not in gold:
    answer, count = _VARIABLE.subn('', answer, count=1)
    if not count or '=' in answer:
      return None
    answer = answer.strip()
  return answer


def _depth(text: str) -> int:
  deepest = depth = 0
  for c in text:
    depth += (c in '([{') - (c in ')]}')
    deepest = max(deepest, depth)
  return deepest


class Verifiers:
  """`count` workers of math-verify, each with `deadline` seconds an answer."""

  def __init__(self, count: int, deadline: float):
    self._workers: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    self._all = [_Worker(deadline) for _ in range(count)]
    for worker in self._all:
      self._workers.put(worker)

  def is_right(self, gold: str, answer: str) -> bool:
    """Returns whether two formulas are equal; waits for a worker.

    Raises:
      Failed: no answer in time, or an error of the library.
    """
    worker = self._workers.get()
    try:
      return worker.is_right(gold, answer)
    finally:
      self._workers.put(worker)

  def close(self) -> None:
    """Ends the workers."""
    for worker in self._all:
      worker.close()


class _Worker:
  """A process of `verifier`, begun at its first request."""

  def __init__(self, deadline: float):
    self._deadline = deadline
    self._child = child.Child(verifier.__file__, start=_START)

  def is_right(self, gold: str, answer: str) -> bool:
    request = {'gold': gold, 'answer': answer, 'seconds': self._deadline}
    try:
      reply = self._child.ask(request, self._deadline)
    except child.ChildError as error:
      raise Failed(f'math-verify: {error}') from None
    if 'error' in reply:
      raise Failed(f'math-verify: {reply["error"]}')
    return reply['right']

  def close(self) -> None:
    """Kills the process, if there is one."""
    self._child.close()


def has_math_verify() -> bool:
  """Returns whether math-verify is installed."""
  try:
    return importlib.util.find_spec('math_verify') is not None
  except (ImportError, ValueError):
    raise ConfigError('math-verify is broken: install it again') from None
