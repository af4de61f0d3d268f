"""The edge of every program: flags in, one line and an exit code out.

Exit codes: 0 finished; 2 bad flags, config or input, reported in one line; 1 a
run that could not go on, in one line, or any other error, with its traceback.

A config is named by its file or, if it is one of ours, by its name: `tiny` is
configs/tiny.py of a clone, and mla_moe/configs/tiny.py of an installed package.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib.util
import inspect
import operator
import os
import pathlib
import re
import sys
import traceback
import typing
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from mla_moe.checked import ConfigWarning
from mla_moe.config import Config, ConfigError, freeze

from . import commands
from .data import remote

FLAGS = flags.FLAGS
CONFIGS = pathlib.Path(__file__).parent.parent / 'configs'

# --config=NAME as a process gets it, words joined by \0.
_CONFIG = re.compile(r'((?:^|\0)--?config[=\0])([^:\0]*)')
# The messages of Python's int and float for a text that is no number.
_NUMBER = re.compile(
  r'flag --(.*?): (?:invalid literal for|could not convert string to) '
  r'(int|float).*'
)
# That of absl for a text that is no bool.
_BOOL = re.compile(r"flag --(.*?): \('?Non-boolean argument.*")


class Stopped(RuntimeError):
  """A run that could not go on: the message is one line, the exit code 1."""


def path(name: str, value: os.PathLike | str) -> pathlib.Path:
  """Returns the path that the flag or field `name` gives, its ~ expanded.

  Raises:
    ConfigError: a URL, which would become a folder of that name; or the home of
      a user whom this machine does not know.
  """
  text = os.fspath(value)
  scheme = re.match(r'([A-Za-z][\w+.-]*)://', text)
  if scheme:
    raise ConfigError(
      f'{name}={text!r}: {scheme[0]} is not supported; name a path of this '
      'machine, such as a copy or a mounted bucket'
    )
  try:
    return pathlib.Path(text).expanduser()
  except RuntimeError:
    raise ConfigError(f'{name}={text!r}: there is no such user') from None


def run_folder(name: str, value: os.PathLike | str) -> Any:
  """Returns a run's folder: gs://BUCKET/FOLDER as text, or a path.

  Raises:
    ConfigError: as `path`; another service's bucket, where Orbax cannot write.
  """
  text = os.fspath(value)
  if re.fullmatch(r'gs://[^/]+/.*[^/].*', text):
    return text
  if text.startswith(('gs://', 's3://')):
    raise ConfigError(
      f'{name}={text!r}: {text[:5]} is not supported; a run lies in a folder, '
      'or in gs://BUCKET/FOLDER'
    )
  return path(name, text)


def check_paths(config: Config) -> Config:
  """Returns the config, whose paths begin here or at a home of this machine.

  Raises:
    ConfigError: as `path`.
  """
  for name, place in (
    ('data.source', config.data.source),
    *(('data.sources', place) for place, *_ in config.data.sources),
    *(('data.validation', place) for place, *_ in config.data.validation),
  ):
    if not remote.is_remote(place):
      path(name, place)
  path('data.tokenizer', config.data.tokenizer)
  path('rl.task', config.rl.task)
  path('run.base', config.run.base)
  for name, *_ in config.rl.teachers:
    path('rl.teachers', name)
  return config


def _frozen(values: Any) -> Config:
  """Returns the checked config; `freeze` may read the tokenizer's file."""
  data = values.get('data')
  name = data.get('tokenizer') if hasattr(data, 'get') else None
  if isinstance(name, str):
    path('data.tokenizer', name)
  return check_paths(freeze(values))


class _Path(flags.ArgumentParser):
  """Parses a flag that is a path; '' stays ''."""

  syntactic_help = 'a path'

  def __init__(self, name: str, read: Callable = path):
    super().__init__()
    self._name, self._read = f'--{name}', read

  def parse(self, argument: str) -> str:
    return str(self._read(self._name, argument)) if argument else ''

  def flag_type(self) -> str:
    return 'path'


def define_path(
  name: str,
  default: str,
  text: str,
  values: flags.FlagValues = FLAGS,
  read: Callable = path,
) -> None:
  """Defines a flag that is a path, by `path` or `run_folder`."""
  parser, writer = _Path(name, read), flags.ArgumentSerializer()
  flags.DEFINE(parser, name, default, text, values, writer)


def define_unsealed(values: flags.FlagValues = FLAGS) -> None:
  """Defines the flag of every program that reads a run's checkpoint."""
  flags.DEFINE_bool(
    'allow_unsealed',
    False,
    'Trust a checkpoint that was never sealed.',
    flag_values=values,
  )


def define(
  values: flags.FlagValues = FLAGS, words: list[str] | None = None
) -> None:
  """Defines the flags of every program that runs a config.

  `words` are the command line, without which it is this process's.
  """
  config_flags.DEFINE_config_file(
    'config',
    str(CONFIGS / 'tiny.py'),
    'File of the config, or the name of one of ours: FILE:variant, tiny:smoke.',
    flag_values=values,
    sys_argv=words,
  )
  text = 'Folder of the run, or gs://BUCKET/FOLDER.'
  define_path('workdir', 'runs/tiny', text, values, run_folder)


def config() -> Config:
  """Returns the checked config of the flags."""
  return _frozen(FLAGS.config)


def config_of(words: Sequence[str], define: Callable) -> Config:
  """Returns the checked config that a program's words give.

  `define(values, words)` defines the program's flags in `values`.

  Raises:
    ConfigError: any mistake in the words.
  """
  name, values = config_file(words), flags.FlagValues()
  try:
    words = with_files(['', *words])
    share_configs()
    define(values, words)
    rest = values(words)[1:]
    if rest:
      raise ConfigError(f'{rest[0]!r}: not a flag; flags have --')
    return _frozen(values.config)
  except ConfigError:
    raise
  except Exception as error:  # a config file may raise anything
    raise ConfigError(_message(error, name, words)) from None


def run(
  main: Callable[..., None],
  define: Callable[[], None] = define,
  has_words: bool = False,
) -> None:
  """Defines and parses the flags, and calls `main`; errors end the process.

  With `has_words`, the words without -- are the arguments of `main`.
  """
  with edge():
    words = _parse(define)
    if words and not has_words:
      raise ConfigError(f'{words[0]!r}: not a flag; flags have --')
    main(*words)


@contextlib.contextmanager
def edge() -> Iterator[None]:
  """Turns the errors of a `with` block into a line and an exit code."""
  warnings.formatwarning = _line_of
  code, text = 2, ''
  try:
    try:
      _check_system()
      yield
    finally:
      sys.stdout.flush()  # here, where its errors can still be reported
    return
  except ConfigError as error:
    text = f'error: {error}'
  except (Stopped, FloatingPointError) as error:  # the latter: of a generation
    code, text = 1, f'error: {error}'
  except KeyboardInterrupt:
    code, text = 1, 'Interrupted.'
  except BrokenPipeError:
    # The reader (head, less) has gone; Python must not flush to it at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    code, text = 1, 'Ended: nobody reads the output any more.'
  print(text, file=sys.stderr)
  sys.exit(code)


def _line_of(message, category, *place, _others=warnings.formatwarning) -> str:
  """Returns the text of a warning; our own are for people, without a place."""
  if issubclass(category, ConfigWarning):
    return f'WARNING: {message}\n'
  return _others(message, category, *place)


def _check_system() -> None:
  """Refuses a system without the locks and limits of Unix: Windows."""
  for module in ('fcntl', 'resource'):
    if importlib.util.find_spec(module) is None:
      raise ConfigError(
        f'{sys.platform}: Python has no {module} here, which a run needs; use '
        'Linux or macOS, and WSL2 on Windows'
      )


def _parse(define: Callable[[], None]) -> list[str]:
  """Defines and parses the flags, a config and its overrides, too.

  Returns the words that are no flags.

  Raises:
    ConfigError: any mistake in them.
  """
  name = ''
  try:
    libraries = set(FLAGS)
    define()
    ours = sorted(set(FLAGS) - libraries - {'config'})
    words = [word for word in sys.argv if word != '--help']
    if 'config' in FLAGS:
      name = config_file(words[1:])
      share_configs()
      words = with_files(words)
    rest = FLAGS(words)[1:]
    config = FLAGS.config if 'config' in FLAGS else FLAGS
    if '--help' in sys.argv:
      print(commands.typed(sys.modules['__main__'].__doc__))
      print('\n'.join(_flags(ours)))
      if config is not FLAGS:
        print('\n'.join(_keys(name)))
      sys.exit(0)
  except (ConfigError, BrokenPipeError):
    raise
  except Exception as error:  # a config file may raise anything
    raise ConfigError(_message(error, name, sys.argv)) from None
  if not hasattr(config, 'keys') and config is not FLAGS:
    raise ConfigError(
      f'--config={name}: get_config gives {config!r}; it must return a config, '
      'as that of configs/tiny.py does'
    )
  return rest


def share_configs() -> None:
  """Lets a config import ours as `configs`, installed as in a clone.

  ml_collections executes a config in the module of the one before it, whose
  get_config would stand in for one that is missing: that module goes.
  """
  sys.modules.pop('config_config', None)
  if importlib.util.find_spec('configs') is None:
    sys.modules['configs'] = importlib.import_module('..configs', __package__)


def _flags(names: list[str]) -> Iterator[str]:
  """Yields each flag with its value, and its meaning below."""
  for name in names:
    value = FLAGS[name].value
    yield f'  --{name}={"" if value is None else value}'
    yield f'      {FLAGS[name].help}'


def _keys(name: str) -> Iterator[str]:
  """Yields each key of the config as a flag with its value, by group.

  A group's meaning, its class's docstring, stands above it.
  """
  yield f'\nThe config, {name or FLAGS["config"].default}'
  whole, last = config(), None
  for key in config_keys():
    path, _, field = key.rpartition('.')
    read = operator.attrgetter(key.partition('.')[2])
    if path != last:
      group = operator.attrgetter(f'{path}.__doc__'.partition('.')[2])(whole)
      yield f'\n{path}\n{inspect.cleandoc(group)}\n'
      last = path
    yield f'  --{key}={read(whole)}'


def config_file(words: Sequence[str]) -> str:
  """Returns the config file that the command line names, or ''.

  Raises:
    ConfigError: there is no such file; names one with a similar name.
  """
  flag = _CONFIG.search('\0'.join(words))
  return str(file_of(flag[2])) if flag else ''


def file_of(name: str) -> pathlib.Path:
  """Returns the file of a config: `tiny` is one of ours, others are paths.

  Raises:
    ConfigError: there is none; names one with a similar name.
  """
  ours = sorted(path.stem for path in CONFIGS.glob('[a-z]*.py'))
  if name in ours:
    return CONFIGS / f'{name}.py'
  if pathlib.Path(name).is_file():
    return pathlib.Path(name)
  if re.fullmatch(r'\w*', name):
    raise ConfigError(f'--config={name}: is no file; ours: {", ".join(ours)}')
  near = difflib.get_close_matches(pathlib.Path(name).stem, ours, 1)
  hint = f'; did you mean {near[0]}?' if near else ''
  raise ConfigError(f'--config={name}: no such file in {os.getcwd()}{hint}')


def with_files(words: Sequence[str]) -> list[str]:
  """Returns the words with the file of a config in place of its name."""
  file = lambda flag: f'{flag[1]}{file_of(flag[2])}'
  return _CONFIG.sub(file, '\0'.join(words)).split('\0')


def _message(error: Exception, name: str, words: Sequence[str]) -> str:
  """Returns one line for an error of `words` or of the config file `name`."""
  cause, ours = error, None
  while cause:  # absl and ml_collections raise ours again, with its traceback
    ours = cause if isinstance(cause, ConfigError) else ours
    cause = None if cause.__suppress_context__ else cause.__context__
  if ours:
    return str(ours)
  text = str(error).replace(r'\n', '; ').strip()
  # ml_collections puts the traceback of some errors into its own message: the
  # last line is the error itself.
  wrapped = 'Traceback' in text
  last = text.splitlines()[-1].strip() if text else ''
  whole = ''.join(traceback.format_exception(error))
  lines = re.findall(rf'File "{re.escape(name)}", line (\d+)', whole)
  if "no attribute 'get_config'" in text:
    return f'--config={name}: has no function get_config'
  if wrapped or lines:
    kind = type(error).__name__
    last = last if wrapped else f'{kind}: {getattr(error, "msg", last)}'
    line = f', line {lines[-1]}' if lines else ''
    return f'--config={name}{line}: {last}'
  if isinstance(error, (AttributeError, KeyError)):
    return _no_key(words) or f'config: {text}'
  text = ' '.join(text.split())
  text = _BOOL.sub(r'\1: must be true or false', text)
  return _NUMBER.sub(r'\1: must be a \2', text).replace('a int', 'an int')


def _alike(word: str, name: str) -> bool:
  """Whether `word` abbreviates `name`: topk or tk for top_k."""
  parts = name.split('_')
  short = ''.join(part[0] for part in parts)
  return word.replace('_', '') in (''.join(parts), short if parts[1:] else '')


def config_keys(group: type = Config, path: str = 'config') -> Iterator[str]:
  """Yields the path of each field of a group, nested ones included."""
  for name, kind in typing.get_type_hints(group).items():
    here = f'{path}.{name}'
    if dataclasses.is_dataclass(kind):
      yield from config_keys(kind, here)
    else:
      yield here


def _no_key(words: Sequence[str]) -> str:
  """Returns a line on the first unknown --config.KEY, with the likeliest key.

  The same name in another group comes before a similar name: people forget the
  group first. In their own group it comes before all.
  """
  keys = list(config_keys())
  groups = {key.rpartition('.')[0] for key in keys}
  for word in words:
    flag = re.match(r'--?(config\.[\w.]+)', word)
    if not flag or flag[1] in keys or flag[1] in groups:
      continue
    group, word = flag[1].rsplit('.', 1)
    same = [key for key in keys if _alike(word, key.rpartition('.')[2])]
    near = [key for key in same if key.rpartition('.')[0] == group]
    near += [key for key in same if key.endswith(f'.{word}')] + same
    near = near or difflib.get_close_matches(flag[1], keys, 1, 0.8)
    hint = f'did you mean {near[0]}?' if near else '--help lists them'
    return f'{flag[1]}: there is no such key; {hint}'
  return ''
