"""Small texts for the tests of documents, corpora and batches."""

import json

import numpy as np
import pytest

from experiments.data import corpus, tokenizer
from mla_moe.config import DataConfig

BYTE = tokenizer.load('byte', 256, 257)
BOS, EOS, BEGIN, HOLE, END = range(256, 261)


def small(**changes) -> DataConfig:
  plain = dict(seq_len=8, batch_size=6, fim_rate=0.0, heldout=0.2)
  return DataConfig(**(plain | changes))


def prepared(config, cache, tokens=BYTE):
  """Returns the corpus without a printed line."""
  return corpus.prepare(config, tokens, cache, lambda line: None)


def write_folder(folder, count=40):
  folder.mkdir()
  for i in range(count):
    text = f'{i}: ' + 'añb\n' * (3 + i % 7)
    (folder / f'{i:02}.txt').write_text(text, encoding='utf-8')
  return str(folder)


def rows_of(kind, path, rows):
  if kind == 'jsonl':
    lines = [json.dumps({'text': row, 'other': 1}) for row in rows]
    path.write_text('\n'.join([lines[0], '', *lines[1:]]), encoding='utf-8')
  else:
    pyarrow = pytest.importorskip('pyarrow', reason='extra [data] is missing')
    parquet = pytest.importorskip('pyarrow.parquet')
    parquet.write_table(
      pyarrow.table({'text': rows, 'n': [1] * len(rows)}), path
    )


def documents_of(stream):
  """Returns the documents of a stream: lists of ids with bos and eos."""
  ids = np.asarray(stream)
  starts = np.flatnonzero(ids == BOS)
  return [part.tolist() for part in np.split(ids, starts[1:])]
