"""Sources: where the batches of a run come from, and what it is judged by.

The loop asks a `Source` for the batch of each step, with the state before it: a
corpus ignores the state, and reinforcement learning draws its answers with it.
Whatever the source, a batch is a function of the config, the number of the step
and the state alone, so that a run resumes bit for bit.
"""

from __future__ import annotations

import abc
import contextlib
import functools
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mla_moe.config import Config, ConfigError, DataConfig
from mla_moe.decode import generation

from .. import distributed, workdir
from ..checkpointing import folders, seal
from ..data import (
  batches,
  blend,
  corpus,
  corpus_folder,
  mixture,
  shards,
  tokenizer,
)
from . import steps

_TEMPERATURE = 0.7  # of the samples
_JOINT = '+'  # between the fingerprints of several texts


class Source(abc.ABC):
  """Batches of a run by arithmetic, held-out text, and the numbers about them.

  Attributes:
    fingerprint: of the data; a run resumes with the same one alone.
    heldout: micro-batches for evaluation.
    prompt: text whose beginning a sample continues.
    gzip_bits_per_byte: of the held-out text, or None.
    table: numbers of the run's texts, for people.
    writes: whether the source may write to the run's folder: a replay may not.
  """

  fingerprint: str
  heldout: list[batches.Batch]
  prompt: str
  gzip_bits_per_byte: float | None = None
  table: Sequence[dict] = ()
  writes: bool = True

  @abc.abstractmethod
  def batch(self, setup, number: int, state: Any, left_out: int) -> NamedTuple:
    """Returns this process's rows of the batch of step `number`, from 1.

    `state` is the one before the step; `left_out` sequences of text are skipped
    (see `skips`).
    """

  def tokens(self, config: Config, number: int) -> int:
    """Returns the tokens that step `number` computes, for its speed."""
    return steps.tokens(config, number)[1]

  def may_stop(self, number: int) -> bool:
    """Whether a run can be saved after this step, and resumed there."""
    return True

  def row(self, number: int) -> dict:
    """Returns the source's own numbers in the row of a step."""
    return {}

  def headline(self, row: dict) -> str:
    """Returns the main numbers of a step's row, for the person who waits."""
    vio = f'  MaxVio {row["max_vio"]:.2f}' if 'max_vio' in row else ''
    if 'index_kl' in row:  # of sparse attention: a value a layer
      vio += f'  index KL {sum(row["index_kl"]) / len(row["index_kl"]):.3f}'
    return f'loss {row["main_loss"]:.3f}{vio}'

  def notices(self, row: dict) -> list[str]:
    """Returns lines about a step's row that a person should know."""
    return []

  def close(self) -> None:  # noqa: B027 (most sources have none)
    """Ends the source's processes and files, after the run."""

  def evaluate(self, setup, number: int, state: Any) -> tuple[dict, str]:
    """Returns the numbers of the held-out text, and a line about them."""
    bits, gzip = _bits(setup, state, self.heldout), self.gzip_bits_per_byte
    row, beside = {'bits_per_byte': bits}, ''
    if gzip is not None:
      row['gzip_bits_per_byte'] = gzip
      beside = f' (gzip -9: {gzip:.3f})'
    return row, f'held out: {bits:.3f} bits per byte{beside}'

  def sample(self, setup, number: int, state: Any) -> list[str]:
    """Returns texts for samples.txt: the prompt's beginning, continued.

    Decoding unrolls the layers. Where FSDP splits them, a compiler may gather
    the weights of many at once, unlike a training step's scan.
    """
    window = setup.config.data.seq_len
    length = min(200, window // 2)
    prompt = setup.tokenizer.encode(self.prompt[: window - length])
    prompt = prompt[length - window :]
    rollout = generation.rollout(
      setup.config.model,
      setup.variables(state.params, state.router),
      np.array([prompt], np.int32),
      length,
      temperature=_TEMPERATURE,
      seed=number,
    )
    decode = setup.tokenizer.decode
    return [f'{decode(prompt)}<<<\n{decode(rollout.tokens[0])}']


Open = Callable[[Config, tokenizer.Tokenizer, pathlib.Path], Source]


def _bits(setup, state: Any, heldout: Sequence[batches.Batch]) -> float:
  """Returns bits per byte of held-out micro-batches."""
  nll, size = 0.0, 0
  for batch in heldout:
    batch_here = setup.place(batch)
    sums = setup.evaluate(state, batch_here, setup.base.params)
    nll += float(sums['nll'])
    targets = batch.targets[batch.targets >= 0]
    size += int(setup.byte_lengths[targets].sum())
  return batches.bits_per_byte(nll, size)


class Text(Source):
  """The stream of a corpus for pre-training, or of one for each source.

  The held-out number of several is the mean of theirs.
  """

  def __init__(
    self,
    texts: Sequence[corpus_folder.Corpus],
    validation: dict[str, shards.Tokens],
    config: Config,
  ):
    mean = lambda values: math.fsum(values) / len(texts)
    data, count = config.data, config.run.eval_batches
    self._data, self._left_out, self._bos = data, 0, texts[0].bos_id
    self._streams = [text.train for text in texts]
    self.fingerprint = _JOINT.join(text.fingerprint for text in texts)
    self.prompt = texts[0].prompt
    self.gzip_bits_per_byte = mean(text.gzip_bits_per_byte for text in texts)
    names = [name for *_, name in data.sources] or ['']
    parts = dict(zip(names, (text.heldout for text in texts), strict=True))
    self._sets = {
      name: batches.eval_batches(tokens, data, self._bos, count)
      for name, tokens in (parts | validation).items()
    }
    self._names, self.heldout = names, self._sets[names[0]]
    sequences, _ = batches.span(data, config.run.steps)
    epochs = mixture.epochs(data, self._streams, sequences)
    self.table = [
      dict(source=name, epochs=epochs[name], table=corpus_folder.table(text))
      for name, text in zip(names, texts, strict=True)
    ]

  def batch(self, setup, number: int, state: Any, left_out: int):
    self._left_out = left_out
    args = self._data, number - 1, self._bos, setup.rows, left_out
    if self._data.sources:
      return mixture.batch_at(self._streams, *args)
    return batches.batch_at(self._streams[0], *args)

  def row(self, number: int) -> dict:
    """Returns how often each of several sources has been read."""
    if not self._data.sources:
      return {}
    sequences = batches.span(self._data, number)[0] + self._left_out
    epochs = mixture.epochs(self._data, self._streams, sequences)
    return {f'epoch_{name}': times for name, times in epochs.items()}

  def evaluate(self, setup, number: int, state: Any) -> tuple[dict, str]:
    if list(self._sets) == ['']:
      return super().evaluate(setup, number, state)
    bits = {name: _bits(setup, state, x) for name, x in self._sets.items()}
    own = [bits[name] for name in self._names]
    row = {'bits_per_byte': math.fsum(own) / len(own)}
    row['gzip_bits_per_byte'] = self.gzip_bits_per_byte
    bits.pop('', None)  # an only source is the mean
    row |= {f'bits_per_byte/{name}': value for name, value in bits.items()}
    each = ', '.join(f'{name} {value:.3f}' for name, value in bits.items())
    mean = row['bits_per_byte']
    return row, f'held out: {mean:.3f} bits per byte ({each})'


def _recorded(checkpoints: pathlib.Path) -> str:
  """Returns the text's fingerprint in the newest seal of a run, or ''."""
  for step in reversed(folders.steps(checkpoints)):
    with contextlib.suppress(seal.Damaged):
      sealed = seal.read(checkpoints / str(step))
      if sealed:
        return sealed['facts'].get('corpus', '')
  return ''


def open_text(
  config: Config, words: tokenizer.Tokenizer, path: pathlib.Path
) -> Source:
  """Returns the source of a pre-training run in the folder `path`.

  Raises:
    ConfigError: a text that cannot be used.
  """
  if config.rl.task:
    raise ConfigError(
      f'rl.task={config.rl.task!r}: is for python -m experiments.rl; leave it '
      'empty to train on text'
    )
  cache, singles = path.parent / '.corpus', blend.singles(config.data)
  known = _recorded(workdir.checkpoints(path)).split(_JOINT)
  if len(known) != len(singles):  # of other sources: `progress` says so
    known = [''] * len(singles)
  texts = []
  for (name, data), fingerprint in zip(singles.items(), known, strict=True):
    with blend.named('data.sources', name):
      texts.append(_opened(data, words, cache, fingerprint))
      # A batch has rows of several sources.
      corpus_folder.check(texts[-1], data, rows=int(len(singles) > 1))
  blend.check(config, [text.train for text in texts])
  validation = {}
  for name, data in blend.validations(config.data).items():
    with blend.named('data.validation', name):
      text = _opened(data, words, cache, '')
      validation[name] = blend.whole(text, data)
  return Text(texts, validation, config)


def _opened(
  data: DataConfig, words: tokenizer.Tokenizer, cache: pathlib.Path, known: str
) -> corpus_folder.Corpus:
  """Returns the corpus of one source; the first process tokenises it."""
  tokenise = functools.partial(corpus.prepare, data, words, cache)
  text = distributed.alone(lambda: tokenise(known=known))
  name = distributed.of_first(text.fingerprint if text else '')
  if not text:
    # The first process vouches for the text, where they share a folder.
    is_here = (cache / name / 'corpus.json').exists()
    shared = functools.partial(corpus_folder.opened, cache / name, words)
    text = shared() if is_here else tokenise(known=name)
  return text
