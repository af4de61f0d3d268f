"""The numbers of a run's text: its sources, and the tokens of a step."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Literal

from mla_moe.checked import Checked, is_number, is_row


@dataclasses.dataclass(frozen=True)
class DataConfig(Checked):
  """The source of the tokens, and the tokens of a step.

  `source` is 'stdlib' (the source files of Python's standard library: real
  text that is always there), or a folder, glob or file of .txt, .jsonl or
  .parquet; `field` is that of a row with its text. `tokenizer` is 'byte' or the
  path of a tokenizer.json. A step has `batch_size` sequences, computed
  `micro_batch` at a time (0: all at once). The batch grows from `batch_start`
  (0: no ramp) over `ramp_tokens`. `packing` is
  'joined' (documents follow each other and see each other, as V3 pre-trained)
  or 'separate' (attention and positions end with the document). `fim_rate` is
  the fraction of documents turned into fill-in-the-middle, `heldout` the
  fraction of text for evaluation.

  `sources` are (path, weight, name) in the place of `source`: rows come from
  them by weight. `phases` are (tokens, weights): from so many tokens of the run
  on, the sources have these weights. No source is read more than `max_epochs`
  times (0: any). `validation` are (path, name) of texts that are evaluated,
  too. `dtype` is that of the ids in a raw .bin. Of ids in a bucket `block_rows`
  neighbours are read together (0: rows of any places).
  """

  source: str = 'stdlib'
  field: str = 'text'
  sources: tuple = ()
  phases: tuple = ()
  max_epochs: float = 0.0
  validation: tuple = ()
  dtype: Literal['uint16', 'uint32'] = 'uint16'
  block_rows: int = 0
  tokenizer: str = 'byte'
  packing: Literal['joined', 'separate'] = 'joined'
  seq_len: int = 4096
  batch_size: int = 15360
  batch_start: int = 0
  ramp_tokens: float = 0.0
  micro_batch: int = 0
  fim_rate: float = 0.1
  heldout: float = 0.02
  seed: int = 0

  def _rules(self):
    self._positive('batch_size')
    self._require('seq_len', self.seq_len > 1, 'must be at least 2')
    self._require('source', self.source != '', "must be 'stdlib' or a path")
    self._require('tokenizer', self.tokenizer != '', "must be 'byte' or a path")
    self._require('fim_rate', self.fim_rate <= 1, 'is a probability')
    self._require('heldout', 0 < self.heldout < 1, 'must be between 0 and 1')
    micro = self.micro_batch or self.batch_size
    self._require(
      'micro_batch',
      self.batch_size % micro == 0,
      f'must divide batch_size={self.batch_size}',
    )
    self._require(
      'batch_start',
      self.batch_start <= self.batch_size and self.batch_start % micro == 0,
      f'must be a multiple of micro_batch={micro} up to '
      f'batch_size={self.batch_size}',
    )
    self._require(
      'ramp_tokens',
      (self.ramp_tokens > 0) == (self.batch_start > 0),
      f'belongs to batch_start={self.batch_start}: set both or neither',
    )
    alone = self.source == 'stdlib' or not self.sources
    self._require('source', alone, 'has sources in its place; leave it out')
    names = [row[-1] for row in self.sources if is_row(row, str, float, str)]
    names += [row[-1] for row in self.validation if is_row(row, str, str)]
    count = len(self.sources) + len(self.validation)
    self._require(
      'sources',
      len(names) == len({*names}) == count
      and len(self.sources) <= 32
      and all(re.fullmatch(r'[\w-]+', name) for name in names),
      f'must be up to 32 (path, weight, name), validation={self.validation!r} '
      '(path, name), and all names different words',
    )
    before = 0.0
    for row in [(0, tuple(row[1] for row in self.sources)), *self.phases]:
      self._require(
        'phases',
        is_row(row, float, tuple)
        and before <= row[0]
        and len(row[1]) == len(self.sources)
        and all(is_number(w) and 0 <= w < math.inf for w in row[1])
        and (sum(row[1]) > 0 or not row[1]),
        f'and the weights of sources={self.sources!r} must be 0 or more, one '
        'above 0, for each source, and the tokens of phases rise',
      )
      before = row[0]
