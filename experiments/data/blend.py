"""The texts of a config: its source or sources, and its validation sets.

Each is a corpus by itself (`corpus`); `mixture` mixes their rows.
Both parts of a validation set are evaluated, so it is as good as all held out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

from mla_moe.config import Config, ConfigError, DataConfig

from . import batches, corpus_folder, mixture, shards


def singles(data: DataConfig) -> dict[str, DataConfig]:
  """Returns the config of each source alone; the name of an only one is ''."""
  alone = dataclasses.replace(data, sources=(), phases=(), validation=())
  one = lambda path: dataclasses.replace(alone, source=path)
  return {name: one(path) for path, _, name in data.sources} or {'': data}


def validations(data: DataConfig) -> dict[str, DataConfig]:
  """Returns the config of each validation set, of which both parts are used."""
  alone = dataclasses.replace(data, sources=(), phases=(), validation=())
  one = lambda path: dataclasses.replace(
    alone, source=path, fim_rate=0.0, heldout=0.5
  )
  return {name: one(path) for path, name in data.validation}


@contextlib.contextmanager
def named(field: str, name: str) -> Iterator[None]:
  """Errors in the block about `data.source` are of this row of a field.

  The config of a source alone has its path there (`singles`). The row of the
  only source has no name.
  """
  try:
    yield
  except ConfigError as error:
    if not name:
      raise
    words = re.sub('^data[.]source(?=[=:])', f'{field}: {name}', str(error))
    raise type(error)(words) from None


def whole(text: corpus_folder.Corpus, data: DataConfig) -> shards.Tokens:
  """Returns all tokens of a validation set.

  Raises:
    ConfigError: fewer than a row.
  """
  tokens = shards.Tokens([text.train, text.heldout], text.train.dtype)
  if len(tokens) <= data.seq_len:
    raise ConfigError(
      f'data.validation={data.source!r}: {len(tokens)} tokens, but a row needs '
      f'{data.seq_len + 1}; give more text, or lower data.seq_len'
    )
  return tokens


def check(config: Config, streams: Sequence[Any]) -> None:
  """Refuses phases after the run, and sources that it would read too often.

  Raises:
    ConfigError: names the field and the fix.
  """
  data, steps = config.data, config.run.steps
  sequences, _ = batches.span(data, steps)
  tokens = sequences * data.seq_len
  if data.phases and data.phases[-1][0] >= tokens:
    raise ConfigError(
      f'data.phases: one begins after {data.phases[-1][0]:,.0f} tokens, and '
      f'the run has {tokens:,}; let it begin earlier, or raise run.steps'
    )
  for name, times in mixture.epochs(data, streams, sequences).items():
    if times > data.max_epochs > 0:
      of = f'source {name!r}' if name else f'data.source={data.source!r}'
      raise ConfigError(
        f'data.max_epochs={data.max_epochs:g}: the {steps:,} steps read {of} '
        f'{times:.3g} times; give more of its text, or lower '
        + ('its weight or ' if name else '')
        + 'run.steps'
      )
