"""The size of a tokenizer, and its tokens that begin and end a text.

A tokenizer.json does not say which of its tokens are bos and eos. The
tokenizer_config.json beside it does; without one, DeepSeek's names of these
tokens count. No library is needed: the files are JSON.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
from typing import Any, NamedTuple

from mla_moe import files
from mla_moe.checked import ConfigError

BOS, EOS = '<｜begin▁of▁sentence｜>', '<｜end▁of▁sentence｜>'
FIM = ('<｜fim▁begin｜>', '<｜fim▁hole｜>', '<｜fim▁end｜>')
BYTES = 256
_CONTROL = re.compile('<[|｜].*[|｜]>')
_LARGEST = 2**24  # a larger vocabulary would only fill the memory


class Vocabulary(NamedTuple):
  """The names of a tokenizer's tokens.

  size: its largest id + 1. special: {id: text} of the tokens that no text
  becomes. bos_id, eos_id: -1 where the files name no such token.
  """

  size: int
  special: dict[int, str]
  bos_id: int
  eos_id: int


BYTE = Vocabulary(
  size=BYTES + 5,
  special=dict(enumerate((BOS, EOS, *FIM), BYTES)),
  bos_id=BYTES,
  eos_id=BYTES + 1,
)


def file_of(name: str) -> pathlib.Path:
  """Returns the tokenizer.json of a path, which may be its folder."""
  path = pathlib.Path(os.path.expanduser(name))
  return path / 'tokenizer.json' if path.is_dir() else path


def read(name: str) -> Vocabulary:
  """Returns the vocabulary of 'byte', of a tokenizer.json, or of its folder.

  Raises:
    ConfigError: no such file, or no tokenizer.json.
  """
  if name == 'byte':
    return BYTE
  path = file_of(name)
  try:
    content = files.read_bytes(path)
  except ConfigError as error:
    raise ConfigError(
      f"data.tokenizer={name!r}: must be 'byte' or a tokenizer.json ({error})"
    ) from None
  # Settings beside a file of another name may belong to another tokenizer.
  beside = path.with_name('tokenizer_config.json')
  has_settings = path.name == 'tokenizer.json' and beside.exists()
  return parse(
    content, str(path), files.read_json(beside) if has_settings else {}
  )


def parse(content: bytes, name: str, settings: dict[str, Any]) -> Vocabulary:
  """Returns the vocabulary of a tokenizer.json's content.

  Args:
    content: of the file.
    name: of the file, for errors.
    settings: of the tokenizer_config.json beside it, {} without one.

  Raises:
    ConfigError: no tokenizer.json.
  """
  try:
    values = json.loads(content)
    added = values.get('added_tokens') or ()
    special = {t['id']: t['content'] for t in added if is_special(t)}
    words = values['model']['vocab']
    ids = words.values() if hasattr(words, 'values') else range(len(words))
    size = max([*ids, *(token['id'] for token in added)]) + 1
    if not 0 < size <= _LARGEST:
      raise ValueError(f'its largest id is {size - 1}')
    ends = {text: i for i, text in special.items()}
    bos = ends.get(text_of(settings.get('bos_token', BOS)), -1)
    eos = ends.get(text_of(settings.get('eos_token', EOS)), -1)
  except Exception as error:  # anything may lie there
    raise ConfigError(
      f'data.tokenizer={name!r}: not a tokenizer.json '
      f'({type(error).__name__}: {error})'
    ) from None
  return Vocabulary(size, special, bos, eos)


def is_special(token: dict[str, Any]) -> bool:
  """Returns whether no text may become an added token.

  V3's release has no such flag for <｜User｜> and the tokens of FIM; words that
  a model writes, such as <think>, have none either. So the spelling counts.
  """
  return token['special'] or bool(_CONTROL.fullmatch(token['content']))


def exists(name: str) -> bool:
  """Returns whether `read` has a file to read."""
  return name == 'byte' or file_of(name).exists()


def fill(name: str, vocab: int, bos_id: int, eos_id: int) -> dict[str, int]:
  """Returns the fields of a model; 0 and -1 become the tokenizer's numbers.

  The size becomes a multiple of 8, so that devices can split it.

  Raises:
    ConfigError: as `read`, or the files name no such token.
  """
  words = read(name)
  ids = {'bos_id': bos_id, 'eos_id': eos_id}
  for field, index in ids.items():
    ids[field] = index if index >= 0 else getattr(words, field)
    if ids[field] < 0:
      raise ConfigError(
        f'model.{field}: the files of {name!r} do not say which token it is; '
        f'set model.{field} to one of {choices(words.special)}'
      )
  return {'vocab': vocab or -(-words.size // 8) * 8, **ids}


def text_of(token: Any) -> str:
  """Returns the text of a token of tokenizer_config.json; '' for a null."""
  token = token.get('content') if isinstance(token, dict) else token
  return token if isinstance(token, str) else ''


def choices(special: dict[int, str]) -> str:
  """Returns the special tokens for a message, the first eight."""
  tokens = [f'{i} {text!r}' for i, text in list(special.items())[:8]]
  return ', '.join(tokens) or 'none: it has no special token'
