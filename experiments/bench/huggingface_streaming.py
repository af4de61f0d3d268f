"""How fast, and in how much memory, released checkpoints stream in.

  python -m experiments.bench.huggingface_streaming --folder=/tmp/streaming

Writes a synthetic checkpoint in DeepSeek-V3's layout with DeepSeek-V2-Lite's
widths and few layers, and times, each in a process of its own, three things:
`load_huggingface`, plain reads of its files into memory that is kept, as
loading must, and plain reads into one buffer of 16 MiB that is used again and
again. Cold means that the files' pages were dropped from the page cache before,
warm that all of them were in it. A virtual machine gets memory from its host
when it first touches it, which may take longer than all else: as much as is
needed is touched and freed before each measurement. Memory is the process's
peak resident set, less the parameters themselves (on a CPU they are in the same
memory) and less what jax takes before loading. The folder is deleted at the
end.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import time

import numpy as np

from mla_moe import config as c
from mla_moe.hf import config_json, fp8_blocks, names, safetensors

SHARD = 2 * 10**9


def model(layers: int) -> c.ModelConfig:
  """V2-Lite's widths, V3's routing (64 experts in 8 groups) and layout."""
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


def write(folder: pathlib.Path, layers: int, fp8: bool) -> int:
  """Writes the synthetic checkpoint; returns its bytes."""
  config = model(layers)
  folder.mkdir(parents=True)
  random = np.random.default_rng(0)
  pool = random.normal(0, 0.02, 2**24).astype(safetensors.DTYPES['BF16'])
  pool8 = (pool.astype(np.float32) * 4000).astype(fp8_blocks.E4M3)
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
        scale = (np.dtype(np.float32), fp8_blocks.scale_shape(shape))
        plan[-1][f'{name}_scale_inv'] = scale
  places, total = {}, 0
  for number, tensors in enumerate(plan, 1):
    file = f'model-{number:05d}-of-{len(plan):05d}.safetensors'
    with safetensors.create(folder / file, tensors) as out:
      for name, array in out.items():
        places[name] = file
        if array.dtype == np.float32:
          array[...] = 1 / 4000
        else:
          source = pool8 if array.dtype == fp8_blocks.E4M3 else pool
          flat = array.reshape(-1)
          for start in range(0, flat.size, source.size):
            part = flat[start : start + source.size]
            part[:] = source[: part.size]
        total += array.nbytes
        del array
  index = {'metadata': {'total_size': total}, 'weight_map': places}
  path = folder / 'model.safetensors.index.json'
  path.write_text(json.dumps(index))
  values = config_json.write(config, 'bfloat16', fp8)
  (folder / 'config.json').write_text(json.dumps(values))
  return total


def files(folder: pathlib.Path) -> list[pathlib.Path]:
  """The checkpoint's files, in order."""
  return sorted(folder.glob('*.safetensors'))


def drop(folder: pathlib.Path) -> None:
  """The files' pages leave the page cache."""
  for path in files(folder):
    with open(path, 'rb') as file:
      os.fsync(file.fileno())
      os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def plain(folder: pathlib.Path) -> float:
  """Seconds to read every byte into one buffer."""
  buffer = bytearray(16 * 2**20)
  began = time.perf_counter()
  for path in files(folder):
    with open(path, 'rb', buffering=0) as file:
      while file.readinto(buffer):
        pass
  return time.perf_counter() - began


def kept(folder: pathlib.Path) -> float:
  """Seconds to read every byte into memory of its own."""
  memory = []
  began = time.perf_counter()
  for path in files(folder):
    memory.append(np.empty(path.stat().st_size, np.uint8))
    with open(path, 'rb', buffering=0) as file:
      at = 0
      while read := file.readinto(memory[-1][at:]):
        at += read
  return time.perf_counter() - began


def touch(size: int) -> None:
  """Has the host give `size` bytes of memory, and frees them."""
  np.empty(size, np.uint8)[:: 2**12] = 1


def peak() -> int:
  """Bytes of this process's peak resident set."""
  # Not ru_maxrss, which a process inherits from the one that started it.
  status = pathlib.Path('/proc/self/status').read_text()
  line = next(x for x in status.splitlines() if x.startswith('VmHWM'))
  return int(line.split()[1]) * 1024


def load(folder: pathlib.Path, dtype: str) -> dict:
  """Seconds, and the peak memory beyond the parameters."""
  import jax
  import jax.numpy as jnp

  from mla_moe import load_huggingface

  jnp.zeros(8).block_until_ready()
  before = peak()
  began = time.perf_counter()
  _, variables = load_huggingface(folder, dtype)
  seconds = time.perf_counter() - began
  held = sum(x.nbytes for x in jax.tree.leaves(variables))
  return {
    'seconds': seconds,
    'parameters': held,
    'peak': peak(),
    'beyond': peak() - before - held,
  }


def child(what: str, folder: pathlib.Path, warm: bool) -> dict:
  """One measurement in a fresh process."""
  drop(folder)
  if warm:
    plain(folder)
  touch(sum(path.stat().st_size for path in files(folder)) * 5 // 4)
  command = [sys.executable, __file__, f'--folder={folder}', f'--only={what}']
  out = subprocess.run(command, check=True, capture_output=True, text=True)
  return json.loads(out.stdout.splitlines()[-1])


def main() -> None:
  """Prints the table, as Markdown."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--folder', required=True, type=pathlib.Path)
  parser.add_argument('--layers', type=int, default=5)
  parser.add_argument('--repeats', type=int, default=3)
  parser.add_argument('--only', default='')
  flags = parser.parse_args()
  for name, read in (('plain', plain), ('kept', kept)):
    if flags.only == name:
      print(json.dumps({'seconds': read(flags.folder)}))
      return
  if flags.only:
    print(json.dumps(load(flags.folder, flags.only)))
    return
  import jax

  print(
    f'{time.strftime("%Y-%m-%d")}, Python {platform.python_version()}, jax '
    f'{jax.__version__}, numpy {np.__version__}, '
    f'{len(os.sched_getaffinity(0))} core(s), {platform.machine()}\n'
  )
  print(
    '| files | GiB | cache | loaded, MB/s | kept plain reads | share | reads '
    'into one buffer | share | peak beyond parameters, MiB |'
  )
  print('|---|---|---|---|---|---|---|---|---|')
  cases = ((flags.layers, False), (2, False), (flags.layers, True))
  for layers, fp8 in cases:
    folder = flags.folder / f'{layers}-{"fp8" if fp8 else "bf16"}'
    total = write(folder, layers, fp8)
    try:
      for warm in (False, True):
        found: dict[str, list] = {'bfloat16': [], 'kept': [], 'plain': []}
        for _ in range(flags.repeats):  # one beside the other
          for what, seen in found.items():
            seen.append(child(what, folder, warm))
        best = {k: min(x['seconds'] for x in v) for k, v in found.items()}
        rate = {k: f'{total / v / 1e6:.0f}' for k, v in best.items()}
        share = {k: f'{v / best["bfloat16"]:.2f}' for k, v in best.items()}
        beyond = max(one['beyond'] for one in found['bfloat16'])
        print(
          f'| {folder.name} layers | {total / 2**30:.2f} | '
          f'{"warm" if warm else "cold"} | {rate["bfloat16"]} | {rate["kept"]} '
          f'| {share["kept"]} | {rate["plain"]} | {share["plain"]} | '
          f'{beyond / 2**20:.0f} |',
          flush=True,
        )
    finally:
      shutil.rmtree(folder)


if __name__ == '__main__':
  main()
