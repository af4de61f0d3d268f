"""The files of a run: rows of metrics, samples, fingerprints, incidents.

The loop calls a `Recorder` for each step and for each chore: evaluation, a
sample, the health of FP8. The rows after a step are dropped when the run goes
back to it, except those of incidents.jsonl: an incident has happened.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from mla_moe.train import optim

from .. import runtime, workdir
from ..adapters import flops
from ..checkpointing import fingerprint
from . import logs, samples, starts, steps, tracking
from .preparation import Setup, matmul_peak

_FINAL = ('step', 'loss', 'main_loss', 'bits_per_byte')


class Result(NamedTuple):
  """A step's results; the device may still be computing them.

  `signal` is of `Stop.share`, before the step; `fingerprints` are of the state
  after it, or None where none are due; `lap` is (seconds, tokens) since the
  last logged step, (0, 0) where no step was timed, or None where this one is
  not logged.
  """

  number: int
  rates: optim.Rates
  metrics: dict[str, jax.Array]
  signal: Any
  fingerprints: fingerprint.Pending | None
  lap: tuple[float, int] | None = None


class Recorder:
  """Writes the files of a run into `folder`, from step `start` on.

  `tell(step, text)` shows a line to the person who waits.

  Attributes:
    final: the last values of the row's main numbers, for the caller of a run.
    bits_per_byte: {step: of the held-out text}.
  """

  def __init__(
    self,
    setup: Setup,
    folder: pathlib.Path,
    start: int,
    trackers: Sequence[tracking.Tracker],
    tell: Callable[[int, str], Any],
  ):
    config = setup.config
    self._setup, self._folder = setup, folder
    self._trackers, self._tell = trackers, tell
    self._flops = flops.train_flops_per_token(
      config, config.data.seq_len, mtp=True
    )
    self._peak = matmul_peak(config)
    self._is_fp8 = config.model.precision != 'bf16'
    self._fallbacks = 0
    self._incidents = workdir.Rows(folder / 'incidents.jsonl')
    self._logs = self._fingerprints = None
    self.bits_per_byte: dict[int, float] = {}
    self.rewind(start)
    starts.record(folder, start, setup.source.table)

  def rewind(self, step: int) -> None:
    """Drops the rows after `step`; `final` is read from those before."""
    if self._logs:
      self._logs.close()
      self._fingerprints.close()
    self._logs = logs.Logs(self._folder, step)
    latest: dict = {}
    for _, row in workdir.backwards(self._folder / 'metrics.jsonl'):
      latest = _numbers(row) | latest
      if len(latest) == len(_FINAL):
        break
    self.final = {'step': step} | latest
    path = self._folder / 'fingerprints.jsonl'
    workdir.rewind(path, step)
    self._fingerprints = workdir.Rows(path)
    samples.rewind(self._folder / samples.FILE, step)

  def close(self) -> None:
    """Closes the files.

    Raises:
      OSError: rows that cannot be written.
    """
    self._incidents.close()
    self._fingerprints.close()
    self._logs.close()

  def incident(self, step: int, text: str) -> None:
    """Prints and records something that a person should know."""
    print(f'ATTENTION, step {step}: {text}')
    self._incidents.append({'step': step, 'what': workdir.redacted(text)})

  def fallbacks(self, reasons: Sequence[str]) -> None:
    """Prints why compiled FP8 products have no kernel, and counts them."""
    self._fallbacks = len(reasons)
    print(*sorted(set(reasons)), sep='\n')

  def fingerprints(self, result: Result, left_out: int) -> list[str]:
    """Records a step's fingerprints; returns the leaves whose copies differ."""
    leaves, apart = fingerprint.read(result.fingerprints)
    self._fingerprints.append(
      {'step': result.number, 'left_out': left_out, 'leaves': leaves}
    )
    return apart

  def step(self, result: Result) -> None:
    """Records and prints a step."""
    setup, number = self._setup, result.number
    config = setup.config
    metrics = jax.device_get(result.metrics)
    scalars = {k: float(v) for k, v in metrics.items() if v.ndim == 0}
    row = {
      'step': number,
      'tokens': sum(steps.tokens(config, number)),
      'lr': result.rates.learning_rate,
      **scalars,
      'skipped': int(scalars['skipped']),
      'memory_mib': _memory_mib(),
    }
    if self._is_fp8:
      row['fp8_fallbacks'] = self._fallbacks
    speed = ''
    seconds, tokens = result.lap or (0.0, 0)
    if seconds:  # the first step compiles: it has no speed
      rate = tokens / seconds
      row |= {'tokens_per_s': rate, 'mfu': rate * self._flops / self._peak}
      speed = f'  {rate:,.0f} tokens/s'
    if metrics['load'].size:
      row |= self._logs.health(number, metrics['load'])
      for name in ('entropy', 'bias_norm'):
        if name in metrics:
          row[name] = np.round(metrics[name].astype(float), 5).tolist()
      if config.mesh.expert > 1:
        row['overflow'] = int(metrics['overflow'].sum())
    for name in sorted(metrics):
      if name.startswith('index_') and metrics[name].ndim:
        row[name] = np.round(metrics[name].astype(float), 5).tolist()
    row |= setup.source.row(number)
    self._write(row)
    self._tell(number, setup.source.headline(row) + speed)
    for text in setup.source.notices(row):
      self.incident(number, text)

  def advance(self, number: int) -> None:
    """Moves the progress bar to a step that is not logged."""
    self._tell(number, '')

  def chores(self, number: int) -> list[Callable]:
    """Returns the methods `(number, state)` that are due after a step."""
    run = self._setup.config.run
    has_fp8 = self._is_fp8 and self._setup.source.heldout
    periods = [
      (self.evaluate, run.eval_every),
      (self.sample, run.sample_every),
      (self.fp8_health, run.health_every if has_fp8 else 0),
    ]
    due = steps.is_due
    return [chore for chore, period in periods if due(run, number, period)]

  def evaluate(self, number: int, state: Any) -> None:
    """Records the source's numbers of held-out text."""
    row, text = self._setup.source.evaluate(self._setup, number, state)
    self._write({'step': number, **row})
    if 'bits_per_byte' in row:
      self.bits_per_byte[number] = row['bits_per_byte']
    self._tell(number, text)

  def sample(self, number: int, state: Any) -> None:
    """Records the source's samples."""
    texts = self._setup.source.sample(self._setup, number, state)
    samples.append(self._folder / samples.FILE, number, texts)

  def fp8_health(self, number: int, state: Any) -> None:
    """Records the health of FP8, always on the same held-out batch."""
    setup = self._setup
    batch = setup.place(setup.source.heldout[0])
    values = setup.fp8_health(state.params, state.router, batch)
    row = logs.fp8_health(jax.device_get(values))
    self._write({'step': number, **row})
    error, flushed = row['fp8_error'], row['fp8_flushed']
    self._tell(number, f'FP8 error {error:.3f}, flushed {flushed:.1e}')

  def _write(self, row: dict) -> None:
    self._logs.write(row)
    for tracker in self._trackers:
      tracker.write(row)
    self.final |= _numbers(row)


def _numbers(row: dict) -> dict:
  """Returns those of a row that the caller of a run gets."""
  return {name: row[name] for name in _FINAL if name in row}


def _memory_mib() -> float:
  """Returns the peak MiB of the first accelerator, or of a CPU's process."""
  stats = jax.local_devices()[0].memory_stats()
  if stats:
    return round(stats['peak_bytes_in_use'] / 2**20, 1)
  return round(runtime.peak_memory() / 2**20, 1)
