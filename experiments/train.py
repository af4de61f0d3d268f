"""Trains a config: the loop, from top to bottom.

  python -m experiments.train --config=configs/tiny.py --workdir=runs/tiny

The same command again resumes from the last checkpoint, bit for bit. SIGTERM
and SIGINT save at the next step and exit with 0; a second signal ends the
process at once. --replay=STEP trains nothing: it computes that step again from
the checkpoint before it, and compares it with the run's record.

`run` claims the folder, `_run` opens the parts of a run, and `_steps` is the
loop. A step is dispatched before the results of the step before it are read:
the device computes while Python writes. Hence a step's faults are seen one step
late, or at once where a chore or a save is due.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

from absl import flags

from mla_moe import vocabulary
from mla_moe.config import Config, RunConfig

from . import cli, distributed, profile, run_tokenizer, workdir
from .adapters import base as frozen_base
from .checkpointing import retention
from .training import signals, skips, tracking
from .training.clock import Clock
from .training.progress import Progress, resume
from .training.watchdog import Watchdog


class Options(NamedTuple):
  """Choices of one start of a run beside its config.

  profile: the steps to trace, FIRST:LAST. track: a tracker that gets the
  metrics, too. allow_unsealed: resume from a checkpoint without a seal. init:
  the run or release whose weights a run begins from (`warm_start`).
  """

  profile: str = ''
  track: str = ''
  allow_unsealed: bool = False
  init: str = ''


class Parts(NamedTuple):
  """The open parts of a run: see `_run`."""

  setup: Any  # preparation.Setup
  recorder: Any  # recorder.Recorder
  writer: Any  # saving.Writer
  watchdog: Watchdog
  stop: signals.Stop
  trace: Any  # of `profile.steps`


class End(NamedTuple):
  """Why the loop ended.

  kind: 'finished'; 'stopped', by a signal; 'back', to before the spikes that
  began at step `first`; or 'halted', because too many steps were skipped.
  """

  kind: str
  progress: Progress
  reason: str = ''
  first: int = 0


def run(
  config: Config,
  folder: os.PathLike | str,
  options: Options = Options(),
  open_source: Any = None,
) -> dict:
  """Trains in `folder`; returns the last numbers (step, loss, bits_per_byte).

  `open_source` makes the source of the batches (`training.source`): without
  one, the text of the config is read.

  Raises:
    ConfigError: a config, a text or a checkpoint that cannot be used.
    cli.Stopped: the run could not go on; its last good state is saved.
  """
  folder = cli.run_folder('workdir', folder)
  cli.check_paths(config)
  frozen_base.check(config)
  frozen_base.check_folder(config)
  if options.init:
    init = str(cli.run_folder('init', options.init))
    options = options._replace(init=init)
  with (
    distributed.claim(folder, config) as (path, records, send),
    signals.Stop() as stop,
  ):
    try:
      config = run_tokenizer.resolved(path, config)
      return _run(config, path, records, send, stop, options, open_source)
    except signals.Stopped as signal:
      print(f'Stopped by {signal} before the first step: nothing to save.')
      return {'step': 0}
    except RuntimeError as error:
      if 'RESOURCE_EXHAUSTED' not in str(error):
        raise
      raise cli.Stopped(_out_of_memory(config, error)) from error
    except OSError as error:
      if error.errno not in workdir.DISK and path.is_dir():
        raise
      raise cli.Stopped(workdir.trouble(path, error)) from error


def _run(
  config: Config,
  path: pathlib.Path,
  records: pathlib.Path,
  send: Callable,
  stop: signals.Stop,
  options: Options,
  open_source: Any,
) -> dict:
  """Opens the parts of a run, trains, and closes them.

  Rows go to `records`: `path` on the first process, a scratch folder on the
  others. `send` is called before each seal.
  """
  import jax

  from .checkpointing import saving
  from .training import logs, preparation, source, steps
  from .training.recorder import Recorder

  traced = profile.window(options.profile)
  name = options.track if distributed.first() else ''
  with contextlib.ExitStack() as stack:
    enter = stack.enter_context
    trackers = []
    if name:
      trackers.append(tracking.Tracker(name, path, dataclasses.asdict(config)))
      stack.callback(trackers[0].close)
    open_source = open_source or source.open_text
    with stop.at_once():
      setup = preparation.prepare(config, path, open_source)
    stack.callback(setup.source.close)
    if setup.mesh:
      enter(jax.set_mesh(setup.mesh))
    run = config.run
    keep = dict(keep_every=run.keep_every, keep_best=run.keep_best)
    keep['before_seal'] = send
    writer = enter(saving.Writer(workdir.checkpoints(path), run.keep, **keep))
    watchdog = enter(Watchdog(run.step_timeout))
    start, is_warm = _start(setup, options)
    print(preparation.headline(config))
    if steps.schedule_end(config):
      print(steps.schedule_end(config))
    with logs.progress_bar(run.steps, start.number) as tell:
      recorder = Recorder(setup, records, start.number, trackers, tell)
      stack.callback(recorder.close)
      trace = enter(profile.steps(path / 'profile', *traced, watchdog.rest))
      parts = Parts(setup, recorder, writer, watchdog, stop, trace)
      if is_warm:
        _save(parts, start)
        if run.eval_every:  # what the weights could do before
          _attempt(recorder.evaluate, start, recorder)
      end = _steps(parts, start)
      while end.kind == 'back':
        end = _steps(parts, _go_back(parts, end))
    try:
      _finish(parts, end)
    finally:
      _report(path)
  return recorder.final


def _start(setup, options: Options) -> tuple[Progress, bool]:
  """Returns the progress from which a run goes on, and if it is a warm start.

  Step 0 of a warm start must be saved.
  """
  from .training import preparation, warm_start

  unsealed = options.allow_unsealed
  start = resume(setup, allow_unsealed=unsealed, set_aside=retention.set_aside)
  origin = warm_start.chosen(setup.path, options.init, begun=bool(start))
  if start:
    print(f'Resuming {setup.path} at step {start.number}.')
    return start, False
  if origin:
    state = warm_start.begin(setup, origin, allow_unsealed=unsealed)
  else:
    state = preparation.fresh(setup)
  return Progress(0, state, skips.Counts()), bool(origin)


def _steps(parts: Parts, start: Progress) -> End:
  """Trains until a signal, skipped steps or the last step end the loop."""
  import jax

  from .training import steps

  setup, recorder, run = parts.setup, parts.recorder, parts.setup.config.run
  (number, state, counts), source = start, setup.source
  clock, previous = Clock(), None
  while number < run.steps:
    number += 1
    batch = source.batch(setup, number, state, counts.left_out)
    state, result = _dispatch(parts, clock, number, state, batch)
    end = previous and _examine(recorder, previous, counts, run)
    clock.add(source.tokens(setup.config, number), result.metrics)
    if number % run.log_every == 0 or number == run.steps:
      jax.block_until_ready(result.metrics['loss'])
      result = result._replace(lap=clock.lap())
    previous = result

    may_stop = source.may_stop(number)
    signal = signals.agreed(result.signal) if may_stop else ''
    chores = recorder.chores(number)
    saves = steps.is_due(run, number, run.save_every) or signal
    if end or chores or saves or number == run.steps:
      parts.watchdog.rest()
      with clock.paused():
        end = end or _examine(recorder, result, counts, run)
        progress, previous = Progress(number, state, counts), None
        if end and end.kind == 'back':  # frees the memory for another state
          progress = progress._replace(state=None)
        if end:
          return end._replace(progress=progress)
        for chore in chores:
          _attempt(chore, progress, recorder)
        if saves:
          _save(parts, progress)
      if signal and number < run.steps:
        return End('stopped', progress, signal)
  return End('finished', Progress(number, state, counts))


def _dispatch(parts: Parts, clock: Clock, number: int, state, batch):
  """Starts a step on the devices; returns its state and its `Result`."""
  from mla_moe import fp8

  from .checkpointing import fingerprint
  from .training import disturbances, steps
  from .training.recorder import Result

  config = parts.setup.config
  rates = steps.rates(config, number)
  disturbed, state = disturbances.disturb(number, rates, state)
  signal = parts.stop.share()
  clock.pause(parts.trace(number, state))
  if clock.running:
    parts.watchdog.arm(f'step {number}')
  with fp8.collect_fallbacks() as fallbacks:  # when the step is traced
    state, metrics = steps.take(parts.setup, state, batch, disturbed)
  if fallbacks:
    parts.recorder.fallbacks(fallbacks)
  checked = steps.is_checked(config.run, number)
  # The first step compiles: the fingerprints' program with it.
  prints = fingerprint.of(state) if checked or not clock.running else None
  return state, Result(
    number, rates, metrics, signal, prints if checked else None
  )


def _examine(
  recorder, result, counts: skips.Counts, run: RunConfig
) -> End | None:
  """Records a step's results; returns an `End` if the loop must end there.

  Raises:
    cli.Stopped: devices hold different copies of an array.
  """
  number, skipped = result.number, int(result.metrics['skipped'])
  if skipped:
    recorder.incident(number, f'skipped: {skips.REASONS[skipped]}')
  if result.lap or skipped:
    recorder.step(result)
  else:
    recorder.advance(number)
  if result.fingerprints:
    apart = recorder.fingerprints(result, counts.left_out)
    if apart:
      recorder.incident(number, f'replicas differ: {"; ".join(apart)}')
      raise cli.Stopped(
        f'step {number}: devices hold different copies of {apart[0]}; suspect '
        'that device. Nothing was saved since; the same command resumes before'
      )
  verdict = counts.add(skipped, run)
  if not verdict:
    return None
  first = number - counts.streak + 1
  if verdict == 'back':
    return End('back', None, first=first)
  return End('halted', None, f'step {number}: {verdict}', first)


def _attempt(chore, progress: Progress, recorder) -> None:
  """Does a chore; one that fails is an incident, and training goes on."""
  number, state, _ = progress
  try:
    chore(number, state)
  except Exception as error:
    text = ' '.join(str(error).split())[:200]
    recorder.incident(
      number, f'{chore.__name__} failed: {type(error).__name__}: {text}'
    )


@contextlib.contextmanager
def _saving(recorder, number: int):
  """Makes an incident of a save that fails in the block: training goes on."""
  from .checkpointing import saving

  try:
    yield
  except saving.NotSaved as error:
    recorder.incident(number, str(error))


def _until(done, recorder, number: int, last: int = -1) -> None:
  """Calls `ready` or `wait` of a writer; saves that failed are incidents.

  Raises:
    NotSaved: that of the step `last`.
  """
  from .checkpointing import saving

  while True:
    try:
      return done()
    except saving.NotSaved as error:
      if error.step == last:
        raise
      recorder.incident(number, str(error))


def _save(parts: Parts, progress: Progress) -> None:
  """Begins to save the progress, when the one before it is written."""
  _until(parts.writer.ready, parts.recorder, progress.number)
  for text in parts.writer.notices():
    parts.recorder.incident(progress.number, text)
  with _saving(parts.recorder, progress.number):
    parts.writer.save(progress.number, progress.state, _facts(parts, progress))


def _facts(parts: Parts, progress: Progress) -> dict:
  """Returns what a checkpoint says of its run, beside the state."""
  return {
    'corpus': parts.setup.source.fingerprint,
    'config': workdir.digest(parts.setup.config),
    'base': parts.setup.base.fingerprint,
    'bits_per_byte': parts.recorder.bits_per_byte.get(progress.number),
    'counts': dataclasses.asdict(progress.counts),
  }


def _go_back(parts: Parts, end: End) -> Progress:
  """Returns the progress from before a series of spikes.

  The text from there to `spike_jump` batches after the last step is left out.
  """
  from .data import batches

  setup, recorder, writer, *_ = parts
  config, (number, _, counts) = setup.config, end.progress
  _until(writer.wait, recorder, number)
  start = resume(setup, before=end.first, set_aside=retention.set_aside)
  if start is None:
    raise cli.Stopped(
      f'step {number}: spikes since step {end.first}, and no checkpoint from '
      'before; lower config.optim.learning_rate or config.run.save_every'
    )
  first, last = (
    batches.span(config.data, step)[0] for step in (start.number, number)
  )
  jump = config.run.spike_jump * config.data.batch_size
  counts = counts.after_rollback(counts.left_out + last - first + jump)
  recorder.rewind(start.number)
  recorder.incident(
    number,
    f'went back to step {start.number}, from before the spikes that began at '
    f'step {end.first}; {counts.left_out} sequences are left out',
  )
  return start._replace(counts=counts)


def _finish(parts: Parts, end: End) -> None:
  """Waits for the last checkpoint, and prints why a run ends early.

  Raises:
    cli.Stopped: the run was halted, or its last step could not be saved.
  """
  from .checkpointing import saving

  number = end.progress.number
  try:
    if end.kind == 'halted':
      _until(parts.writer.wait, parts.recorder, number)
      facts = _facts(parts, end.progress)
      parts.writer.save(number, end.progress.state, facts)
    _until(parts.writer.wait, parts.recorder, number, last=number)
  except saving.NotSaved as error:
    raise cli.Stopped(f'{error}; sealed steps are as they were') from None
  if end.kind == 'halted':
    parts.recorder.incident(number, end.reason)
    raise cli.Stopped(
      f'{end.reason}; step {number} is saved, and holds the last good numbers'
    )
  if end.kind == 'stopped':
    print(f'Stopped by {end.reason} at step {number}: saved.')


def _report(path: pathlib.Path) -> None:
  """Draws the report, and prints where the results are."""
  from . import report
  from .training import samples

  metrics = path / 'metrics.jsonl'
  # A run that a signal stops in its first steps may have logged nothing.
  logged = any('loss' in row for row in workdir.rows(metrics))
  if distributed.first() and logged:
    files = report.write(path), metrics, path / samples.FILE
    names = [file.name for file in files if file and file.exists()]
    print(f'Results in {path}: {", ".join(names)}.')


def _out_of_memory(config: Config, error: Exception) -> str:
  """Returns a line with the size of the state, and three ways to need less."""
  from .plan import memory

  sizes = memory.footprint(config)
  state = (sizes.state + sizes.gradients) / 2**30
  parts = 'parameters, gradients and optimizer'
  if sizes.base:
    parts = 'adapters, gradients, optimizer and frozen base'
  data, mesh = config.data, config.mesh
  return (
    f'out of memory ({str(error).splitlines()[0][:200]}); {parts} '
    f'take {state:,.2f} GiB of each device, activations the rest: lower '
    f'config.data.micro_batch={data.micro_batch} (0 is all '
    f"{data.batch_size}), keep less by config.model.compute.remat='full', "
    f'or split the state over more devices by config.mesh.fsdp={mesh.fsdp}'
  )


def define(
  values: flags.FlagValues = flags.FLAGS, words: list[str] | None = None
) -> None:
  """Defines this program's flags, beside those of a config, in `values`.

  `words` are the command line, without which it is this process's.
  """
  cli.define(values, words)
  cli.define_unsealed(values)
  own = dict(flag_values=values)
  text = 'Compute this step again, and compare.'
  flags.DEFINE_integer('replay', 0, text, 0, **own)
  modes = ['auto', 'on', 'off']
  flags.DEFINE_enum(
    'distributed', 'auto', modes, 'Join other processes.', **own
  )
  text = 'Seconds to wait for them.'
  flags.DEFINE_integer('distributed_timeout', 300, text, 1, **own)
  text = 'Begin from the weights of this run or Hugging Face folder.'
  cli.define_path('init', '', text, values, cli.run_folder)
  flags.DEFINE_string('profile', '', 'Trace these steps: FIRST:LAST.', **own)
  text = 'Tracker to tell as well.'
  flags.DEFINE_enum('track', '', tracking.TRACKERS, text, **own)


def begin(config: Config, open_source: Any = None) -> None:
  """Runs the config, or replays a step of it, as the other flags say.

  `open_source` is that of `run`.
  """
  values = flags.FLAGS
  options = Options(
    values.profile, values.track, values.allow_unsealed, values.init
  )
  distributed.start(values.distributed, values.distributed_timeout)
  if values.replay:
    from .training import replay

    replay.replay(
      _here(values.workdir),
      values.replay,
      allow_unsealed=options.allow_unsealed,
      open_source=open_source,
    )
    return
  distributed.agree(config)
  run(config, values.workdir, options, open_source)


def _here(folder: str) -> pathlib.Path:
  """Returns a run's folder, or the copy of its records in a bucket."""
  return distributed.records(folder, 0)


def configured() -> Config:
  """Returns the config of the flags, for the run in the folder of the flags.

  A tokenizer that is no longer where the config says is the run's own.

  Raises:
    ConfigError: as `cli.config`.
  """
  data = flags.FLAGS.config.get('data') or {}
  name = data.get('tokenizer')
  if isinstance(name, str) and not vocabulary.exists(name):
    run = _here(flags.FLAGS.workdir)
    data.tokenizer = run_tokenizer.path_of(run, name)
  return cli.config()


def main() -> None:
  """Runs the config of the flags in the folder of the flags."""
  begin(configured())


if __name__ == '__main__':
  cli.run(main, define)
