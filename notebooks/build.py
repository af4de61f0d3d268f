"""Runs the sources and writes the .ipynb beside them, pictures included.

  python -m notebooks.build [NAME ...]

Cells are compared with their source by tests/test_notebooks.py.
"""

from __future__ import annotations

import pathlib
import sys
import time

FOLDER = pathlib.Path(__file__).parent


def sources() -> list[pathlib.Path]:
  """The percent-format files."""
  return sorted(FOLDER.glob('[0-9]_*.py'))


def read(path: pathlib.Path):
  """The notebook of a source, without outputs, ids counted."""
  import jupytext

  notebook = jupytext.read(path)
  for i, cell in enumerate(notebook.cells):
    cell['id'] = f'cell-{i}'
  kernel = {'display_name': 'Python 3', 'language': 'python', 'name': 'python3'}
  notebook.metadata = {'kernelspec': kernel}
  return notebook


def run(path: pathlib.Path, seconds: int = 600):
  """The notebook of a source, executed in the repository's root."""
  from nbclient import NotebookClient

  notebook = read(path)
  where = {'metadata': {'path': str(FOLDER.parent)}}
  NotebookClient(notebook, timeout=seconds, resources=where).execute()
  for cell in notebook.cells:
    cell.metadata = {}
  return notebook


def main() -> None:
  """Builds the notebooks named on the command line, or all."""
  import nbformat

  for path in sources():
    if sys.argv[1:] and path.stem not in sys.argv[1:]:
      continue
    began = time.perf_counter()
    nbformat.write(run(path), path.with_suffix('.ipynb'))
    print(f'{path.stem}: {time.perf_counter() - began:.0f} s')


if __name__ == '__main__':
  main()
