"""A folder with two sealed steps, and a copy to damage."""

import shutil

import pytest
from states import save

from experiments import faults


@pytest.fixture(autouse=True)
def unstruck():
  """A rule strikes a step once in a process: each test begins anew."""
  faults.struck.clear()


@pytest.fixture(scope='module')
def two(tmp_path_factory):
  """Steps 1 and 2, to be copied and damaged."""
  folder = tmp_path_factory.mktemp('two')
  save(folder, 1, 2)
  return folder


@pytest.fixture
def damaged(two, tmp_path):
  return shutil.copytree(two, tmp_path / 'damaged')
