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
from mla_moe.checked import ConfigError, few

BOS, EOS = '<｜begin▁of▁sentence｜>', '<｜end▁of▁sentence｜>'
FIM = ('<｜fim▁begin｜>', '<｜fim▁hole｜>', '<｜fim▁end｜>')
BYTES = 256
FILES = ('tokenizer.json', 'tiktoken.model')
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


_BYTE = dict(enumerate((BOS, EOS, *FIM), BYTES))
BYTE = Vocabulary(BYTES + 5, _BYTE, bos_id=BYTES, eos_id=BYTES + 1)


def file_of(name: str) -> pathlib.Path:
  """Returns the file of a path, which may be a folder with one of `FILES`."""
  path = pathlib.Path(os.path.expanduser(name))
  choices = [path / file for file in FILES] if path.is_dir() else [path]
  return next((file for file in choices if file.exists()), choices[0])


def read(name: str) -> Vocabulary:
  """Returns the vocabulary of 'byte', of a tokenizer's file, or of its folder.

  Raises:
    ConfigError: no such file, or none of a tokenizer.
  """
  if name == 'byte':
    return BYTE
  path = file_of(name)
  refuse_tekken(path)
  try:
    content = files.read_bytes(path)
  except ConfigError as error:
    raise ConfigError(
      f"data.tokenizer={name!r}: must be 'byte' or a tokenizer.json ({error})"
    ) from None
  return parse(content, str(path), settings_of(path))


def refuse_tekken(path: pathlib.Path) -> None:
  """Refuses Mistral's own tokenizer, also where `path` is not there beside it.

  Raises:
    ConfigError: names the file, and the one to use.
  """
  tekken = path.with_name('tekken.json')
  if path == tekken or (tekken.exists() and not path.exists()):
    raise ConfigError(
      f'{tekken}: is not read; use the tokenizer.json of the same model, which '
      "Mistral's releases in transformers' layout have, in its place"
    )


def settings_of(path: pathlib.Path) -> dict[str, Any]:
  """Returns the tokenizer_config.json beside a file of a usual name, or {}."""
  beside = path.with_name('tokenizer_config.json')
  has_settings = path.name in FILES and beside.exists()
  return files.read_json(beside) if has_settings else {}


def parse(content: bytes, name: str, settings: dict[str, Any]) -> Vocabulary:
  """Returns the vocabulary of a file's content, with the settings beside it.

  Raises:
    ConfigError: no tokenizer.json.
  """
  try:
    if name.endswith('.model'):  # base64 and a rank in each line
      added, words = reserved(len(content.split()) // 2, settings), ()
    else:
      values = json.loads(content)
      added, words = values.get('added_tokens') or (), values['model']['vocab']
    ends = (BOS, EOS) if words else ('[BOS]', '[EOS]')
    special = {t['id']: t['content'] for t in added if is_special(t)}
    ids = words.values() if hasattr(words, 'values') else range(len(words))
    size = max([*ids, *(token['id'] for token in added)]) + 1
    if not 0 < size <= _LARGEST:
      raise ValueError(f'its largest id is {size - 1}')
    ids = {text: i for i, text in special.items()}
    bos = ids.get(text_of(settings.get('bos_token', ends[0])), -1)
    eos = ids.get(text_of(settings.get('eos_token', ends[1])), -1)
  except Exception as error:  # anything may lie there
    raise ConfigError(
      f'data.tokenizer={name!r}: not a tokenizer.json '
      f'({type(error).__name__}: {error})'
    ) from None
  return Vocabulary(size, special, bos, eos)


def reserved(count: int, settings: dict[str, Any]) -> list[dict[str, Any]]:
  """Returns the 256 added tokens after the ranks of a tiktoken.model."""
  named = settings.get('added_tokens_decoder') or {}
  token = lambda i: {'content': f'<|reserved_token_{i}|>', 'special': True}
  ids = range(count, count + 256)
  return [token(i) | named.get(str(i), {}) | {'id': i} for i in ids]


def is_special(token: dict[str, Any]) -> bool:
  """Returns whether no text becomes a token; V3 has no flag of <｜User｜>."""
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
  """Returns the special tokens for a message, the first of them."""
  return few(f'{i} {text!r}' for i, text in special.items()) or 'none'
