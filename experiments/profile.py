"""A trace of some steps for xprof, and its longest operations in the terminal.

  python -m experiments.train --profile=5:8 ...

traces steps 5 to 8 into DIR/profile and prints a table of their operations.
`xprof --logdir DIR/profile` (extra [profile]) draws the trace in a browser,
whose charts come from the network. The table needs neither, and

  python -m experiments.profile DIR

prints it again.
"""

from __future__ import annotations

import collections
import contextlib
import pathlib
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from mla_moe.config import ConfigError

from . import cli, commands

# An accelerator's operations; its other lines (steps, modules) contain them.
_LINES = ('XLA Ops', 'Stream')


def window(text: str) -> tuple[int, int]:
  """Returns (5, 8) of '5:8', and of '' (0, -1), which has no step.

  Raises:
    ConfigError: it is not two steps, of which the first is at least 2 (step 1
      compiles) and at most the last.
  """
  if not text:
    return 0, -1
  match = re.fullmatch(r'(\d+):(\d+)', text)
  if not match or not 2 <= int(match[1]) <= int(match[2]):
    raise ConfigError(
      f'--profile={text!r}: must be FIRST:LAST, such as 5:8; the first step '
      'compiles, so begin with 2 or later'
    )
  return int(match[1]), int(match[2])


@contextlib.contextmanager
def steps(
  folder: pathlib.Path,
  first: int,
  last: int,
  rest: Callable[[], None] = lambda: None,
) -> Iterator[Callable[[int, Any], float]]:
  """Yields before_step(step, values): call it before each step.

  `values` are those of the step before; the trace waits for them where it
  begins and ends. The table is printed as soon as the trace is written.
  before_step returns the seconds of starting and writing the trace, which do
  not count as the steps'. It calls `rest` (a watchdog's) ahead of them.
  """
  import jax

  running = False

  def end():
    nonlocal running
    running = False
    jax.profiler.stop_trace()
    print(table(operations(folder)))
    print(f'Trace of steps {first} to {last}: xprof --logdir {folder}')

  def before_step(step: int, values: Any) -> float:
    nonlocal running
    if not running and step == first:
      jax.block_until_ready(values)
      rest()
      began = time.perf_counter()
      jax.profiler.start_trace(str(folder))
      running = True
    elif running and step == last + 1:
      jax.block_until_ready(values)
      rest()
      began = time.perf_counter()
      end()
    else:
      return 0.0
    return time.perf_counter() - began

  try:
    yield before_step
  finally:
    if running:
      end()


def _of_devices(planes: list) -> Iterator[Any]:
  """Yields the operations of accelerators."""
  for plane in planes:
    for line in plane.lines if plane.name.startswith('/device:') else ():
      if any(name in line.name for name in _LINES):
        yield from line.events


def _of_host(planes: list) -> Iterator[Any]:
  """Yields the operations of a CPU.

  Another event, which can lie on another thread's line, marks the end of each.
  """
  lines = [line for plane in planes for line in plane.lines]
  names = {event.name for line in lines for event in line.events}
  for line in lines:
    for event in line.events:
      if f'end: {event.name}' in names:
        yield event


def operations(folder: pathlib.Path) -> dict[str, tuple[int, float]]:
  """Returns the newest trace's operations: count and seconds, longest first.

  Names lose the numbers that XLA appends: fusion.12 is a fusion.

  Raises:
    ConfigError: the folder holds no trace.
  """
  from jax.profiler import ProfileData

  files = sorted(folder.glob('**/*.xplane.pb'), key=lambda f: f.stat().st_mtime)
  if not files:
    raise ConfigError(f'{str(folder)!r}: holds no trace (*.xplane.pb)')
  rows = collections.defaultdict(lambda: [0, 0.0])
  planes = list(ProfileData.from_file(str(files[-1])).planes)
  # A compiler's library that is only loaded adds a device without operations.
  for event in list(_of_devices(planes)) or _of_host(planes):
    name = event.name.partition(' = ')[0].lstrip('%')
    row = rows[re.sub(r'[.\d]+$', '', name) or name]
    row[0] += 1
    row[1] += event.duration_ns / 1e9
  order = sorted(rows.items(), key=lambda item: -item[1][1])
  return {name: (count, seconds) for name, (count, seconds) in order}


def table(operations: dict[str, tuple[int, float]], most: int = 15) -> str:
  """Returns the longest operations as lines, with their share of all."""
  whole = sum(seconds for _, seconds in operations.values()) or 1.0
  lines = [f'{"seconds":>9} {"share":>6} {"times":>7}  operation']
  for name, (count, seconds) in list(operations.items())[:most]:
    lines.append(
      f'{seconds:9.3f} {seconds / whole:6.1%} {count:7}  {name[:50]}'
    )
  return '\n'.join(lines)


def main() -> None:
  """Prints the table of the newest trace below a folder."""
  if sys.argv[1:] in (['--help'], ['-h']):
    print(commands.typed(__doc__))
    return
  if len(sys.argv) != 2 or sys.argv[1].startswith('-'):
    usage = commands.typed('usage: python -m experiments.profile DIR')
    print(usage, file=sys.stderr)
    sys.exit(2)
  with cli.edge():
    print(table(operations(cli.path('DIR', sys.argv[1]))))


if __name__ == '__main__':
  main()
