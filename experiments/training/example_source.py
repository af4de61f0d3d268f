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
from typing import Any

import numpy as np

from mla_moe import vocabulary
from mla_moe.config import Config, ConfigError
from mla_moe.decode import generation

from .. import ends
from ..data import batches, packing
from ..data.tokenizer import Tokenizer
from . import examples, source

_SAMPLES = 4  # held-out prompts that a sample answers


class Examples(source.Source):
  """The batches of a run on examples.

  Attributes:
    rows: number of packed rows, an epoch.
  """

  def __init__(
    self,
    config: Config,
    tokenizer: Tokenizer,
    own: str = '',
    say: Callable[[str], None] = print,
  ):
    """Reads, tokenises and packs the examples of `data.source`.

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
    train, self._heldout = examples.split(fit, data.heldout)
    self.fingerprint = _fingerprint(whole, config)
    self._data = data
    self._pairs = [(x.prompt, x.completion) for x in train]
    self._rows = _packed(self._pairs, length)
    self.rows = len(self._rows)
    self.heldout = _spread(self._heldout, data, config.run.eval_batches)
    say(_summary(self._pairs, self.rows, len(self._heldout), config))

  def batch(
    self, setup, number: int, state: Any, left_out: int
  ) -> batches.Batch:
    args = self._data, number - 1, setup.rows, left_out
    sequences = batches.sequences_at(*args)
    order = batches.shuffled(sequences, self.rows, self._data)
    rows = [self._rows[i] for i in order.flat]
    batch = _filled(self._pairs, rows, order.shape, self._data.seq_len)
    return batches.with_padding(batch, self._data)

  def sample(self, setup, number: int, state: Any) -> list[str]:
    """Returns answers to held-out prompts, beside the right ones."""
    model, decode = setup.config.model, setup.tokenizer.decode
    few = self._heldout[:_SAMPLES]
    lengths = [len(x.prompt) for x in few]
    prompts = np.zeros((len(few), max(lengths)), np.int32)
    for row, x in zip(prompts, few, strict=True):
      row[: len(x.prompt)] = x.prompt
    longest = 2 * max(len(x.completion) for x in few)
    rollout = generation.rollout(
      model,
      setup.variables(state.params, state.router),
      prompts,
      min(longest, self._data.seq_len, model.max_positions - max(lengths)),
      lengths=lengths,
      stop_ids=ends.of_run(setup.config),
      seed=number,
    )
    texts = []
    for i, x in enumerate(few):
      end = '' if rollout.ended[i] else ' ... (no end)'
      answer = decode(rollout.tokens[i, : rollout.counts[i]])
      texts.append(
        f'{decode(x.prompt)}<<<\n{answer}{end}\n'
        f'=== in the data\n{decode(x.completion)}'
      )
    return texts


def opened(own: str = '') -> source.Open:
  """Returns the function that opens the source of a run, for the loop.

  `own` is a chat template in the place of the one beside the tokenizer.
  """
  return lambda config, tokenizer, path: Examples(config, tokenizer, own)


def check(config: Config) -> None:
  """Refuses a config with which examples would be learned wrongly.

  Raises:
    ConfigError: names the field and the fix.
  """
  data, mesh, task = config.data, config.mesh, config.rl.task
  if task:
    raise ConfigError(
      f'rl.task={task!r}: is for python -m experiments.rl; leave it empty to '
      'learn from examples'
    )
  if data.sources:
    raise ConfigError(
      f'data.sources={data.sources!r}: are texts; name examples by '
      '--data=FILE.jsonl'
    )
  if data.source == 'stdlib':
    raise ConfigError(
      "data.source='stdlib': is text, and no examples; name them by "
      '--data=FILE.jsonl'
    )
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


def _filled(pairs, rows, shape, length) -> batches.Batch:
  """Returns `rows` of pairs as a batch of the shape [n, B]."""
  packed, _ = packing.fill(pairs, rows, length)
  arrays = (x.reshape(*shape, length) for x in packed)
  return batches.Batch(*arrays, np.int32(shape[0]))


def _spread(heldout, data, count: int) -> list[batches.Batch]:
  """Returns micro-batches of held-out rows, at most `count`, evenly spread."""
  micro = data.micro_batch or data.batch_size
  pairs = [(x.prompt, x.completion) for x in heldout]
  rows = _packed(pairs, data.seq_len)
  used = min(len(rows), count * micro)
  rows = [rows[i * len(rows) // used] for i in range(used)]
  rows += [[]] * (-used % micro)
  parts = (rows[i : i + micro] for i in range(0, len(rows), micro))
  return [_filled(pairs, part, (1, micro), data.seq_len) for part in parts]


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
