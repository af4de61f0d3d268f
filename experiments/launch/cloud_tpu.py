"""Cloud TPU v5e, v5p and v6e by queued resources, one slice or several.

A request waits in Google's queue until it becomes ACTIVE. A spot slice that is
taken away becomes SUSPENDED (cloud.google.com/tpu/docs/queued-resources);
`resume` then asks for a new one, and training goes on from the bucket: the run
lies there, and nothing of it but a log on the slice. Ironwood has no queued
resources: it is GKE's (`gke`).
"""

from __future__ import annotations

import dataclasses

from mla_moe.config import ConfigError

from .. import chips
from .job import (
  Command,
  Job,
  background,
  command,
  log,
  pack,
  tpu_type,
  unpack,
)

_RUNTIME = {
  'v5e': 'v2-alpha-tpuv5-lite',
  'v5p': 'v2-alpha-tpuv5',
  'v6e': 'v2-alpha-tpuv6e',
}
_DEAD = ('FAILED', 'SUSPEND')
AFTER = {'install': 'create', 'start': 'create and install', 'logs': 'start'}


def check(job: Job) -> None:
  """Raises ConfigError where a field is missing or does not fit."""
  job.need('project', 'zone', 'topology', 'storage')
  kind = job.slice.kind
  if kind == 'tpu7x':
    raise ConfigError(
      f'--topology={job.topology}: Ironwood has no queued resources; use '
      "'gke' instead of 'tpu'"
    )
  if kind not in _RUNTIME:
    raise ConfigError(f'--topology={job.topology}: is no TPU')
  if not job.in_bucket:
    raise ConfigError(
      f'--storage={job.storage}: a slice vanishes with its disks; give a '
      'bucket, gs://BUCKET[/FOLDER]'
    )


def devices(job: Job) -> chips.Slice:
  """Returns the slices as one."""
  return dataclasses.replace(job.slice, count=job.slices)


def chips_of_process(slice_: chips.Slice) -> int:
  """Returns the chips of a host, each of which runs one process."""
  return slice_.chip.of_host


def folders(job: Job, action: str) -> dict[str, str]:
  """Returns none: the machines have the commit, and read buckets."""
  return {}


def create(job: Job) -> list[Command]:
  """Asks for the slices and waits until they are there."""
  if job.slices > 1:
    nodes = f'--node-count={job.slices}', f'--node-prefix={job.name}'
  else:
    nodes = (f'--node-id={job.name}',)
  return [
    command(
      *_queue('create', job),
      f'--accelerator-type={tpu_type(job.slice)}',
      f'--runtime-version={_RUNTIME[job.slice.kind]}',
      *nodes,
      '--scopes=cloud-platform',  # its account's roles say the rest
      '--spot' if job.spot else '',
      f'--reservation={job.reservation}' if job.reservation else '',
    ),
    command(
      *_queue('describe', job),
      '--format=value(state.state)',
      wait='ACTIVE',
      gives_up=_DEAD,
    ),
  ]


def install(job: Job) -> list[Command]:
  """Copies this commit to every machine, and makes .venv."""
  line = unpack(job, 'tpu')
  copy = (*_vm('scp', job), '--worker=all', job.archive)
  return [
    pack(job),
    *(
      command(*copy, f'{node}:{job.archive}', beside='copy')
      for node in nodes(job)
    ),
    *(_ssh(job, node, line, beside='install') for node in nodes(job)),
  ]


def start(job: Job) -> list[Command]:
  """Starts every process in the background; each machine has its log."""
  line = background(job, 'tpu', job.folder)
  return [_ssh(job, node, line, beside='start') for node in nodes(job)]


def logs(job: Job) -> list[Command]:
  """Follows the log of the first machine."""
  line = f'tail -n 100 -F {log(job)}'
  return [_ssh(job, nodes(job)[0], line, worker='0')]


def resume(job: Job) -> list[Command]:
  """Deletes the rest of a lost request, then does all from the start."""
  return [*delete(job), *create(job), *install(job), *start(job)]


def delete(job: Job) -> list[Command]:
  """Gives the slices back; the bucket stays."""
  return [command(*_queue('delete', job), '--force', '--quiet', may_fail=True)]


def nodes(job: Job) -> list[str]:
  """Returns the names of the slices."""
  if job.slices == 1:
    return [job.name]
  return [f'{job.name}-{i}' for i in range(job.slices)]


def _queue(verb: str, job: Job) -> tuple[str, ...]:
  words = ('gcloud', 'compute', 'tpus', 'queued-resources', verb, job.name)
  return (*words, *job.where)


def _vm(verb: str, job: Job) -> tuple[str, ...]:
  words = ('gcloud', 'compute', 'tpus', 'tpu-vm', verb)
  return (*words, *job.where)


def _ssh(
  job: Job, node: str, line: str, worker: str = 'all', **more
) -> Command:
  words = (*_vm('ssh', job), node, f'--worker={worker}', f'--command={line}')
  return command(*words, **more)
