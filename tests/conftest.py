"""Fake devices, strict jax, checked annotations, before the first import."""

import gc
import importlib.metadata
import os
import pathlib

_FLAGS = [os.environ.get('XLA_FLAGS', '')]
_FLAGS += ['--xla_force_host_platform_device_count=8']
# Where little is to be optimized, this emitter compiles in 0.6 of the time;
# later versions do not know the flag, and end at one that they do not know.
_QUICK = os.environ.get('JAX_DISABLE_MOST_OPTIMIZATIONS')
if _QUICK and importlib.metadata.version('jaxlib').startswith('0.10.'):
  _FLAGS += ['--xla_cpu_use_fusion_emitters=false']
os.environ['JAX_PLATFORMS'] = 'cpu'
# Several processes compile for TPUs at once: none of them has one.
os.environ['ALLOW_MULTIPLE_LIBTPU_LOAD'] = '1'
os.environ['XLA_FLAGS'] = ' '.join(_FLAGS).strip()

import hypothesis  # noqa: E402
import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402
from skips import (  # noqa: E402, F401
  pytest_make_collect_report,
  pytest_runtest_makereport,
)

# A red test can be repeated: the draws are the same in every run.
hypothesis.settings.register_profile('fixed', derandomize=True, database=None)
hypothesis.settings.load_profile('fixed')
jax.config.update('jax_numpy_rank_promotion', 'raise')

# Every module but config, whose classes check their own types and say so in
# a line for people. A folder's name stands for all that it holds.
_PACKAGE = pathlib.Path(__file__).parent.parent / 'mla_moe'
_OWN = {'__init__', '__pycache__', 'checked', 'config', 'variants'}
_OWN |= {'run_config', 'rl_config'}
_CHECKED = [
  f'mla_moe.{path.stem}' for path in _PACKAGE.iterdir() if path.stem not in _OWN
]
jaxtyping.install_import_hook(_CHECKED, 'checking.check')


# Files of many minutes, where the slow tests run: two workers take files in
# order, and the one that takes such a file last works on alone.
_LONG = ('test_docs.py', 'test_notebooks.py', 'test_bench.py')


def pytest_collection_modifyitems(items):
  """Puts the long files first; the order is else that of the names.

  Tests that are run by hand are slow ones, too: -m 'not slow' leaves them out.
  """
  items.sort(key=lambda item: item.path.name not in _LONG)
  for item in items:
    if item.get_closest_marker('by_hand'):
      item.add_marker('slow')


@pytest.fixture(scope='module', autouse=True)
def _forget_programs():
  """Frees each file's compiled programs behind it.

  Each program is a handful of memory mappings; Linux allows a process 65,530
  of them, and the one that asks for more aborts in the compiler.
  """
  yield
  jax.clear_caches()
  gc.collect()
