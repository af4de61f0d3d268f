"""Every mesh that the documentation names, compiled for its slice.

No machine of the slice is here: libtpu and XLA for CUDA compile without one. Of
a TPU's step the schedule is made, with its memory and its transfers
(`plan.scheduled`), for machine code takes many minutes. Not all slices can do
an all-to-all. Where tokens travel by one, machine code is made of a small twin:
the same devices, mesh, experts and collectives, but one narrow layer and short
sequences. The rows stand in slices.md; a test compares them with the
documentation.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
from typing import NamedTuple

from configs import deepseek_v2, deepseek_v2_lite, deepseek_v3
from mla_moe import config as c

from .. import chips
from ..plan import compiled, overlap, scheduled, search


class Program(NamedTuple):
  """A file of configs/, a slice and a mesh, as --topology and --mesh."""

  config: str
  topology: str
  mesh: str


PROGRAMS = (
  Program('deepseek_v2_lite', 'v5e:16x16', 'fsdp=4,expert=64'),
  Program('deepseek_v2_lite', 'v5e:8x8', 'fsdp=4,expert=16'),
  Program('deepseek_v2_lite', 'v5e:8x8', 'fsdp=16,expert=4'),
  Program('deepseek_v2_lite', 'v5e:4x8', 'fsdp=4,expert=4,tensor=2'),
  Program('deepseek_v2_lite', 'v5e:4x8', 'fsdp=2,expert=4,tensor=4'),
  Program('deepseek_v2_lite', 'v6e:4x4', 'fsdp=4,expert=4'),
  Program('deepseek_v2_lite', 'v6e:4x4', 'fsdp=2,expert=8'),
  Program('deepseek_v2_lite', 'v5p:2x2x1', 'expert=2,tensor=2'),
  Program('deepseek_v2_lite', 'v5p:2x2x1', 'expert=4'),
  Program('deepseek_v2_lite', 'h100:64', 'expert=64'),
  Program('deepseek_v2', 'v5p:4x4x8', 'fsdp=8,expert=16'),
  Program('deepseek_v3', 'v5p:4x8x8', 'fsdp=16,expert=16'),
  Program('deepseek_v3', 'v5p:4x8x8', 'fsdp=8,expert=32'),
  Program('deepseek_v3', 'v5p:4x8x8', 'fsdp=8,expert=16,tensor=2'),
  Program('deepseek_v3', 'tpu7x:4x4x8', 'fsdp=8,expert=32'),
  Program('deepseek_v3', 'tpu7x:4x4x8', 'fsdp=16,expert=8,tensor=2'),
  Program('deepseek_v3', 'v6e:16x16*4', 'fsdp=8,expert=32,tensor=4'),
)
CONFIGS = {
  'deepseek_v2': deepseek_v2,
  'deepseek_v2_lite': deepseek_v2_lite,
  'deepseek_v3': deepseek_v3,
}
HEAD = 'config', 'slice', 'mesh', 'GiB', 'beside', 'idle', 'sync', 'twin'


def flags(parser) -> None:
  """Adds this benchmark's flags."""
  parser.add_argument('--only', default='', help='Part of a row, as v5e:8x8.')


def run(out: pathlib.Path, args: argparse.Namespace) -> None:
  """Prints and writes a row for each program; OUT/slices.md has them.

  Raises:
    ConfigError: no row is named, or the compiler serves another process.
  """
  programs = [each for each in PROGRAMS if args.only in ' '.join(each)]
  if not programs:
    names = ', '.join(sorted({each.topology for each in PROGRAMS}))
    raise c.ConfigError(f'--only={args.only}: is in no row; slices are {names}')
  lines = [_line(HEAD), _line(['---'] * len(HEAD))]
  for program in programs:
    lines.append(_line(row(program)))
    print(lines[-1], flush=True)
    text = '\n'.join(lines) + '\n'
    (out / 'slices.md').write_text(text, encoding='utf-8')


def row(program: Program) -> tuple:
  """Returns a program's figures, in the order of `HEAD`."""
  config, slice_ = config_of(program), chips.parse(program.topology)
  compiler = compiled if slice_.gpu else scheduled
  name = program.config, str(slice_), program.mesh.replace(',', ', ')
  try:
    answer = compiler.run(config, slice_)
  except c.ConfigError as error:
    _raise_if_busy(error)
    return *name, f'refused: {error}', '', '', '', ''
  needs = (answer['arguments'] + answer['temporary']) / chips.GIB
  counts = (
    f'{sum(line[state] for line in answer["overlap"]):,}'
    for state in overlap.STATES
  )
  if slice_.gpu or config.mesh.expert <= config.model.moe.top_k:
    return *name, f'{needs:.2f}', *counts, ''
  try:
    seconds = f'{compiled.run(twin(config), slice_)["seconds"]:.0f} s'
  except c.ConfigError as error:
    _raise_if_busy(error)
    seconds = f'fails: {error}'
  return *name, f'{needs:.2f}', *counts, seconds


def _raise_if_busy(error: c.ConfigError) -> None:
  """Raises what says nothing of a program, but of another process."""
  if compiled.BUSY in str(error):
    raise error


def config_of(program: Program) -> c.Config:
  """Returns the config on its mesh, a sequence a device at a time."""
  config = c.freeze(CONFIGS[program.config].get_config())
  mesh = search.mesh_of(program.mesh, config.mesh)
  rows = mesh.data * mesh.fsdp * mesh.expert
  data = dataclasses.replace(config.data, micro_batch=rows)
  return dataclasses.replace(config, mesh=mesh, data=data)


def twin(config: c.Config) -> c.Config:
  """Returns one narrow layer with the config's mesh, experts and routing."""
  model, rows = config.model, config.data.micro_batch
  mla = dataclasses.replace(
    model.mla, heads=8, query_rank=256, kv_rank=256, nope_dim=128, rope_dim=64
  )
  moe = dataclasses.replace(model.moe, width=256)
  model = dataclasses.replace(
    model,
    mla=mla,
    moe=moe,
    vocab=1024,
    bos_id=0,
    eos_id=1,
    dim=512,
    layers=1,
    dense_layers=0,
    dense_width=1024,
    mtp=c.MTPConfig(depth=0),
  )
  data = c.DataConfig(seq_len=512, batch_size=rows, micro_batch=rows)
  return dataclasses.replace(config, model=model, data=data)


def _line(cells) -> str:
  return f'| {" | ".join(cells)} |'
