"""Programs in the process of the tests, where nothing is imported again."""

import pathlib
import runpy
import sys
import warnings

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope='module')
def no_pictures():
  """Pages without their pictures: a report's take seconds to draw."""
  from experiments import page

  def svg(figure):
    from matplotlib import pyplot

    pyplot.close(figure)
    return ''

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(page, 'svg', svg)
    yield


@pytest.fixture
def call(monkeypatch, capsys):
  """Runs a program's words in this process: its exit code, output, errors."""
  from experiments import cli

  def run(program, *words):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, 'argv', [program, *words])
    before, code = set(cli.FLAGS), 0
    try:
      with warnings.catch_warnings():
        # ml_collections'; and runpy's, of a module that is imported already.
        for others in ('the load_module', '.*found in sys.modules'):
          warnings.filterwarnings('ignore', message=others)
        name = f'experiments.{program}'
        runpy.run_module(name, run_name='__main__', alter_sys=True)
    except SystemExit as ended:
      code = ended.code or 0
    finally:
      for name in set(cli.FLAGS) - before:
        delattr(cli.FLAGS, name)
      cli.FLAGS.unparse_flags()
    return code, *capsys.readouterr()

  return run
