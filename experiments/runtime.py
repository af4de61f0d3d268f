"""What a program sets of its process before it computes: caches and memory."""

from __future__ import annotations

import ctypes
import functools
import os
import pathlib
import resource
import sys

from mla_moe.config import ConfigError


def keep_compilations(folder: pathlib.Path) -> None:
  """A second start of the same config compiles nothing again.

  What lies there is run, so nobody else may put anything there. The variable
  JAX_COMPILATION_CACHE_DIR names another folder.

  Raises:
    ConfigError: the folder is another user's, or others can write to it.
  """
  import jax

  folder = pathlib.Path(os.environ.get('JAX_COMPILATION_CACHE_DIR') or folder)
  folder.mkdir(parents=True, exist_ok=True, mode=0o700)
  found = folder.stat()
  if found.st_uid != os.getuid() or found.st_mode & 0o022:
    raise ConfigError(
      f'{folder}: compiled programs are run from here, but others can write to '
      'it; chmod 700 it, or delete it'
    )
  jax.config.update('jax_compilation_cache_dir', str(folder.resolve()))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)


def keep_memory() -> None:
  """On a CPU, what a step frees stays with the process for the next step.

  XLA asks for a step's whole scratch memory anew each time, and glibc hands so
  large a piece back to the system at once: every step then faults it in page
  by page, which costs about a tenth of the benchmark's step. It must be the
  main thread that asks, because other threads' heaps cannot grow so large.
  """
  import jax

  # Before anything asks for a backend: a CPU client reads it when it is made.
  jax.config.update('jax_cpu_enable_async_dispatch', False)
  if jax.default_backend() != 'cpu':
    return
  mallopt = None
  if sys.platform == 'linux':
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
  if mallopt:
    mallopt(-4, 0)  # M_MMAP_MAX: no piece gets a mapping of its own
    mallopt(-1, -1)  # M_TRIM_THRESHOLD: nothing is handed back


# Fewer copies of what loops carry: up to 3 % of a step's time.
_STEP = {'xla_cpu_copy_insertion_use_region_analysis': True}


@functools.cache
def step_options() -> dict[str, bool]:
  """What a training step is compiled with: `compiler_options` of `jax.jit`.

  Nothing but on a CPU, and nothing where XLA does not know the option.
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
  """Bytes of memory that this process has held at most.

  On Linux not what `ru_maxrss` says, which begins with what the process held
  that started this one.
  """
  status = pathlib.Path('/proc/self/status')
  if status.exists():
    for line in status.read_text().splitlines():
      if line.startswith('VmHWM:'):
        return int(line.split()[1]) * 2**10
  unit = 1 if sys.platform == 'darwin' else 2**10
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
