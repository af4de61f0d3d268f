"""Rewards: functions from an answer's text to a number; no model is judged.

R1-Zero is paid for a right answer and for the form in which it thinks, equally
(report, section 2.2); R1 adds the part of its thought that is in the language
of the question. The answer is read from the last `<answer>` only where the form
is kept, or else a model learns to list its guesses.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Mapping

_FORM = re.compile(
  r'\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*', re.DOTALL
)
_TAGS = ('<think>', '</think>', '<answer>', '</answer>')
# Numbers, formulas and code belong to no language.
_NEUTRAL = re.compile(r'```.*?```|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$', re.DOTALL)
_WORD = re.compile(r'[^\W\d_]+')


class BadReward(ValueError):
  """A reward that is not a finite number; names the reward and the answer."""


def parts(text: str) -> tuple[str, str] | None:
  """Returns the thought and the answer, or None where the form is broken.

  The form: one <think>...</think>, then one <answer>...</answer>, and nothing
  else but blanks.
  """
  match = _FORM.fullmatch(text)
  if not match or any(text.count(tag) != 1 for tag in _TAGS):
    return None
  return match[1], match[2].strip()


def format_reward(text: str) -> float:
  """Returns 1 where the form is kept, else 0."""
  return float(parts(text) is not None)


def language_consistency(text: str, script: str = 'LATIN') -> float:
  """Returns the part of a text's words that are in one Unicode script.

  A CJK character is a word, and so is a run of other letters. Code, formulas
  and numbers do not count; a text without words is consistent (1).
  """
  right = total = 0
  for run in _WORD.findall(_NEUTRAL.sub(' ', text)):
    scripts = [unicodedata.name(c, '').split(' ')[0] for c in run]
    single = [s for s in scripts if s in ('CJK', 'HIRAGANA', 'KATAKANA')]
    rest = [s for s in scripts if s not in ('CJK', 'HIRAGANA', 'KATAKANA')]
    words = single + rest[:1]
    total += len(words)
    right += sum(word == script for word in words)
  return right / total if total else 1.0


def weighted_sum(
  rewards: Mapping[str, Callable[[str], float]],
  weights: Mapping[str, float],
  text: str,
) -> tuple[float, dict[str, float]]:
  """Returns the weighted sum of an answer's rewards, and each one alone.

  Raises:
    BadReward: a reward is not a finite number.
  """
  values = {}
  for name, reward in rewards.items():
    values[name] = float(reward(text))
    if not math.isfinite(values[name]):
      raise BadReward(f'reward {name!r}: is {values[name]} for {text[:80]!r}')
  return sum(weights[name] * values[name] for name in values), values


def pass_at_k(samples: int, right: int, k: int) -> float:
  """Returns the chance that one of k samples is right, without bias.

  1 - C(n - c, k) / C(n, k) for c right ones of n (Chen et al. 2021).
  """
  return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)
