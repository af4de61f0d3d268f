"""Settings of a process before it computes: compilation cache and memory."""

from __future__ import annotations

import ctypes
import functools
import os
import pathlib
import sys
import time

from mla_moe.config import ConfigError


def keep_compilations(folder: pathlib.Path) -> None:
  """Makes jax cache compiled programs in a folder, for the next start.

  Programs are run from there, so other users must not write to it. The variable
  JAX_COMPILATION_CACHE_DIR names another folder, which has jax's own limits.

  Raises:
    ConfigError: the folder is another user's, or others can write to it.
  """
  import jax

  chosen = os.environ.get('JAX_COMPILATION_CACHE_DIR')
  folder = pathlib.Path(chosen or folder)
  folder.mkdir(parents=True, exist_ok=True, mode=0o700)
  status = folder.stat()
  if status.st_uid != os.getuid() or status.st_mode & 0o022:
    raise ConfigError(
      f'{folder}: compiled programs are run from here, but others can write to '
      'it; chmod 700 it, or delete it'
    )
  jax.config.update('jax_compilation_cache_dir', str(folder.resolve()))
  if chosen:
    return
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)


def keep_memory() -> None:
  """Keeps freed memory with the process, on a CPU, for the next step.

  XLA allocates a step's whole scratch memory again each time, and glibc returns
  so large a piece to the system at once. Every step then faults it in page by
  page, which costs about a tenth of the benchmark's step. The dispatch must be
  synchronous, because the heaps of other threads cannot grow so large.
  """
  import jax

  # Before the backend starts: a CPU client reads the flag only then.
  jax.config.update('jax_cpu_enable_async_dispatch', False)
  if jax.default_backend() != 'cpu':
    return
  mallopt = None
  if sys.platform == 'linux':
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
  if mallopt:
    mallopt(-4, 0)  # M_MMAP_MAX: no piece gets a mapping of its own
    mallopt(-1, -1)  # M_TRIM_THRESHOLD: nothing is handed back


# Copies the carries of loops less often: up to 3 % of a step's time.
_STEP = {'xla_cpu_copy_insertion_use_region_analysis': True}


@functools.cache
def step_options() -> dict[str, bool]:
  """Returns the `compiler_options` of a training step, for `jax.jit`.

  They are {} on accelerators, and where XLA does not know the option.
  """
  import jax

  if jax.default_backend() != 'cpu':
    return {}
  try:
    jax.jit(lambda x: x, compiler_options=_STEP)(0)
  except jax.errors.JaxRuntimeError:
    return {}
  return _STEP


def peak_memory() -> int:
  """Returns the peak memory of this process in bytes.

  Linux's `ru_maxrss` would begin with the peak of the parent process.
  """
  status = pathlib.Path('/proc/self/status')
  if status.exists():
    for line in status.read_text(encoding='utf-8').splitlines():
      if line.startswith('VmHWM:'):
        return int(line.split()[1]) * 2**10
  import resource  # Windows has none: `cli` says so

  unit = 1 if sys.platform == 'darwin' else 2**10
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class First:
  """Says on standard error that a program's first answer compiles."""

  def __init__(self):
    self._start = 0.0
    self._is_over = False

  def begin(self) -> None:
    """Prints a line at its first call; later ones do nothing."""
    if not self._start:
      self._start = time.perf_counter()
      print(
        'The first answer: compiling, once ...', file=sys.stderr, flush=True
      )

  def end(self) -> None:
    """Prints the seconds since `begin`, at its first call."""
    if not self._is_over:
      self._is_over = True
      seconds = time.perf_counter() - self._start
      print(f'Compiled in {seconds:.1f} s.', file=sys.stderr, flush=True)
