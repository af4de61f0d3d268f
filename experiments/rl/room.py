"""Room for questions: rows that hold a prompt and the longest answer to it.

All rows of an update have `data.seq_len` columns. A question that is too long
for them is an error before the run; an endless source may still make a longer
one later, whose place another question takes.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable

import numpy as np

from mla_moe.config import Config, ConfigError

from ..data import packing
from . import prompts, questions

LOOKED_AT = 256  # questions of an endless source that are read before the run
_COUNTED = 4096  # the longest texts of those, whose tokens are counted
_TRIES = 100  # questions in the place of one that is too long


def check(
  config: Config, source: questions.Source, texts: prompts.Prompts
) -> None:
  """Refuses a config whose rows are too short for a question.

  All questions of a file are looked at, and the first ones of an endless
  source.

  Raises:
    ConfigError: names the field and the fix.
  """
  rl, length = config.rl, config.data.seq_len
  sides = (
    (source.train, source.size or LOOKED_AT),
    (source.held_out, source.held_out_size or rl.heldout),
  )
  items = (draw(i) for draw, count in sides for i in range(count))
  items = heapq.nlargest(_COUNTED, items, key=lambda item: len(item.text))
  longest, text = max((len(texts.ids(item)), item.text) for item in items)
  need = packing.columns(longest, rl.max_new)
  if longest + rl.max_new > config.model.max_positions:
    raise ConfigError(
      f'model.max_positions={config.model.max_positions}: a prompt of '
      f'{longest} tokens (of the question {text[:40]!r}) and an answer of '
      f'rl.max_new={rl.max_new} need more; shorten one of the two'
    )
  if need > length:
    raise ConfigError(
      f'data.seq_len={length}: a prompt of {longest} tokens (of the question '
      f'{text[:40]!r}) and an answer of rl.max_new={rl.max_new} need {need} '
      f'columns; set --config.data.seq_len={need}'
    )


def fitting(
  config: Config,
  texts: prompts.Prompts,
  draw: Callable[[int], questions.Question],
  indices: Iterable[int],
) -> tuple[list[questions.Question], list[np.ndarray]]:
  """Returns questions of a side and their prompts, for which rows have room.

  An endless source may make a longer question than those before the run. Far
  later ones, which no rollout has, take its place.

  Args:
    config: of the run.
    texts: the prompts of its questions.
    draw: the question of an index; one side's of the source.
    indices: of the questions.

  Raises:
    ConfigError: no question fits.
  """
  rl, items = config.rl, []
  longest = config.data.seq_len - packing.columns(0, rl.max_new)
  longest = min(longest, config.model.max_positions - rl.max_new)
  for index in indices:
    for turn in range(_TRIES):
      item = draw(index + (turn << 48))
      ids = texts.ids(item)
      if len(ids) <= longest:
        break
    else:
      raise ConfigError(
        f'rl.task={rl.task!r}: {_TRIES} questions one after the other have '
        f'more than {longest} tokens; begin anew with a larger '
        f'--config.data.seq_len than {config.data.seq_len}'
      )
    items.append((item, ids))
  return [item for item, _ in items], [ids for _, ids in items]
