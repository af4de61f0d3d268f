"""Ports for processes that are told a number: free ones, tried again if lost.

Between the look for a port and its use another process may take it.
"""

import contextlib
import socket


@contextlib.contextmanager
def held():
  """Yields a port on which this process listens; the one before it is free."""
  while True:
    with socket.socket() as first, socket.socket() as second:
      first.bind(('', 0))
      port = first.getsockname()[1] + 1
      try:
        second.bind(('', port))
      except (OSError, OverflowError):
        continue
      second.listen()
      first.close()
      yield port
      return


def tried(run):
  """Returns `run(port)`, (processes, their outputs), on ports that were free.

  The port after it, of the roll call, was free, too.
  """
  for _ in range(5):
    with held() as following:
      port = following - 1
    processes, outputs = run(port)
    if 'in use' not in str(outputs):
      break
  return processes, outputs
