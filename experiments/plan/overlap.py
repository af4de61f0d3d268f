"""Transfers of a scheduled program, and the work that runs beside them.

A compiled program is text in the order in which it runs. An asynchronous
collective is two lines, its start and its end; all that stands between runs
meanwhile. A transfer is `beside` where a product or a kernel stands there, and
`idle` where nothing does that takes long. One line alone, `sync`, keeps the
device waiting. That a product stands beside a transfer does not say that it
lasts as long. A transfer that does not end where it starts, but in a later turn
of a loop, counts by the work after its start.
"""

from __future__ import annotations

import collections
import functools
import re

from . import hlo

_LINE = re.compile(
  r'^\s*(?:ROOT )?%?([\w.\-]+) = (?:\(.*?\)|\S+) ([\w\-]+)\((.*)$'
)
_KERNEL = re.compile(
  r'custom_call_target="\S*(tpu_custom_call|mosaic_gpu|triton|__cublas|__cudnn)'
)
_PRODUCTS = ('convolution', 'dot')
_WALKED = ('while', 'conditional', 'call')
STATES = ('beside', 'idle', 'sync')


def overlap(text: str, unknown: int = 1) -> list[dict]:
  """Returns rows of a collective's kind, and its number in each of `STATES`.

  Args:
    text: the scheduled program, `as_text()` of a compiled function.
    unknown: turns of a loop whose number XLA does not know.
  """
  bodies, entry = hlo._bodies(text)
  times = hlo._times(bodies, entry, unknown)
  program = _Program(bodies)
  rows = collections.defaultdict(collections.Counter)
  chains = {}
  for name in program.scheduled(entry):
    if times[name]:
      _walk(program, name, times[name], rows, chains)
  for (kind, _), (turns, is_beside) in chains.items():
    rows[kind]['beside' if is_beside else 'idle'] += turns
  return [
    {'kind': kind, **{state: row[state] for state in STATES}}
    for kind, row in sorted(rows.items())
  ]


class _Program:
  """Computations by name, and all that each contains, by its calls, too."""

  def __init__(self, bodies: dict[str, list[str]]):
    self.bodies = bodies
    self.lines = functools.cache(self._lines)
    self.has_product = functools.cache(self._has_product)
    self.transfers = functools.cache(self._transfers)

  def called(self, line: str) -> list[str]:
    names = hlo._CALLED.findall(line)
    for branches in hlo._BRANCHES.findall(line):
      names += re.findall(r'%?([\w.\-]+)', branches)
    return [name for name in names if name in self.bodies]

  def scheduled(self, entry: str) -> list[str]:
    """Returns the computations whose lines run one after another."""
    names, ahead = [], [entry]
    while ahead:
      name = ahead.pop()
      if name not in names:
        names.append(name)
        for line in self.bodies[name]:
          match = _LINE.match(line)
          if match and match[2] in _WALKED:
            ahead += self.called(line)
    return names

  def _lines(self, name: str) -> list[tuple[str, str]]:
    """Returns lines with their computations, those of calls included."""
    lines = []
    for line in self.bodies[name]:
      lines.append((name, line))
      for other in self.called(line):
        lines += self.lines(other)
    return lines

  def _has_product(self, name: str) -> bool:
    return any(_is_product(line) for _, line in self.lines(name))

  def _transfers(self, name: str) -> list[tuple[str, tuple | None]]:
    """Returns the kinds of a computation's transfers, each with its chain."""
    transfers = []
    for place, line in self.lines(name):
      match = _operation(line)
      if match:
        scattered = 'all-reduce-scatter' in place
        transfers.append(
          ('reduce-scatter' if scattered else match[2], hlo._chain(line))
        )
    return transfers


def _operation(line: str) -> re.Match | None:
  """Returns the match of a collective, None where a device has no others."""
  match = hlo._OPERATION.search(line)
  return match if match and len(hlo._group(line, 2)) > 1 else None


def _is_product(line: str) -> bool:
  match = _LINE.match(line)
  return bool(match and match[2] in _PRODUCTS) or bool(_KERNEL.search(line))


def _walk(program: _Program, name: str, turns: int, rows, chains) -> None:
  """Adds a computation's transfers to `rows`, parts of chains to `chains`."""
  started = {}  # by the name of the start: [kind, a product stands beside]
  tuples, names = {}, {}  # operands of tuples; elements, as they were before
  for line in program.bodies[name]:
    match = _LINE.match(line)
    if not match:
      continue
    label, operation, operands = match.groups()
    inside = program.called(line)
    is_work = _is_product(line) or any(map(program.has_product, inside))
    if is_work and operation != 'async-start':
      for transfer in started.values():
        transfer[1] = True
    sources = re.findall(r'%([\w.\-]+)', operands)
    sources = [names.get(name, name) for name in sources]
    if operation == 'tuple':
      tuples[label] = sources
    elif operation == 'get-tuple-element' and sources[0] in tuples:
      index = int(re.search(r'index=(\d+)', operands)[1])
      names[label] = tuples[sources[0]][index]
    source = sources[0] if sources else ''
    if operation.endswith('-done'):
      earlier = started.pop(source, None)
      if earlier:
        rows[earlier[0]][STATES[not earlier[1]]] += turns
      continue
    if operation == 'async-update':
      # A sparse core has its operand only from here on.
      if source in started:
        started[label] = [started.pop(source)[0], False]
      continue
    if operation in _WALKED:
      continue
    of_line = _operation(line)
    transfers = [(of_line[2], hlo._chain(line))] if of_line else []
    if not transfers:
      transfers = [t for other in inside for t in program.transfers(other)]
    for kind, chain in transfers:
      if chain:
        before = chains.get((kind, chain), (turns, False))
        both = min(before[0], turns), before[1] or is_work
        chains[kind, chain] = both
      elif operation.endswith('-start'):
        started[label] = [kind, False]
      else:
        rows[kind]['sync'] += turns
  for kind, is_beside in started.values():
    rows[kind][STATES[not is_beside]] += turns
