"""Trains a tokenizer.json on texts: a byte-level BPE of DeepSeek's kind.

  python -m experiments.tokenizer TEXTS... --vocab=8192 --out=runs/words
  python -m experiments.train --config=configs/tiny.py \\
    --config.data.tokenizer=runs/words --workdir=runs/mine

TEXTS are what `data.source` may be: folders, globs and files, or stdlib. The
tokens are eight special ones, the 256 bytes, and the most frequent merges of
neighbours. A text is first split as DeepSeek-V3 splits it, and no merge crosses
a split: numbers by three digits, Chinese and Japanese apart, then words,
punctuation and spaces. --out is a folder, which gets a tokenizer.json, or a
file whose name ends in .json.
"""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

from absl import flags

from mla_moe import vocabulary
from mla_moe.config import ConfigError
from mla_moe.hf import settings
from mla_moe.vocabulary import BOS

from . import cli, workdir
from .data import documents, sources, tokenizer

FLAGS = flags.FLAGS

# Ids from 0, so that bos and eos are 0 and 1 as in V3.
SPECIAL = (BOS, vocabulary.EOS, settings.PAD)
SPECIAL += (*vocabulary.FIM, settings.USER, settings.ASSISTANT)
LEAST = len(SPECIAL) + vocabulary.BYTES

# The splits that DeepSeek-V3's tokenizer.json makes before merging.
SPLITS = (
  r'\p{N}{1,3}',
  r'[一-龥぀-ゟ゠-ヿ]+',
  r'[!"#$%&\'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+'
  r'|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*'
  r'|\s*[\r\n]+|\s+(?!\S)|\s+',
)


def train(texts: Iterable[str], vocab: int) -> Any:
  """Returns a Tokenizer of the library `tokenizers`, of at most `vocab` tokens.

  Raises:
    ConfigError: a vocabulary too small for the bytes, or no library.
  """
  if vocab < LEAST:
    raise ConfigError(
      f'--vocab={vocab}: must be at least {LEAST}, for '
      f'{vocabulary.BYTES} bytes and {len(SPECIAL)} special tokens'
    )
  library = tokenizer.library()
  parts = library.pre_tokenizers
  core = library.Tokenizer(library.models.BPE())
  splits = [parts.Split(library.Regex(s), 'isolated') for s in SPLITS]
  level = parts.ByteLevel(add_prefix_space=False, use_regex=False)
  core.pre_tokenizer = parts.Sequence([*splits, level])
  core.decoder = library.decoders.ByteLevel()
  trainer = library.trainers.BpeTrainer(
    vocab_size=vocab,
    special_tokens=list(SPECIAL),
    initial_alphabet=parts.ByteLevel.alphabet(),
    show_progress=False,
  )
  core.train_from_iterator(texts, trainer)
  return core


def texts_of(names: Iterable[str], field: str = 'text') -> Iterator[str]:
  """Yields the text of every document of these sources; `field` is of rows.

  Raises:
    ConfigError: as `sources.listed` and `documents.read`.
  """
  for name in names:
    for file in sources.listed(name, field=field).files:
      for document in documents.read(file):
        yield document.text


def write(path: pathlib.Path, texts: Iterable[str], vocab: int) -> None:
  """Trains, and writes a .json file, or tokenizer.json in a folder.

  Raises:
    ConfigError: as `train`; the target exists or cannot be written.
  """
  file = path if path.suffix == '.json' else path / 'tokenizer.json'
  if file.exists():
    raise ConfigError(f'--out={str(path)!r}: exists; name another one')
  core = train(texts, vocab)
  try:
    file.parent.mkdir(parents=True, exist_ok=True)
    content = core.to_str().encode()
    content = settings.with_bos(content, SPECIAL.index(BOS), BOS)
    workdir.write(file, content.decode())
  except OSError as error:
    raise ConfigError(workdir.trouble(file.parent, error)) from None


def byte_tokenizer() -> bytes:
  """Returns the tokenizer.json whose ids are those of the byte tokenizer.

  It is a byte-level BPE without a merge, for exports of models of bytes. BPE
  spells a byte as one printable character: itself, or one from 256 on.
  """
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [byte for byte in range(vocabulary.BYTES) if byte not in printable]
  spelled = {chr(byte): byte for byte in printable}
  spelled |= {chr(vocabulary.BYTES + i): byte for i, byte in enumerate(others)}
  token = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
  level = {'type': 'ByteLevel', 'add_prefix_space': False, 'use_regex': False}
  level['trim_offsets'] = True
  values = {
    'version': '1.0',
    'added_tokens': [
      {'id': index, 'content': content, **token, 'special': True}
      for index, content in vocabulary.BYTE.special.items()
    ],
    'pre_tokenizer': level,
    'decoder': level,
    'model': {'type': 'BPE', 'vocab': spelled, 'merges': []},
  }
  return json.dumps(values, ensure_ascii=False).encode()


def define() -> None:
  """Defines this program's flags."""
  flags.DEFINE_integer('vocab', 8192, 'Tokens, special ones included.')
  flags.DEFINE_string('field', 'text', 'Of rows, with their text: data.field.')
  cli.define_path('out', '', 'The folder, or the .json file, to make.')


def main(*names: str) -> None:
  """Trains a tokenizer; the last lines say what it is and how to use it."""
  if not names:
    raise ConfigError('TEXTS: name folders, globs or files of text, or stdlib')
  if not FLAGS.out:
    raise ConfigError('--out: name the folder, or the .json file, to make')
  path = pathlib.Path(FLAGS.out)
  for name in names:
    if left_out := sources.listed(name, field=FLAGS.field).left_out:
      print(left_out)
  texts = functools.partial(texts_of, names, FLAGS.field)
  write(path, texts(), FLAGS.vocab)
  words, tokens, size = tokenizer.load(str(path)), 0, 0
  for text in texts():
    tokens += len(words.encode(text))
    size += len(text.encode('utf-8', 'replace'))
  print(
    f'{words.vocab} tokens; {size / max(tokens, 1):.2f} bytes a token on these '
    f'texts.\nTrain with it: --config.data.tokenizer={path}'
  )


if __name__ == '__main__':
  cli.run(main, define, has_words=True)
