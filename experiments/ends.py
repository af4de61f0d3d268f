"""The tokens that end a text: one, or several, as a release says.

A config.json may list several ends, and the generation_config.json beside it
others (Kimi K2's chats end with <|im_end|>, its texts with [EOS]). Any of them
ends a sample.
"""

from __future__ import annotations

import os
import pathlib

from mla_moe import files, vocabulary
from mla_moe.config import Config, ModelConfig


def listed(folder: pathlib.Path | None) -> set[int]:
  """Returns the ids that the files of a release name as ends.

  Raises:
    ConfigError: a file that is no JSON.
  """
  ids = set()
  for name in ('config.json', 'generation_config.json'):
    path = (folder or pathlib.Path(os.devnull)) / name
    if path.exists():
      words = files.read_json(path)
      inner = words.get('text_config')  # of a model that also sees
      words |= inner if isinstance(inner, dict) else {}
      value = words.get('eos_token_id')
      values = value if isinstance(value, list) else [value]
      ids |= {i for i in values if type(i) is int and i >= 0}
  return ids


def of(folder: pathlib.Path | None, model: ModelConfig) -> tuple[int, ...]:
  """Returns all ids that end a text: the model's, and those of a release."""
  others = {i for i in listed(folder) if i < model.vocab}
  return tuple(sorted({model.eos_id, *others}))


def of_run(config: Config) -> tuple[int, ...]:
  """Returns the ids that end a text of a run: a release's files lie beside its
  tokenizer."""
  name = config.data.tokenizer
  folder = None if name == 'byte' else vocabulary.file_of(name).parent
  return of(folder, config.model)
