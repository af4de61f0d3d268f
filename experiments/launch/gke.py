"""TPUs of GKE through xpk: Ironwood (tpu7x), and any other.

xpk (github.com/AI-Hypercomputer/xpk) makes the cluster and turns a command into
a JobSet. Kubernetes starts that again when a node is lost, and every start
resumes from the storage: a bucket, or a folder that the pods mount.
"""

from __future__ import annotations

import dataclasses
import re

from mla_moe.config import ConfigError

from .. import chips
from .job import (
  Command,
  Job,
  command,
  extras,
  pack,
  tpu_type,
  train_line,
)

RESTARTS = 1000
_READY = 'create, install, and the right of the pods to write to the storage'
AFTER = {'start': _READY, 'resume': _READY, 'logs': 'start'}


def check(job: Job) -> None:
  """Raises ConfigError where a field is missing or does not fit."""
  job.need('project', 'zone', 'cluster', 'topology', 'image', 'storage')
  if job.slice.chip.dimensions == 1:
    raise ConfigError(f'--topology={job.topology}: is no TPU')


def devices(job: Job) -> chips.Slice:
  """Returns the slices as one."""
  return dataclasses.replace(job.slice, count=job.slices)


def chips_of_process(slice_: chips.Slice) -> int:
  """Returns the chips of a host, each of which runs one process."""
  return slice_.chip.of_host


def folders(job: Job, action: str) -> dict[str, str]:
  """Returns the folder beside the commit, if the pods mount one."""
  return {} if job.in_bucket else {job.storage.rstrip('/'): 'the storage'}


def device(job: Job) -> str:
  """Returns xpk's name of the slice: tpu7x by shape, the others by size."""
  slice_ = job.slice
  if slice_.kind == 'tpu7x':
    return f'tpu7x-{"x".join(map(str, slice_.shape))}'
  return tpu_type(slice_)


def create(job: Job) -> list[Command]:
  """Makes the cluster with its node pools."""
  return [
    command(
      *_xpk('cluster', 'create', job),
      f'--tpu-type={device(job)}',
      f'--num-slices={job.slices}',
      '--spot' if job.spot else '',
      f'--reservation={job.reservation}' if job.reservation else '',
    )
  ]


def install(job: Job) -> list[Command]:
  """Builds the image of this commit, and of nothing else here; pushes it."""
  return [
    pack(job),
    command(
      'docker',
      'build',
      '--file=experiments/launch/Dockerfile',
      f'--build-arg=EXTRAS={extras(job, "tpu")}',
      f'--tag={job.image}',
      '-',
      source=job.archive,
    ),
    command('docker', 'push', job.image),
  ]


def start(job: Job) -> list[Command]:
  """Starts the workload, which restarts by itself."""
  return [
    command(
      *_xpk('workload', 'create', job),
      f'--workload={job.name}',
      f'--tpu-type={device(job)}',
      f'--num-slices={job.slices}',
      f'--docker-image={job.image}',
      f'--max-restarts={RESTARTS}',
      f'--command={train_line(job, job.folder, "tpu", "python")}',
    )
  ]


def logs(job: Job) -> list[Command]:
  """Follows the log of the first pod."""
  label = f'jobset.sigs.k8s.io/jobset-name={job.name}'
  index = 'batch.kubernetes.io/job-completion-index=0'
  region = re.sub(r'-[a-z]$', '', job.zone)
  cluster = ('gcloud', 'container', 'clusters', 'get-credentials', job.cluster)
  return [
    command(*cluster, f'--project={job.project}', f'--region={region}'),
    command(
      'kubectl', 'logs', '--follow', '--tail=100', f'--selector={label},{index}'
    ),
  ]


def resume(job: Job) -> list[Command]:
  """Starts a new workload on the same folder, once restarts are used up."""
  return [*_stop(job), *start(job)]


def delete(job: Job) -> list[Command]:
  """Deletes the workload, then the cluster."""
  return [*_stop(job), command(*_xpk('cluster', 'delete', job), '--force')]


def _stop(job: Job) -> list[Command]:
  words = _xpk('workload', 'delete', job)
  return [command(*words, f'--workload={job.name}', may_fail=True)]


def _xpk(noun: str, verb: str, job: Job) -> tuple[str, ...]:
  return 'xpk', noun, verb, *job.where, f'--cluster={job.cluster}'
