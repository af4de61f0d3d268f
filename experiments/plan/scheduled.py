"""The scheduled program of a TPU slice, without its machine code.

libtpu needs many minutes for the machine code of a large step. Before, in one
or two, it writes the program in the order in which it runs, and every buffer's
place in memory. From these two come all figures of `compiled.run`. So the
compiling process ends here once they lie in its folder. A schedule does not
show a refusal that comes later, such as that of a ragged all-to-all which the
slice's links cannot route.
"""

from __future__ import annotations

import pathlib
import re
import subprocess
import tempfile
import time
from typing import NamedTuple

from mla_moe.config import Config, ConfigError

from .. import chips, commands
from . import compiled

_FLAG = '--schedule'  # in refusals
_NAME = '*train_step*.'  # of the module, in the name of each of its files
_LAST = f'{_NAME}debug_options'
_PROGRAM = f'{_NAME}after_optimizations.txt'
_MEMORY = f'{_NAME}after_optimizations-memory-usage-report.txt'
_BUFFERS = f'{_NAME}after_optimizations-buffer-assignment.txt'


class Scheduled(NamedTuple):
  """A step as libtpu plans it, in three texts.

  program: the HLO in its order. memory: bytes of each memory space. buffers:
  all allocations.
  """

  program: str
  memory: str
  buffers: str


def run(config: Config, slice_: chips.Slice) -> dict:
  """Returns the figures of `compiled.run`; of TPUs alone.

  Raises:
    ConfigError: as `compiled.run` does, or the slice is of GPUs.
  """
  began = time.perf_counter()
  texts = step(config, slice_)
  needs = needed(texts.memory)
  compiled.check_memory(needs, slice_, _FLAG)
  state = arguments(texts.buffers)
  return {
    'arguments': state,
    'temporary': needs - state,
    **compiled.transfers(texts.program, config),
    **compiled.versions(slice_),
    'seconds': time.perf_counter() - began,
  }


def step(config: Config, slice_: chips.Slice) -> Scheduled:
  """Returns a training step for a slice of TPUs, in a process of its own.

  Raises:
    ConfigError: libtpu's refusal, or the slice is of GPUs.
  """
  described, environment = compiled.job(config, slice_, _FLAG)
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    flags = f'--xla_dump_to="{folder}" --xla_dump_hlo_as_text'
    flags += ' --xla_dump_hlo_module_re=.*train_step.*'
    environment['XLA_FLAGS'] = f'{environment.get("XLA_FLAGS", "")} {flags}'
    (folder / 'job').write_text(described, encoding='utf-8')
    with (folder / 'job').open() as job, (folder / 'log').open('w') as log:
      process = subprocess.Popen(
        commands.program('plan.compiled'),
        stdin=job,
        stdout=log,
        stderr=log,
        env=environment,
      )
    try:
      while process.poll() is None and not _is_whole(folder):
        time.sleep(0.2)
    finally:
      process.kill()
      process.wait()
    if not _is_whole(folder):
      log = _read(folder, 'log')
      raise ConfigError(compiled.refusal(log, slice_, _FLAG))
    return Scheduled(*(_read(folder, n) for n in (_PROGRAM, _MEMORY, _BUFFERS)))


def _is_whole(folder: pathlib.Path) -> bool:
  """Returns whether the program lies there, and the file that libtpu writes
  after it; one of that name from the beginning is older by many ticks."""
  times = [
    [path.stat().st_mtime_ns for path in folder.glob(name)]
    for name in (_PROGRAM, _LAST)
  ]
  return all(times) and times[0] <= times[1]


def needed(report: str) -> int:
  """Returns a device's bytes, by libtpu's report of each memory space."""
  return int(re.search(r'\(color=0\)\nTotal bytes: (\d+)', report)[1])


def arguments(buffers: str) -> int:
  """Returns the bytes of a program's arguments, by libtpu's buffers.

  A colour stands for a memory other than the device's.
  """
  pattern = r'^allocation \d+: size (\d+), (?!color [1-9]).*\bparameter \d+,'
  sizes = re.findall(pattern, buffers, re.MULTILINE)
  return sum(map(int, sizes))


def _read(folder: pathlib.Path, name: str) -> str:
  (path,) = folder.glob(name)
  return path.read_text(encoding='utf-8')
