"""Prompts as token ids: a text, a text with special tokens, or two ends of one.

A text never becomes a special token by itself (`data.tokenizer`). Two doors
lead to them. `special` reads the special tokens that a text spells, for people
that mean them. `fill_in` asks for the text between a prefix and a suffix, in
the order of training (PSM: prefix, suffix, middle; DeepSeek-V3, section 4.1).
"""

from __future__ import annotations

import re

import numpy as np

from mla_moe import vocabulary
from mla_moe.config import ConfigError
from mla_moe.types import Int

from .data.tokenizer import ByteTokenizer, RanksTokenizer, Tokenizer


def plain(tokenizer: Tokenizer, text: str) -> Int[np.ndarray, ' T']:
  """Returns bos and the ids of a text, int32."""
  return np.append(tokenizer.bos_id, tokenizer.encode(text)).astype(np.int32)


def special(tokenizer: Tokenizer, text: str) -> Int[np.ndarray, ' T']:
  """Returns the ids of a text with its special tokens, int32.

  bos comes first unless the text begins with it.
  """
  tokens = special_tokens(tokenizer)
  ids: list[int] = []
  start = 0
  for piece in re.finditer(any_of(tokens), text):
    ids += tokenizer.encode(text[start : piece.start()]).tolist()
    ids.append(tokens[piece.group()])
    start = piece.end()
  ids += tokenizer.encode(text[start:]).tolist()
  has_bos = ids[:1] == [tokenizer.bos_id]
  return np.array(ids if has_bos else [tokenizer.bos_id, *ids], np.int32)


def fill_in(
  tokenizer: Tokenizer, prefix: str, suffix: str
) -> Int[np.ndarray, ' T']:
  """Returns the ids after which a model writes the text between two, int32.

  Raises:
    ConfigError: the tokenizer has no tokens for it.
  """
  if not tokenizer.fim_ids:
    raise ConfigError(
      'suffix: the tokenizer has no tokens for filling in the middle '
      f'({", ".join(vocabulary.FIM)})'
    )
  begin, hole, end = tokenizer.fim_ids
  before, after = tokenizer.encode(prefix), tokenizer.encode(suffix)
  parts = [[tokenizer.bos_id, begin], before, [hole], after, [end]]
  return np.concatenate(parts).astype(np.int32)


def special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
  """Returns the ids of the special tokens, by their text."""
  if isinstance(tokenizer, ByteTokenizer):
    special = vocabulary.BYTE.special.items()
    return {text: i for i, text in special if i < tokenizer.vocab}
  if isinstance(tokenizer, RanksTokenizer):
    return {text: i for i, text in tokenizer.special.items()}
  added = tokenizer.core.get_added_tokens_decoder()
  return {token.content: i for i, token in added.items() if token.special}


def any_of(tokens: dict[str, int]) -> str:
  """Returns the pattern of any of these tokens, a longer one first."""
  longest = sorted(filter(None, tokens), key=len, reverse=True)
  return '|'.join(map(re.escape, longest)) or '(?!)'  # which matches nothing
