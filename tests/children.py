"""Programs in processes of their own, forked from one that has imported jax.

A program spends 1.3 CPU seconds on the imports of jax, flax and orbax before
its first line, and the tests start dozens. Here one server imports them once
for a worker of the tests, and forks for each program. It never starts a backend
of jax, so a fork is sound. The child leaves the server's loop for the top level
of the interpreter: its output, exit code, signals, threads and end are those of
`python -m PROGRAM`. Options that jax reads as it is imported must be those of
the tests; other variables are the child's own.

Tests of imports and of a process's first settings start a Python of their own.
"""

import atexit
import functools
import gc
import importlib
import json
import os
import pathlib
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time

import jax

ROOT = pathlib.Path(__file__).parent.parent
IMPORTED = (
  *('numpy', 'jax', 'flax.linen', 'optax', 'orbax.checkpoint'),
  *('ml_collections.config_flags', 'mla_moe', 'experiments.training.steps'),
)


class Child:
  """The part of subprocess.Popen that the tests use; output is text.

  `words` begin with '-m' and a module's name, or with a script's path.
  """

  def __init__(self, *words, env=None, cwd=ROOT, input=''):
    self.args, self.returncode = list(map(str, words)), None
    env = dict(os.environ if env is None else env)
    assert _imports(env) == _imports(os.environ), 'jax is imported already'
    request = {'words': self.args, 'env': env, 'cwd': str(cwd)}
    self._status, status = os.pipe()
    out, err = os.pipe(), os.pipe()
    with tempfile.TemporaryFile() as standard:
      standard.write(input.encode())
      standard.seek(0)
      fds = standard.fileno(), out[1], err[1], status
      _send(_server(), request, fds)
    for fd in fds[1:]:
      os.close(fd)
    self.stdout, self.stderr = (os.fdopen(pipe[0]) for pipe in (out, err))
    self.pid = self._number(None)

  def _number(self, timeout):
    """The next number of the server about this child; None after `timeout`."""
    if not select.select([self._status], [], [], timeout)[0]:
      return None
    return struct.unpack('i', os.read(self._status, 4))[0]

  def wait(self, timeout=None):
    if self.returncode is None:
      status = self._number(timeout)
      if status is None:
        raise subprocess.TimeoutExpired(self.args, timeout)
      self.returncode = os.waitstatus_to_exitcode(status)
      os.close(self._status)
    return self.returncode

  def poll(self):
    try:
      return self.wait(0)
    except subprocess.TimeoutExpired:
      return None

  def communicate(self, timeout=None):
    """Returns all of its output and errors, read side by side."""
    texts, end = {}, timeout and time.monotonic() + timeout
    files = {'out': self.stdout, 'err': self.stderr}
    read = lambda name, file: texts.update({name: file.read()})
    readers = [
      threading.Thread(target=read, args=pair, daemon=True)
      for pair in files.items()
    ]
    for reader in readers:
      reader.start()
    for reader in readers:
      reader.join(end and max(0, end - time.monotonic()))
    if any(reader.is_alive() for reader in readers):
      raise subprocess.TimeoutExpired(self.args, timeout)
    self.stdout.close()
    self.stderr.close()
    self.wait(end and max(0, end - time.monotonic()))
    return texts['out'], texts['err']

  def send_signal(self, number):
    if self.poll() is None:
      os.kill(self.pid, number)

  def kill(self):
    self.send_signal(signal.SIGKILL)

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.stdout.close()
    self.stderr.close()
    self.wait()


def run(*words, timeout=None, **options):
  """Like subprocess.run with its output captured."""
  with Child(*words, **options) as child:
    try:
      out, err = child.communicate(timeout)
    except BaseException:
      child.kill()
      raise
  return subprocess.CompletedProcess(child.args, child.returncode, out, err)


def on_devices(number):
  """The tests' environment, with another number of fake devices."""
  count = '--xla_force_host_platform_device_count='
  flags = os.environ['XLA_FLAGS'].replace(f'{count}8', f'{count}{number}')
  assert f'{count}{number}' in flags
  return os.environ | {'XLA_FLAGS': flags}


def _imports(environment):
  """The variables that jax reads as it is imported."""
  return {
    name: value
    for name, value in environment.items()
    if name.lower() in jax.config.values
  }


@functools.cache
def _server():
  """A connection to this process's server, which ends with the process."""
  ours, theirs = socket.socketpair()
  command = [sys.executable, __file__, str(theirs.fileno())]
  environment = os.environ | {'PYTHONPATH': str(ROOT)}
  server = subprocess.Popen(
    command, pass_fds=[theirs.fileno()], env=environment
  )
  theirs.close()
  atexit.register(server.wait)
  atexit.register(ours.close)  # the last one is the first to be called
  return ours


def _send(connection, request, fds):
  data = json.dumps(request).encode()
  socket.send_fds(connection, [struct.pack('i', len(data))], fds)
  connection.sendall(data)


def _receive(connection):
  """Returns (request, its files), or None where the tests are at their end."""
  head, fds, *_ = socket.recv_fds(connection, 4, 4)
  if not head:
    return None
  (size,), data = struct.unpack('i', head), b''
  while len(data) < size:
    data += connection.recv(size - len(data))
  return json.loads(data), fds


def serve(connection):
  """Forks for each request; returns it in the child, and None at the end."""
  waiting = {}  # the file where each child's end is reported
  wake, woken = os.pipe()
  for end in (wake, woken):
    os.set_blocking(end, False)
  signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
  signal.signal(signal.SIGCHLD, lambda *_: None)
  while True:
    ready, *_ = select.select([connection, wake], [], [])
    if wake in ready:
      os.read(wake, 4096)
      for pid in list(waiting):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
          os.write(waiting[pid], struct.pack('i', status))
          os.close(waiting.pop(pid))
    if connection in ready:
      received = _receive(connection)
      if received is None:
        return None
      request, (*standard, report) = received
      pid = os.fork()
      if not pid:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for number, fd in enumerate(standard):
          os.dup2(fd, number)
        others = [wake, woken, report, connection.detach(), *waiting.values()]
        for fd in (*standard, *others):
          os.close(fd)
        return request
      os.write(report, struct.pack('i', pid))
      waiting[pid] = report
      for fd in standard:
        os.close(fd)


def become(words, env, cwd):
  """Runs the program as this process's own."""
  os.chdir(cwd)
  os.environ.clear()
  os.environ.update(env)
  if words[0] == '-m':
    _, name, *arguments = words
    sys.argv, sys.path[0] = [name, *arguments], cwd
    runpy.run_module(name, run_name='__main__', alter_sys=True)
  else:
    sys.argv, sys.path[0] = words, os.path.dirname(words[0])
    runpy.run_path(words[0], run_name='__main__')


if __name__ == '__main__':
  for module in IMPORTED:
    importlib.import_module(module)
  gc.freeze()  # a child ends without a look at each imported object
  child = serve(socket.socket(fileno=int(sys.argv[1])))
  if child:
    become(**child)
