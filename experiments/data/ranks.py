"""The tokenizer of Moonlight and Kimi K2: a tiktoken.model and its settings.

The file has a line for each token: its bytes in base64, and its rank, which is
its id. A text is split by `PATTERN`, and in each piece the neighbours whose
union has the lowest rank merge first. The 256 ids after the last rank are
reserved: tokenizer_config.json names some of them, as [BOS] or <|im_end|>.

The pattern is no part of the file. It is that of the releases' own code, whose
words keep Chinese apart (`tokenization_moonshot`, `tokenization_kimi`), and a
release that names other code is refused. Nothing of that code is run here.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import os
import pathlib
import re
from typing import Any

import numpy as np

from mla_moe import files, vocabulary
from mla_moe.config import ConfigError
from mla_moe.types import Int

_UPPER = r'[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]'
_LOWER = r'[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]'
_LEAD, _TAIL = r'[^\r\n\p{L}\p{N}]?', r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERN = (
  rf'[\p{{Han}}]+|{_LEAD}{_UPPER}*{_LOWER}+{_TAIL}'
  rf'|{_LEAD}{_UPPER}+{_LOWER}*{_TAIL}|\p{{N}}{{1,3}}'
  r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
# Their code cuts long texts, and long runs of blanks or of other characters.
_CODES = ('tokenization_moonshot', 'tokenization_kimi')
_LONGEST, _RUN = 400_000, 25_000


@dataclasses.dataclass(frozen=True)
class RanksTokenizer:
  """A byte-level BPE of ranks, run by the library `tiktoken`.

  core: the library's Encoding. reserved: texts of the ids after the ranks.
  special: those that no text becomes; the others are words, such as <think>.
  """

  vocab: int
  bos_id: int
  eos_id: int
  fim_ids: tuple[int, int, int] | None
  fingerprint: str
  core: Any = dataclasses.field(repr=False)
  reserved: dict[int, str] = dataclasses.field(repr=False)
  special: dict[int, str] = dataclasses.field(repr=False)

  def encode(self, text: str) -> Int[np.ndarray, ' M']:
    """Returns the text's ids, int32, without bos and eos."""
    return self.encode_batch([text])[0]

  def encode_batch(self, texts: list[str]) -> list[Int[np.ndarray, ' _']]:
    """Returns the ids of each text, computed on all cores."""
    parts = [_parts(text.encode('utf-8', 'replace').decode()) for text in texts]
    rows = iter(
      self.core.encode_batch(
        [part for row in parts for part in row],
        num_threads=os.cpu_count() or 1,
        allowed_special=set(self.reserved.values()) - {*self.special.values()},
        disallowed_special=(),
      )
    )
    lists = ([next(rows) for _ in row] for row in parts)
    return [np.array(sum(row, []), np.int32) for row in lists]

  def decode(self, ids: Any) -> str:
    """Returns the text, without specials; broken UTF-8 becomes U+FFFD."""
    ids = np.asarray(ids).reshape(-1).tolist()
    ids = [i for i in ids if i < self.vocab and i not in self.special]
    return self.core.decode(ids, errors='replace')

  def byte_lengths(self) -> Int[np.ndarray, ' V']:
    """Returns the number of bytes of each id, int32; 0 for specials."""
    size = self.vocab - len(self.reserved)
    lengths = map(len, map(self.core.decode_single_token_bytes, range(size)))
    words = {i: text.encode() for i, text in self.reserved.items()}
    sizes = [0 if i in self.special else len(x) for i, x in words.items()]
    return np.array([*lengths, *sizes], np.int32)


def load(
  path: pathlib.Path, words: vocabulary.Vocabulary, bos_id: int, eos_id: int
) -> RanksTokenizer:
  """Returns the tokenizer of a tiktoken.model.

  Args:
    path: of the file.
    words: its vocabulary.
    bos_id, eos_id: the model's; special tokens, where settings name any.

  Raises:
    ConfigError: no library, a file of another kind, or other ids.
  """
  settings = vocabulary.settings_of(path)
  content = files.read_bytes(path)
  by_bytes = _ranks(content, str(path), settings)
  for field, index in (('bos_id', bos_id), ('eos_id', eos_id)):
    if settings and index not in words.special:
      raise ConfigError(
        f'model.{field}={index}: {path} has no such special token; set '
        f"model.{field}=-1, for the tokenizer's own, or one of "
        f'{vocabulary.choices(words.special)}'
      )
  try:
    import tiktoken
  except ImportError:
    raise ConfigError(
      'a tiktoken.model needs tiktoken: pip install "mla_moe[hf]"'
    ) from None
  tokens = vocabulary.reserved(len(by_bytes), settings)
  reserved = {token['id']: token['content'] for token in tokens}
  names = json.dumps([reserved, [*words.special]]).encode()
  digest = hashlib.sha256(content + names).hexdigest()
  return RanksTokenizer(
    vocab=words.size,
    bos_id=bos_id,
    eos_id=eos_id,
    fim_ids=None,
    fingerprint=f'{digest}:{bos_id}:{eos_id}',
    core=tiktoken.Encoding(
      name=path.name,
      pat_str=PATTERN,
      mergeable_ranks=by_bytes,
      special_tokens={text: i for i, text in reserved.items()},
    ),
    reserved=reserved,
    special=words.special,
  )


def _ranks(
  content: bytes, name: str, settings: dict[str, Any]
) -> dict[bytes, int]:
  """Returns {bytes: rank} of a tiktoken.model.

  Raises:
    ConfigError: another file, or settings of other code than Moonshot's.
  """
  try:
    rows = [line.split() for line in content.splitlines() if line.strip()]
    out = {base64.b64decode(x, validate=True): int(i) for x, i in rows}
    if sorted(out.values()) != list(range(len(rows))):
      raise ValueError('its ranks are not 0, 1, 2, ...')
    if not all(bytes([i]) in out for i in range(256)):
      raise ValueError('a byte has no rank')
    code = (settings.get('auto_map') or {}).get('AutoTokenizer') or ''
    code = code if isinstance(code, str) else code[0] or ''
    if code and code.split('.')[0] not in _CODES:
      raise ValueError(f'its code is {code!r}, and not one of {_CODES}')
  except Exception as error:  # anything may lie there
    raise ConfigError(
      f'data.tokenizer={name!r}: not a tiktoken.model with its settings '
      f'({type(error).__name__}: {error})'
    ) from None
  return out


def _parts(text: str) -> list[str]:
  """Returns the pieces of a text that their code encodes one by one."""
  if len(text) <= _RUN:
    return [text]
  parts = []
  for start in range(0, len(text), _LONGEST):
    chunk = text[start : start + _LONGEST]
    cuts = [0]
    for run in re.finditer(r'\s+|\S+', chunk):
      cuts += range(run.start() + _RUN, run.end(), _RUN)
    parts += [chunk[a:b] for a, b in zip(cuts, [*cuts[1:], None], strict=True)]
  return parts
