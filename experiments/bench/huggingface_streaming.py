"""How fast, and in how much memory, released checkpoints stream in.

A synthetic checkpoint has DeepSeek-V3's layout, DeepSeek-V2-Lite's widths and
few layers. Three readings of it are timed, each in a process of its own:
`load_huggingface`; plain reads into memory that is held, as loading must hold
it; and plain reads into one buffer of 16 MiB, again and again. Cold means that
the files' pages were dropped from the page cache before, warm that all of them
were in it.

A virtual machine gets memory from its host when it first touches it, which can
take longer than all else: so each process first touches as much as it needs,
and frees it. Memory is the process's peak resident set without the parameters
(on a CPU they are in the same memory) and without jax's own before loading. The
folder needs 5 GiB and is emptied at the end. Results stand in
huggingface_streaming.md.
"""

from __future__ import annotations

import json
import os
import pathlib
import platform
import shutil
import subprocess
import time

import numpy as np

from mla_moe import config as c
from mla_moe.hf import config_json, formats, fp8_blocks, names, safetensors

from .. import cli, commands, runtime
from . import show

SHARD = 2 * 10**9
_HEAD = (
  '| files | GiB | cache | loaded, MB/s | plain reads, held | share | reads '
  'into one buffer | share | peak beyond parameters, MiB |\n'
  '|---|---|---|---|---|---|---|---|---|'
)


def flags(parser) -> None:
  """Adds this benchmark's flags."""
  add = parser.add_argument
  add('--folder', default='', help='scratch; else below --out')
  add('--layers', type=int, default=5)
  add('--repeats', type=int, default=3, help='of which the best counts')
  add('--only', default='', help='one measurement of the files in --folder')


def run(out: pathlib.Path, args) -> None:
  """Prints the table, as Markdown."""
  folder = cli.path('--folder', args.folder or out / 'streaming')
  if args.only:
    (name,) = show.chosen(args.only, _MEASURES)
    print(json.dumps(_MEASURES[name](folder)))
    return
  import jax

  print(
    f'{time.strftime("%Y-%m-%d")}, Python {platform.python_version()}, jax '
    f'{jax.__version__}, numpy {np.__version__}, '
    f'{len(os.sched_getaffinity(0))} core(s), {platform.machine()}\n\n{_HEAD}'
  )
  for layers, fp8 in ((args.layers, False), (2, False), (args.layers, True)):
    files = folder / f'{layers}-{"fp8" if fp8 else "bf16"}'
    total = write(files, layers, fp8)
    try:
      for warm in (False, True):
        print(row(files, total, warm, args.repeats), flush=True)
    finally:
      shutil.rmtree(files)


def row(folder: pathlib.Path, total: int, warm: bool, repeats: int) -> str:
  """Measures a row of the table: the best of `repeats`, in turns."""
  measured: dict[str, list] = {name: [] for name in _MEASURES}
  for _ in range(repeats):
    for name, of_name in measured.items():
      of_name.append(child(name, folder, warm))
  best = {k: min(x['seconds'] for x in v) for k, v in measured.items()}
  rate = {k: f'{total / v / 1e6:.0f}' for k, v in best.items()}
  ratio = {k: f'{v / best["load"]:.2f}' for k, v in best.items()}
  beyond = max(one['beyond'] for one in measured['load'])
  return (
    f'| {folder.name} layers | {total / 2**30:.2f} | '
    f'{"warm" if warm else "cold"} | {rate["load"]} | {rate["held"]} '
    f'| {ratio["held"]} | {rate["buffer"]} | {ratio["buffer"]} | '
    f'{beyond / 2**20:.0f} |'
  )


def child(name: str, folder: pathlib.Path, warm: bool) -> dict:
  """Returns one measurement of a fresh process."""
  drop(folder)
  if warm:
    read_into_buffer(folder)
  touch(sum(path.stat().st_size for path in files(folder)) * 5 // 4)
  command = [
    *(*commands.program('bench'), 'huggingface_streaming'),
    *(f'--folder={folder}', f'--only={name}'),
  ]
  process = subprocess.run(command, check=True, capture_output=True, text=True)
  return json.loads(process.stdout.splitlines()[-1])


# ------------------------------------------------------ the checkpoint


def model(layers: int) -> c.ModelConfig:
  """Returns V2-Lite's widths with V3's routing (64 experts in 8 groups)."""
  moe = c.MoEConfig(experts=64, top_k=6, shared=2, width=1408)
  return c.ModelConfig(
    vocab=102400,
    dim=2048,
    layers=layers,
    dense_layers=1,
    dense_width=10944,
    mla=c.MLAConfig(heads=16, query_rank=0),
    moe=moe,
    mtp=c.MTPConfig(depth=0),
  )


def shards(config: c.ModelConfig, fp8: bool) -> list[dict]:
  """Returns the dtype and shape of each tensor by name, file by file."""
  plan: list[dict] = [{}]
  size = 0
  for row in names.rows(config):
    for index in row.indices():
      name, shape = row.tensor(index), row.file_shape
      quantized = fp8 and names.quantized(name)
      dtype = safetensors.DTYPES['F8_E4M3' if quantized else 'BF16']
      if row.path[0] == 'router':
        dtype = safetensors.DTYPES['F32']
      if name in plan[-1]:
        continue
      if size > SHARD:
        plan.append({})
        size = 0
      plan[-1][name] = (dtype, shape)
      size += dtype.itemsize * int(np.prod(shape))
      if quantized:
        scale = (
          np.dtype(np.float32),
          formats.scale_shape(shape, formats.BLOCK),
        )
        plan[-1][f'{name}_scale_inv'] = scale
  return plan


def write(folder: pathlib.Path, layers: int, fp8: bool) -> int:
  """Writes the checkpoint; returns its bytes."""
  config = model(layers)
  folder.mkdir(parents=True)
  random = np.random.default_rng(0)
  pool = random.normal(0, 0.02, 2**24).astype(safetensors.DTYPES['BF16'])
  pools = {
    pool.dtype: pool,
    np.dtype(fp8_blocks.E4M3): (pool.astype(np.float32) * 4000).astype(
      fp8_blocks.E4M3
    ),
  }
  plan = shards(config, fp8)
  places, total = {}, 0
  for number, tensors in enumerate(plan, 1):
    file = f'model-{number:05d}-of-{len(plan):05d}.safetensors'
    with safetensors.create(folder / file, tensors) as arrays:
      for name, array in arrays.items():
        places[name] = file
        fill(array, pools)
        total += array.nbytes
        del array
  index = {'metadata': {'total_size': total}, 'weight_map': places}
  path = folder / 'model.safetensors.index.json'
  path.write_text(json.dumps(index), encoding='utf-8')
  values = config_json.write(config, 'bfloat16', fp8)
  (folder / 'config.json').write_text(json.dumps(values), encoding='utf-8')
  return total


def fill(array: np.ndarray, pools: dict) -> None:
  """Fills an array with its dtype's pool, again and again; scales are one."""
  if array.dtype == np.float32:
    array[...] = 1 / 4000
    return
  flat, pool = array.reshape(-1), pools[array.dtype]
  for start in range(0, flat.size, pool.size):
    part = flat[start : start + pool.size]
    part[:] = pool[: part.size]


# ---------------------------------------------------- the measurements


def files(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns the checkpoint's files, in order."""
  return sorted(folder.glob('*.safetensors'))


def drop(folder: pathlib.Path) -> None:
  """Drops the files' pages from the page cache."""
  for path in files(folder):
    with open(path, 'rb') as file:
      os.fsync(file.fileno())
      os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def touch(size: int) -> None:
  """Makes the host give `size` bytes of memory, and frees them."""
  np.empty(size, np.uint8)[:: 2**12] = 1


def read_into_buffer(folder: pathlib.Path) -> dict:
  """Returns the seconds to read every byte into one buffer."""
  buffer = bytearray(16 * 2**20)
  began = time.perf_counter()
  for path in files(folder):
    with open(path, 'rb', buffering=0) as file:
      while file.readinto(buffer):
        pass
  return {'seconds': time.perf_counter() - began}


def read_and_hold(folder: pathlib.Path) -> dict:
  """Returns the seconds to read every byte into memory of its own."""
  memory = []
  began = time.perf_counter()
  for path in files(folder):
    memory.append(np.empty(path.stat().st_size, np.uint8))
    with open(path, 'rb', buffering=0) as file:
      read_bytes = 0
      while read := file.readinto(memory[-1][read_bytes:]):
        read_bytes += read
  return {'seconds': time.perf_counter() - began}


def load(folder: pathlib.Path) -> dict:
  """Returns the seconds of loading as bfloat16, and memory in bytes."""
  import jax
  import jax.numpy as jnp

  from mla_moe import load_huggingface

  jnp.zeros(8).block_until_ready()
  before = runtime.peak_memory()
  began = time.perf_counter()
  _, variables = load_huggingface(folder, 'bfloat16')
  seconds = time.perf_counter() - began
  parameters = sum(x.nbytes for x in jax.tree.leaves(variables))
  peak = runtime.peak_memory()
  return {
    'seconds': seconds,
    'parameters': parameters,
    'peak': peak,
    'beyond': peak - before - parameters,
  }


_MEASURES = {'load': load, 'held': read_and_hold, 'buffer': read_into_buffer}
