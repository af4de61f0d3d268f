"""The command line's edge: bad input is one line and exit code 2."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable

from absl import flags
from ml_collections import config_flags

from mla_moe import config as config_lib

FLAGS = flags.FLAGS


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


def config() -> config_lib.Config:
  """The checked config of the flags."""
  return config_lib.freeze(FLAGS.config)


def run(main: Callable[[], None], define: Callable[[], None] = define) -> None:
  """Defines and parses the flags, and calls `main`; ends the process.

  0: finished. 2: bad flags, config or input, said in one line. 1: a run that
  could not go on, in one line; anything else, with its traceback.
  """
  try:
    _parse(define)
    main()
  except Stopped as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(1)
  except config_lib.ConfigError as error:
    _refuse(error)


def _parse(define: Callable[[], None]) -> None:
  """Defines the flags, which reads the config and its overrides at once.

  Raises:
    ConfigError: whatever is wrong with them.
  """
  try:
    define()
    if '--help' in sys.argv[1:]:
      print(sys.modules['__main__'].__doc__)
      print(FLAGS.get_help())
      sys.exit(0)
    rest = FLAGS(sys.argv)[1:]
    if 'config' in FLAGS:
      FLAGS.config.keys()  # a file that failed to load says so here
  except (flags.Error, AttributeError, KeyError, OSError, TypeError) as error:
    # ml_collections wraps what a config file raised in its text: the last
    # line is the error itself.
    text = str(error).replace(r'\n', '; ').strip()
    last = text.splitlines()[-1].strip()
    wrapped = 'Traceback' in text or isinstance(error, OSError)
    text = last if wrapped else ' '.join(text.split())
    text = text.removeprefix('mla_moe.config.ConfigError: ')
    if isinstance(error, (AttributeError, KeyError)):
      text = f'config: there is no such key: {_unwrapped(text)}'
    raise config_lib.ConfigError(text) from None
  if rest:
    raise config_lib.ConfigError(f'{rest[0]!r}: not a flag; flags have --')


def _unwrapped(text: str) -> str:
  """'topk'; did you mean "top_k"? of ml_collections' words, once or twice."""
  text = text.replace("\\'", "'").replace("''", "'")
  hint = r';? Did you mean (".*?") instead of ".*?"\?\'?'
  return re.sub(hint, r'; did you mean \1?', text).strip('"')


def _refuse(error: config_lib.ConfigError) -> None:
  print(f'error: {error}', file=sys.stderr)
  sys.exit(2)
