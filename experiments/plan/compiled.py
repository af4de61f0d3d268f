"""The training step compiled for machines that are not here.

libtpu compiles for TPUs and XLA's CUDA plugin for NVIDIA's GPUs, on any CPU.
Both need a process of their own, without this one's devices: it reads a config
as JSON, compiles, and prints the figures as JSON. The program is the one that a
run makes (`training.program`), but for two things on GPUs: XLA
cannot measure which form of a product is fastest, and jax asks a card before it
takes cuDNN's attention, so the portable one stands in its place.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import time

from mla_moe.config import Config, ConfigError, freeze

from .. import chips, commands
from . import gpus

_CUDA = 'jax-cuda13-plugin'
BUSY = 'another process is using libtpu'


def compiler(slice_: chips.Slice) -> str:
  """Returns the name of the package that compiles for a slice."""
  return _CUDA if slice_.gpu else 'libtpu'


def run(config: Config, slice_: chips.Slice) -> dict:
  """Returns bytes of arguments and scratch, collectives, versions, seconds.

  Raises:
    ConfigError: the compiler is not installed, too old for the chip or without
      its description, or the program does not fit (with its numbers).
  """
  described, environment = job(config, slice_)
  process = subprocess.run(
    commands.program('plan.compiled'),
    input=described,
    capture_output=True,
    text=True,
    env=environment,
  )
  if process.returncode:
    raise ConfigError(refusal(process.stderr, slice_))
  answer = json.loads(process.stdout.splitlines()[-1])
  if slice_.gpu:  # libtpu refuses by itself
    check_memory(answer['arguments'] + answer['temporary'], slice_)
  return answer


def check_memory(
  needs: int, slice_: chips.Slice, flag: str = '--compile'
) -> None:
  """Raises ConfigError for a program of more bytes than a device has."""
  has = slice_.chip.usable
  if needs > has:
    gib = lambda size: f'{size / chips.GIB:.2f}G'
    raise ConfigError(_too_large(slice_, gib(needs), gib(has), flag))


def check_compiler(slice_: chips.Slice, flag: str = '--compile') -> None:
  """Refuses a slice for which nothing here compiles as the flag asks.

  Raises:
    ConfigError: the compiler is missing, XLA has no description of a card, or a
      schedule is of GPUs.
  """
  if slice_.gpu and flag == '--schedule':
    raise ConfigError(
      f'--schedule: is of TPUs, and {slice_} has GPUs, whose programs compile '
      'whole in a minute; use --compile'
    )
  if slice_.gpu and slice_.kind not in gpus.CARDS:
    raise ConfigError(
      f'{flag}: there is no description of {slice_.kind} for XLA; there is '
      f'one of {", ".join(gpus.CARDS)}'
    )
  package = compiler(slice_)
  if importlib.util.find_spec(package.replace('-', '_')) is None:
    extra = 'cuda' if slice_.gpu else 'tpu'
    raise ConfigError(
      f'{flag}: {package} is missing; pip install "mla_moe[{extra}]"'
    )


def job(
  config: Config, slice_: chips.Slice, flag: str = '--compile'
) -> tuple[str, dict[str, str]]:
  """Returns the stdin and the environment of the process that compiles.

  Raises:
    ConfigError: as `check_compiler`.
  """
  check_compiler(slice_, flag)
  environment = {
    **os.environ,
    'JAX_PLATFORMS': 'cpu',
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_WORKER_HOSTNAMES': 'localhost',
  }
  described = {'config': dataclasses.asdict(config), 'topology': str(slice_)}
  return json.dumps(described), environment


def _too_large(slice_: chips.Slice, needs: str, has: str, flag: str) -> str:
  return (
    f'{flag}: {compiler(slice_)} says that the step needs {needs} of memory '
    f'on {slice_}, where there is {has}; shard more or lower micro_batch'
  )


def refusal(text: str, slice_: chips.Slice, flag: str = '--compile') -> str:
  """Returns the compiler's complaint in one line."""
  full = re.search(
    r'total memory required .*?\(([\d.]+\w)\).*?\(([\d.]+\w)\)', text
  )
  full = full or re.search(r'Used ([\d.]+\w) of ([\d.]+\w) hbm', text)
  if full:
    return _too_large(slice_, full[1], full[2], flag)
  if 'lockfile' in text or 'already in use' in text:
    return f'{flag}: {BUSY}; wait for it'
  lines = text.splitlines()
  last = [line for line in lines if 'Error' in line] or lines[-1:] or ['?']
  package = compiler(slice_)
  return f'{flag}: {package} failed for {slice_}: {last[-1].strip()}'


def describe(slice_: chips.Slice):
  """Returns a `jax.experimental.topologies` description with its devices."""
  from jax.experimental import topologies

  if slice_.gpu:
    target = gpus.topology(slice_)
    return topologies.get_topology_desc(platform='cuda', **target)
  name = f'{slice_.kind}:{"x".join(map(str, slice_.shape))}'
  several = {'num_slices': slice_.count} if slice_.count > 1 else {}
  # A host has four chips, unless there is but one.
  alone = {'chips_per_host_bounds': (1, 1, 1)} if slice_.chips == 1 else {}
  return topologies.get_topology_desc(name, 'tpu', **several, **alone)


def lower(config: Config, devices: list):
  """Returns the step's lowering on a mesh of `devices`, and the mesh.

  A single device has a mesh, too, unlike in a run: it names the platform.
  """
  import jax

  from mla_moe import fp8, sharding

  from ..training import program

  # 'auto' is resolved for those devices, and not for the one that is here.
  model = config.model
  if model.precision != 'bf16':
    impl, _ = fp8.choose(model.precision, model.compute.fp8, device=devices[0])
    compute = dataclasses.replace(model.compute, fp8=impl)
    model = dataclasses.replace(model, compute=compute)
    config = dataclasses.replace(config, model=model)
  mesh = sharding.make_mesh(config.mesh, devices)
  train = program.jitted_step(config, mesh)
  with jax.set_mesh(mesh):
    return train.lower(*program.abstract_inputs(config, mesh)), mesh


def main() -> None:
  """Compiles the job on stdin; the last line of stdout is the answer."""
  described = json.loads(sys.stdin.read())
  config = freeze(described['config'])
  slice_ = chips.parse(described['topology'])
  began = time.perf_counter()
  lowered, _ = lower(config, describe(slice_).devices)
  program = lowered.compile()
  seconds = time.perf_counter() - began
  memory = program.memory_analysis()
  answer = {
    'arguments': memory.argument_size_in_bytes,
    'temporary': memory.temp_size_in_bytes,
    **transfers(program.as_text(), config),
    **versions(slice_),
    'seconds': seconds,
  }
  print(json.dumps(answer))


def transfers(text: str, config: Config) -> dict:
  """Returns the rows of a step's collectives, and of the work beside them."""
  from mla_moe import sharding

  from . import copies, hlo, overlap

  axes = sharding.AXES
  sizes = tuple(getattr(config.mesh, axis) for axis in axes)
  rows = config.data.micro_batch or config.data.batch_size
  micro_batches = config.data.batch_size // rows
  return {
    'collectives': hlo.collectives(text, axes, sizes, micro_batches),
    'overlap': overlap.overlap(text, micro_batches),
    'copies': copies.size(text, micro_batches),
  }


def versions(slice_: chips.Slice) -> dict[str, str]:
  """Returns the versions of jax and of a slice's compiler."""
  package, version = compiler(slice_), importlib.metadata.version
  return {'jax': version('jax'), 'compiler': f'{package} {version(package)}'}


if __name__ == '__main__':
  main()
