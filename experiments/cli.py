"""The command line's edge: bad input is one line and exit code 2."""

from __future__ import annotations

import contextlib
import difflib
import operator
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Callable, Iterator

from absl import flags
from ml_collections import config_flags

from mla_moe.config import Config, ConfigError, freeze
from mla_moe.config import keys as config_keys

FLAGS = flags.FLAGS

_OURS = 'mla_moe.config.ConfigError: '
# What Python's int and float say of a text that is none.
_NUMBER = re.compile(
  r'flag --(.*?): (?:invalid literal for|could not convert string to) '
  r'(int|float).*'
)


class Stopped(RuntimeError):
  """A run that could not go on: the message is one line, the exit code 1."""


def define_unsealed() -> None:
  """The flag of every program that reads a run's checkpoint."""
  flags.DEFINE_bool(
    'allow_unsealed', False, 'Trust a checkpoint that was never sealed.'
  )


def define() -> None:
  """The flags of every program that runs a config."""
  config_flags.DEFINE_config_file(
    'config', 'configs/tiny.py', 'File of the config, or FILE:variant.'
  )
  flags.DEFINE_string('workdir', 'runs/tiny', 'Folder of the run.')


def config() -> Config:
  """The checked config of the flags."""
  return freeze(FLAGS.config)


def run(main: Callable[[], None], define: Callable[[], None] = define) -> None:
  """Defines and parses the flags, and calls `main`; ends the process.

  0: finished. 2: bad flags, config or input, said in one line. 1: a run that
  could not go on, in one line; anything else, with its traceback.
  """
  with edge():
    _parse(define)
    main()


@contextlib.contextmanager
def edge() -> Iterator[None]:
  """Ends the process by `run`'s exit codes; needs no flags of its own."""
  code, text = 2, ''
  try:
    try:
      yield
    finally:
      sys.stdout.flush()  # here, and not when Python has half ended
    return
  except ConfigError as error:
    text = f'error: {error}'
  except Stopped as error:
    code, text = 1, f'error: {error}'
  except KeyboardInterrupt:
    code, text = 1, 'Interrupted.'
  except BrokenPipeError:
    # Whoever reads has seen enough; what Python would still flush goes nowhere.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    code, text = 1, 'Ended: nobody reads the output any more.'
  print(text, file=sys.stderr)
  sys.exit(code)


def _parse(define: Callable[[], None]) -> None:
  """Defines the flags, which reads the config and its overrides at once.

  Raises:
    ConfigError: whatever is wrong with them.
  """
  name = ''
  try:
    define()
    if '--help' in sys.argv[1:]:
      print(sys.modules['__main__'].__doc__)
      print(FLAGS.get_help())
      if 'config' in FLAGS:
        print(_keys())
      sys.exit(0)
    if 'config' in FLAGS:
      name = config_file(sys.argv[1:])
    rest = FLAGS(sys.argv)[1:]
    made = FLAGS.config if 'config' in FLAGS else FLAGS
  except (ConfigError, BrokenPipeError):
    raise
  except Exception as error:  # a config file may raise anything
    raise ConfigError(_said(error, name)) from None
  if not hasattr(made, 'keys') and made is not FLAGS:
    raise ConfigError(
      f'--config={name}: get_config gives {made!r}; it must return a config, '
      'as that of configs/tiny.py does'
    )
  if rest:
    raise ConfigError(f'{rest[0]!r}: not a flag; flags have --')


def _keys() -> str:
  """Every key of a config, as the command line has it."""
  lines = [
    "The keys of a config (mla_moe/config.py), with DeepSeek-V3's values:"
  ]
  for key in config_keys():
    value = operator.attrgetter(key.partition('.')[2])(Config())
    lines.append(f'  --{key}={value}')
  return '\n'.join(lines)


def config_file(words: list[str]) -> str:
  """The config file that the command line names, or ''.

  Raises:
    ConfigError: it is not there; says which may be meant.
  """
  found = re.search(r'(?:^|\0)--?config[=\0]([^:\0]*)', '\0'.join(words))
  name = found[1] if found else ''
  if found and not pathlib.Path(name).is_file():
    there = {path.stem: path for path in pathlib.Path('configs').glob('*.py')}
    near = difflib.get_close_matches(pathlib.Path(name).stem, there, 1)
    hint = f'; did you mean {there[near[0]]}?' if near else ''
    raise ConfigError(f'--config={name}: no such file in {os.getcwd()}{hint}')
  return name


def _said(error: Exception, name: str) -> str:
  """An error of the flags or of config file `name`, with its line, in one."""
  text = str(error).replace(r'\n', '; ').strip()
  # ml_collections wraps some of what a config file raises in its text: the
  # last line is the error itself.
  wrapped = 'Traceback' in text
  last = text.splitlines()[-1].strip() if text else ''
  if last.startswith(_OURS) and wrapped:
    return last.removeprefix(_OURS)
  whole = ''.join(traceback.format_exception(error))
  lines = re.findall(rf'File "{re.escape(name)}", line (\d+)', whole)
  if "no attribute 'get_config'" in text:
    return f'--config={name}: has no function get_config'
  if wrapped or lines:
    kind = type(error).__name__
    last = last if wrapped else f'{kind}: {getattr(error, "msg", last)}'
    at = f', line {lines[-1]}' if lines else ''
    return f'--config={name}{at}: {last}'
  if isinstance(error, (AttributeError, KeyError)):
    return _no_key(sys.argv[1:]) or f'config: {text}'
  text = ' '.join(text.split())
  return _NUMBER.sub(r'\1: must be a \2', text).replace('a int', 'an int')


def _alike(word: str, name: str) -> bool:
  """topk or tk for top_k."""
  parts = name.split('_')
  short = ''.join(part[0] for part in parts)
  return word.replace('_', '') in (''.join(parts), short if parts[1:] else '')


def _no_key(words: list[str]) -> str:
  """The first --config.KEY that no config has, and the nearest that is there.

  A key of another group counts before a similar name: the group is what one
  forgets.
  """
  keys = list(config_keys())
  groups = {key.rpartition('.')[0] for key in keys}
  for word in words:
    asked = re.match(r'--?(config\.[\w.]+)', word)
    if not asked or asked[1] in keys or asked[1] in groups:
      continue
    word = asked[1].rpartition('.')[2]
    same = [key for key in keys if _alike(word, key.rpartition('.')[2])]
    near = same or difflib.get_close_matches(asked[1], keys, 1, 0.8)
    hint = f'did you mean {near[0]}?' if near else '--help lists them'
    return f'{asked[1]}: there is no such key; {hint}'
  return ''
