"""What a run says of itself: rows, samples, fingerprints, incidents."""

from __future__ import annotations

import jax
import numpy as np

from experiments import runtime, workdir
from experiments.training import logs, sample
from experiments.training.preparation import Prepared, matmul_peak, place
from mla_moe import cost
from mla_moe.checkpoint import fingerprint
from mla_moe.data import batches

_FINAL = ('step', 'loss', 'main_loss', 'bits_per_byte')


class Recorder:
  """The files of a run, opened at a step, and `final`, its last numbers.

  incidents.jsonl keeps what went wrong and fingerprints.jsonl what the state
  was; the first is never rewound, because what happened has happened.
  """

  def __init__(self, ready: Prepared, start: int):
    self._ready, config = ready, ready.config
    self._flops = cost.train_flops_per_token(
      config, config.data.seq_len, mtp=True
    )
    self._peak = matmul_peak(config)
    self._incidents = workdir.Rows(ready.path / 'incidents.jsonl')
    self._logs = self._prints = None
    self.before = lambda number, state: 0.0  # of each step: a profile
    self.trackers = []  # who get the rows of metrics.jsonl as well
    self.measured: dict[int, float] = {}  # held-out bits per byte, by step
    self.eight = config.model.precision != 'bf16'
    self.fallen = 0  # products without their kernel, in a compiled step
    self.open(start)

  def open(self, step: int) -> None:
    """Goes back to `step`: later rows are dropped, `final` is the others'."""
    if self._logs:
      self._logs.close()
      self._prints.close()
    self._logs = logs.Logs(self._ready.path, step)
    self.final = {'step': step}
    for row in workdir.rows(self._ready.path / 'metrics.jsonl'):
      self.final |= {name: row[name] for name in _FINAL if name in row}
    path = self._ready.path / 'fingerprints.jsonl'
    workdir.rewind(path, step)
    self._prints = workdir.Rows(path)

  def _write(self, row: dict) -> None:
    self._logs.write(row)
    for tracker in self.trackers:
      tracker.write(row)

  def close(self) -> None:
    """Raises OSError where rows could not be written to the end."""
    self._incidents.close()
    self._prints.close()
    self._logs.close()

  def incident(self, step: int, text: str) -> None:
    """Something that a person should know: said, and written down."""
    print(f'ATTENTION, step {step}: {text}')
    self._incidents.append({'step': step, 'what': workdir.redacted(text)})

  def fingerprints(
    self, step: int, pending: fingerprint.Pending, passed: int
  ) -> list[str]:
    """Writes them down; returns the leaves whose replicas differ."""
    values, apart = fingerprint.read(pending)
    self._prints.append({'step': step, 'passed': passed, 'leaves': values})
    return apart

  def step(self, number, rates, values, seconds, tokens) -> str:
    """The row of a step, of which `tokens` took `seconds` (0: not timed)."""
    config = self._ready.config
    values = jax.device_get(values)
    scalars = {k: float(v) for k, v in values.items() if v.ndim == 0}
    seen, size = batches.span(config.data, number - 1)
    row = {
      'step': number,
      'tokens': (seen + size) * config.data.seq_len,
      'lr': rates.learning_rate,
      **scalars,
      'skipped': int(scalars['skipped']),
      'memory_mib': _memory_mib(),
    }
    if self.eight:
      row['fp8_fallbacks'] = self.fallen
    speed = ''
    if seconds:  # the first step compiles: it has no speed
      rate = tokens / seconds
      row |= {'tokens_per_s': rate, 'mfu': rate * self._flops / self._peak}
      speed = f'  {rate:,.0f} tokens/s'
    if values['load'].size:
      row |= self._logs.health(number, values['load'])
      for name in ('entropy', 'bias_norm'):
        if name in values:
          row[name] = np.round(values[name].astype(float), 5).tolist()
      if config.mesh.expert > 1:
        row['overflow'] = int(values['overflow'].sum())
    self._write(row)
    self.final |= {name: row[name] for name in _FINAL if name in row}
    vio = f'  MaxVio {row["max_vio"]:.2f}' if 'max_vio' in row else ''
    return f'loss {row["main_loss"]:.3f}{vio}{speed}'

  def measure(self, number, state) -> str:
    """Held-out bits per byte."""
    ready = self._ready
    nll, size = 0.0, 0
    for batch in ready.heldout:
      nll += float(ready.evaluate(state, place(ready, batch))['nll'])
      size += int(ready.lengths[batch.targets[batch.targets >= 0]].sum())
    bits, gzip = batches.bits_per_byte(nll, size), ready.text.gzip_bits_per_byte
    self._write(
      {'step': number, 'bits_per_byte': bits, 'gzip_bits_per_byte': gzip}
    )
    self.final['bits_per_byte'] = self.measured[number] = bits
    return f'held out: {bits:.3f} bits per byte (gzip -9: {gzip:.3f})'

  def health(self, number, state) -> str:
    """FP8's, on a held-out batch that is always the same."""
    ready = self._ready
    batch = place(ready, ready.heldout[0])
    values = ready.examine(state.params, state.router, batch)
    row = logs.fp8_health(jax.device_get(values))
    self._write({'step': number, **row})
    return f'FP8 error {row["fp8_error"]:.3f}, flushed {row["fp8_flushed"]:.1e}'

  def show(self, number, state) -> str:
    """A sample, into samples.txt."""
    ready = self._ready
    window = ready.config.data.seq_len
    new = min(200, window // 2)
    prompt = ready.tokenizer.encode(ready.text.prompt[: window - new])
    tokens = sample.sample(
      ready.config.model,
      {'params': state.params, 'router': state.router},
      prompt,
      new,
      window,
      seed=number,
    )
    with open(ready.path / 'samples.txt', 'a') as file:
      file.write(f'--- step {number}\n{ready.tokenizer.decode(prompt)}')
      file.write(f'<<<\n{ready.tokenizer.decode(tokens)}\n')
    return ''


def _memory_mib() -> float:
  """Peak MiB of the first accelerator, or of this process on a CPU."""
  stats = jax.local_devices()[0].memory_stats()
  if stats:
    return round(stats['peak_bytes_in_use'] / 2**20, 1)
  return round(runtime.peak_memory() / 2**20, 1)
