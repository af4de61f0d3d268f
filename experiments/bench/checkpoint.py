"""The cost of safety: a save's pause beside Orbax alone, and the seal's time.

Training waits during the pause: for the copy of the arrays, and with us for
their fingerprints. Both kinds of save take turns on the same arrays with the
same options. A thread makes the seal, from files that have just been written:
training can lose only processor time by it. With two processes, each of one
core, each hashes its half, and the next save begins beside a slow seal.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import statistics
import tempfile
import time

from .. import runtime
from . import sealing as halves

_PAUSE_MIB, _SEAL_MIB, _MIB, _PERIOD = 128, 1024, 512, 100.0


def flags(parser) -> None:
  """Adds this benchmark's flags."""
  parser.add_argument('--rounds', type=int, default=7, help='saves of each')


def run(out: pathlib.Path, args) -> None:
  """Measures, prints a table and writes OUT/checkpoint.json."""
  import jax

  runtime.keep_memory()
  with tempfile.TemporaryDirectory(dir=out) as scratch:
    pause = pauses(pathlib.Path(scratch), args.rounds)
    sealing = seals(pathlib.Path(scratch), max(args.rounds // 2, 1))
    shared = {
      count: halves.measured(pathlib.Path(scratch) / f'{count}', count, _MIB)
      for count in (1, 2)
    }
  results = {
    'machine': f'{os.cpu_count()} cores, {jax.devices()[0].device_kind}',
    'pause': pause,
    'seal': sealing,
    'processes': shared,
  }
  (out / 'checkpoint.json').write_text(
    json.dumps(results, indent=1), encoding='utf-8'
  )
  ms = {name: 1e3 * pause[name]['pause'] for name in ('ours', 'orbax')}
  print(
    f'pause of a save of {_PAUSE_MIB} MiB: {ms["ours"]:.0f} ms, Orbax alone '
    f'{ms["orbax"]:.0f} ms ({ms["ours"] / ms["orbax"]:.2f} times)\n'
    f'until it is safe: {pause["ours"]["safe"]:.2f} s, Orbax alone until it is '
    f'committed {pause["orbax"]["safe"]:.2f} s\n'
    f'seal of {_SEAL_MIB} MiB: {sealing["seconds"]:.2f} s, of processor time '
    f'{sealing["processor"]:.2f} s: {100 * sealing["fraction"]:.2f} % of '
    f'{_PERIOD:.0f} s between saves'
  )
  for lines in shared.values():
    print(halves.described(lines, _MIB))


def pauses(folder: pathlib.Path, rounds: int) -> dict:
  """Returns medians of seconds: a save blocks, and is on the disk."""
  import orbax.checkpoint as ocp

  from ..checkpointing import saving

  state = _arrays(_PAUSE_MIB)
  items = ocp.args.Composite(
    state=ocp.args.StandardSave(state), facts=ocp.args.JsonSave({})
  )
  times = {name: {'pause': [], 'safe': []} for name in ('ours', 'orbax')}
  orbax = saving.checkpointer(folder)
  with saving.Writer(folder / 'ours', 1) as writer:
    for i in range(1, rounds + 2):
      kinds = {
        'orbax': (
          lambda i=i: orbax.save(folder / f'orbax{i}', args=items),
          orbax.wait_until_finished,
        ),
        'ours': (lambda i=i: writer.save(i, state, {}), writer.wait),
      }
      for name in sorted(kinds, reverse=i % 2 == 0):
        save, wait = kinds[name]
        began = time.perf_counter()
        save()
        blocked = time.perf_counter() - began
        wait()
        if i > 1:  # the first compiles and starts threads
          times[name]['pause'].append(blocked)
          times[name]['safe'].append(time.perf_counter() - began)
      shutil.rmtree(folder / f'orbax{i}')
  orbax.close()
  return {
    name: {part: statistics.median(x) for part, x in one.items()}
    for name, one in times.items()
  }


def seals(folder: pathlib.Path, rounds: int) -> dict:
  """Returns medians of the seal's seconds and processor seconds."""
  from ..checkpointing import saving, seal

  with saving.Writer(folder / 'large', 1) as writer:
    writer.save(1, _arrays(_SEAL_MIB), {})
  seconds, processor = [], []
  for _ in range(rounds):
    began, of_process = time.perf_counter(), time.process_time()
    seal.write(folder / 'large/1', seal.records(folder / 'large/1'), {})
    seconds.append(time.perf_counter() - began)
    processor.append(time.process_time() - of_process)
  whole, busy = statistics.median(seconds), statistics.median(processor)
  return {'seconds': whole, 'processor': busy, 'fraction': busy / _PERIOD}


def _arrays(mib: int) -> dict:
  """Returns random float32 arrays, 4 MiB each: zeros would be compressed."""
  import jax

  keys = jax.random.split(jax.random.key(0), mib // 4)
  array = jax.jit(lambda key: jax.random.normal(key, (1024, 1024)))
  return jax.block_until_ready({f'{i}': array(k) for i, k in enumerate(keys)})
