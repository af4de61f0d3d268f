"""Trains a config: the loop, from top to bottom.

  python -m experiments.train --config=configs/tiny.py --workdir=runs/tiny

The same command again resumes where the last checkpoint was, bit for bit.
SIGTERM and SIGINT save at the next step and exit 0; a second one ends at once.
With --replay=STEP nothing is trained: the step is computed again from the
checkpoint before it, and compared with what it gave when the run was there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import time
from typing import Any, NamedTuple

from absl import flags

from experiments import cli, distributed, profile, workdir
from experiments.training import signals, skips, tracking, watchdog
from experiments.training.course import Course, resume, shape
from mla_moe.config import Config


class Also(NamedTuple):
  """What a run does beside training: steps to trace, a tracker to tell."""

  profile: str = ''
  track: str = ''


def run(
  config: Config,
  folder: os.PathLike | str,
  *,
  unsealed: bool = False,
  also: Also = Also(),
) -> dict:
  """Trains in `folder`; returns the last numbers (step, loss, bits_per_byte).

  Raises:
    ConfigError: a config, a text or a checkpoint that cannot be used.
    cli.Stopped: the run could not go on; what it had is saved.
  """
  with (
    distributed.claim(folder, config) as (path, records),
    signals.Stop() as stop,
  ):
    try:
      return _run(config, path, records, stop, unsealed, also)
    except RuntimeError as error:
      if 'RESOURCE_EXHAUSTED' not in str(error):
        raise
      raise cli.Stopped(_out_of_memory(config, error)) from error
    except OSError as error:
      if error.errno not in workdir.DISK and path.is_dir():
        raise
      raise cli.Stopped(workdir.trouble(path, error)) from error


class Look(NamedTuple):
  """A dispatched step, to be looked at once the next one runs."""

  number: int
  rates: Any
  values: Any
  prints: Any  # fingerprints of the state after it, where they are due
  spent: tuple[float, int] | None  # seconds and tokens, where it is logged


class Ended(NamedTuple):
  """How steps ended: finished, stopped, back (to before `first`), halted."""

  how: str
  course: Course
  text: str = ''
  first: int = 0


def _run(
  config, path: pathlib.Path, records: pathlib.Path, stop, unsealed, also
) -> dict:
  import jax

  from experiments import report
  from experiments.training import logs, preparation, recorder
  from mla_moe.checkpoint import folders, store

  window = profile.window(also.profile)
  metrics = path / 'metrics.jsonl'
  track = also.track if distributed.first() else ''
  tell_also = tracking.of(track, path, dataclasses.asdict(config))
  ready = preparation.prepare(config, path)
  every = config.run
  with contextlib.ExitStack() as stack:
    if ready.mesh:
      stack.enter_context(jax.set_mesh(ready.mesh))
    kept = dict(keep_every=every.keep_every, keep_best=every.keep_best)
    saved = store.Writer(path / 'checkpoints', every.keep, **kept)
    stack.enter_context(saved)
    dog = stack.enter_context(watchdog.Watchdog(every.step_timeout))
    state = preparation.fresh(ready)
    like = jax.tree.map(shape, state)
    course = Course(0, state, skips.Guard())
    if folders.steps(path / 'checkpoints'):
      del state, course  # their memory is the restored one's
      course = resume(ready, like, unsealed=unsealed, aside=True)
      if course:
        print(f'Resuming {path} at step {course.number}.')
      else:  # killed in its very first save
        course = Course(0, preparation.fresh(ready), skips.Guard())
    written = recorder.Recorder(ready._replace(path=records), course.number)
    stack.callback(written.close)
    written.before = stack.enter_context(
      profile.steps(path / 'profile', *window, dog.rest)
    )
    if tell_also:
      stack.callback(tell_also.close)
      written.trackers.append(tell_also)
    print(preparation.headline(config))
    with logs.progress(every.steps, course.number) as tell:
      while True:
        ended = _steps(ready, course, saved, written, stop, dog, tell)
        dog.rest()
        if ended.how != 'back':
          break
        course = _back(ready, saved, written, like, ended)
    try:
      _end(ready, saved, written, ended)
    finally:
      # A run that is stopped at once has logged nothing to draw.
      if distributed.first() and report.logged(workdir.rows(metrics)):
        files = report.write(path), metrics, path / 'samples.txt'
        there = [file.name for file in files if file and file.exists()]
        print(f'Results in {path}: {", ".join(there)}.')
  return written.final


def _steps(ready, course, saved, written, stop, dog, tell) -> Ended:
  """Steps until something ends them; each is looked at behind the next one."""
  import jax

  from experiments.training.preparation import place
  from mla_moe import fp8
  from mla_moe.checkpoint import faults, fingerprint
  from mla_moe.data import batches
  from mla_moe.train import optim

  config, every = ready.config, ready.config.run
  start, state, counts = course
  del course
  number = start
  stream = batches.batches(
    ready.text.train,
    config.data,
    ready.text.bos_id,
    start,
    every.steps,
    *ready.share,
    left_out=counts.passed,
  )
  look, clock = None, None
  for number, batch in enumerate(stream, start + 1):
    seen, size = batches.span(config.data, number - 1)
    rates = optim.rates(config.optim, number - 1, seen * config.data.seq_len)
    given, state = faults.disturb(number, rates, state)
    asked = stop.share()
    traced = written.before(number, state)
    if clock:  # the first step compiles: it is not watched
      clock.pause(traced)
      dog.arm(f'step {number}')
    with fp8.collect_fallbacks() as fallbacks:  # when the step is traced
      state, values = ready.train(
        state, place(ready, batch), place(ready, given)
      )
    if fallbacks:
      written.fallen = len(fallbacks)
      print(*sorted(set(fallbacks)), sep='\n')
    checked = _checked(number, every)
    prints = fingerprint.of(state) if checked or not clock else None
    ended = look and _look(look, counts, every, written, tell)
    if ended:
      return _at(ended, number, state, counts)
    if clock:
      clock.tokens += size * config.data.seq_len
    else:  # nor timed
      jax.block_until_ready(values)
      clock = Clock()
    spent = None
    if number % every.log_every == 0 or number == every.steps:
      jax.block_until_ready(values['loss'])
      spent = clock.lap()
    look = Look(number, rates, values, prints if checked else None, spent)
    why = signals.agreed(asked)
    chores = _chores(number, every, written)
    saving = _due(number, every.save_every, every) or why
    if chores or saving or number == every.steps:
      dog.rest()
      began = time.perf_counter()
      ended = _look(look, counts, every, written, tell)
      look = None
      if ended:
        return _at(ended, number, state, counts)
      for do in chores:
        tell(number, _attempt(do, number, state, written))
      course = Course(number, state, counts)
      if saving:
        _store(ready, course, saved, written)
      clock.pause(time.perf_counter() - began)
      if why and number < every.steps:
        return Ended('stopped', course, why)
      del course  # its buffers become the next state's
  return Ended('finished', Course(number, state, counts))


def _at(ended: Ended, number, state, counts) -> Ended:
  """With its course; without the state, which is not gone back from."""
  state = None if ended.how == 'back' else state
  return ended._replace(course=Course(number, state, counts))


class Clock:
  """Tokens and seconds between logged steps, chores left out."""

  def __init__(self):
    self._began, self.tokens = time.perf_counter(), 0

  def lap(self) -> tuple[float, int]:
    """(seconds, tokens) since the last lap; (0, 0) where there was no step."""
    now = time.perf_counter()
    spent, did = now - self._began, self.tokens
    self._began, self.tokens = now, 0
    return (spent if did else 0.0), did

  def pause(self, seconds: float) -> None:
    """Leaves so much out of the lap."""
    self._began += seconds


def _due(number: int, period: int, every) -> bool:
  return bool(period) and (number % period == 0 or number == every.steps)


def _checked(number: int, every) -> bool:
  """Fingerprints are due; behind a saved step, too: replay is cheap there."""
  behind = every.save_every and number % every.save_every == 1
  return bool(every.check_every) and (
    _due(number, every.check_every, every) or bool(behind)
  )


def _chores(number, every, written) -> list:
  periods = [
    (written.measure, every.eval_every),
    (written.show, every.sample_every),
    (written.health, every.health_every if written.eight else 0),
  ]
  return [do for do, period in periods if _due(number, period, every)]


def _attempt(do, number, state, written) -> str:
  """A chore; a disk that fails it is no reason to stop training."""
  try:
    return do(number, state)
  except OSError as error:
    written.incident(number, f'{do.__name__}: {error}')
    return ''


def _look(look: Look, counts, every, written, tell) -> Ended | None:
  """Writes a step down; says whether the run must end there."""
  number = look.number
  skipped = int(look.values['skipped'])
  if skipped:
    written.incident(number, f'skipped: {skips.REASONS[skipped]}')
  logged = look.spent or skipped
  text = ''
  if logged:
    spent, tokens = look.spent or (0.0, 0)
    text = written.step(number, look.rates, look.values, spent, tokens)
  tell(number, text)
  apart = look.prints and written.fingerprints(
    number, look.prints, counts.passed
  )
  if apart:
    written.incident(number, f'replicas differ: {"; ".join(apart)}')
    raise cli.Stopped(
      f'step {number}: devices hold different copies of {apart[0]}; suspect '
      'that device. Nothing was saved since; the same command resumes before'
    )
  verdict = counts.saw(skipped, every)
  if not verdict:
    return None
  first = number - counts.streak + 1
  if verdict == 'back':
    return Ended('back', None, first=first)
  return Ended('halted', None, f'step {number}: {verdict}', first)


def _store(ready, course, saved, written) -> bool:
  """Saves; a save that fails is an incident, and training goes on."""
  from mla_moe.checkpoint import store

  bits = written.measured.get(course.number)
  facts = {
    'corpus': ready.text.fingerprint,
    'config': workdir.digest(ready.config),
    'bits_per_byte': bits,
    'guard': dataclasses.asdict(course.guard),
  }
  good = True
  for attempt in (
    saved.wait,
    lambda: saved.save(course.number, course.state, facts),
  ):
    try:
      attempt()
    except store.NotSaved as error:
      written.incident(course.number, str(error))
      good = False
  return good


def _back(ready, saved, written, like, ended: Ended) -> Course:
  """The course from before a spike, with the text around it left out."""
  from mla_moe.data import batches

  config = ready.config
  now, counts = ended.course.number, ended.course.guard
  saved.wait()
  course = resume(ready, like, before=ended.first, aside=True)
  if course is None:
    raise cli.Stopped(
      f'step {now}: spikes since step {ended.first}, and no checkpoint from '
      'before; lower config.optim.learning_rate or config.run.save_every'
    )
  ahead = (
    batches.span(config.data, now)[0]
    - batches.span(config.data, course.number)[0]
  )
  more = config.run.spike_jump * config.data.batch_size
  counts = counts.went_back(counts.passed + ahead + more)
  written.open(course.number)
  written.incident(
    now,
    f'went back to step {course.number}, from before the spikes that began at '
    f'step {ended.first}; {counts.passed} sequences are left out',
  )
  return course._replace(guard=counts)


def _end(ready, saved, written, ended: Ended) -> None:
  """The last words of a run, once its last checkpoint is sealed."""
  from mla_moe.checkpoint import store

  number = ended.course.number
  try:
    if ended.how == 'halted':
      _store(ready, ended.course, saved, written)
    saved.wait()
  except store.NotSaved as error:
    raise cli.Stopped(f'{error}; sealed steps are as they were') from None
  if ended.how == 'halted':
    written.incident(number, ended.text)
    raise cli.Stopped(
      f'{ended.text}; step {number} is saved, and holds the last good numbers'
    )
  if ended.how == 'stopped':
    print(f'Stopped by {ended.text} at step {number}: saved.')


def _out_of_memory(config, error) -> str:
  """What the state alone takes, and what would take less."""
  from mla_moe import cost

  state = sum(cost.training_bytes_per_device(config).values()) / 2**30
  data, mesh = config.data, config.mesh
  return (
    f'out of memory ({str(error).splitlines()[0][:200]}); parameters, '
    f'gradients and optimizer take {state:,.2f} GiB of each device, '
    'activations the rest: lower '
    f'config.data.micro_batch={data.micro_batch} (0 is all '
    f"{data.batch_size}), keep less by config.model.compute.remat='full', "
    f'or split the state over more devices by config.mesh.fsdp={mesh.fsdp}'
  )


def define() -> None:
  """This program's flags, beside those of a config."""
  cli.define()
  cli.define_unsealed()
  flags.DEFINE_integer('replay', 0, 'Compute this step again, and compare.', 0)
  flags.DEFINE_enum(
    'distributed', 'auto', ['auto', 'on', 'off'], 'Join other processes.'
  )
  flags.DEFINE_integer(
    'distributed_timeout', 300, 'Seconds to wait for them.', 1
  )
  flags.DEFINE_string('profile', '', 'Trace these steps: FIRST:LAST.')
  flags.DEFINE_enum('track', '', tracking.TRACKERS, 'Tracker to tell as well.')


def main() -> None:
  """Runs the flags' config in the flags' folder."""
  unsealed = flags.FLAGS.allow_unsealed
  if flags.FLAGS.replay:
    from experiments.training import replay

    path = pathlib.Path(flags.FLAGS.workdir)
    replay.replay(path, flags.FLAGS.replay, unsealed=unsealed)
    return
  config = cli.config()
  distributed.start(flags.FLAGS.distributed, flags.FLAGS.distributed_timeout)
  distributed.agree(config)
  also = Also(flags.FLAGS.profile, flags.FLAGS.track)
  run(config, flags.FLAGS.workdir, unsealed=unsealed, also=also)


if __name__ == '__main__':
  cli.run(main, define)
