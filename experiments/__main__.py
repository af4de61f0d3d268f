"""All programs by one name.

  mla-moe NAME ...              in an environment with the package
  python -m mla_moe NAME ...    there, and in a clone
  python -m experiments.NAME    in a clone

The three run the same code. NAME is one of these, and `NAME --help` explains:

{programs}
"""

from __future__ import annotations

import ast
import difflib
import os
import pathlib
import runpy
import sys

from mla_moe.config import ConfigError

from . import cli


def programs() -> dict[str, str]:
  """Returns the first line of each program's docstring, by its name."""
  folder = pathlib.Path(__file__).parent
  files = {path.stem: path for path in folder.glob('[a-z]*.py')}
  files |= {path.parent.name: path for path in folder.glob('*/__main__.py')}
  lines = {}
  for name, path in sorted(files.items()):
    text = path.read_text(encoding='utf-8')
    if "\nif __name__ == '__main__':" in text:
      lines[name] = ast.get_docstring(ast.parse(text)).splitlines()[0]
  return lines


def main() -> None:
  """Runs the program that the command line names, as `python -m` runs it."""
  with cli.edge():
    lines = programs()
    name = sys.argv[1] if sys.argv[1:] else '--help'
    if name in ('--help', '-h'):
      table = '\n'.join(f'  {name:11} {line}' for name, line in lines.items())
      print(__doc__.format(programs=table))
      return
    if name not in lines:
      near = difflib.get_close_matches(name, lines, 1)
      hint = f'did you mean {near[0]}?' if near else '--help lists them'
      raise ConfigError(f'{name!r}: is no program; {hint}')
  del sys.argv[1]
  # As with `python -m`: a config of one's own may import its neighbours.
  if not sys.flags.safe_path and os.getcwd() not in sys.path:
    sys.path.insert(0, os.getcwd())
  runpy.run_module(f'{__package__}.{name}', run_name='__main__', alter_sys=True)


if __name__ == '__main__':
  main()
