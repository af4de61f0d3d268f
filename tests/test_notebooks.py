"""Notebooks are what their sources say, were run, and run."""

import importlib.util
import json
import re
import runpy
import subprocess
import sys

import pytest

from notebooks import build

SOURCES = build.sources()
needs = lambda *names: pytest.mark.skipif(
  any(importlib.util.find_spec(name) is None for name in names),
  reason='extra [notebooks]',
)


def test_there_is_a_notebook_for_each_question():
  assert len(SOURCES) >= 4
  listed = (build.FOLDER.parent / 'docs' / 'notebooks.md').read_text()
  assert set(re.findall(r'`(\d_\w+)`', listed)) == {p.stem for p in SOURCES}


@needs('jupytext')
@pytest.mark.parametrize('path', SOURCES, ids=lambda p: p.stem)
def test_the_ipynb_is_its_source(path):
  notebook = json.loads(path.with_suffix('.ipynb').read_text())['cells']
  expected = build.read(path).cells
  joined = lambda cell: ''.join(cell['source'])
  assert [joined(c) for c in notebook] == [joined(c) for c in expected]


@pytest.mark.parametrize('path', SOURCES, ids=lambda p: p.stem)
def test_it_was_run_whole_and_shows_pictures(path):
  cells = json.loads(path.with_suffix('.ipynb').read_text())['cells']
  code = [cell for cell in cells if cell['cell_type'] == 'code']
  assert [c['execution_count'] for c in code] == list(range(1, len(code) + 1))
  outputs = [o for cell in code for o in cell['outputs']]
  assert not any(o['output_type'] == 'error' for o in outputs)
  assert sum('image/png' in o.get('data', {}) for o in outputs) >= 2
  badge = f'colab.research.google.com/github/{build.REPOSITORY}/blob/main/'
  assert f'{badge}notebooks/{path.stem}.ipynb' in ''.join(cells[0]['source'])
  assert ''.join(code[0]['source']) == build.COLAB


def test_the_first_cell_fetches_only_on_colab_and_only_once(
  tmp_path, monkeypatch
):
  ran = []
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, 'path', list(sys.path))
  monkeypatch.setattr(subprocess, 'run', lambda words, check: ran.append(words))
  (tmp_path / 'cell.py').write_text(build.COLAB)
  runpy.run_path('cell.py')
  assert not ran and 'src' not in sys.path
  monkeypatch.setitem(sys.modules, 'google.colab', sys)
  runpy.run_path('cell.py')
  clone, install = ran
  assert clone[-2:] == [f'https://github.com/{build.REPOSITORY}', 'src']
  assert install[-2:] == ['-e', 'src'] and sys.path[0] == 'src'
  (tmp_path / 'src').mkdir()
  runpy.run_path('cell.py')
  assert len(ran) == 2


def test_only_notebooks_that_are_there_are_built():
  command = [sys.executable, '-m', 'notebooks.build', '6_nothing']
  process = subprocess.run(
    command, cwd=build.FOLDER.parent, capture_output=True, text=True
  )
  assert process.returncode == 2 and '5_cost' in process.stderr


@needs('jupytext', 'nbclient', 'ipykernel')
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings('ignore')  # Jupyter's own
@pytest.mark.parametrize('path', SOURCES, ids=lambda p: p.stem)
def test_it_runs(path):
  build.run(path)


def test_no_path_of_a_machine():
  for path in SOURCES:
    text = path.with_suffix('.ipynb').read_text()
    assert not re.search(r'/(home|root|work|tmp|Users)/', text), path.stem
