"""What a program sets of its process before it computes: caches and memory."""

from __future__ import annotations

import ctypes
import pathlib
import sys


def keep_compilations(folder: pathlib.Path) -> None:
  """A second start of the same config compiles nothing again."""
  import jax

  folder.mkdir(parents=True, exist_ok=True, mode=0o700)
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
