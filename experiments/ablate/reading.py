"""Reading an ablation: a file of one function, or an idea's folder.

  get_ablation() -> {'sizes': {name: Config}, 'arms': {name: function},
                     'equal': budget, 'paper': text}

An arm is a function from a size's config to the arm's own: a changed config, or
a `Recipe` where an idea replaces functions, too. Such a file is anyone's, and
may do anything: its errors become one line that names the place.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import pathlib
import re
import traceback
from collections.abc import Iterator
from typing import Any

from mla_moe.config import Config, ConfigError

from .. import cli

OURS = cli.CONFIGS / 'ablate'
IDEAS = pathlib.Path(__file__).parent.parent / 'ideas'
# Names of sizes and arms: of files, of columns, and of the flags' lists.
_NAME = re.compile(r'\w[\w.+]*')


def names() -> list[str]:
  """Returns the names of the ablations that are here."""
  files = [path.stem for path in sorted(OURS.glob('[a-z]*.py'))]
  ideas = [path.parent.name for path in sorted(IDEAS.glob('*/ablation.py'))]
  return files + ideas


def read(name: str) -> tuple[dict, str, str, str]:
  """Returns the ablation of a name or file: values, name, docstring, code.

  A name is that of a file in configs/ablate, or of a folder in
  experiments/ideas, which has an `ablation.py`. The code is a hash of the file,
  or of all Python files of the idea's folder.

  Raises:
    ConfigError: there is none, or it is no ablation.
  """
  cli.share_configs()
  is_idea = name.isidentifier() and (IDEAS / name / 'ablation.py').is_file()
  path = IDEAS / name / 'ablation.py' if is_idea else _file(name)
  spec = importlib.util.spec_from_file_location('ablation', path)
  if spec is None:
    raise ConfigError(f'--name={name}: is no Python file; name a .py file')
  with own_code(name, path):
    if is_idea:
      package = __package__.rpartition('.')[0]
      module = importlib.import_module(f'{package}.ideas.{name}.ablation')
    else:
      module = importlib.util.module_from_spec(spec)
      spec.loader.exec_module(module)
  if not hasattr(module, 'get_ablation'):
    raise ConfigError(f'--name={name}: has no function get_ablation')
  with own_code(name, path):
    values = module.get_ablation()
  _check_values(name, values)
  sources = sorted(path.parent.rglob('*.py')) if is_idea else [path]
  code = hashlib.sha256(b'\0'.join(file.read_bytes() for file in sources))
  title = inspect.cleandoc(module.__doc__ or path.stem)
  return values, name if is_idea else path.stem, title, code.hexdigest()[:16]


@contextlib.contextmanager
def own_code(name: str, path: pathlib.Path | str) -> Iterator[None]:
  """Turns an error of an ablation's own code into one line with its place."""
  try:
    yield
  except Exception as error:  # a file of one's own may raise anything
    frames = traceback.extract_tb(error.__traceback__)
    lines = [x.lineno for x in frames if x.filename == str(path)]
    line = f', line {lines[-1]}' if lines else ''
    is_ours = isinstance(error, ConfigError)
    kind = '' if is_ours else f'{type(error).__name__}: '
    text = ' '.join(str(error).split())
    raise ConfigError(f'--name={name}{line}: {kind}{text}') from None


def _check_values(name: str, values: Any) -> None:
  """Refuses values that are no ablation.

  Raises:
    ConfigError: names the entry, and the form that it must have.
  """
  if not isinstance(values, dict):
    raise ConfigError(
      f'--name={name}: get_ablation gives {values!r:.60}; it must return a '
      "dict of 'sizes', 'arms', 'equal' and 'paper'"
    )
  wrong = {'sizes', 'arms', 'equal', 'paper'} ^ set(values)
  if wrong:
    raise ConfigError(
      f'--name={name}: {min(map(str, wrong))!r} is missing or unknown; an '
      "ablation has 'sizes', 'arms', 'equal' and 'paper'"
    )
  is_config = lambda value: isinstance(value, Config)
  for key, is_right, form in (
    ('sizes', is_config, 'configs'),
    ('arms', callable, 'functions of a config'),
  ):
    entries = values[key]
    if not isinstance(entries, dict) or not entries:
      raise ConfigError(f'--name={name}: {key!r} must be a dict of {form}')
    for word, value in entries.items():
      if not isinstance(word, str) or not _NAME.fullmatch(word):
        raise ConfigError(
          f'--name={name}: {word!r} of {key!r} names files and columns; it may '
          'have letters, digits, _, and after the first also . and +'
        )
      if not is_right(value):
        raise ConfigError(
          f'--name={name}: {word!r} of {key!r} is {value!r:.60}; it must be '
          f'one of the {form}'
        )
  if not isinstance(values['paper'], str):
    raise ConfigError(f"--name={name}: 'paper' must be a text; '' for none")


def _file(name: str) -> pathlib.Path:
  """Returns the file of an ablation: of ours by its name, or a path.

  Raises:
    ConfigError: there is none; names those of ours, or one like it.
  """
  if name in names():
    return OURS / f'{name}.py'
  path = cli.path('--name', name)
  if path.is_file():
    return path
  near = difflib.get_close_matches(pathlib.Path(name).stem, names(), 1)
  hint = f'did you mean {near[0]}?' if near else f'ours: {", ".join(names())}'
  raise ConfigError(f'--name={name}: is no ablation; {hint}')


def place(function: Any) -> str:
  """Returns the file of a function; '' of one without."""
  code = getattr(function, '__code__', None)
  return code.co_filename if code else ''
