"""A model of V2-Lite's size from a frozen base, on this machine.

A synthetic release has V2-Lite's widths and --layers layers (27: 15.7 billion
parameters, 31.4 GB of bfloat16 in --folder, removed at the end). In processes
of their own, each base loads it, decodes --tokens greedy tokens after a prompt
of 16, and int4 also takes one step of adapters on 512 tokens. Beside the speed
stands the memory's floor: the bytes that a token reads, over the speed of a sum
over an array. Peak memory is that of the process.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import time

import numpy as np

from .. import cli, commands, runtime
from . import huggingface_streaming as streaming

# The C library's large arrays are then of pages of 2 MiB: each product widens a
# bfloat16 weight to an array of its own, and small pages took half of a token.
_HUGE_PAGES = {'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1'}
_HEAD = (
  '| base | GiB | load, s | peak GiB | decode, tokens/s | floor, tokens/s | '
  'LoRA step of 512 tokens, s | peak GiB |\n|---|---|---|---|---|---|---|---|'
)


def flags(parser) -> None:
  """Adds this benchmark's flags."""
  add = parser.add_argument
  add('--folder', default='', help='scratch; else below --out')
  add('--layers', type=int, default=27)
  add('--tokens', type=int, default=16)
  add('--bases', default='int4,int8,fp8')
  add('--only', default='', help='one measurement, BASE:decode or BASE:step')


def run(out: pathlib.Path, args) -> None:
  """Prints the table, as Markdown."""
  folder = cli.path('--folder', args.folder or out / 'real_size')
  if args.only:
    base, part = args.only.split(':')
    measure = step if part == 'step' else decode
    print(json.dumps(measure(folder, base, args)))
    return
  print(_HEAD)
  streaming.write(folder, args.layers, fp8=False)
  try:
    for base in args.bases.split(','):
      read = child(folder, f'{base}:decode', args)
      took = child(folder, f'{base}:step', args) if base == 'int4' else {}
      gib = lambda x: f'{x / 2**30:.1f}'
      print(
        f'| {base} | {gib(read["parameters"])} | {read["load"]:.0f} | '
        f'{gib(read["peak"])} | {read["speed"]:.2f} | {read["floor"]:.2f} | '
        + (f'{took["step"]:.0f} | {gib(took["peak"])} |' if took else '| |'),
        flush=True,
      )
  finally:
    shutil.rmtree(folder)


def child(folder: pathlib.Path, only: str, args) -> dict:
  """Returns one measurement of a fresh process."""
  streaming.drop(folder)
  command = [
    *(*commands.program('bench'), 'real_size'),
    *(f'--folder={folder}', f'--only={only}', f'--layers={args.layers}'),
    f'--tokens={args.tokens}',
  ]
  process = subprocess.run(
    command, check=True, stdout=subprocess.PIPE, env=os.environ | _HUGE_PAGES
  )
  return json.loads(process.stdout.splitlines()[-1])


def _loaded(folder: pathlib.Path, base: str):
  """Returns the model, its variables, and the seconds to load them."""
  from ..adapters.load import load_base

  began = time.perf_counter()
  config, variables = load_base(folder, base, 'bfloat16')
  return config, variables, time.perf_counter() - began


def decode(folder: pathlib.Path, base: str, args) -> dict:
  """Returns the speed of greedy decoding, and its floor."""
  import jax

  from mla_moe import cost
  from mla_moe.decode import generation

  config, variables, seconds = _loaded(folder, base)
  size = sum(x.nbytes for x in jax.tree.leaves(variables))
  prompt = np.arange(1, 17, dtype=np.int32)[None]
  moments = []
  for _ in generation.stream(config, variables, prompt, args.tokens + 2):
    moments.append(time.perf_counter())
  speed = (len(moments) - 2) / (moments[-1] - moments[1])
  counts = cost.parameters(config)
  # Of a token's parameters the routed experts are codes, the others bfloat16.
  routed = counts.routed * config.moe.top_k / config.moe.experts
  others = counts.active - counts.embedding - routed
  width = {'int4': 0.5625}.get(base, 1 + 4 / 128)
  return {
    'parameters': size,
    'load': seconds,
    'speed': speed,
    'floor': read_speed() / (routed * width + others * 2),
    'peak': runtime.peak_memory(),
  }


def read_speed() -> float:
  """Returns bytes a second of a sum over an array of 1 GiB, the best of 5."""
  array, best = np.ones(2**28, np.float32), 0.0
  for _ in range(5):
    began = time.perf_counter()
    array.sum()
    best = max(best, array.nbytes / (time.perf_counter() - began))
  return best


def step(folder: pathlib.Path, base: str, args) -> dict:
  """Returns the seconds of a second step of adapters on 512 tokens."""
  import dataclasses

  import jax
  import jax.numpy as jnp

  from mla_moe import config as c
  from mla_moe.train import optim
  from mla_moe.types import Batch

  from ..adapters.state import init_state
  from ..training import program

  model, variables, _ = _loaded(folder, base)
  model = dataclasses.replace(model, lora=c.LoRAConfig(rank=8))
  data = c.DataConfig(seq_len=512, batch_size=1, batch_start=0, ramp_tokens=0.0)
  config = c.Config(model=model, data=data)
  state = init_state(jax.random.key(0), config)
  state = state.replace(router=variables['router'])
  run = program.jitted_step(config, None)
  tokens = jnp.arange(512, dtype=jnp.int32)[None, None] % model.vocab
  zeros = jnp.zeros_like(tokens)
  positions = jnp.arange(512, dtype=jnp.int32)[None, None]
  one = jnp.ones((), jnp.int32)
  batch = Batch(tokens, tokens, zeros, positions, one)
  rates = optim.Rates(*map(jnp.float32, (1e-4, 0.0, 0.0)))
  seconds = 0.0
  for _ in range(2):
    began = time.perf_counter()
    state, metrics = run(state, batch, rates, variables['params'])
    jax.block_until_ready(metrics['loss'])
    seconds = time.perf_counter() - began
  return {'step': seconds, 'peak': runtime.peak_memory()}
