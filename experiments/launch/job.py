"""A training run somewhere else, and the shell line that runs it there.

Every command is a list of arguments and never goes through a local shell; the
text for a remote shell is quoted here, once. So an argument with spaces, quotes
or `;` arrives unchanged. Names of resources have a pattern each (`_PATTERNS`),
because they pass through programs with quoting rules of their own.
"""

from __future__ import annotations

import dataclasses
import math
import re
import shlex

from mla_moe.config import ConfigError

from .. import chips
from ..data import remote
from . import presets

_NAME = r'[a-z]([a-z0-9-]{0,38}[a-z0-9])?'
_WORD = r'[A-Za-z0-9][\w.,:/@+-]*'
# Field: the pattern of the whole value, and its rule in words.
_PATTERNS = {
  'name': (
    _NAME,
    'must be at most 40 lower-case letters, digits and dashes, and begin with '
    'a letter, as cloud resources do',
  ),
  'storage': (
    r'gs://[a-z0-9][a-z0-9._-]*(/(?!\.\.?(/|$))[^/]+)*/?|/.*',
    'must be gs://BUCKET[/FOLDER] or a folder that begins with /',
  ),
}
_PATTERNS['program'] = 'train|sft|rl', 'must be train, sft or rl'
_PATTERNS |= {
  field: (_WORD, 'must be a word of letters, digits and . , : / @ + -')
  for field in (
    *('project', 'zone', 'cluster', 'image', 'reservation'),
    *('partition', 'account', 'machine'),
  )
}


@dataclasses.dataclass(frozen=True)
class Job:
  """One training run somewhere else; each backend reads some of the fields.

  `arguments` go to `program` of experiments (train, sft or rl) as they are.
  `storage` holds the run's folder beyond the machine's life: a bucket
  (gs://...), which training writes to by itself and nothing mounts, or a shared
  folder.
  """

  name: str
  arguments: tuple[str, ...]
  program: str = 'train'
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
  cpus: int = 8

  def __post_init__(self):
    for field, (pattern, rule) in _PATTERNS.items():
      value = getattr(self, field)
      if (value or field == 'name') and not re.fullmatch(pattern, value):
        raise ConfigError(f'--{field}={value!r}: {rule}')
    for text in (self.storage, *self.arguments):
      if not text.isprintable():
        raise ConfigError(f'{text!r}: must have no line break or other control')
    if any(re.match('--?workdir', word) for word in self.arguments):
      raise ConfigError('--workdir: is STORAGE/NAME here; leave it out')
    if self.slices < 1:
      raise ConfigError(f'--slices={self.slices}: must be at least 1')
    if self.cpus < 1:
      raise ConfigError(f'--cpus={self.cpus}: must be at least 1')
    if not 0 < self.hours < math.inf:
      raise ConfigError(f'--hours={self.hours}: must be above 0')

  def need(self, *names: str) -> None:
    """Raises ConfigError for the first of these fields that is empty."""
    for name in names:
      if not getattr(self, name):
        raise ConfigError(f'--{name}: is needed here; --help explains it')

  def check_one_slice(self) -> None:
    """Raises ConfigError for several slices, which only TPUs have."""
    if self.slices > 1:
      raise ConfigError(f'--slices={self.slices}: only TPUs have slices')

  @property
  def slice(self) -> chips.Slice:
    """One slice of the topology."""
    slice_ = chips.parse(self.topology)
    if slice_.count > 1:
      raise ConfigError(
        f'--topology={self.topology}: is of one slice here; give --slices='
        f'{slice_.count}'
      )
    return slice_

  @property
  def folder(self) -> str:
    """The run's folder, in the storage."""
    return f'{self.storage.rstrip("/")}/{self.name}'

  @property
  def in_bucket(self) -> bool:
    """Whether the run's folder is in a bucket."""
    return self.storage.startswith('gs://')

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
  """An argument list, with the text of its `stdin` or the file `source` of it.

  With `wait` the command polls: it runs every half minute until its output is
  `wait`; output that begins with one of `gives_up` ends the launch. Commands in
  a row with the same text in `beside` run side by side. `after` says which
  actions must come before this command's.
  """

  words: tuple[str, ...]
  stdin: str = ''
  source: str = ''
  wait: str = ''
  gives_up: tuple[str, ...] = ()
  may_fail: bool = False
  beside: str = ''
  after: str = ''

  def as_typed(self) -> str:
    """Returns the command as one would type it."""
    text = shlex.join(self.words)
    if self.source:
      text = f'{text} < {shlex.quote(self.source)}'
    if self.wait:
      end = '' if self.may_fail else ' || exit'
      dead = '|'.join(f'{state}*' for state in self.gives_up)
      stop = f'case "$s" in {dead}) exit 1;; esac; ' if dead else ''
      test = f'[ "$s" = {self.wait} ]'
      text = f'(until s=$({text}){end}; {test}; do {stop}sleep 30; done)'
    if self.stdin:
      body = self.stdin.rstrip('\n')
      text = f"{text} <<'END'\n{body}\nEND"
    return text


def in_steps(commands: list[Command]) -> list[list[Command]]:
  """Returns the commands in groups of those that run side by side."""
  steps = []
  for command in commands:
    if steps and command.beside and command.beside == steps[-1][-1].beside:
      steps[-1].append(command)
    else:
      steps.append([command])
  return steps


def as_typed(commands: list[Command]) -> str:
  """Returns the lines that one would type for the commands, in order."""
  lines = [f'# after {commands[0].after}'] if commands[0].after else []
  for step in in_steps(commands):
    end = ' &' if step[1:] else ''
    lines += [command.as_typed() + end for command in step]
    lines += ['wait'] if step[1:] else []
  return '\n'.join(lines)


def command(*words: str, **more) -> Command:
  """Returns a Command of the words that are not empty."""
  return Command(tuple(word for word in words if word), **more)


def extras(job: Job, platform: str) -> str:
  """Returns the package's extras that a training machine needs."""
  names = ['cuda' if platform == 'gpu' else platform, 'hf', 'data', 'viz']
  names += ['rl'] if job.program == 'rl' else []
  for scheme, extra in remote.SCHEMES.items():
    words = (job.storage, *job.arguments)
    if extra not in names and any(f'{scheme}://' in word for word in words):
      names.append(extra)
  return ','.join(names)


def pack(job: Job) -> Command:
  """Returns the command that writes this commit into the job's archive."""
  return command('git', 'archive', f'--output={job.archive}', 'HEAD')


def environment(job: Job, platform: str) -> list[list[str]]:
  """Returns the argument lists that make .venv, with a Python new enough.

  The system's own is often older (3.10 on Ubuntu 22.04): uv gets another. It
  comes by pip into a folder of its own, which needs no rights and no venv.
  """
  uv, python = '.uv/bin/uv', '.venv/bin/python'
  pip = ['python3', '-m', 'pip', 'install', '--quiet', '--upgrade']
  return [
    [*pip, '--target=.uv', 'uv'],
    [uv, 'venv', '--quiet', '--allow-existing', '--python=>=3.11,<3.14']
    + ['.venv'],
    [uv, 'pip', 'install', '--quiet', f'--python={python}']
    + [f'--editable=.[{extras(job, platform)}]'],
  ]


def unpack(job: Job, platform: str) -> str:
  """Returns a shell line that makes mla_moe/.venv of the archive beside it."""
  lines = [
    'mkdir -p mla_moe',
    f'tar -xzf {job.archive} -C mla_moe',
    'cd mla_moe',
    *map(shlex.join, environment(job, platform)),
  ]
  return ' && '.join(lines)


def log(job: Job) -> str:
  """Returns the file, in a machine's home, that its training prints into."""
  return f'logs/{job.name}.txt'


def background(job: Job, platform: str, workdir: str) -> str:
  """Returns a shell line that starts training and ends at once.

  It fails where there is no environment. Only the training is in the
  background, not the list before it: a list there would be a shell that waits
  for the end of training and keeps ssh's pipes.
  """
  line = train_line(job, workdir, platform, '.venv/bin/python')
  lines = [
    'mkdir -p logs',
    "{ test -x mla_moe/.venv/bin/python || { echo 'no mla_moe/.venv here: "
    "install comes first' >&2; false; }; }",
    'cd mla_moe',
    f'{{ nohup {line} >> ../{log(job)} 2>&1 < /dev/null & }}',
  ]
  return ' && '.join(lines)


def train_words(job: Job, workdir: str, python: str) -> list[str]:
  """Returns the training process's argument list."""
  return [
    python,
    '-m',
    f'experiments.{job.program}',
    *job.arguments,
    f'--workdir={workdir}',
  ]


def train_line(job: Job, workdir: str, platform: str, python: str) -> str:
  """Returns a shell line that trains: environment, then the process."""
  kind = job.slice.kind if platform == 'tpu' else platform
  flags = presets.environment(job.preset, kind)
  settings = [f'{name}={value}' for name, value in flags.items()]
  words = train_words(job, workdir, python)
  return shlex.join(['env', *settings, *words] if settings else words)
