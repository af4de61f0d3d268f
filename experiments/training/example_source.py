"""Batches of examples: supervised fine-tuning's place in the training loop.

Examples are packed once, best-fit, into rows of `data.seq_len` columns, and a
keyed permutation of the rows is the order of an epoch, as in `data.batches`: so
any step's batch follows from its number, and a run resumes without a reader's
state. Rows are filled when a step needs them. Attention, positions and targets
end with each example; prompts and padding have no targets. So the loss is the
mean over all completion tokens of a step, and the held-out loss is in bits per
byte of the held-out completions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence

import numpy as np

from mla_moe import vocabulary
from mla_moe.config import Config, ConfigError
from mla_moe.data import batches, packing
from mla_moe.data.tokenizer import Tokenizer

from . import examples


class ExampleSource:
  """The batches of a run on the examples of `data.source`.

  Attributes:
    fingerprint: of all that the batches depend on but the schedule.
    heldout: micro-batches [1, B, T] of the held-out examples, at most
      `run.eval_batches`.
    prompt: the text of a held-out prompt, for samples.
    gzip_bits_per_byte: None; nothing is compared with completions.
    rows: number of packed rows, an epoch.
  """

  gzip_bits_per_byte = None

  def __init__(
    self,
    config: Config,
    tokenizer: Tokenizer,
    own: str = '',
    say: Callable[[str], None] = print,
  ):
    """Reads, tokenises and packs the examples.

    Args:
      config: of the run.
      tokenizer: its tokenizer.
      own: a chat template in the place of the one beside the tokenizer.
      say: shows lines to the person who waits.

    Raises:
      ConfigError: a config or a file that cannot be used.
    """
    check(config)
    data, length = config.data, config.data.seq_len
    folder = None
    if data.tokenizer != 'byte':
      folder = vocabulary.file_of(data.tokenizer).parent
    whole = examples.read(data.source, tokenizer, own, folder, say)
    fit = examples.fitting(whole, length, say)
    train, heldout = examples.split(fit, data.heldout)
    self.fingerprint = _fingerprint(whole, config)
    self.prompt = tokenizer.decode(heldout[0].prompt)
    self._data = data
    self._pairs = [(x.prompt, x.completion) for x in train]
    self._rows = _packed(self._pairs, length)
    self.rows = len(self._rows)
    self.heldout = _spread(heldout, data, config.run.eval_batches)
    say(_summary(self._pairs, self.rows, len(heldout), config))

  def batch(
    self,
    number: int,
    rows: np.ndarray | slice = slice(None),
    left_out: int = 0,
  ) -> batches.Batch:
    """Returns the batch of step `number`, from 1; see `batches.batch_at`."""
    args = self.rows, self._data, number - 1, rows, left_out
    order = batches.order_at(*args)
    rows_of = [self._rows[i] for i in order.flat]
    batch = _filled(self._pairs, rows_of, order, self._data.seq_len)
    return batches.with_padding(batch, self._data)


def check(config: Config) -> None:
  """Refuses a config with which examples would be learned wrongly.

  Raises:
    ConfigError: names the field and the fix.
  """
  data, mesh = config.data, config.mesh
  if data.packing != 'separate' or data.fim_rate:
    raise ConfigError(
      f'data.packing={data.packing!r}, data.fim_rate={data.fim_rate:g}: '
      'examples do not see each other and keep their order; set '
      '--config.data.packing=separate --config.data.fim_rate=0'
    )
  if mesh.stage > 1:
    raise ConfigError(
      f'mesh.stage={mesh.stage}: a pipeline counts padding, and rows of '
      'examples have some; set --config.mesh.stage=1'
    )


def _packed(pairs: Sequence[tuple], length: int) -> list[list[int]]:
  """Returns the rows of numbers of pairs."""
  columns = [packing.columns(len(p), len(c)) for p, c in pairs]
  return packing.best_fit(columns, length)


def _filled(pairs, rows, order, length) -> batches.Batch:
  """Returns `rows` of pairs as a batch of the shape of `order` [n, B]."""
  packed, _ = packing.fill(pairs, rows, length)
  arrays = (x.reshape(*order.shape, length) for x in packed)
  return batches.Batch(*arrays, np.int32(len(order)))


def _spread(heldout, data, count: int) -> list[batches.Batch]:
  """Returns micro-batches of held-out rows, at most `count`, evenly spread."""
  micro = data.micro_batch or data.batch_size
  pairs = [(x.prompt, x.completion) for x in heldout]
  rows = _packed(pairs, data.seq_len)
  used = min(len(rows), count * micro)
  rows = [rows[i * len(rows) // used] for i in range(used)]
  rows += [[]] * (-used % micro)
  one = np.zeros((1, micro))
  parts = (rows[i : i + micro] for i in range(0, len(rows), micro))
  return [_filled(pairs, part, one, data.seq_len) for part in parts]


def _summary(pairs, rows: int, heldout: int, config: Config) -> str:
  """Returns a line with the sizes, and the run's length in epochs."""
  data, steps = config.data, config.run.steps
  learned = sum(len(c) for _, c in pairs)
  used = sum(packing.columns(len(p), len(c)) for p, c in pairs)
  sequences = sum(batches.span(data, steps))
  return (
    f'{len(pairs):,} examples, {learned:,} tokens to learn, in {rows:,} rows '
    f'({used / (rows * data.seq_len):.0%} full), {heldout:,} examples held '
    f'out; {steps:,} steps are {sequences / rows:.3g} epochs.'
  )


def _fingerprint(whole: Sequence[examples.Example], config: Config) -> str:
  """Returns a hash of the token ids and of the options that place them."""
  data = config.data
  digest = hashlib.sha256(
    json.dumps(['examples', data.seq_len, data.heldout, data.seed]).encode()
  )
  for x in whole:
    digest.update(np.array([len(x.prompt), len(x.completion)], '<i4').tobytes())
    digest.update(x.prompt.astype('<i4').tobytes())
    digest.update(x.completion.astype('<i4').tobytes())
  return digest.hexdigest()[:24]
