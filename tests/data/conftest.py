"""A folder of small text files, and its corpus."""

import pytest
from texts import prepared, small, write_folder


@pytest.fixture
def folder(tmp_path):
  return write_folder(tmp_path / 'text')


@pytest.fixture
def text(folder, tmp_path):
  return prepared(small(source=folder), tmp_path / 'cache')
