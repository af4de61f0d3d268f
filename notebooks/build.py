"""Runs the sources and writes the .ipynb beside them, pictures included.

  python -m notebooks.build [--text] [NAME ...]

--text runs nothing: a code cell that has not changed keeps its outputs, and the
others have none. tests/test_notebooks.py compares the cells with their source.
"""

from __future__ import annotations

import pathlib
import sys
import time

# The badges and the first cells name this repository; a fork has another.
REPOSITORY = 'mla-moe/mla_moe'
FOLDER = pathlib.Path(__file__).parent
# The first cell of code of each notebook, which the sources do not have: a
# notebook may be opened anywhere, and its imports and folders are the clone's.
SETUP = f"""\
# Set-up: works in the clone above this notebook, or in one that Colab or Kaggle
# (with Internet switched on) fetches, or with the installed package.
import importlib.util
import os
import pathlib
import subprocess
import sys

here = pathlib.Path.cwd()
folders = here, here / 'src', *here.parents
clones = [f for f in folders if (f / 'notebooks/build.py').exists()]
if 'google.colab' in sys.modules or 'KAGGLE_KERNEL_RUN_TYPE' in os.environ:
  if not clones:
    clones = [here / 'src']
    where = 'https://github.com/{REPOSITORY}'
    subprocess.run(['git', 'clone', '-q', where, 'src'], check=True)
    pip = [sys.executable, '-m', 'pip', 'install', '-q', '-e', 'src']
    subprocess.run(pip, check=True)
if clones:
  os.chdir(clones[0])
  sys.path.insert(0, str(clones[0]))
else:
  package = importlib.util.find_spec('mla_moe')
  if not package:
    raise ModuleNotFoundError('open it in a clone, or: pip install mla_moe')
  # A wheel has the programs and configs within the package, a clone beside it.
  for place in package.submodule_search_locations:
    sys.path += [place, os.path.dirname(place)]"""


def sources() -> list[pathlib.Path]:
  """Returns the percent-format files."""
  return sorted(FOLDER.glob('[0-9]_*.py'))


def read(path: pathlib.Path):
  """Returns the notebook of a source, without outputs, ids counted."""
  import jupytext
  import nbformat

  notebook = jupytext.read(path)
  imports = notebook.cells[1]
  imports.source = imports.source.split('"""\n\n', 1)[1]  # the title says it
  notebook.cells.insert(1, nbformat.v4.new_code_cell(SETUP))
  for i, cell in enumerate(notebook.cells):
    cell['id'] = f'cell-{i}'
  kernel = {'display_name': 'Python 3', 'language': 'python', 'name': 'python3'}
  notebook.metadata = {'kernelspec': kernel}
  return notebook


def run(path: pathlib.Path, seconds: int = 1800):
  """Returns the notebook of a source, run in its own folder as in Jupyter."""
  from nbclient import NotebookClient

  notebook = read(path)
  where = {'metadata': {'path': str(FOLDER)}}
  NotebookClient(notebook, timeout=seconds, resources=where).execute()
  return clean(notebook)


def clean(notebook):
  """Removes parts that differ from run to run: timings, machines' warnings.

  Paths in what is printed begin at the root of the clone.
  """
  notebook.metadata.pop('language_info', None)  # the version of Python
  for cell in notebook.cells:
    cell.metadata = {}
    if cell.cell_type == 'code':
      outputs = []
      for output in cell.outputs:
        if output.get('name') == 'stderr':
          continue
        if 'text' in output:
          output.text = output.text.replace(f'{FOLDER.parent}/', '')
        if output.get('name') == 'stdout' and outputs and 'text' in outputs[-1]:
          outputs[-1].text += output.text
        else:
          outputs.append(output)
      cell.outputs = outputs
  return notebook


def text(path: pathlib.Path):
  """Returns the notebook of a source with the outputs of its .ipynb."""
  import nbformat

  notebook = read(path)
  before = nbformat.read(path.with_suffix('.ipynb'), as_version=4)
  old = {c.source: c for c in before.cells if c.cell_type == 'code'}
  for cell in notebook.cells:
    if cell.cell_type == 'code' and cell.source in old:
      cell.outputs = old[cell.source].outputs
      cell.execution_count = old[cell.source].execution_count
  return clean(notebook)


def main() -> None:
  """Builds the notebooks named on the command line, or all."""
  names = [word for word in sys.argv[1:] if word != '--text']
  stems = [path.stem for path in sources()]
  for name in names:
    if name not in stems:
      print(__doc__)
      print(f'{name!r}: is none of {", ".join(stems)}', file=sys.stderr)
      sys.exit(2)
  import nbformat

  for path in sources():
    if names and path.stem not in names:
      continue
    began = time.perf_counter()
    notebook = text(path) if '--text' in sys.argv else run(path)
    nbformat.write(notebook, path.with_suffix('.ipynb'))
    print(f'{path.stem}: {time.perf_counter() - began:.0f} s')


if __name__ == '__main__':
  main()
