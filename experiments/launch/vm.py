"""A single virtual machine with GPUs on Google Compute Engine.

A spot machine that is taken away is stopped, and its disk stays: `resume`
starts it again, and training goes on from the last checkpoint.
"""

from __future__ import annotations

import dataclasses
import re

from mla_moe.config import ConfigError

from .. import chips
from .job import (
  Command,
  Job,
  background,
  command,
  log,
  pack,
  unpack,
)

_READY = 'create and install'
AFTER = {'install': 'create', 'start': _READY, 'resume': _READY}
AFTER |= {'logs': 'start'}
# Of cloud.google.com/compute/docs/gpus: names end with the number of GPUs.
_GPUS = {
  'a2-highgpu': 'a100-40gb',
  'a2-megagpu': 'a100-40gb',
  'a2-ultragpu': 'a100-80gb',
  'a3-highgpu': 'h100',
  'a3-megagpu': 'h100',
  'a3-edgegpu': 'h100',
  'a3-ultragpu': 'h200',
  'a4-highgpu': 'b200',
}


def check(job: Job) -> None:
  """Raises ConfigError where a field is missing or does not fit."""
  job.need('project', 'zone', 'machine')
  job.check_one_slice()


def devices(job: Job) -> chips.Slice:
  """Returns the machine's GPUs, by --topology or by the name of its type."""
  if job.topology:
    return job.slice
  family, _, size = job.machine.rpartition('-')
  if family not in _GPUS or not re.fullmatch('[0-9]+g', size):
    raise ConfigError(
      f'--machine={job.machine}: its GPUs are not known here; name them, such '
      'as --topology=h100:8'
    )
  return chips.parse(f'{_GPUS[family]}:{size[:-1]}')


def chips_of_process(slice_: chips.Slice) -> int:
  """Returns all chips: one process has the whole machine."""
  return slice_.chips


def folders(job: Job, action: str) -> dict[str, str]:
  """Returns the home folder, where files may lie before training starts.

  Nobody has copied any to a machine that is created and started at once.
  """
  return {} if action == 'up' else {'..': 'the home folder'}


def create(job: Job) -> list[Command]:
  """Makes the machine, with NVIDIA's driver in its image."""
  return [
    command(
      *_instances('create', job),
      f'--machine-type={job.machine}',
      '--image-project=deeplearning-platform-release',
      '--image-family=common-cu128-ubuntu-2204-nvidia-570',
      '--boot-disk-size=500GB',
      '--maintenance-policy=TERMINATE',
      '--provisioning-model=SPOT' if job.spot else '',
      '--instance-termination-action=STOP' if job.spot else '',
    ),
    *_up(job),
  ]


def install(job: Job) -> list[Command]:
  """Copies this commit and makes .venv."""
  scp = ('gcloud', 'compute', 'scp', *job.where)
  return [
    pack(job),
    command(*scp, job.archive, f'{job.name}:{job.archive}'),
    _ssh(job, unpack(job, 'gpu')),
  ]


def start(job: Job) -> list[Command]:
  """Starts training in the background."""
  return [_ssh(job, background(job, 'gpu', f'../runs/{job.name}'))]


def logs(job: Job) -> list[Command]:
  """Follows the log."""
  return [_ssh(job, f'tail -n 100 -F {log(job)}')]


def resume(job: Job) -> list[Command]:
  """Starts the machine and the training again."""
  return [command(*_instances('start', job)), *_up(job), *start(job)]


def delete(job: Job) -> list[Command]:
  """Deletes the machine and its disk with the run: copy that first."""
  return [command(*_instances('delete', job), '--quiet')]


def _up(job: Job) -> list[Command]:
  """Waits until the machine runs, and then until it can be reached."""
  running = command(
    *_instances('describe', job),
    '--format=value(status)',
    wait='RUNNING',
    gives_up=('TERMINATED', 'SUSPENDED'),
  )
  reached = _ssh(job, 'echo ready')
  return [running, dataclasses.replace(reached, wait='ready', may_fail=True)]


def _instances(verb: str, job: Job) -> tuple[str, ...]:
  words = ('gcloud', 'compute', 'instances', verb, job.name)
  return (*words, *job.where)


def _ssh(job: Job, line: str) -> Command:
  words = ('gcloud', 'compute', 'ssh', job.name, *job.where)
  return command(*words, f'--command={line}')
