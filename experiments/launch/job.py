"""A training run somewhere else, and the shell line that runs it there.

Every command is a list of arguments and never goes through a local shell; the
text for a remote shell is quoted here, once. So an argument with spaces, quotes
or `;` arrives unchanged.
"""

from __future__ import annotations

import dataclasses
import re
import shlex

from mla_moe.config import ConfigError

from .. import chips
from . import presets


@dataclasses.dataclass(frozen=True)
class Job:
  """One training run somewhere else; each backend reads some of the fields.

  `arguments` go to experiments.train as they are. `storage` holds the run's
  folder beyond the machine's life: a bucket (gs://...) or a shared folder.
  """

  name: str
  arguments: tuple[str, ...]
  topology: str = ''
  slices: int = 1
  spot: bool = False
  preset: str = ''
  storage: str = ''
  project: str = ''
  zone: str = ''
  cluster: str = ''
  image: str = ''
  reservation: str = ''
  partition: str = ''
  account: str = ''
  hours: float = 24.0
  machine: str = 'a3-highgpu-8g'

  def __post_init__(self):
    if not re.fullmatch(r'[a-z]([a-z0-9-]{0,38}[a-z0-9])?', self.name):
      raise ConfigError(
        f'--name={self.name!r}: must be at most 40 lower-case letters, digits '
        'and dashes, and begin with a letter, as cloud resources do'
      )
    if self.slices < 1:
      raise ConfigError(f'--slices={self.slices}: must be at least 1')
    if self.storage and not re.match(r'gs://[a-z0-9]|/', self.storage):
      raise ConfigError(
        f'--storage={self.storage!r}: must be gs://BUCKET[/FOLDER] or a folder '
        'that begins with /'
      )

  def need(self, *names: str) -> None:
    """Raises ConfigError for the first of these fields that is empty."""
    for name in names:
      if not getattr(self, name):
        raise ConfigError(f'--{name}: is needed here; --help explains it')

  @property
  def slice(self) -> chips.Slice:
    return chips.parse(self.topology)

  @property
  def folder(self) -> str:
    """The run's folder, where storage is a folder."""
    return f'{self.storage.rstrip("/")}/{self.name}'

  @property
  def where(self) -> tuple[str, str]:
    """Google's project and zone, as options."""
    return f'--project={self.project}', f'--zone={self.zone}'

  @property
  def archive(self) -> str:
    """The file in which this commit travels."""
    return f'{self.name}.tar.gz'


def tpu_type(slice_: chips.Slice) -> str:
  """Returns Google's name of a slice by size; v5p counts cores, two a chip."""
  if slice_.kind == 'v5p':
    return f'v5p-{2 * slice_.chips}'
  kind = 'v5litepod' if slice_.kind == 'v5e' else slice_.kind
  return f'{kind}-{slice_.chips}'


@dataclasses.dataclass(frozen=True)
class Command:
  """An argument list, with the text of its `stdin`.

  With `wait` the command polls: it runs every half minute until its output is
  `wait`; output that begins with one of `gives_up` ends the launch.
  """

  words: tuple[str, ...]
  stdin: str = ''
  wait: str = ''
  gives_up: tuple[str, ...] = ()
  may_fail: bool = False

  def as_typed(self) -> str:
    """Returns the command as one would type it."""
    text = shlex.join(self.words)
    if self.wait:
      text = f'{text}  # until it prints {self.wait}'
    if self.stdin:
      body = self.stdin.rstrip('\n')
      text = f"{text} <<'END'\n{body}\nEND"
    return text


def command(*words: str, **more) -> Command:
  """Returns a Command of the words that are not empty."""
  return Command(tuple(word for word in words if word), **more)


def extras(platform: str) -> str:
  """Returns the package's extras that a training machine needs."""
  return f'{"cuda" if platform == "gpu" else platform},hf,data,viz'


def pack(job: Job) -> Command:
  """Returns the command that writes this commit into the job's archive."""
  return command('git', 'archive', f'--output={job.archive}', 'HEAD')


def unpack(job: Job, platform: str, storage: str, *mount: str) -> str:
  """Returns a shell line that makes mla_moe/.venv of the archive beside it."""
  lines = [
    f'mkdir -p mla_moe {storage}',
    f'tar -xzf {job.archive} -C mla_moe',
    *mount,
    'cd mla_moe',
    'python3 -m venv .venv',
    f".venv/bin/pip install --quiet -e '.[{extras(platform)}]'",
  ]
  return ' && '.join(lines)


def background(job: Job, platform: str, storage: str, log: str) -> str:
  """Returns a shell line that trains on after its shell has ended."""
  workdir = f'../{storage}/{job.name}'
  line = train_line(job, workdir, platform, '.venv/bin/python')
  return (
    f'cd mla_moe && mkdir -p {workdir} && '
    f'nohup {line} >> {workdir}/{log} 2>&1 < /dev/null &'
  )


def train_words(job: Job, workdir: str, python: str) -> list[str]:
  """Returns the training process's argument list."""
  return [
    python,
    '-m',
    'experiments.train',
    *job.arguments,
    f'--workdir={workdir}',
  ]


def train_line(job: Job, workdir: str, platform: str, python: str) -> str:
  """Returns a shell line that trains: environment, then the process."""
  flags = presets.environment(job.preset, platform)
  settings = [f'{name}={value}' for name, value in flags.items()]
  words = train_words(job, workdir, python)
  return shlex.join(['env', *settings, *words] if settings else words)
