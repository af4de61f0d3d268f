"""Settings of Sphinx: MyST pages, and an API page of every public module."""

import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

project = 'mla_moe'
copyright = 'the mla_moe authors, Apache-2.0'
extensions = ['myst_parser', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon']
myst_enable_extensions = ['dollarmath', 'amsmath', 'colon_fence']
myst_heading_anchors = 3
source_suffix = {'.md': 'markdown'}
exclude_patterns = ['_build']
html_theme = 'furo'
html_static_path = ['_static']
html_title = 'mla_moe'
# Docstrings write `names` in single backticks, as Markdown does.
default_role = 'code'
autodoc_member_order = 'bysource'
autodoc_typehints = 'none'
autodoc_default_options = {
  'members': True,
  'undoc-members': False,
  'exclude-members': 'setup, parent, name, replace',
}
# Folders of mla_moe in the order of reading, '' for the modules at its top.
FOLDERS = ('', 'model', 'train', 'fp8', 'kernels', 'decode')
FOLDERS += ('hf',)


def setup(app):
  """Registers the hooks below; Sphinx calls this function."""
  app.connect('env-get-outdated', lambda *_: ['api'])  # always read again
  app.connect('source-read', list_modules)
  app.connect('autodoc-process-docstring', to_restructured, priority=400)


def list_modules(app, page: str, source: list[str]) -> None:
  """Replaces two lines of api.md: NAMES by a table, MODULES by sections."""
  if page == 'api':
    source[0] = source[0].replace('\nNAMES\n', f'\n{exported()}\n')
    sections = [
      f'{"##" if name.count(".") < 2 else "###"} {name}\n\n'
      f'```{{eval-rst}}\n.. automodule:: {name}\n```\n'
      for name in public_modules()
    ]
    source[0] = source[0].replace('MODULES', '\n'.join(sections))


def exported() -> str:
  """Returns a table of `mla_moe.__all__` with each name's first line."""
  import mla_moe

  rows = ['| `mla_moe.` | |', '| --- | --- |']
  for name in mla_moe.__all__:
    first = (getattr(mla_moe, name).__doc__ or '').strip().splitlines()[0]
    rows.append(f'| `{name}` | {first.replace("|", "or")} |')
  return '\n'.join(rows)


def public_modules() -> list[str]:
  """Names of mla_moe's packages and modules without a leading underscore."""
  names = []
  for folder in FOLDERS:
    prefix = f'mla_moe.{folder}'.rstrip('.')
    names += [prefix] if folder else []
    for path in sorted((ROOT / 'mla_moe' / folder).glob('[a-z]*.py')):
      names.append(f'{prefix}.{path.stem}')
  return names


def to_restructured(app, kind, name, obj, options, lines: list[str]) -> None:
  """Rewrites a docstring's Markdown habits in place as reStructuredText.

  An indented block below a paragraph is a table of plain text or a command,
  and is shown as it stands. Lines of the form `name: text` become a list. The
  asterisk in [*lead, K] is no emphasis.
  """
  result, indented = [], False
  for block in '\n'.join(lines).split('\n\n'):
    rows = block.splitlines()
    starts = block.startswith(' ') and not indented and bool(result)
    indented = block.startswith(' ')
    if starts:
      rows[:0] = ['::', '']
    if not indented:
      rows = [_escaped(row) for row in rows]
      if result and all(re.match(r' |\w+: ', row) for row in rows):
        rows = [row if row.startswith(' ') else f'* {row}' for row in rows]
    result += [*rows, '']
  lines[:] = result


def _escaped(row: str) -> str:
  parts = row.split('`')
  parts[::2] = [part.replace('[*', r'[\*') for part in parts[::2]]
  return '`'.join(parts)
