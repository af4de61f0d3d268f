"""Fake devices, strict jax, checked annotations, before the first import."""

import atexit
import ctypes
import gc
import importlib.metadata
import os
import pathlib
import shutil
import sys
import tempfile

gc.disable()  # until all is imported, of which little is garbage
_FLAGS = [os.environ.get('XLA_FLAGS', '')]
_FLAGS += ['--xla_force_host_platform_device_count=8']
# Where little is to be optimized, this emitter compiles in 0.6 of the time, and
# a program in one piece in 0.65 of that; later versions do not know the first
# flag, and end at one that they do not know.
_QUICK = os.environ.get('JAX_DISABLE_MOST_OPTIMIZATIONS')
if _QUICK and importlib.metadata.version('jaxlib').startswith('0.10.'):
  _FLAGS += ['--xla_cpu_use_fusion_emitters=false']
  _FLAGS += ['--xla_cpu_parallel_codegen_split_count=1']
os.environ['JAX_PLATFORMS'] = 'cpu'
# Several processes compile for TPUs at once: none of them has one.
os.environ['ALLOW_MULTIPLE_LIBTPU_LOAD'] = '1'
os.environ['XLA_FLAGS'] = ' '.join(_FLAGS).strip()
# Workers and programs that tests start share what takes long to compile. To
# store a small program takes longer than to compile it again.
_SECONDS = 0.1
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
  _COMPILED = tempfile.mkdtemp(prefix='mla_moe_')
  atexit.register(shutil.rmtree, _COMPILED, ignore_errors=True)
  os.environ['JAX_COMPILATION_CACHE_DIR'] = _COMPILED
  os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = str(_SECONDS)

import hypothesis  # noqa: E402
import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402
from calls import call, no_pictures  # noqa: E402, F401
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
_OWN |= {'run_config', 'rl_config', 'use_config', 'data_config', 'dsa_config'}
_CHECKED = [
  f'mla_moe.{path.stem}' for path in _PACKAGE.iterdir() if path.stem not in _OWN
]
jaxtyping.install_import_hook(_CHECKED, 'checking.check')


# Files of many minutes, where the slow tests run. They come first, and a worker
# takes one of their tests at a time: none works on alone at the end.
_LONG = ('test_docs.py', 'test_notebooks.py', 'test_bench.py')

_NUMBERS = {'model', 'fp8', 'train', 'decode', 'test_sharding.py'}


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist, where it is in use
def pytest_xdist_make_scheduler(config, log):
  """Of --dist=loadfile: a worker takes a file, or a test of a long file."""
  from xdist.scheduler import LoadFileScheduling

  class Pieces(LoadFileScheduling):
    def _split_scope(self, nodeid):
      file = super()._split_scope(nodeid)
      return nodeid if file.endswith(_LONG) else file

  if config.getvalue('dist') == 'loadfile':
    return Pieces(config, log)


def pytest_collection_modifyitems(items):
  """Puts the long files first; the order is else that of the names.

  Tests that are run by hand are slow ones, too: -m 'not slow' leaves them out.
  The folder's name is a marker, where CI compiles its tests as for use.
  """
  items.sort(key=lambda item: item.path.name not in _LONG)
  for item in items:
    if item.path.parent.name == 'kernels':
      item.add_marker('kernels')
    elif _NUMBERS & {item.path.parent.name, item.path.name}:
      item.add_marker('numbers')
    if item.get_closest_marker('by_hand'):
      item.add_marker('slow')


def pytest_collection_finish():
  """Leaves what there is from here on out of every later garbage collection.

  Tracing makes and drops many small objects, and each collection would look at
  all modules and tests again.
  """
  gc.collect()
  gc.freeze()
  gc.enable()
  gc.set_threshold(20_000, 20, 20)


# Each compiled program is a handful of memory mappings; Linux allows a process
# 65,530 of them, and the one that asks for more aborts in the compiler. And a
# worker that keeps all programs has 7 GB when it ends.
_MAPPINGS = 20_000
_PAGES = 2 << 18  # of 4 KiB: 2 GiB


def _is_full():
  process = pathlib.Path('/proc/self')
  if not process.exists():
    return True
  pages = int((process / 'statm').read_text().split()[1])
  mappings = (process / 'maps').read_bytes().count(b'\n')
  return pages > _PAGES or mappings > _MAPPINGS


@pytest.fixture(autouse=True)
def _close_figures():
  """Closes what a test has drawn: matplotlib warns of the 21st open figure."""
  yield
  if 'matplotlib.pyplot' in sys.modules:
    sys.modules['matplotlib.pyplot'].close('all')


@pytest.fixture(scope='module', autouse=True)
def _forget_programs():
  """Frees each file's compiled programs behind it, and its style of pictures.

  jax's own small ones, of sums and casts, stay for the next file while memory
  and mappings are few. A test may have traced one of ours with a function
  replaced.
  """
  yield
  jax.config.update('jax_persistent_cache_min_compile_time_secs', _SECONDS)
  for name, module in list(sys.modules.items()):
    if name.split('.')[0] in ('mla_moe', 'experiments'):
      for value in list(vars(module).values()):
        for clear in ('clear_cache', 'cache_clear'):  # of jit, of functools
          getattr(value, clear, lambda: None)()
  if _is_full():
    jax.clear_caches()
    gc.collect()
    # What is free goes back to the system, which glibc else keeps.
    getattr(ctypes.CDLL(None), 'malloc_trim', lambda size: None)(0)
  if 'matplotlib' in sys.modules:
    sys.modules['matplotlib'].rcdefaults()
