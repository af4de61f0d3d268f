"""The first lines of a program that a model wrote: the source of its limits.

`sandbox` puts this text before the answer's, so that the limits are there when
the answer's first line runs. It imports nothing of the package, and leaves the
modules of `_READY` loaded: a process that has given up root may not be able to
read Python's own library.
"""

import contextlib
import importlib
import os
import resource
import signal
import sys

_READY = (
  'bisect collections copy dataclasses datetime decimal enum fractions '
  'functools heapq io itertools json math operator random re socket '
  'statistics string time typing'
)
_NOBODY = 65534


def confine(seconds: int, memory: int, length: int) -> None:
  """Limits this process: processor, memory, files, processes, privileges."""
  for name in _READY.split():
    with contextlib.suppress(ImportError):  # a Python that was built without it
      importlib.import_module(name)
  # If the parent was killed: a first process ignores signals without a handler.
  signal.signal(signal.SIGALRM, lambda *_: os._exit(1))
  signal.pthread_sigmask(signal.SIG_SETMASK, ())  # the parent's, until here
  signal.alarm(seconds + 1)
  limits = {
    resource.RLIMIT_CORE: 0,
    resource.RLIMIT_CPU: seconds,
    resource.RLIMIT_AS: memory,
    resource.RLIMIT_FSIZE: length,
    resource.RLIMIT_NOFILE: 16,
  }
  for kind, value in limits.items():
    with contextlib.suppress(ValueError, OSError):  # macOS has not all of them
      resource.setrlimit(kind, (value, value))
  if os.geteuid() == 0:  # the kernel counts no processes of root
    os.setgroups([])
    os.setgid(_NOBODY)
    os.setuid(_NOBODY)
  resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
  sys.setrecursionlimit(10_000)
