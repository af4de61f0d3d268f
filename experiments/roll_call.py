"""Who is missing: a roll call before jax.distributed starts.

A process that waits for others inside of jax is aborted when its time is up,
without a word on whom it waited for. So they meet here first: process 0 listens
on the port after the coordinator's, the others say their numbers, and all are
told the same: everybody is here, or who is not.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time


def missing(address: str, me: int, processes: int, timeout: float) -> list[int]:
  """The processes that did not arrive in time, the same list everywhere.

  `address` is the coordinator's host:port. Where process 0 is the one that is
  missing, the others find out by themselves.
  """
  host, _, port = address.rpartition(':')
  end = time.monotonic() + timeout
  if me:
    return _report(host, int(port) + 1, me, end)
  return _listen(int(port) + 1, processes, end)


def _listen(port: int, processes: int, end: float) -> list[int]:
  here = {}
  with contextlib.ExitStack() as stack:
    server = stack.enter_context(socket.create_server(('', port), backlog=64))
    while len(here) < processes - 1 and time.monotonic() < end:
      server.settimeout(max(end - time.monotonic(), 0.01))
      try:
        one = stack.enter_context(server.accept()[0])
        one.settimeout(max(end - time.monotonic(), 0.01))
        here[int(one.makefile().readline())] = one
      except (OSError, ValueError):  # too late, or nobody of ours
        continue
    absent = sorted(set(range(1, processes)) - set(here))
    for one in here.values():
      with contextlib.suppress(OSError):
        one.sendall(json.dumps(absent).encode() + b'\n')
  return absent


def _report(host: str, port: int, me: int, end: float) -> list[int]:
  while time.monotonic() < end:
    try:
      with socket.create_connection((host, port), timeout=1.0) as one:
        one.sendall(f'{me}\n'.encode())
        # Process 0's time may have begun later than ours.
        one.settimeout(2 * max(end - time.monotonic(), 1.0))
        return json.loads(one.makefile().readline())
    except (OSError, ValueError):
      time.sleep(0.2)
  return [0]
