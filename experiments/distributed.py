"""Several processes as one run: how they find each other, and what they share.

jax.distributed is started when it is asked for (--distributed=on) or when the
surroundings say so, and one line says which: JAX_COORDINATOR_ADDRESS with
JAX_NUM_PROCESSES and JAX_PROCESS_ID, a Slurm step of several tasks, a TPU slice
of several hosts (Cloud or GKE). Then every process must be of one mind: config,
code and packages are compared before anything is computed, since a difference
would end in a hang or, worse, in a run that nobody can repeat.

Process 0 alone writes the run's files. The others compute the same numbers and
write them where nobody looks; of a batch each reads only its devices' rows.
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
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments import roll_call, workdir
from mla_moe.config import Config, ConfigError

_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')
_ROOT = pathlib.Path(__file__).parent.parent


def detect(environ: dict[str, str]) -> tuple[str, dict]:
  """(who says so, arguments of jax.distributed.initialize), or ('', {})."""
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


def start(asked: str, timeout: int) -> None:
  """Joins the other processes; before anything else of jax is used.

  `asked` is auto, on or off; `timeout` is in seconds.

  Raises:
    ConfigError: processes did not arrive in time; says which.
  """
  how, arguments = detect(dict(os.environ)) if asked != 'off' else ('', {})
  if not how and asked != 'on':
    return
  import jax

  if 'cpu' in (os.environ.get('JAX_PLATFORMS') or ''):
    jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  if arguments:
    absent = roll_call.missing(*arguments.values(), timeout)
    if absent:
      who = ', '.join(map(str, absent))
      raise ConfigError(
        f'process {who} did not arrive within {timeout} s (found by {how}); '
        'look at its log, or wait longer with --distributed_timeout'
      )
  try:
    jax.distributed.initialize(**arguments, initialization_timeout=timeout)
  except (RuntimeError, ValueError) as error:
    line = ' '.join(str(error).split())
    raise ConfigError(
      f'--distributed={asked}: could not start: {line}'
    ) from None
  if jax.process_index() == 0:
    print(
      f'{jax.process_count()} processes (found by {how or "--distributed"}), '
      f'{jax.device_count()} devices.'
    )


def processes() -> int:
  """How many there are; asking starts no backend where there is one."""
  import jax

  return jax.process_count() if jax.distributed.is_initialized() else 1


def first() -> bool:
  """This is the process that writes."""
  import jax

  return processes() == 1 or jax.process_index() == 0


def agree(config: Config) -> None:
  """Compares config, code and packages of all processes.

  Raises:
    ConfigError: on every process, if any differs from process 0; says which
      and in what.
  """
  if processes() == 1:
    return
  from jax.experimental import multihost_utils

  parts = fingerprints(config)
  mine = np.stack([np.frombuffer(h, np.uint8) for h in parts.values()])
  every = np.asarray(multihost_utils.process_allgather(mine))
  apart = [
    f'process {i} has another {name}'
    for i, theirs in enumerate(every)
    for name, ours, other in zip(parts, every[0], theirs, strict=True)
    if (ours != other).any()
  ]
  if apart:
    raise ConfigError(
      f'{"; ".join(apart)} than process 0: all must run the same config, code '
      'and versions'
    )


def fingerprints(config: Config) -> dict[str, bytes]:
  """SHA-256 of the config, of our sources, and of versions that matter."""
  digest = lambda text: hashlib.sha256(text.encode()).digest()
  files = [
    path
    for folder in ('mla_moe', 'experiments')
    for path in sorted((_ROOT / folder).glob('**/*.py'))
  ]
  sources = [f'{p.relative_to(_ROOT)}\n{p.read_text()}' for p in files]
  versions = [importlib.metadata.version(name) for name in _PACKAGES]
  return {
    'config': digest(json.dumps(dataclasses.asdict(config), sort_keys=True)),
    'code': digest('\n'.join(sources)),
    'set of package versions': digest(
      ' '.join([platform.python_version(), *versions])
    ),
  }


@contextlib.contextmanager
def claim(folder: os.PathLike | str, config: Config):
  """`workdir.claim` by process 0; yields the folder, and where to write.

  The second is the folder itself on process 0, and scratch on the others,
  which are silent.

  Raises:
    ConfigError: on every process, if process 0 cannot have the folder.
  """
  with contextlib.ExitStack() as stack:
    enter = lambda: stack.enter_context(workdir.claim(folder, config))
    if first():
      path = alone(enter)
      yield path, path
      return
    alone(enter)
    scratch = stack.enter_context(tempfile.TemporaryDirectory())
    nowhere = stack.enter_context(open(os.devnull, 'w'))
    stack.enter_context(contextlib.redirect_stdout(nowhere))
    yield pathlib.Path(folder), pathlib.Path(scratch)


def alone(do: Callable[[], Any]) -> Any:
  """What `do` returns on process 0; None on the others, which wait for it.

  Raises:
    ConfigError: on every process, what it raised on process 0.
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
  said = np.zeros(2048, np.uint8)
  raw = text.encode()[: said.size]
  said[: len(raw)] = np.frombuffer(raw, np.uint8)
  said = np.asarray(multihost_utils.broadcast_one_to_all(said))
  if said.any():
    raise ConfigError(bytes(said[said > 0].tolist()).decode(errors='ignore'))
  return result


def share(mesh, micro: int) -> tuple[int, int]:
  """(i, n): this process's devices hold the i-th of n shares of the rows.

  Processes that hold other parts of the same rows' model read the same share.
  (0, 1), all rows, where the devices' order does not let it be one stretch.
  """
  from jax.sharding import NamedSharding

  from mla_moe import sharding

  if mesh is None:
    return 0, 1
  rows = NamedSharding(mesh, sharding.spec(('batch',)))
  mine = rows.addressable_devices_indices_map((micro,)).values()
  at = sorted({index[0].indices(micro)[:2] for index in mine})
  first, last = at[0][0], at[-1][1]
  size = sum(stop - start for start, stop in at)
  if size != last - first or first % size or micro % size:
    return 0, 1
  return first // size, micro // size
