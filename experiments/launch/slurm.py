"""GPU clusters under Slurm: one batch script, which requeues itself.

The launcher runs on the login node, in a clone on the shared file system. Slurm
sends SIGTERM two minutes before the time is up or a job is preempted. Training
then saves and ends, and the job goes back into the queue unless it has ended by
itself. The job's options are words of sbatch's command line, because lines of a
script (#SBATCH) have quoting rules of their own.
"""

from __future__ import annotations

import math
import re

from mla_moe.config import ConfigError

from .. import chips
from .job import Command, Job, command, environment, train_line

PER_NODE = 8
AFTER = {'start': 'install', 'resume': 'install', 'logs': 'start'}


def check(job: Job) -> None:
  """Raises ConfigError where a field is missing or does not fit."""
  job.need('topology', 'storage')
  job.check_one_slice()
  slice_ = job.slice
  if slice_.chip.dimensions > 1:
    raise ConfigError(f'--topology={job.topology}: is no GPU; h100:64 is')
  if slice_.chips > PER_NODE and slice_.chips % PER_NODE:
    raise ConfigError(
      f'--topology={job.topology}: whole nodes have {PER_NODE} GPUs each'
    )
  if not job.storage.startswith('/'):
    raise ConfigError(f'--storage={job.storage}: must be a shared folder, /...')
  if re.search(r'[%\\]', job.storage):
    raise ConfigError(
      f'--storage={job.storage}: Slurm replaces % and \\ in the name of a log; '
      'name another folder'
    )


def devices(job: Job) -> chips.Slice:
  """Returns the GPUs."""
  return job.slice


def chips_of_process(slice_: chips.Slice) -> int:
  """Returns 1: each GPU has a process of its own."""
  return 1


def folders(job: Job, action: str) -> None:
  """Returns None: all nodes have this machine's files."""


def options(job: Job) -> list[str]:
  """Returns sbatch's options."""
  count = job.slice.chips
  gpus = min(count, PER_NODE)
  minutes = math.ceil(60 * job.hours)  # 0 would be no limit
  return [
    f'--job-name={job.name}',
    f'--nodes={count // gpus}',
    f'--ntasks-per-node={gpus}',
    f'--gpus-per-node={gpus}',
    f'--cpus-per-task={job.cpus}',
    f'--time={minutes}',
    f'--output={job.folder}/log.txt',
    '--open-mode=append',
    '--requeue',
    '--dependency=singleton',  # the job before it, which saves, has ended
    '--signal=B:TERM@120',
    f'--partition={job.partition}' if job.partition else '',
    f'--account={job.account}' if job.account else '',
    f'--reservation={job.reservation}' if job.reservation else '',
  ]


def script(job: Job) -> str:
  """Returns the batch script."""
  line = train_line(job, job.folder, 'gpu', '.venv/bin/python')
  body = [
    '#!/usr/bin/env bash',
    'set -u',
    'if [ ! -x .venv/bin/python ]; then',
    '  echo "$PWD has no .venv: install comes first" >&2',
    '  exit 2',
    'fi',
    'asked=',
    'trap \'asked=yes; scancel --signal=TERM "$SLURM_JOB_ID.0"\' TERM',
    f'srun --cpus-per-task={job.cpus} {line} &',  # srun inherits no number
    'child=$!',
    'wait "$child"',
    'code=$?',
    'if [ -n "$asked" ]; then',
    '  wait "$child"  # it saves, then ends',
    '  scontrol requeue "$SLURM_JOB_ID"',
    'fi',
    'exit "$code"',
  ]
  return '\n'.join(body) + '\n'


def create(job: Job) -> list[Command]:
  """Makes the folder of the run and its log; machines are Slurm's business."""
  return [command('mkdir', '-p', job.folder)]


def install(job: Job) -> list[Command]:
  """Makes an environment in this clone."""
  return [command(*words) for words in environment(job, 'gpu')]


def start(job: Job) -> list[Command]:
  """Submits the script; Slurm makes no folder for its log."""
  return [
    command('test', '-x', '.venv/bin/python'),
    *create(job),
    command('sbatch', *options(job), stdin=script(job)),
  ]


def logs(job: Job) -> list[Command]:
  """Follows the log of all processes."""
  return [command('tail', '-n', '100', '-F', f'{job.folder}/log.txt')]


def resume(job: Job) -> list[Command]:
  """Submits again, after Slurm has given the job up."""
  return [*delete(job), *start(job)]


def delete(job: Job) -> list[Command]:
  """Takes the job out of the queue; its folder stays."""
  return [command('scancel', f'--name={job.name}', may_fail=True)]
