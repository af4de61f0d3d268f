"""Faults of a launch that can be known before a machine is paid for.

Five questions. Does the config train on text? Is it in the commit that is sent?
Has the mesh as many devices as the slices? Does a training step fit them, by
the plan's arithmetic? Are the text and other files there? A backend answers two
of them: `devices` returns its slices, and `folders` returns the folders that
its machines have beside the commit, or None where they share this machine's
files.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType

from mla_moe.config import Config, ConfigError, MeshConfig, RunConfig
from mla_moe.types import PyTree

from .. import chips, cli, train
from ..adapters import base as frozen_base
from .job import Job

ACTIONS = ('create', 'install', 'start', 'resume', 'up')  # that cost money
# Folders of the code that trains.
_CODE = ('mla_moe', 'experiments', 'configs', 'setup.py', 'pyproject.toml')
# Fields that name a file, or a folder, which is no text.
_NO_TEXT = ('config.data.tokenizer', 'config.run.base')


def findings(backend: ModuleType, action: str, job: Job) -> list[str]:
  """Returns a line for each fault.

  Raises:
    ConfigError: the arguments give no config.
  """
  if action not in ACTIONS:
    return []
  config = _config(job)
  folders = backend.folders(job, action)
  lines = [] if folders is None else _commit(job)
  try:
    _check_program(config, backend, job)
    _check_fit(config, backend.devices(job))
  except ConfigError as error:
    lines.append(str(error))
  return lines + _files(config, job, folders)


def _config(job: Job) -> Config:
  """Returns the config that the job's program makes of its arguments.

  Raises:
    ConfigError: the arguments give none.
  """
  from .. import sft
  from ..rl import __main__ as rl

  defines = {'train': train.define, 'sft': sft.define, 'rl': rl.define}
  config = cli.config_of(job.arguments, defines[job.program])
  value = functools.partial(_value, job.arguments)
  if job.program == 'sft' and value('data'):
    data = dataclasses.replace(config.data, source=value('data'))
    config = dataclasses.replace(config, data=data)
  if job.program == 'rl':
    names = value('teacher')
    config = rl.taught(config, names.split(',') if names else [])
  return config


def _value(words: tuple[str, ...], flag: str) -> str:
  """Returns the last value of a flag among the words, '' without one."""
  value = ''
  for word, after in zip(words, (*words[1:], ''), strict=True):
    name, equals, text = word.lstrip('-').partition('=')
    if word.startswith('-') and name == flag:
      value = text if equals else after
  return value


def _check_program(config: Config, backend: ModuleType, job: Job) -> None:
  """Refuses a config of another program, and answers of several processes.

  Adapters are refused as `train` would; their base may be there alone.

  Raises:
    ConfigError: names the fault and the fix.
  """
  frozen_base.check(config)
  if config.model.lora.rank and not config.run.base:
    frozen_base.check_folder(config)
  if bool(config.rl.task) != (job.program == 'rl'):
    right = 'rl' if config.rl.task else 'train or sft'
    raise ConfigError(
      f'config.rl.task={config.rl.task!r}: is not for experiments.'
      f'{job.program}; launch it with --program={right}'
    )
  if job.program != 'rl':
    return
  from ..rl import checks

  checks.check(config)
  slice_ = backend.devices(job)
  count = -(-slice_.chips // backend.chips_of_process(slice_))
  if count > 1:
    raise ConfigError(
      f'--program=rl: one process draws all answers, and {slice_} has {count} '
      'processes here; name a slice of one machine'
    )


def _commit(job: Job) -> list[str]:
  """Returns the faults of the commit that `job.pack` sends."""
  root = _git('rev-parse', '--show-toplevel')
  here = pathlib.Path.cwd()
  if not root or pathlib.Path(root[0]) != here.resolve():
    return [f'{here}: is not the root of a git clone, whose commit is sent']
  tracked, name = set(_git('ls-files')), cli.config_file(job.arguments)
  if 'experiments/train.py' not in tracked:
    return [f'{here}: has no experiments/train.py in its commit']
  lines, file = [], name and _relative(name, here)
  if any(re.match('--?config=/', word) for word in job.arguments):
    lines.append(f'--config={name}: other machines have it as {file}; say so')
  if name and file not in tracked:
    lines.append(
      f'--config={name}: is not in the commit that is sent; git add it, and '
      'commit'
    )
  imported = {getattr(m, '__file__', None) for m in [*sys.modules.values()]}
  absent = [
    other
    for other in _git('ls-files', '--others', '--exclude-standard')
    if str(here / other) in imported and other != file
  ]
  changed = _git(
    'diff', '--name-only', 'HEAD', '--', *_CODE, *({file} & tracked)
  )
  for names, fault in (
    (absent, 'not in the commit that is sent'),
    (changed, 'changed since the commit that is sent'),
  ):
    if names:
      more = f' and {len(names) - 1} more' if names[1:] else ''
      lines.append(f'{names[0]}{more}: {fault}; commit first')
  return lines


def _git(*words: str) -> list[str]:
  """Returns the lines that git prints, or none if it fails."""
  try:
    process = subprocess.run(
      ['git', '-c', 'core.quotePath=off', *words],
      capture_output=True,
      text=True,
    )
  except FileNotFoundError:
    return []
  return process.stdout.splitlines() if process.returncode == 0 else []


def _relative(name: str, here: pathlib.Path) -> str:
  return os.path.relpath(os.path.realpath(name), here.resolve())


@functools.lru_cache(maxsize=8)
def _layout(config: Config) -> PyTree:
  """Returns the shapes of a config's state, which a sweep often shares."""
  import jax

  from ..adapters.state import abstract_state

  jax.config.update('jax_platforms', 'cpu')  # shapes need no accelerator
  return abstract_state(config)


def _check_fit(config: Config, slice_: chips.Slice) -> None:
  """Refuses a mesh of another size, and a step that does not fit.

  Raises:
    ConfigError: names a mesh, or the smallest slice, that fits.
  """
  from ..plan import search

  data = dataclasses.replace(config.data, source='stdlib', tokenizer='byte')
  layout = _layout(
    dataclasses.replace(config, data=data, mesh=MeshConfig(), run=RunConfig())
  )
  if config.mesh.devices != slice_.devices:
    best = search.best_on(config, slice_, layout)
    hint = (
      f'; {search.training_flags(best.config, config.mesh)} fits'
      if best
      else ''
    )
    raise ConfigError(
      f'config.mesh: its product is {config.mesh.devices}, {slice_} has '
      f'{slice_.devices} devices{hint}'
    )
  search.refuse_if_too_large(search.plan(config, slice_, layout), layout)


def _files(
  config: Config, job: Job, folders: dict[str, str] | None
) -> list[str]:
  """Returns the faults of the files that training reads.

  Those are the config's, and paths in other flags that exist here.
  """
  data, rl = config.data, config.rl
  if rl.task:
    data = dataclasses.replace(data, source='stdlib', sources=(), validation=())
  paths = {
    'config.data.source': data.source,
    'config.data.tokenizer': '' if data.tokenizer == 'byte' else data.tokenizer,
    'config.run.base': config.run.base,
  }
  for field in ('sources', 'validation'):
    for path, *_, name in getattr(data, field):
      paths[f'config.data.{field} {name}'] = path
  paths |= {
    f'config.rl.teachers {i}': path for i, (path, *_) in enumerate(rl.teachers)
  }
  if rl.task.endswith('.jsonl'):
    paths['config.rl.task'] = rl.task
  texts = [name for name in paths if name not in _NO_TEXT]
  paths |= {name: '' for name in texts if paths[name] == 'stdlib'}
  for word in job.arguments:
    flag, _, value = word.lstrip('-').partition('=')
    if not flag.startswith('config') and os.path.exists(value):
      paths[flag] = value
  here = functools.partial(_absent_here, data.field)
  check: Callable = here if folders is None else _absent_there
  lines = [check(name, path, folders) for name, path in paths.items() if path]
  return [line for line in lines if line]


def _absent_here(field: str, name: str, path: str, _) -> str:
  """Returns the fault of a path on files that all machines share, or ''."""
  from ..data import corpus, remote, sources

  if remote.is_remote(path):
    return ''  # each machine reads it by itself
  if name.startswith(('config.data.source', 'config.data.validation')):
    try:
      if not corpus.has_ids(path, field):
        sources.listed(path, field=field)
      return ''
    except ConfigError as error:
      return str(error)
  return (
    '' if os.path.exists(path) or '*' in path else f'{name}={path}: no file'
  )


def _absent_there(name: str, path: str, folders: dict[str, str]) -> str:
  """Returns the fault of a path for machines of their own, or ''."""
  from ..data import remote

  if remote.is_remote(path):
    return ''
  place = os.path.normpath(path)
  if any(place.startswith(f'{folder}/') for folder in folders):
    return ''
  if not os.path.isabs(place) and _git('ls-files', '--', place):
    return ''
  # A text, and a run to begin from, may be in a bucket.
  reads = '' if name in _NO_TEXT else ' and gs://'
  ways = [
    f'{there}, which is {folder} there' for folder, there in folders.items()
  ]
  return (
    f'{name}={path}: is not on those machines; they have the commit'
    f'{reads}' + ''.join(f' and {way}' for way in ways)
  )
