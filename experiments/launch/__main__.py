"""Runs a config on machines that are not here.

  python -m experiments.launch tpu up --name=lite --topology=v5e:4x4 \\
    --project=P --zone=us-west4-a --storage=gs://B --spot --dry-run \\
    -- --config=configs/deepseek_v2_lite.py --config.mesh.fsdp=16

Backends: tpu (queued resources: v5e, v5p, v6e), gke (xpk: Ironwood too), slurm
(GPUs), vm (one machine). Actions: create, install, start, logs, resume, delete;
up is the first three. What follows -- goes to experiments.train. --dry-run
prints every command and runs none.
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
import time

from experiments import cli
from experiments.launch import cloud_tpu, gke, job, presets, slurm, vm
from mla_moe.config import ConfigError

BACKENDS = {'tpu': cloud_tpu, 'gke': gke, 'slurm': slurm, 'vm': vm}
ACTIONS = ('create', 'install', 'start', 'logs', 'resume', 'delete', 'up')
_HELP = {
  'name': 'name of the run and of what is made for it',
  'topology': 'slice: v5p:4x4x4, v5e-16, tpu7x:4x4x4, h100:64',
  'slices': 'slices, connected by the data centre network',
  'spot': 'cheaper machines that may be taken away',
  'preset': f'compiler flags: {", ".join(presets.PRESETS)}',
  'storage': 'gs://BUCKET[/FOLDER], or a shared folder',
  'cluster': 'GKE cluster',
  'image': 'container image to build and push, REGISTRY/NAME:TAG',
  'machine': 'machine type of a VM',
  'hours': "Slurm's time limit",
}


def commands(backend: str, action: str, asked: job.Job) -> list[job.Command]:
  """The commands of an action.

  Raises:
    ConfigError: a flag that the backend needs is missing or wrong.
  """
  module = BACKENDS[backend]
  module.check(asked)
  actions = ('create', 'install', 'start') if action == 'up' else (action,)
  return [c for name in actions for c in getattr(module, name)(asked)]


def renamed(asked: job.Job, name: str, arguments: tuple[str, ...]) -> job.Job:
  """The same job under another name, with other arguments of training."""
  return dataclasses.replace(asked, name=name, arguments=arguments)


def parse(words: list[str]) -> tuple[str, str, job.Job, bool]:
  """Backend, action, job and whether it is a dry run."""
  rest = []
  if '--' in words:
    at = words.index('--')
    words, rest = words[:at], words[at + 1 :]
  parser = argparse.ArgumentParser(
    prog='python -m experiments.launch',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument('backend', choices=BACKENDS)
  parser.add_argument('action', choices=ACTIONS)
  parser.add_argument('--dry-run', action='store_true')
  for field in dataclasses.fields(job.Job):
    if field.name in ('arguments',):
      continue
    told = {'help': _HELP.get(field.name)}
    if field.type == 'bool':
      told['action'] = 'store_true'
    else:
      told['type'] = {'int': int, 'float': float}.get(field.type, str)
      told['default'] = '' if field.name == 'name' else field.default
    parser.add_argument(f'--{field.name}', **told)
  values = vars(parser.parse_args(words))
  backend, action = values.pop('backend'), values.pop('action')
  dry = values.pop('dry_run')
  return backend, action, job.Job(arguments=tuple(rest), **values), dry


def execute(command: job.Command) -> None:
  """Runs a command, or polls with it.

  Raises:
    ConfigError: it failed, is not installed, or what it waits for will not be.
  """
  print(f'$ {command.shown()}', flush=True)
  while True:
    try:
      done = subprocess.run(
        command.words,
        input=command.stdin or None,
        text=True,
        stdout=subprocess.PIPE if command.wait else None,
      )
    except FileNotFoundError:
      raise ConfigError(
        f'{command.words[0]}: is not installed on this machine'
      ) from None
    if done.returncode and not command.may_fail:
      raise ConfigError(
        f'{command.words[0]} ended with {done.returncode}: nothing after it '
        'was run'
      )
    if not command.wait:
      return
    state = done.stdout.strip()
    if state == command.wait:
      return
    if state.startswith(command.gives_up):
      raise ConfigError(f'{command.words[0]}: the machine is {state}')
    print(f'  {state}', flush=True)
    time.sleep(30)


def main() -> None:
  """Prints or runs the commands that the command line asks for."""
  with cli.edge():
    backend, action, asked, dry = parse(sys.argv[1:])
    cli.config_file(list(asked.arguments))  # before a machine is paid for
    for one in commands(backend, action, asked):
      if dry:
        print(one.shown())
      else:
        execute(one)


if __name__ == '__main__':
  main()
