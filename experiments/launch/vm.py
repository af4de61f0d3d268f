"""A single virtual machine with GPUs on Google Compute Engine.

A spot machine that is taken away is stopped, and its disk stays: `resume`
starts it again, and training goes on from the last checkpoint.
"""

from __future__ import annotations

from .job import (
  Command,
  Job,
  background,
  command,
  pack,
  unpack,
)


def check(job: Job) -> None:
  """Raises ConfigError where a field is missing or does not fit."""
  job.need('project', 'zone', 'machine')
  job.check_one_slice()


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
    _up(job),
  ]


def install(job: Job) -> list[Command]:
  """Copies this commit and makes .venv."""
  scp = ('gcloud', 'compute', 'scp', *job.where)
  return [
    pack(job),
    command(*scp, job.archive, f'{job.name}:{job.archive}'),
    _ssh(job, unpack(job, 'gpu', 'runs')),
  ]


def start(job: Job) -> list[Command]:
  """Starts training in the background."""
  return [_ssh(job, background(job, 'gpu', 'runs', 'log.txt'))]


def logs(job: Job) -> list[Command]:
  """Follows the log."""
  return [_ssh(job, f'tail -n 100 -F runs/{job.name}/log.txt')]


def resume(job: Job) -> list[Command]:
  """Starts the machine and the training again."""
  return [command(*_instances('start', job)), _up(job), *start(job)]


def delete(job: Job) -> list[Command]:
  """Deletes the machine and its disk with the run: copy that first."""
  return [command(*_instances('delete', job), '--quiet')]


def _up(job: Job) -> Command:
  return command(
    *_instances('describe', job),
    '--format=value(status)',
    wait='RUNNING',
    gives_up=('TERMINATED', 'SUSPENDED'),
  )


def _instances(verb: str, job: Job) -> tuple[str, ...]:
  words = ('gcloud', 'compute', 'instances', verb, job.name)
  return (*words, *job.where)


def _ssh(job: Job, line: str) -> Command:
  words = ('gcloud', 'compute', 'ssh', job.name, *job.where)
  return command(*words, f'--command={line}')
