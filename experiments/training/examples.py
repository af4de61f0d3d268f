"""Examples to imitate: the rows of a .jsonl file as prompts and completions.

A row is {"prompt", "completion"} or {"messages": [{"role", "content"}, ...]}.
The first form is plain text: bos and the prompt, then the completion and eos. A
chat goes through the model's own template, and each of its answers is an
example; its prompt is the chat before it, as a server would give it to the
model. The lengths say which tokens are learned, never the token values: eos is
learned where it is the padding's token, too.

The end token is the one after which generation stops. No text becomes a special
token. A prompt decides by its hash whether its examples are held out, so that
two answers to one question are never on both sides.
"""

from __future__ import annotations

import codecs
import hashlib
import itertools
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from mla_moe.config import ConfigError
from mla_moe.types import Int

from ..data import encodings, packing, sources
from ..data.tokenizer import Tokenizer
from ..serving import template

_BATCH = 256  # rows tokenised at once
_PROGRESS = 50_000  # rows between two lines for the person who waits
_ROLES = ('system', 'user', 'assistant')
_FORMS = '{"prompt", "completion"} or {"messages"}'


class Example(NamedTuple):
  """Token ids, int32; the completion ends with eos.

  key: a hash of the prompt, uniform in [0, 2**64). row: the example's place,
  FILE:LINE.
  """

  prompt: Int[np.ndarray, ' P']
  completion: Int[np.ndarray, ' C']
  key: int
  row: str


class Row(NamedTuple):
  """A row of a file: a chat, or [('', prompt), ('', completion)]."""

  place: str
  turns: list[tuple[str, str]]


def read(
  source: str,
  tokenizer: Tokenizer,
  own: str = '',
  folder: pathlib.Path | None = None,
  say: Callable[[str], None] = print,
) -> list[Example]:
  """Returns the examples of the .jsonl files of `source`, in their order.

  Args:
    source: a file, folder or glob.
    tokenizer: of the model.
    own: a template in the place of the one of `folder`, for messages.
    folder: of the tokenizer, if there is one: a template may lie there.
    say: gets a line once in 50,000 rows.

  Raises:
    ConfigError: a file of another kind, or a wrong row, with its line.
  """
  files, left_out = sources.listed(source)
  if left_out:
    say(left_out)
  for file in files:
    if sources.kind(file.path) != 'jsonl':
      raise ConfigError(
        f'--data={source}: {file.name} is no .jsonl; examples are rows of '
        f'{_FORMS}'
      )
  chat = None
  examples: list[Example] = []
  rows = itertools.chain.from_iterable(map(_rows, files))
  done = 0
  while batch := list(itertools.islice(rows, _BATCH)):
    if chat is None and any(row.turns[0][0] for row in batch):
      chat = template.opened(folder, tokenizer, own)
    examples += _encoded(batch, tokenizer, chat)
    done += len(batch)
    if done // _PROGRESS > (done - len(batch)) // _PROGRESS:
      say(f'  {done:,} rows of {source!r} tokenised')
  if not examples:
    raise ConfigError(f'--data={source}: holds no rows')
  return examples


def fitting(
  examples: list[Example], length: int, say: Callable[[str], None] = print
) -> list[Example]:
  """Returns the examples that rows of `length` columns can hold whole.

  A cut completion would teach the model never to end.

  Raises:
    ConfigError: more than one of a hundred is too long.
  """
  columns = [
    packing.columns(len(x.prompt), len(x.completion)) for x in examples
  ]
  longest = int(np.argmax(columns))
  fit = [x for x, n in zip(examples, columns, strict=True) if n <= length]
  many = len(examples) - len(fit)
  text = (
    f'{many:,} of {len(examples):,} examples have more than the '
    f'{length + 1:,} tokens of data.seq_len={length}; the longest, '
    f'{examples[longest].row}, has {columns[longest] + 1:,}'
  )
  if many > len(examples) // 100:
    raise ConfigError(
      f'{text}: set --config.data.seq_len={columns[longest]}, or leave them out'
    )
  if many:
    say(f'{text}: left out.')
  return fit


def split(
  examples: list[Example], fraction: float
) -> tuple[list[Example], list[Example]]:
  """Returns (training, held-out): the examples with the lowest keys are out.

  A side that would be empty gets the examples of one prompt.

  Raises:
    ConfigError: all examples have one prompt.
  """
  keys = sorted({x.key for x in examples})
  if len(keys) < 2:
    raise ConfigError(
      f'{examples[0].row}: all {len(examples)} examples have one prompt, and '
      'one prompt must be held out; give at least two'
    )
  limit = min(max(fraction * 2**64, keys[0] + 1), keys[-1])
  train = [x for x in examples if x.key >= limit]
  return train, [x for x in examples if x.key < limit]


def _rows(file: sources.File) -> Iterator[Row]:
  """Yields the checked rows of a file."""
  with encodings.opened(file.path) as opened:
    for number, line in enumerate(opened, 1):
      if line.strip():
        place = f'{file.path}:{number}'
        yield Row(place, _turns(place, line.removeprefix(codecs.BOM_UTF8)))


def _turns(place: str, line: bytes) -> list[tuple[str, str]]:
  try:
    row = json.loads(line.decode('utf-8'))
  except (ValueError, RecursionError) as error:
    why = getattr(error, 'msg', str(error))
    raise ConfigError(f'{place}: not JSON in UTF-8 ({why})') from None
  row = row if isinstance(row, dict) else {}
  pair = row.keys() & {'prompt', 'completion'}
  if pair and 'messages' in row:
    raise ConfigError(f'{place}: has both forms; a row is {_FORMS}')
  if 'messages' in row:
    return _messages(place, row['messages'])
  for name in ('prompt', 'completion'):
    if not isinstance(row.get(name), str):
      raise ConfigError(f'{place}: has no text "{name}"; a row is {_FORMS}')
  if not row['completion']:
    raise ConfigError(f'{place}: its completion is empty; leave the row out')
  return [('', row['prompt']), ('', row['completion'])]


def _messages(place: str, messages) -> list[tuple[str, str]]:
  turns = []
  for message in messages if isinstance(messages, list) else ():
    message = message if isinstance(message, dict) else {}
    role, content = message.get('role'), message.get('content')
    if role not in _ROLES or not isinstance(content, str):
      raise ConfigError(
        f'{place}: a message has a "role", {", ".join(_ROLES)}, and a text '
        '"content"'
      )
    if role == 'assistant' and not content:
      raise ConfigError(f'{place}: an answer is empty; leave the row out')
    turns.append((role, content))
  if 'assistant' not in dict(turns):
    raise ConfigError(f'{place}: no message is of the role assistant')
  return turns


def _encoded(
  rows: list[Row], tokenizer: Tokenizer, chat: template.Template | None
) -> Iterator[Example]:
  """Yields the examples of the rows, in order."""
  texts = [text for row in rows for role, text in row.turns if not role]
  ids = iter(tokenizer.encode_batch(texts))
  ends = [np.array([x], np.int32) for x in (tokenizer.bos_id, tokenizer.eos_id)]
  for place, turns in rows:
    answers = [i for i, (role, _) in enumerate(turns) if role == 'assistant']
    first = answers[0] if answers else 1
    key = _key(turns[:first])
    if not answers:
      prompt = np.concatenate([ends[0], next(ids)])
      yield Example(prompt, np.concatenate([next(ids), ends[1]]), key, place)
    for i in answers:
      try:
        prompt, answer = chat.prompt(turns[:i]), chat.answer(turns[: i + 1])
      except ConfigError as error:
        raise ConfigError(f'{place}: {error}') from None
      yield Example(prompt, answer, key, place)


def _key(turns: list[tuple[str, str]]) -> int:
  digest = hashlib.blake2b(json.dumps(turns).encode(), digest_size=8).digest()
  return int.from_bytes(digest, 'little')
