"""The command line's edge: bad input is one line and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Callable

from absl import flags
from ml_collections import config_flags

from mla_moe import config as config_lib

FLAGS = flags.FLAGS


def define() -> None:
  """The flags of every program that runs a config."""
  config_flags.DEFINE_config_file(
    'config', 'configs/tiny.py', 'File of the config, or FILE:variant.'
  )
  flags.DEFINE_string('workdir', 'runs/tiny', 'Folder of the run.')


def config() -> config_lib.Config:
  """The checked config of the flags."""
  return config_lib.freeze(FLAGS.config)


def run(main: Callable[[], None]) -> None:
  """Parses the flags and calls `main`; ends the process.

  0: finished. 2: bad flags, config or input, said in one line. Anything else
  leaves with its traceback, as 1.
  """
  try:
    rest = FLAGS(sys.argv)[1:]
    if rest:
      raise config_lib.ConfigError(f'{rest[0]!r}: not a flag; flags have --')
    main()
  except config_lib.ConfigError as error:
    _refuse(error)
  except flags.Error as error:
    _refuse(error)
  except AttributeError as error:
    # ml_collections answers an unknown key of --config.a.b this way.
    if 'ml_collections' not in _origin(error):
      raise
    _refuse(f'config: there is no such key: {error}')
  except FileNotFoundError as error:
    if 'ml_collections' not in _origin(error):
      raise
    _refuse(f'--config: no such file: {error.filename}')


def _origin(error: BaseException) -> str:
  """The file in which `error` was raised."""
  trace = error.__traceback__
  while trace.tb_next:
    trace = trace.tb_next
  return trace.tb_frame.f_code.co_filename


def _refuse(error) -> None:
  line = ' '.join(str(error).split())
  print(f'error: {line}', file=sys.stderr)
  sys.exit(2)
