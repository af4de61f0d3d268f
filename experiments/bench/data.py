"""Tokenising a text, mixing it, and starting with it: processor seconds.

Three ways take turns on the same documents, by default of Python's own library,
with one tokenizer, which was trained on a quarter of them:

  library     encode_batch_fast of `tokenizers` alone, 256 documents at a time,
              until there are ids: nothing is read, written or compared
  tokenizers  `prepare` with that library: it reads, encodes and writes
  gigatoken   `prepare` with gigatoken (extra [fast]), and its comparisons

Batches of 256 rows come from one stream, or from a mixture of three, in turns.
A later start finds the tokens of a larger text, and reads the first batch.
Processor seconds are of all threads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import json
import pathlib
import resource
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from mla_moe.config import DataConfig

from .. import tokenizer as program
from ..data import batches, corpus, mixture, tokenizer
from . import show

_GROUP = 256  # documents


def flags(parser) -> None:
  """Adds this benchmark's flags."""
  parser.add_argument('--source', default='stdlib', help='text')
  parser.add_argument('--megabytes', type=int, default=20, help='of text')
  parser.add_argument('--vocab', type=int, default=16384, help='tokens')
  parser.add_argument('--rounds', type=int, default=3, help='of each')
  text = 'of the text of a later start'
  parser.add_argument('--start_megabytes', type=int, default=4000, help=text)
  parser.add_argument('--only', default='', help='encoding, mixing or start')


def run(out: pathlib.Path, args) -> None:
  """Measures, prints a table and writes OUT/data.json."""
  with tempfile.TemporaryDirectory(dir=out) as scratch:
    folder = pathlib.Path(scratch)
    parts = {
      'encoding': lambda: encoding(
        folder, args.source, args.megabytes * 10**6, args.vocab, args.rounds
      ),
      'mixing': lambda: mixing(4 * args.rounds),
      'start': lambda: start(folder, args.start_megabytes * 10**6),
    }
    results = show.measure(out / 'data.json', parts, args.only)
  for name, part in results.items():
    for row in part['figures']:
      print('  '.join([f'{name:9}', *row]))
  print('\n'.join(show.machines(results)))


def encoding(
  folder: pathlib.Path, source: str, size: int, vocab: int, rounds: int
) -> list[list[str]]:
  """Returns rows of the three ways: medians, and ratios of the same rounds."""
  path = folder / 'text.jsonl'
  texts = _write(path, program.texts_of([source]), size)
  program.write(folder / 'words', texts[: len(texts) // 4], vocab)
  data = DataConfig(source=str(path), tokenizer=str(folder / 'words'))
  words = tokenizer.load(data.tokenizer)
  prepare = lambda: _prepare(data, words, folder)
  ways = {'library': lambda: _library(words, texts), 'tokenizers': prepare}
  if importlib.util.find_spec('gigatoken'):
    ways['gigatoken'] = prepare
  seconds: dict[str, list[float]] = {name: [] for name in ways}
  for i in range(rounds):
    for name in sorted(ways, reverse=i % 2 == 1):
      with _without('gigatoken' if name != 'gigatoken' else ''):
        seconds[name].append(_processor(ways[name]))
  bytes_of = sum(len(text.encode()) for text in texts)
  rows = []
  for name, times in seconds.items():
    pairs = zip(seconds['library'], times, strict=True)
    ratio = statistics.median(first / other for first, other in pairs)
    median = statistics.median(times)
    speed = bytes_of / 1e6 / median
    rows.append(
      [f'{name:10}', f'{median:.2f} s', f'{speed:.1f} MB/s', f'{ratio:.2f} x']
    )
  return rows


def mixing(rounds: int) -> list[list[str]]:
  """Returns rows of the tokens a second of `batch_at`, of medians."""
  random = np.random.default_rng(0)
  sizes = (48 << 20, 32 << 20, 16 << 20)
  streams = [random.integers(0, 60000, n).astype(np.uint16) for n in sizes]
  data = DataConfig(seq_len=4096, batch_size=256)
  weights = zip('abc', (0.5, 0.3, 0.2), 'abc', strict=True)
  mixed = dataclasses.replace(data, sources=tuple(weights))
  ways = {
    'one stream': lambda step: batches.batch_at(streams[0], data, step, 0),
    'mixed': lambda step: mixture.batch_at(streams, mixed, step, 0),
  }
  seconds: dict[str, list[float]] = {name: [] for name in ways}
  for step in range(rounds):
    for name in sorted(ways, reverse=step % 2 == 1):
      seconds[name].append(_processor(functools.partial(ways[name], step)))
  rows = []
  for name, times in seconds.items():
    pairs = zip(seconds['one stream'], times, strict=True)
    ratio = statistics.median(first / other for first, other in pairs)
    speed = data.batch_size * data.seq_len / 1e6 / statistics.median(times)
    rows.append([f'{name:10}', f'{speed:.0f} M tokens/s', f'{ratio:.2f} x'])
  return rows


def start(folder: pathlib.Path, size: int) -> list[list[str]]:
  """Returns rows of a first start and later ones of a large text of bytes."""
  path = folder / 'large.jsonl'
  rows = itertools.cycle(itertools.islice(program.texts_of(['stdlib']), 2000))
  _write(path, (f'{i}: {text}' for i, text in enumerate(rows)), size, False)
  data = DataConfig(source=str(path), seq_len=4096, batch_size=8)
  words = tokenizer.load('byte')

  def begin() -> None:
    text = corpus.prepare(data, words, folder / 'large', lambda line: None)
    batches.batch_at(text.train, data, 0, text.bos_id)

  return [
    [name, f'{_processor(begin):.3f} s']
    for name in ('first', 'second', 'third')
  ]


def _write(
  path: pathlib.Path, texts: Iterable[str], size: int, is_kept: bool = True
) -> list[str]:
  """Writes rows until they have this many bytes; returns them if `is_kept`."""
  rows, place = [], 0
  with open(path, 'w', encoding='utf-8') as file:
    for text in texts:
      place += file.write(json.dumps({'text': text}) + '\n')
      rows += [text] if is_kept else []
      if place >= size:
        break
  return rows


def _prepare(data: DataConfig, words, folder: pathlib.Path) -> None:
  with tempfile.TemporaryDirectory(dir=folder) as cache:
    corpus.prepare(data, words, cache, lambda line: None)


def _library(words, texts: list[str]) -> None:
  for i in range(0, len(texts), _GROUP):
    group = texts[i : i + _GROUP]
    rows = words.core.encode_batch_fast(group, add_special_tokens=False)
    sum(len(row.ids) for row in rows)


@contextlib.contextmanager
def _without(module: str) -> Iterator[None]:
  """Hides a module in the block, as if it were not installed."""
  before = sys.modules.pop(module, None) if module else None
  if module:
    sys.modules[module] = None  # type: ignore[assignment]
  try:
    yield
  finally:
    if module:
      del sys.modules[module]
      if before:
        sys.modules[module] = before


def _processor(do: Callable[[], None]) -> float:
  """Returns the processor seconds of all threads that `do` takes."""
  before = resource.getrusage(resource.RUSAGE_SELF)
  do()
  after = resource.getrusage(resource.RUSAGE_SELF)
  user = after.ru_utime - before.ru_utime
  return user + after.ru_stime - before.ru_stime
