"""Requests of lm-evaluation-harness, checked and fitted into max_positions.

The rule is that of the harness' own models, but nothing is cut in silence. An
answer that would exceed max_positions gets shorter, and a line says of how
many. A question that leaves no room for an answer is refused before anything is
computed, or loses its beginning where `truncate` asks for it.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

from mla_moe.config import ConfigError

from . import opened

_KNOBS = {
  'temperature': 0.0,
  'top_k': 0,
  'top_p': 1.0,
  'min_p': 0.0,
  'repetition_penalty': 1.0,
}
# Names of an answer's most tokens, the first that is there counts.
_LIMITS = (
  'max_gen_toks',
  'max_new_tokens',
  'max_tokens',
  'max_completion_tokens',
)
_OPTIONS = {*_KNOBS, *_LIMITS, 'until', 'do_sample'}


class Question(NamedTuple):
  """A checked request: token ids, tokens of the answer, its ends, knobs."""

  ids: list[int]
  limit: int
  stops: list[str]
  knobs: dict[str, float]


def windows(
  begin: list[int], ids: list[int], size: int
) -> list[tuple[list[int], list[int]]]:
  """Returns pairs that predict each token of a text once, as lm-eval does.

  Each window but the first is read from the token before it; the last one,
  which may be short, from as many tokens before it as the model has positions.
  """
  pairs = []
  for start in range(0, len(ids), size):
    part = ids[start : start + size]
    first = max(start + len(part) - size - 1, 0)
    pairs.append((ids[first:start] if start else begin, part))
  return pairs


def pairs(model, requests, truncate: bool) -> list[tuple[list[int], list[int]]]:
  """Returns the pairs as they are computed; refuses those that cannot be."""
  longest, fitting, cut = model.config.max_positions, [], 0
  for context, continuation in requests:
    _check_ids(model, context and [*context, *continuation])
    room = longest + 1 - len(continuation)  # the last token is not read
    if room < 1 or (room < len(context) and not truncate):
      raise ConfigError(
        f'a question of {len(context)} tokens with an answer of '
        f'{len(continuation)}: more than max_positions={longest}; take fewer '
        'examples (--fewshot), or cut the question (--truncate)'
      )
    cut += room < len(context)
    fitting.append((context[-room:], continuation))
  if cut:
    _warn(
      f'{cut} of {len(requests)} questions lose their beginning (--truncate)'
    )
  return fitting


def _check_ids(model, ids: list[int]) -> None:
  """Refuses a text without tokens, and tokens that the model does not have."""
  if not ids:
    raise ConfigError('a question without tokens: begin it with bos at least')
  opened.check_ids(ids, model.config.vocab)
  if min(ids) < 0:
    raise ConfigError(f'a question has the token {min(ids)}: is none')


def _warn(line: str) -> None:
  print(f'WARNING: {line}', file=sys.stderr)


def questions(model, requests, truncate: bool) -> list[Question]:
  """Returns the checked requests; a line tells of those that were changed."""
  longest, checked, shorter, cut = model.config.max_positions, [], 0, 0
  for number, (ids, options) in enumerate(requests):
    _check_ids(model, ids)
    limit, knobs = _limit(options), _knobs(options) | {'seed': number}
    room = longest - len(ids)
    if room < min(limit, 1):
      if not truncate:
        raise ConfigError(
          f'a question of {len(ids)} tokens leaves no room for an answer '
          f'(max_gen_toks={limit}) in max_positions={longest}; take fewer '
          'examples (--fewshot), or cut the question (--truncate)'
        )
      room = min(limit, max(longest // 4, 1))
      ids, cut = ids[-(longest - room) :], cut + 1
    shorter += room < limit
    limit = min(limit, room)
    checked.append(Question(ids, limit, _stops(options), knobs))
  if shorter:
    _warn(
      f'{shorter} of {len(requests)} answers are shorter than max_gen_toks: '
      f'the question leaves less of max_positions={longest}'
    )
  if cut:
    _warn(f'{cut} of {len(requests)} questions lose their beginning')
  return checked


def _limit(options: dict) -> int:
  """Returns the most tokens of an answer, by any of the option's names."""
  for name in _LIMITS:
    value = options.get(name)
    if value is None:
      continue
    number = _number(name, value)
    if number < 0 or number != int(number):
      raise ConfigError(f'{name}={value!r}: must be a whole number, 0 or more')
    return int(number)
  return 256


def _number(name: str, value) -> float:
  """Returns an option's value, which a task's file may have as a text."""
  try:
    number = float(value)
  except (TypeError, ValueError):
    number = float('nan')
  if isinstance(value, bool) or not abs(number) < float('inf'):
    raise ConfigError(f'generation_kwargs: {name}={value!r}: is no number')
  return number


def _stops(options: dict) -> list[str]:
  """Returns the texts that end an answer."""
  until = options.get('until') or []
  until = [until] if isinstance(until, str) else until
  if not isinstance(until, (list, tuple)) or any(
    not isinstance(stop, str) for stop in until
  ):
    raise ConfigError(f'generation_kwargs: until={until!r}: must be texts')
  return list(until)


def _knobs(options: dict) -> dict[str, float]:
  """Returns the sampler's knobs that the options of lm-eval ask for."""
  for name, value in options.items():
    if name not in _OPTIONS and value is not None:
      raise ConfigError(
        f'generation_kwargs: {name}={value!r} is not supported; a task may set '
        + ', '.join(sorted(_OPTIONS))
      )
  knobs = {}
  for name, default in _KNOBS.items():
    value = options.get(name)
    kind = type(default)
    knobs[name] = default if value is None else kind(_number(name, value))
  if options.get('do_sample') and options.get('temperature') is None:
    knobs['temperature'] = 1.0
  if options.get('do_sample') is False:
    knobs['temperature'] = 0.0
  return knobs
