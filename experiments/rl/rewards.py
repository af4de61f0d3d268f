"""Rewards: functions from an answer's text to a number; no model is judged.

R1-Zero is paid for a right answer and for the form in which it thinks, equally
(report, section 2.2); R1 adds the part of its thought that is in the language
of the question. The answer is read from the last `<answer>` only where the form
is kept, or else a model learns to list its guesses.
"""

from __future__ import annotations

import collections
import math
import re
import unicodedata

from mla_moe.config import ConfigError

_FORM = re.compile(
  r'\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*', re.DOTALL
)
_TAGS = ('<think>', '</think>', '<answer>', '</answer>')
# Numbers, formulas and code belong to no language.
_NEUTRAL = re.compile(r'```.*?```|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$', re.DOTALL)
_WORD = re.compile(r'[^\W\d_]+')
_SINGLE = ('CJK', 'HIRAGANA', 'KATAKANA')  # of which a letter is a word


class BadReward(ConfigError):
  """A reward that is not a finite number; names the reward and the answer."""


def parts(text: str) -> tuple[str, str] | None:
  """Returns the thought and the answer, or None where the form is broken.

  The form: one <think>...</think>, then one <answer>...</answer>, and nothing
  else but blanks.
  """
  # In this order: with many tags the expression takes quadratic time.
  if any(text.count(tag) != 1 for tag in _TAGS):
    return None
  match = _FORM.fullmatch(text)
  if not match:
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
  words = _scripts(text)
  return words.count(script) / len(words) if words else 1.0


def script(text: str) -> str:
  """Returns the Unicode script of most of a text's words; LATIN without any."""
  counts = collections.Counter(_scripts(text))
  return counts.most_common(1)[0][0] if counts else 'LATIN'


def _scripts(text: str) -> list[str]:
  """Returns the script of each word."""
  words = []
  for run in _WORD.findall(_NEUTRAL.sub(' ', text)):
    if run.isascii():
      words.append('LATIN')
      continue
    scripts = [unicodedata.name(c, '').split(' ')[0] for c in run]
    single = [s for s in scripts if s in _SINGLE]
    rest = [s for s in scripts if s not in _SINGLE]
    words += single + rest[:1]
  return words


def pass_at_k(samples: int, right: int, k: int) -> float:
  """Returns the chance that one of k samples is right, without bias.

  1 - C(n - c, k) / C(n, k) for c right ones of n (Chen et al. 2021).
  """
  return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)
