"""Bytes that a compiled program writes to lay arrays out anew.

A copy, a transposition or a cast of a whole array computes nothing: it writes
the numbers once more, in another order or width. Such are copies in the text,
and fusions of nothing else. Those of less than a mebibyte are left out.
"""

from __future__ import annotations

import re

from . import hlo

_LINE = re.compile(r'^\s*(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ([\w\-]+)\((.*)$')
_MOVES = {'copy', 'transpose', 'reshape'}
_CASTS = {*_MOVES, 'convert'}
_VIEWS = {
  *('parameter', 'bitcast', 'bitcast-convert', 'constant', 'broadcast'),
  *('slice', 'dynamic-slice', 'tuple', 'get-tuple-element'),
}
_LEAST = 2**20


def size(text: str, unknown: int = 1) -> float:
  """Returns the bytes of a step, each turn of a loop counted.

  Args:
    text: the program, `as_text()` of a compiled function.
    unknown: turns of a loop whose number XLA does not know.
  """
  bodies, entry = hlo._bodies(text)
  times = hlo._times(bodies, entry, unknown)
  parsed = {
    name: [match.groups() for line in lines if (match := _LINE.match(line))]
    for name, lines in bodies.items()
  }
  fused = {
    _called(rest)
    for lines in parsed.values()
    for _, kind, rest in lines
    if kind == 'fusion'
  }
  total = 0.0
  for name, lines in parsed.items():
    if name in fused:
      continue
    for shape, kind, rest in lines:
      if kind == 'fusion':
        kinds = {kind for _, kind, _ in parsed.get(_called(rest), ())}
        is_copy = kinds <= _CASTS | _VIEWS and bool(kinds & _CASTS)
      else:
        is_copy = kind in _MOVES
      each = sum(hlo._bytes(*x) for x in hlo._SHAPE.findall(shape))
      if is_copy and each >= _LEAST:
        total += times[name] * each
  return total


def _called(rest: str) -> str:
  """Returns the computation that a fusion's line calls."""
  return re.search(r'calls=%?([\w.\-]+)', rest)[1]
