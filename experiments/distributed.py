"""Several processes as one run: how they find each other, and their roles.

jax.distributed starts with --distributed=on, or if the environment names other
processes: JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and JAX_PROCESS_ID, a
Slurm step of several tasks, or a TPU slice of several hosts (Cloud or GKE). A
roll call comes first: jax aborts a process that waits in vain, without a word
on the absent one. Then config, code and packages of all processes are compared,
because a difference would end in a hang or in a run that cannot be repeated.

Process 0 alone writes the run's files. The others compute the same numbers and
write theirs into a scratch folder. Each process reads only its devices' rows of
a batch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import socket
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from mla_moe import files
from mla_moe.config import Config, ConfigError

from . import workdir
from .checkpointing import bucket, storage

_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')
# A clone has them beside each other, an installed package one in the other.
_FOLDERS = pathlib.Path(files.__file__).parent, pathlib.Path(__file__).parent


def detect(environ: dict[str, str]) -> tuple[str, dict]:
  """Returns who names other processes, and jax.distributed's arguments.

  ('', {}) means that there are none.
  """
  get = environ.get
  if get('JAX_COORDINATOR_ADDRESS'):
    names = 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID'
    unset = [name for name in names if not get(name)]
    if unset:
      raise ConfigError(
        f'JAX_COORDINATOR_ADDRESS={get("JAX_COORDINATOR_ADDRESS")!r}: is set, '
        f'but {" and ".join(unset)} not; set all three or none'
      )
    address = get('JAX_COORDINATOR_ADDRESS')
    return 'environment', {
      'coordinator_address': address,
      'process_id': _number(environ, 'JAX_PROCESS_ID'),
      'num_processes': _number(environ, 'JAX_NUM_PROCESSES'),
    }
  if int(get('SLURM_STEP_NUM_TASKS') or 1) > 1:
    return 'Slurm', {}
  hosts = [h for h in get('TPU_WORKER_HOSTNAMES', '').split(',') if h]
  if len(hosts) > 1 or get('MEGASCALE_COORDINATOR_ADDRESS'):
    return 'GKE' if get('KUBERNETES_SERVICE_HOST') else 'Cloud TPU', {}
  return '', {}


def _number(environ, name: str) -> int:
  try:
    return int(environ[name])
  except ValueError:
    raise ConfigError(f'{name}={environ[name]!r}: must be a number') from None


def start(mode: str, timeout: int) -> None:
  """Joins the other processes, before jax is used for anything else.

  `mode` is auto, on or off; `timeout` is in seconds.

  Raises:
    ConfigError: processes that did not arrive in time; names them.
  """
  source, arguments = detect(dict(os.environ)) if mode != 'off' else ('', {})
  if not source and mode != 'on':
    return
  import jax

  if 'cpu' in (os.environ.get('JAX_PLATFORMS') or ''):
    jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  if arguments:
    missing = absent(*arguments.values(), timeout)
    if missing:
      numbers = ', '.join(map(str, missing))
      raise ConfigError(
        f'process {numbers} did not arrive within {timeout} s (found by '
        f'{source}); look at its log, or wait longer with --distributed_timeout'
      )
  try:
    jax.distributed.initialize(**arguments, initialization_timeout=timeout)
  except (RuntimeError, ValueError) as error:
    line = ' '.join(str(error).split())
    raise ConfigError(
      f'--distributed={mode}: could not start: {line}'
    ) from None
  if jax.process_index() == 0:
    print(
      f'{jax.process_count()} processes (found by '
      f'{source or "--distributed"}), {jax.device_count()} devices.'
    )


def absent(address: str, me: int, count: int, timeout: float) -> list[int]:
  """Returns the processes that did not arrive in time, the same everywhere.

  Process 0 listens on the port after the coordinator's (`address`, host:port),
  and the others tell it their numbers. If process 0 is the absent one, each of
  them finds that out by itself.
  """
  host, _, port = address.rpartition(':')
  end = time.monotonic() + timeout
  if me:
    return _report(host, int(port) + 1, me, end)
  return _listen(int(port) + 1, count, end)


def _listen(port: int, count: int, end: float) -> list[int]:
  here = {}
  with contextlib.ExitStack() as stack:
    try:
      server = socket.create_server(('', port), backlog=64)
    except OSError as error:
      raise ConfigError(
        f'port {port}, of the roll call: {error.strerror}; name another in '
        'JAX_COORDINATOR_ADDRESS (the roll call has the port after it)'
      ) from None
    stack.enter_context(server)
    while len(here) < count - 1 and time.monotonic() < end:
      server.settimeout(max(end - time.monotonic(), 0.01))
      try:
        peer = stack.enter_context(server.accept()[0])
        peer.settimeout(max(end - time.monotonic(), 0.01))
        here[int(peer.makefile().readline())] = peer
      except (OSError, ValueError):  # too late, or a stranger
        continue
    missing = sorted(set(range(1, count)) - set(here))
    for peer in here.values():
      with contextlib.suppress(OSError):
        peer.sendall(json.dumps(missing).encode() + b'\n')
  return missing


def _report(host: str, port: int, me: int, end: float) -> list[int]:
  while time.monotonic() < end:
    try:
      with socket.create_connection((host, port), timeout=1.0) as server:
        server.sendall(f'{me}\n'.encode())
        # Process 0 may have started later, and so wait longer.
        server.settimeout(2 * max(end - time.monotonic(), 1.0))
        return json.loads(server.makefile().readline())
    except (OSError, ValueError):
      time.sleep(0.2)
  return [0]


def processes() -> int:
  """Returns how many there are; a single one does not start its backend."""
  import jax

  return jax.process_count() if jax.distributed.is_initialized() else 1


def first() -> bool:
  """Whether this is process 0, which writes the run's files."""
  import jax

  return processes() == 1 or jax.process_index() == 0


def agree(config: Config) -> None:
  """Compares config, code and packages of all processes.

  Raises:
    ConfigError: on every process, if any differs from process 0; names the
      process and the difference.
  """
  if processes() == 1:
    return
  from jax.experimental import multihost_utils

  parts = fingerprints(config)
  mine = np.stack([np.frombuffer(h, np.uint8) for h in parts.values()])
  hashes = np.asarray(multihost_utils.process_allgather(mine))
  apart = [
    f'process {i} has another {name}'
    for i, theirs in enumerate(hashes)
    for name, first, other in zip(parts, hashes[0], theirs, strict=True)
    if (first != other).any()
  ]
  if apart:
    raise ConfigError(
      f'{"; ".join(apart)} than process 0: all must run the same config, code '
      'and versions'
    )


def fingerprints(config: Config) -> dict[str, bytes]:
  """Returns SHA-256 of the config, of our sources, and of package versions."""
  digest = lambda text: hashlib.sha256(text.encode()).digest()
  sources = [
    f'{path.relative_to(folder)}\n{path.read_text(encoding="utf-8")}'
    for folder in _FOLDERS
    for path in sorted(folder.glob('**/*.py'))
  ]
  versions = [importlib.metadata.version(name) for name in _PACKAGES]
  return {
    'config': digest(json.dumps(dataclasses.asdict(config), sort_keys=True)),
    'code': digest('\n'.join(sources)),
    'set of package versions': digest(
      ' '.join([platform.python_version(), *versions])
    ),
  }


def records(folder: os.PathLike | str, process: int) -> pathlib.Path:
  """Returns a run's folder, or a process's copy of the records in a bucket."""
  if storage.is_bucket(folder):
    return bucket.fetched(folder, process)
  return pathlib.Path(folder)


@contextlib.contextmanager
def claim(folder: os.PathLike | str, config: Config):
  """Yields a run's folder, claimed by process 0, the folder for its rows, and
  the call that must come before each seal.

  The second is the first on process 0, and a scratch folder on the others,
  whose standard output goes nowhere. Of a run in a bucket the folder is of this
  machine, and the call copies it there.

  Raises:
    ConfigError: on every process, if process 0 cannot have the folder.
  """
  with contextlib.ExitStack() as stack:

    def enter() -> tuple[pathlib.Path, Callable]:
      if storage.is_bucket(folder):
        return stack.enter_context(bucket.claim(folder, config))
      path = stack.enter_context(workdir.claim(folder, config))
      return path, lambda: None

    if first():
      path, send = alone(enter)
      yield path, path, send
      return
    alone(enter)
    import jax

    path = records(folder, jax.process_index())
    scratch = stack.enter_context(tempfile.TemporaryDirectory())
    null = stack.enter_context(open(os.devnull, 'w', encoding='utf-8'))
    stack.enter_context(contextlib.redirect_stdout(null))
    yield path, pathlib.Path(scratch), lambda: None


def alone(do: Callable[[], Any]) -> Any:
  """Returns the result of `do` on process 0; the others wait and get None.

  Raises:
    ConfigError: on every process, if `do` raised it on process 0.
  """
  if processes() == 1:
    return do()
  from jax.experimental import multihost_utils

  result, text = None, ''
  if first():
    try:
      result = do()
    except ConfigError as error:
      text = str(error)
  message = np.zeros(2048, np.uint8)
  raw = text.encode()[: message.size]
  message[: len(raw)] = np.frombuffer(raw, np.uint8)
  message = np.asarray(multihost_utils.broadcast_one_to_all(message))
  if message.any():
    text = bytes(message[message > 0].tolist())
    raise ConfigError(text.decode(errors='ignore'))
  return result


def of_first(text: str) -> str:
  """Returns the text, of at most 64 characters, that process 0 has."""
  if processes() == 1:
    return text
  from jax.experimental import multihost_utils

  message = np.frombuffer(text.encode().ljust(64, b'\0'), np.uint8)
  message = np.asarray(multihost_utils.broadcast_one_to_all(message))
  return bytes(message[message > 0].tolist()).decode()


def rows(mesh, micro: int, devices: list) -> np.ndarray:
  """Returns the numbers of the rows, of `micro`, that these devices hold.

  They need not be neighbours: the stages of a pipeline share the rows one by
  one. Devices that split the model, and not the rows, hold the same.
  """
  from jax.sharding import NamedSharding

  from mla_moe import sharding

  if mesh is None:
    return np.arange(micro)
  split = NamedSharding(mesh, sharding.spec(('batch',)))
  places = split.devices_indices_map((micro,))
  return np.unique([np.arange(micro)[places[device]] for device in devices])
