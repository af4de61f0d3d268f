"""A copy of a golden checkpoint, for a test to change."""

import shutil

import pytest
from releases import GOLDEN


@pytest.fixture
def copy(tmp_path):
  def make(case):
    target = tmp_path / case
    shutil.copytree(GOLDEN / case, target)
    return target

  return make
