"""The seal of a state that lies on one process, or on two.

Each process has one device, one processor core and its part of the arrays, and
all save the same three steps. The first compiles. The seal of the second is
slowed down by a sleep; the third save, which begins meanwhile, must not wait
for it. Each process prints the bytes and seconds of its hashes, and the pauses
of the last two saves, as a line of JSON.

The arguments of such a process are RANK PROCESSES FOLDER MIB SLEEP.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import time

from .. import commands

SLEEP = 12.0  # seconds, of the second seal, where none are named


def measured(
  folder: pathlib.Path, processes: int, mib: int, sleep: float = SLEEP
) -> list[dict]:
  """Returns the lines of all processes, each of which is started here."""
  folder.mkdir()
  children = [
    subprocess.Popen(
      [*commands.program('bench.sealing'), *map(str, words)],
      stdout=subprocess.PIPE,
      text=True,
    )
    for words in ((i, processes, folder, mib, sleep) for i in range(processes))
  ]
  lines = [child.communicate()[0].splitlines() for child in children]
  codes = [child.returncode for child in children]
  if any(codes):
    raise RuntimeError(f'the processes ended with {codes}')
  return [json.loads(line[-1]) for line in lines]


def described(lines: list[dict], mib: int) -> str:
  """Returns the largest numbers of all processes, as a line."""
  seal = {x: max(line['seal'][x] for line in lines) for x in lines[0]['seal']}
  pause = {x: max(line[x] for line in lines) for x in ('alone', 'beside')}
  return (
    f'seal of {mib} MiB by {len(lines)} process(es) of a core: each hashes '
    f'{seal["bytes"] / 2**20:.0f} MiB, {seal["seconds"]:.2f} s, of processor '
    f'time {seal["processor"]:.2f} s; the pause of a save '
    f'{1e3 * pause["alone"]:.0f} ms, beside a seal that takes {SLEEP:.0f} s '
    f'longer {1e3 * pause["beside"]:.0f} ms'
  )


def main(
  rank: int, processes: int, folder: str, mib: int, sleep: float
) -> None:
  """Saves three steps as one of the processes; prints the line of JSON."""
  cores = sorted(os.sched_getaffinity(0))
  os.sched_setaffinity(0, {cores[rank % len(cores)]})
  import jax

  if processes > 1:
    jax.config.update('jax_cpu_collectives_implementation', 'gloo')
    address = f'unix:{folder}/socket'  # no port that another program may have
    jax.distributed.initialize(
      address, processes, rank, coordinator_bind_address=address
    )
  from ..checkpointing import saving, seal

  records, hashed, state = seal.records, {}, _state(mib)

  def timed(path, *words):
    began, of_process = time.perf_counter(), time.process_time()
    own = records(path, *words)
    size = sum(size for size, _ in own.values())
    hashed[path.name] = {
      'bytes': size,
      'seconds': time.perf_counter() - began,
      'processor': time.process_time() - of_process,
    }
    if path.name == '2':
      time.sleep(sleep)
    return own

  seal.records, pauses = timed, {}
  with saving.Writer(pathlib.Path(folder) / 'run', 9) as writer:
    for step in (1, 2, 3):
      writer.ready()  # the step before is written; its seal may not be
      began = time.perf_counter()
      writer.save(step, state, {})
      pauses[step] = time.perf_counter() - began
      if step == 1:
        writer.wait()
  line = {'seal': hashed['3'], 'alone': pauses[2], 'beside': pauses[3]}
  print(json.dumps(line), flush=True)


def _state(mib: int) -> dict:
  """Returns random float32 arrays of 4 MiB, each split over all devices."""
  import jax
  import numpy as np
  from jax.sharding import Mesh, NamedSharding, PartitionSpec

  mesh = Mesh(np.array(jax.devices()), ('data',))
  split = NamedSharding(mesh, PartitionSpec('data'))
  draw = jax.jit(
    lambda key: jax.random.normal(key, (1024, 1024)), out_shardings=split
  )
  keys = jax.random.split(jax.random.key(0), mib // 4)
  return {f'{i}': draw(key) for i, key in enumerate(keys)}


if __name__ == '__main__':
  rank, processes, folder, mib, sleep = sys.argv[1:]
  main(int(rank), int(processes), folder, int(mib), float(sleep))
