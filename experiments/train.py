"""Trains a config: the loop, from top to bottom.

  python -m experiments.train --config=configs/tiny.py --workdir=runs/tiny

The same command again resumes where the last checkpoint was, bit for bit.
SIGTERM and SIGINT save at the next step and exit 0; a second one ends at once.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import pathlib
import resource
import signal
import time

from experiments import cli, workdir
from mla_moe import config as config_lib


def run(config: config_lib.Config, folder: os.PathLike | str) -> dict:
  """Trains in `folder`; returns the last numbers (step, loss, bits_per_byte)."""
  with workdir.claim(folder, config) as path:
    return _run(config, path)


def _run(config: config_lib.Config, path: pathlib.Path) -> dict:
  import jax
  import numpy as np

  from experiments import logs, report, runtime, sample
  from mla_moe import (
    checkpoint,
    corpus,
    cost,
    data,
    fp8,
    fp8_health,
    optim,
    sharding,
    step,
  )
  from mla_moe import tokenizer as tokenizer_lib

  # ------------------------------------------------------------------- set-up
  sharding.check(config)
  runtime.keep_compilations(path.parent / '.jax_cache')
  runtime.keep_memory()
  _, slow = fp8.choose(config.model.precision, config.model.fp8_impl)
  if slow:
    print(slow)
  tokenizer = tokenizer_lib.load(
    config.data.tokenizer, config.model.bos_id, config.model.eos_id
  )
  text = corpus.prepare(config.data, tokenizer, path.parent / '.corpus')
  corpus.check(text, config)
  lengths = tokenizer.byte_lengths()
  heldout = data.eval_batches(
    text.heldout, config.data, text.bos_id, config.run.eval_batches
  )
  mesh = sharding.make_mesh(config.mesh) if config.mesh.devices > 1 else None
  place = functools.partial(_place, mesh=mesh)
  train = jax.jit(
    functools.partial(step.train_step, config=config), donate_argnums=0
  )
  evaluate = jax.jit(functools.partial(step.eval_step, config=config))
  examine = jax.jit(functools.partial(fp8_health.measure, config=config))
  with (
    jax.set_mesh(mesh) if mesh else contextlib.nullcontext(),
    checkpoint.manager(path / 'checkpoints', config.run.keep) as checkpoints,
    _Stop() as stop,
  ):
    # ------------------------------------------------------ state, new or old
    state = step.init_state(jax.random.key(config.run.seed), config, mesh)
    restored = checkpoint.restore(checkpoints, state)
    start = 0
    if restored:
      start, state, facts = restored
      # '' is a released checkpoint, which has seen no text of ours.
      if facts['corpus'] not in ('', text.fingerprint):
        raise config_lib.ConfigError(
          f'data.source={config.data.source!r}: the text has changed since '
          f'step {start}; restore it, or start in another workdir'
        )
      print(f'Resuming {path} at step {start}.')
    written = logs.Logs(path, start)
    print(_headline(config, cost.parameters(config)))
    peak = _matmul_peak(config)
    flops = cost.train_flops_per_token(config, config.data.seq_len, mtp=True)
    final = {'step': start}

    # ---------------------------------------------------------- what steps do
    def note(number, rates, values, seconds, tokens):
      values = jax.device_get(values)
      scalars = {k: float(v) for k, v in values.items() if v.ndim == 0}
      if not math.isfinite(scalars['loss']):
        raise FloatingPointError(
          f'step {number}: the loss is {scalars["loss"]}'
        )
      seen, size = data.span(config.data, number - 1)
      row = {
        'step': number,
        'tokens': (seen + size) * config.data.seq_len,
        'lr': rates.learning_rate,
        **scalars,
        'memory_mib': _memory_mib(),
      }
      if eight:
        row['fp8_fallbacks'] = fallen
      speed = ''
      if seconds:  # the first step compiles: it has no speed
        rate = tokens / seconds
        row |= {'tokens_per_s': rate, 'mfu': rate * flops / peak}
        speed = f'  {rate:,.0f} tokens/s'
      if values['load'].size:
        row |= written.health(number, values['load'])
        for name in ('entropy', 'bias_norm'):
          if name in values:
            row[name] = np.round(values[name].astype(float), 5).tolist()
      written.write(row)
      final.update(step=number, loss=row['loss'], main_loss=row['main_loss'])
      vio = f'  MaxVio {row["max_vio"]:.2f}' if 'max_vio' in row else ''
      return f'loss {row["main_loss"]:.3f}{vio}{speed}'

    def measure(number):
      nll, size = 0.0, 0
      for batch in heldout:
        nll += float(evaluate(state, place(batch))['nll'])
        size += int(lengths[batch.targets[batch.targets >= 0]].sum())
      bits = data.bits_per_byte(nll, size)
      written.write(
        {
          'step': number,
          'bits_per_byte': bits,
          'gzip_bits_per_byte': text.gzip_bits_per_byte,
        }
      )
      final['bits_per_byte'] = bits
      return (
        f'held out: {bits:.3f} bits per byte '
        f'(gzip -9: {text.gzip_bits_per_byte:.3f})'
      )

    def show(number):
      variables = {'params': state.params, 'router': state.router}
      window = config.data.seq_len
      new = min(200, window // 2)
      prompt = tokenizer.encode(text.prompt[: window - new])
      tokens = sample.sample(
        config.model, variables, prompt, new, window, seed=number
      )
      with open(path / 'samples.txt', 'a') as file:
        file.write(f'--- step {number}\n{tokenizer.decode(prompt)}')
        file.write(f'<<<\n{tokenizer.decode(tokens)}\n')

    def health(number):
      values = examine(state.params, state.router, place(batch))
      row = logs.fp8_health(jax.device_get(values))
      written.write({'step': number, **row})
      return (
        f'FP8 error {row["fp8_error"]:.3f}, flushed {row["fp8_flushed"]:.1e}'
      )

    def store(number):
      checkpoint.save(checkpoints, number, state, {'corpus': text.fingerprint})

    # --------------------------------------------------------------- the loop
    steps, every = config.run.steps, config.run
    eight = config.model.precision != 'bf16'
    due = lambda number, period: (
      period and (number % period == 0 or number == steps)
    )
    stream = data.batches(text.train, config.data, text.bos_id, start, steps)
    waiting, clock, tokens, fallen = None, None, 0, 0
    with logs.progress(steps, start) as tell:
      for number, batch in enumerate(stream, start + 1):
        seen, size = data.span(config.data, number - 1)
        rates = optim.rates(
          config.optim, number - 1, seen * config.data.seq_len
        )
        with fp8.fallbacks() as fell:  # products without their kernel: traced
          state, values = train(state, place(batch), place(rates))
        if fell:
          fallen = len(fell)
          print(*sorted(set(fell)), sep='\n')
        if waiting:  # the step before, fetched while this one runs
          tell(number - 1, note(*waiting))
          waiting = None
        tokens += size * config.data.seq_len
        if clock is None:  # the first step compiles: it is not timed
          jax.block_until_ready(values)
          clock, timed = time.perf_counter(), tokens
        if number % every.log_every == 0 or number == steps:
          jax.block_until_ready(values['loss'])
          now = time.perf_counter()
          spent, did = now - clock, tokens - timed
          waiting = (number, rates, values, spent if did else 0, did)
          clock, timed = now, tokens
        chores = [
          (measure, every.eval_every),
          (show, every.sample_every),
          (health, every.health_every if eight else 0),
          (store, every.save_every),
        ]
        due_now = [do for do, period in chores if due(number, period)]
        if due_now or stop.asked or number == steps:
          began = time.perf_counter()
          if waiting:
            tell(number, note(*waiting))
            waiting = None
          if stop.asked and store not in due_now:
            due_now.append(store)
          for do in due_now:
            tell(number, do(number))
          clock += time.perf_counter() - began
        else:
          tell(number, '')
        if stop.asked and number < steps:
          print(f'Stopped by {stop.asked} at step {number}: saved.')
          break
    written.close()
  report.write(path)
  print(
    f'Results: {path / "report.html"}, metrics.jsonl and samples.txt there.'
  )
  return final


class _Stop:
  """The name of the signal that asked to stop; the second one kills."""

  asked = ''

  def __enter__(self):
    self._before = {}
    for number in (signal.SIGTERM, signal.SIGINT):
      self._before[number] = signal.signal(number, self._ask)
    return self

  def __exit__(self, *_):
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _ask(self, number, _):
    self.asked = signal.Signals(number).name
    signal.signal(number, signal.SIG_DFL)


def _place(tree, mesh=None):
  """A batch (or rates) on the device, or split over the mesh's batch axes."""
  import jax
  import numpy as np
  from jax.sharding import NamedSharding

  from mla_moe import sharding

  if mesh is None:
    return jax.device_put(jax.tree.map(np.asarray, tree))

  def one(x):
    axes = (None, 'batch', None) if np.ndim(x) == 3 else ()
    return jax.device_put(
      np.asarray(x), NamedSharding(mesh, sharding.spec(axes))
    )

  return jax.tree.map(one, tree)


def _headline(config, counts) -> str:
  data = config.data
  return (
    f'{counts.total + counts.mtp:,} parameters, {counts.active:,} active; '
    f'{config.run.steps} steps of {data.batch_size} x {data.seq_len} tokens'
  )


def _matmul_peak(config) -> float:
  """FLOP/s of this model's widest dense product, tokens x dim x 2 widths."""
  import jax
  import jax.numpy as jnp

  model, data = config.model, config.data
  rows = min((data.micro_batch or data.batch_size) * data.seq_len, 8192)
  a = jnp.ones((rows, model.dim), model.dtype)
  b = jnp.ones((model.dim, 2 * model.dense_width), model.dtype)
  product = jax.jit(jnp.matmul)
  product(a, b).block_until_ready()
  best, began = math.inf, time.perf_counter()
  while time.perf_counter() - began < 0.3:
    at = time.perf_counter()
    product(a, b).block_until_ready()
    best = min(best, time.perf_counter() - at)
  return 2.0 * rows * b.size / best * jax.device_count()


def _memory_mib() -> float:
  """Peak MiB of the first accelerator, or of this process on a CPU."""
  import jax

  stats = jax.local_devices()[0].memory_stats()
  if stats:
    return round(stats['peak_bytes_in_use'] / 2**20, 1)
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return round(peak / 1024, 1)


def main() -> None:
  """Runs the flags' config in the flags' folder."""
  run(cli.config(), cli.FLAGS.workdir)


if __name__ == '__main__':
  cli.run(main)
