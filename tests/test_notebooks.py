"""Notebooks are what their sources say, were run, and run."""

import importlib.machinery
import importlib.util
import json
import pathlib
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
  count = ('four', 'five', 'six', 'seven', 'eight')[len(SOURCES) - 4]
  readme = (build.FOLDER.parent / 'README.md').read_text()
  assert f'`notebooks/` has {count} that' in ' '.join(readme.split())
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
  assert ''.join(code[0]['source']) == build.SETUP


@pytest.fixture
def opened(tmp_path, monkeypatch):
  """Runs the first cell as in a folder; returns the commands that it calls."""
  (tmp_path / 'cell.py').write_text(build.SETUP)

  def run(folder):
    ran = []
    monkeypatch.chdir(folder)
    call = lambda words, check: ran.append(words)
    monkeypatch.setattr(subprocess, 'run', call)
    runpy.run_path(str(tmp_path / 'cell.py'))
    return ran

  monkeypatch.setattr(sys, 'path', list(sys.path))
  return run


@pytest.mark.parametrize('folder', ['.', 'notebooks', 'docs/_static'])
def test_a_notebook_of_a_clone_works_in_its_root(folder, opened, monkeypatch):
  root = build.FOLDER.parent
  # Neither the folder nor its packages are there before the cell.
  monkeypatch.setattr(sys, 'path', [p for p in sys.path if not of_root(p)])
  assert not opened(root / folder)
  assert pathlib.Path.cwd() == root
  assert not missing(roots_of_imports())


def test_an_installed_package_has_the_imports_of_all_notebooks(
  opened, tmp_path, monkeypatch
):
  """A wheel: `experiments` and `configs` are folders of mla_moe."""
  package = tmp_path / 'site' / 'mla_moe'
  package.mkdir(parents=True)
  (package / '__init__.py').write_text('')
  for name in ('experiments', 'configs'):
    (package / name).symlink_to(build.FOLDER.parent / name)
  empty = tmp_path / 'empty'
  empty.mkdir()
  others = [p for p in sys.path if not of_root(p)]
  monkeypatch.setattr(sys, 'path', [str(package.parent), *others])
  monkeypatch.delitem(sys.modules, 'mla_moe', raising=False)  # a new kernel
  assert not opened(empty)
  assert pathlib.Path.cwd() == empty
  assert not missing(roots_of_imports())
  monkeypatch.setattr(sys, 'path', others)
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ModuleNotFoundError, match='pip install mla_moe'):
    opened(empty)


@pytest.mark.parametrize('host', ['colab', 'kaggle'])
def test_a_host_fetches_the_clone_once(host, opened, tmp_path, monkeypatch):
  monkeypatch.delenv('KAGGLE_KERNEL_RUN_TYPE', raising=False)
  if host == 'colab':
    monkeypatch.setitem(sys.modules, 'google.colab', sys)
  else:
    monkeypatch.setenv('KAGGLE_KERNEL_RUN_TYPE', 'Interactive')
  (tmp_path / 'src' / 'notebooks').mkdir(parents=True)
  clone, install = opened(tmp_path)
  assert clone[-2:] == [f'https://github.com/{build.REPOSITORY}', 'src']
  assert install[-2:] == ['-e', 'src']
  assert pathlib.Path.cwd() == tmp_path / 'src' == pathlib.Path(sys.path[0])
  (tmp_path / 'src' / 'notebooks' / 'build.py').write_text('')
  for folder in (tmp_path, tmp_path / 'src'):  # another kernel, or a second run
    assert not opened(folder)
    assert pathlib.Path.cwd() == tmp_path / 'src'


def of_root(entry):
  """Whether an entry of sys.path is the clone, or the working folder."""
  return not entry or pathlib.Path(entry).resolve() == build.FOLDER.parent


def roots_of_imports():
  """The packages of this repository that the notebooks import."""
  text = '\n'.join(path.read_text() for path in SOURCES)
  names = set(re.findall(r'^(?:from|import) (\w+)', text, re.M))
  own = names & {'mla_moe', 'experiments', 'configs', 'notebooks'}
  assert own == {'mla_moe', 'experiments', 'configs'}
  return own


def missing(names):
  """The packages that no entry of sys.path has; what is imported is no help."""
  finder = importlib.machinery.PathFinder
  return [name for name in names if not finder.find_spec(name, sys.path)]


def test_only_notebooks_that_are_there_are_built():
  command = [sys.executable, '-m', 'notebooks.build', '6_nothing']
  process = subprocess.run(
    command, cwd=build.FOLDER.parent, capture_output=True, text=True
  )
  assert process.returncode == 2 and '5_cost' in process.stderr


# Fewer steps, and runs of one's own: each cell is computed, in seconds. Of all
# steps the .ipynb has the outcome.
FEWER = {
  '2_routing': {
    'SEEDS = 3': 'SEEDS = 1',
    'STEPS = 150': 'STEPS = 8',
    'assert vio == sorted(vio)': '',
    'assert (share[:-1].max(1) > share[-1].max() + 0.1).any()': '',
  },
  '3_fp8': {'STEPS = 80': 'STEPS = 8'},
  '4_train_and_speculate': {
    'steps=160,': 'steps=6,',
    'eval_every=80,': 'eval_every=6,',
    'save_every=160,': 'save_every=6,',
    "Path('runs/notebook')": "Path('{folder}')",
  },
  '6_r1_zero': {
    "'sort8', seed=0, cold=100, steps=80": "'sort3', seed=0, cold=40, steps=12",
    "Path('runs/notebook_r1')": "Path('{folder}')",
  },
  '7_sparse': {
    'LENGTH, TOPK = 512, 48': 'LENGTH, TOPK = 64, 8',
    'DENSE, WARMUP = 120, 60': 'DENSE, WARMUP = 2, 3',
    'SHOWN, WIDTH = 192, 48': 'SHOWN, WIDTH = 48, 24',
    "assert (kept(chosen['after'], p) > kept(chosen['before'], p)).all()": '',
  },
  '8_lora': {
    'BASE_STEPS, STEPS = 120, 150': 'BASE_STEPS, STEPS = 4, 3',
    'RANKS = 1, 2, 8': 'RANKS = (2,)',
    "Path('runs/notebook_lora')": "Path('{folder}')",
    'assert right_answers[RANKS[-1]] >= 24': '',
  },
}


@pytest.fixture
def as_for_people(monkeypatch):
  """The compiler that people have: it is quicker where steps are many."""
  for variable in ('JAX_DISABLE_MOST_OPTIMIZATIONS', 'XLA_FLAGS'):
    monkeypatch.delenv(variable, raising=False)


@needs('jupytext', 'nbclient', 'ipykernel')
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings('ignore')  # Jupyter's own
@pytest.mark.parametrize('path', SOURCES, ids=lambda p: p.stem)
def test_it_runs(path, tmp_path, monkeypatch, request):
  whole = build.read
  if path.stem not in FEWER:
    request.getfixturevalue('as_for_people')

  def fewer(path):
    notebook = whole(path)
    code = [cell for cell in notebook.cells if cell.cell_type == 'code']
    for old, new in FEWER.get(path.stem, {}).items():
      (cell,) = [cell for cell in code if old in cell.source]
      assert cell.source.count(old) == 1
      cell.source = cell.source.replace(old, new.format(folder=tmp_path / 'a'))
    return notebook

  monkeypatch.setattr(build, 'read', fewer)
  build.run(path)


@needs('jupytext', 'nbclient', 'ipykernel')
@pytest.mark.by_hand
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', sorted(FEWER))
def test_it_runs_whole(name, as_for_people):
  build.run(build.FOLDER / f'{name}.py')


def test_no_path_of_a_machine():
  for path in SOURCES:
    text = path.with_suffix('.ipynb').read_text()
    assert not re.search(r'/(home|root|work|tmp|Users)/', text), path.stem
