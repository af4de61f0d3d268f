"""Trains a config on other machines: gcloud, xpk, sbatch.

  python -m experiments.launch tpu up --name=lite --topology=v5e:8x8 \\
    --project=p --zone=us-west4-a --storage=gs://b --spot --dry-run \\
    -- --config=configs/deepseek_v2_lite.py --config.mesh.fsdp=16 \\
    --config.mesh.expert=4 --config.data.micro_batch=64

Backends: tpu (queued resources: v5e, v5p, v6e), gke (xpk: Ironwood too), slurm
(GPUs), vm (one machine). Actions, in this order: create the machines, install
this commit on them, start training, follow its logs, resume on new machines
after the old ones were taken away, delete everything but the run's folder; up
is the first three. Words after -- go to experiments.train, or to sft or rl by
--program. --dry-run prints every command and runs none. A launch that cannot
train is refused before it costs money (`preflight`); --force launches it all
the same.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import subprocess
import sys
import tempfile
import time

from mla_moe.config import ConfigError

from .. import cli
from ..commands import typed
from . import cloud_tpu, gke, preflight, presets, slurm, vm
from .job import Command, Job, as_typed, in_steps

BACKENDS = {'tpu': cloud_tpu, 'gke': gke, 'slurm': slurm, 'vm': vm}
ACTIONS = ('create', 'install', 'start', 'logs', 'resume', 'delete', 'up')
_TRIES = 20
_HELP = {
  'program': 'of experiments: train, sft or rl',
  'name': 'of the run, and of the machines for it',
  'topology': 'slice: v5p:4x4x4, v5e-16, tpu7x:4x4x4, h100:64',
  'slices': 'slices, connected by the data centre network',
  'spot': 'cheaper machines, which may be taken away',
  'preset': f'compiler flags: {", ".join(presets.PRESETS)}',
  'storage': 'gs://BUCKET[/FOLDER], or a shared folder',
  'cluster': 'GKE cluster',
  'image': 'container image to build and push, REGISTRY/NAME:TAG',
  'machine': 'machine type of a VM',
  'hours': "Slurm's time limit",
  'cpus': "Slurm's processors for each GPU",
}


def commands(backend: str, action: str, job: Job) -> list[Command]:
  """Returns the commands of an action.

  Raises:
    ConfigError: a flag that the backend needs is missing or wrong.
  """
  module = BACKENDS[backend]
  module.check(job)
  actions = ('create', 'install', 'start') if action == 'up' else (action,)
  after = module.AFTER.get(action, '')
  return [
    dataclasses.replace(command, after=after)
    for name in actions
    for command in getattr(module, name)(job)
  ]


def refuse(findings: list[str], force: bool) -> None:
  """Prints the findings, and ends the process unless there are none."""
  for line in findings:
    head, end = ('WARNING', '') if force else ('error', ' (--force overrides)')
    print(f'{head}: {line}{end}', file=sys.stderr)
  if findings and not force:
    sys.exit(2)


def parse(words: list[str]) -> tuple[str, str, Job, bool, bool]:
  """Returns the backend, the action, the job, and the two switches."""
  arguments = []
  if '--' in words:
    end = words.index('--')
    words, arguments = words[:end], words[end + 1 :]
  parser = argparse.ArgumentParser(
    prog=typed('python -m experiments.launch'),
    description=typed(__doc__),
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument('backend', choices=BACKENDS)
  parser.add_argument('action', choices=ACTIONS)
  parser.add_argument(
    '--dry-run', action='store_true', help='print the commands, run none'
  )
  parser.add_argument(
    '--force', action='store_true', help='launch in spite of a fault'
  )
  for field in dataclasses.fields(Job):
    if field.name == 'arguments':
      continue
    options = {'help': _HELP.get(field.name)}
    if field.type == 'bool':
      options['action'] = 'store_true'
    else:
      options['type'] = {'int': int, 'float': float}.get(field.type, str)
      options['default'] = '' if field.name == 'name' else field.default
    parser.add_argument(f'--{field.name}', **options)
  values = vars(parser.parse_args(words))
  backend, action = values.pop('backend'), values.pop('action')
  switches = values.pop('dry_run'), values.pop('force')
  return backend, action, Job(arguments=tuple(arguments), **values), *switches


def execute(commands: list[Command]) -> None:
  """Runs the commands in order, those of one step side by side.

  Raises:
    ConfigError: one failed, is not installed, or will never be ready.
  """
  for step in in_steps(commands):
    for command in step:
      print(f'$ {command.as_typed()}', flush=True)
    if step[0].wait:
      _poll(step[0])
      continue
    processes = [_begin(command) for command in step]
    codes = [process.wait() for process in processes]
    for command, code in zip(step, codes, strict=True):
      if code and not command.may_fail:
        raise _failure(command, code)


def _begin(command: Command) -> subprocess.Popen:
  """Starts a command; its `stdin` is in a file, so it never waits for us."""
  with contextlib.ExitStack() as stack:
    stdin = None
    if command.source:
      stdin = stack.enter_context(open(command.source, 'rb'))
    elif command.stdin:
      stdin = stack.enter_context(tempfile.TemporaryFile())
      stdin.write(command.stdin.encode())
      stdin.seek(0)
    try:
      return subprocess.Popen(command.words, stdin=stdin)
    except FileNotFoundError:
      raise _absent(command) from None


def _poll(command: Command) -> None:
  """Runs a command until it prints `command.wait`.

  One that may fail does so at most `_TRIES` times: a queue may take days, a
  machine that runs is reached in minutes.
  """
  failures = 0
  while True:
    try:
      process = subprocess.run(command.words, text=True, stdout=subprocess.PIPE)
    except FileNotFoundError:
      raise _absent(command) from None
    failures += process.returncode != 0
    if failures > (_TRIES if command.may_fail else 0):
      raise _failure(command, process.returncode)
    state = process.stdout.strip()
    if state == command.wait:
      return
    if state.startswith(command.gives_up):
      raise ConfigError(f'{command.words[0]}: the machine is {state}')
    print(f'  {state}', flush=True)
    time.sleep(30)


def _absent(command: Command) -> ConfigError:
  return ConfigError(f'{command.words[0]}: is not installed on this machine')


def _failure(command: Command, code: int) -> ConfigError:
  after = f'; before it come: {command.after}' if command.after else ''
  return ConfigError(
    f'{command.words[0]} ended with {code}: nothing after it was run{after}'
  )


def main() -> None:
  """Prints or runs the commands of the command line's action."""
  with cli.edge():
    backend, action, job, dry_run, force = parse(sys.argv[1:])
    lines = commands(backend, action, job)
    refuse(preflight.findings(BACKENDS[backend], action, job), force)
    if dry_run:
      print(as_typed(lines))
    else:
      execute(lines)


if __name__ == '__main__':
  main()
