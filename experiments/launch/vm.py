"""A single virtual machine with GPUs on Google Compute Engine.

A spot machine that is taken away is stopped, and its disk stays: `resume`
starts it again, and training goes on from the last checkpoint.
"""

from __future__ import annotations

from experiments.launch.job import Command, Job, command, train_line


def check(job: Job) -> None:
  """Raises ConfigError where a field is missing."""
  job.need('project', 'zone', 'machine')


def create(job: Job) -> list[Command]:
  """The machine, with NVIDIA's driver in its image."""
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
  archive = f'{job.name}.tar.gz'
  lines = [
    'mkdir -p mla_moe runs',
    f'tar -xzf {archive} -C mla_moe',
    'cd mla_moe',
    'python3 -m venv .venv',
    ".venv/bin/pip install --quiet -e '.[cuda,hf,data,viz]'",
  ]
  scp = ('gcloud', 'compute', 'scp', *_where(job))
  return [
    command('git', 'archive', f'--output={archive}', 'HEAD'),
    command(*scp, archive, f'{job.name}:{archive}'),
    _ssh(job, ' && '.join(lines)),
  ]


def start(job: Job) -> list[Command]:
  """Starts training in the background."""
  workdir = f'../runs/{job.name}'
  line = train_line(job, workdir, 'gpu', '.venv/bin/python')
  inner = (
    f'cd mla_moe && mkdir -p {workdir} && '
    f'nohup {line} >> {workdir}/log.txt 2>&1 < /dev/null &'
  )
  return [_ssh(job, inner)]


def logs(job: Job) -> list[Command]:
  """Follows the log."""
  return [_ssh(job, f'tail -n 100 -F runs/{job.name}/log.txt')]


def resume(job: Job) -> list[Command]:
  """Starts the machine and the training again."""
  return [command(*_instances('start', job)), _up(job), *start(job)]


def delete(job: Job) -> list[Command]:
  """The machine and its disk, which holds the run: copy it first."""
  return [command(*_instances('delete', job), '--quiet')]


def _up(job: Job) -> Command:
  return command(
    *_instances('describe', job),
    '--format=value(status)',
    wait='RUNNING',
    gives_up=('TERMINATED', 'SUSPENDED'),
  )


def _where(job: Job) -> tuple[str, ...]:
  return (f'--project={job.project}', f'--zone={job.zone}')


def _instances(verb: str, job: Job) -> tuple[str, ...]:
  words = ('gcloud', 'compute', 'instances', verb, job.name)
  return (*words, *_where(job))


def _ssh(job: Job, line: str) -> Command:
  words = ('gcloud', 'compute', 'ssh', job.name, *_where(job))
  return command(*words, f'--command={line}')
