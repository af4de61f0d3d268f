"""The collectives of a compiled program: kind, mesh axes, count, bytes.

XLA prints a computation once, even if a loop runs it often. So an operation
counts once for each turn of the loops around it. Trip counts are in the text
where XLA knows them. The others are the micro-batches, whose number is a value,
and an exchange's further rounds, of which a balanced step has none. Bytes are
those that one device receives from a ring: an all-gather brings (n-1)/n of its
result, an all-reduce twice that.
"""

from __future__ import annotations

import collections
import math
import re

import numpy as np

from mla_moe.model import exchange

_BITS = {'pred': 8, 'bf16': 16, 'f16': 16, 'f32': 32, 'f64': 64}
_KINDS = (
  'all-gather|all-reduce|reduce-scatter|ragged-all-to-all|all-to-all|'
  'collective-permute|collective-broadcast'
)
_OPERATION = re.compile(rf'= (.*?) ({_KINDS})(-start)?\((.*)')
_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')
# A sparse core's computation has its thread there. A kernel's own text has
# lines of '}}, ...', which end nothing.
_END = re.compile(r'\}(, execution_thread="\w+")?\s*$')
_CALLED = re.compile(
  r'(?:calls|to_apply|body|condition|true_computation|false_computation)='
  r'%?([\w.\-]+)'
)
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')
_SHAPE = re.compile(r'(\w+)\[([\d,]*)\]')


def collectives(
  text: str, axes: tuple[str, ...], sizes: tuple[int, ...], unknown: int = 1
) -> list[dict]:
  """Returns rows of axis ('fsdp', 'data+expert', ...), kind, count and bytes.

  Args:
    text: the program, `as_text()` of a compiled function.
    axes: names of the mesh's axes.
    sizes: their sizes.
    unknown: turns of a loop whose number XLA does not know.
  """
  bodies, entry = _bodies(text)
  times = _times(bodies, entry, unknown)
  operations = {}
  for name, lines in bodies.items():
    scattered = 'all-reduce-scatter' in name
    for line in lines:
      match = _OPERATION.search(line)
      if not match or not times[name]:
        continue
      shape, kind, started, _ = match.groups()
      group = _group(line, math.prod(sizes))
      if len(group) < 2:
        continue
      size = _received(kind, shape, bool(started), len(group), scattered)
      if kind == 'all-reduce' and scattered:
        kind = 'reduce-scatter'
      key = _chain(line) or (name, line)
      turns, most, *_ = operations.get(key, (times[name], size))
      # A chain may go on in a loop; it is no other transfer in each turn.
      both = min(turns, times[name]), max(most, size)
      operations[key] = *both, _axis(group, axes, sizes), kind
  rows = collections.defaultdict(lambda: [0, 0.0])
  for turns, size, axis, kind in operations.values():
    rows[axis, kind][0] += turns
    rows[axis, kind][1] += turns * size
  return [
    {'axis': axis, 'kind': kind, 'count': count, 'bytes': size}
    for (axis, kind), (count, size) in sorted(rows.items())
  ]


def _chain(line: str) -> tuple | None:
  """Returns the transfer of which a line is a part, None where it is whole.

  libtpu writes an asynchronous collective of a v5e in several fusions: where it
  starts, where it ends, and beside the work that runs meanwhile.
  """
  chain = re.search(r'channel_id=(\d+).*?chain_id="(\d+)"', line)
  return chain.groups() if chain else None


def _bodies(text: str) -> tuple[dict[str, list[str]], str]:
  """Returns the lines of each computation by name, and the entry's name."""
  bodies, entry, name = {}, '', None
  for line in text.splitlines():
    if name is None:
      match = _COMPUTATION.match(line)
      if match:
        name = match[2]
        bodies[name] = []
        entry = name if match[1] else entry
    elif _END.match(line):
      name = None
    else:
      bodies[name].append(line)
  return bodies, entry


def _times(bodies, entry: str, unknown: int) -> dict[str, int]:
  """Returns how often each computation runs."""
  calls = collections.defaultdict(list)
  for name, lines in bodies.items():
    for line in lines:
      if re.search(r' async-(update|done)\(', line):
        continue  # of what its start calls
      turns = 1
      if ' while(' in line:
        default = 0 if f'/{exchange.FURTHER}/' in line else unknown
        turns = _turns(line, bodies) or default
      called = _CALLED.findall(line)
      for branches in _BRANCHES.findall(line):
        called += re.findall(r'%?([\w.\-]+)', branches)
      for other in called:
        if other in bodies:
          calls[name].append((other, turns))
  order, visited = [], set()  # callees before callers

  def visit(name):
    if name not in visited:
      visited.add(name)
      for other, _ in calls[name]:
        visit(other)
      order.append(name)

  visit(entry)
  times = dict.fromkeys(bodies, 0)
  times[entry] = 1
  for name in reversed(order):
    for other, turns in calls[name]:
      times[other] += turns * times[name]
  return times


def _turns(line: str, bodies) -> int:
  """Returns how often a loop turns, if the text says so; 0 if it does not.

  A TPU's program has no such note; there the comparison that ends the loop has
  the number, and the body the step: libtpu's windowed products count by twos.
  """
  known = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', line)
  if known:
    return int(known[1])
  condition = re.search(r'condition=%?([\w.\-]+)', line)
  text = '\n'.join(bodies.get(condition[1], ())) if condition else ''
  less = re.search(
    r'ROOT .* compare\([^,]*?%?([\w.\-]+), %?([\w.\-]+)\), direction=LT', text
  )
  bound = less and re.search(
    rf'%?{re.escape(less[2])} = [su]32\[\]\S* constant\((\d+)\)', text
  )
  if not bound:
    return 0
  body = '\n'.join(bodies[re.search(r'body=%?([\w.\-]+)', line)[1]])
  place = re.search(
    rf'%?{re.escape(less[1])} = \S+ get-tuple-element\(.*\), index=(\d+)', text
  )
  step = _step(body, int(place[1])) if place else 1
  return -(-int(bound[1]) // step)


def _step(body: str, place: int) -> int:
  """Returns what a loop's body adds to its counter, at `place` in its tuple.

  From the tuple that the body returns, copies and sums with constants lead back
  to the counter. Where others do, the step counts as 1.
  """
  name = r'%([\w.\-]+)'
  counters = re.findall(
    rf'{name} = \S+ get-tuple-element\(.*\), index={place}\b', body
  )
  copies = dict(re.findall(rf'{name} = \S+ copy\({name}\)', body))
  sums = {
    total: pair
    for total, *pair in re.findall(rf'{name} = \S+ add\({name}, {name}\)', body)
  }
  numbers = dict(re.findall(rf'{name} = [su]32\S* constant\((\d+)\)', body))
  returned = re.search(r'ROOT .* tuple\((.*)\)', body)
  label = re.findall(name, returned[1])[place] if returned else ''
  step = 0
  while label not in counters:
    if label in copies:
      label = copies[label]
      continue
    constants = [x for x in sums.get(label, ()) if x in numbers]
    if len(constants) != 1:
      return 1
    step += int(numbers[constants[0]])
    (label,) = {*sums[label]} - {*constants}
  return max(step, 1)


def _group(line: str, devices: int) -> list[int]:
  """Returns the first group of devices that talk to each other."""
  pairs = re.search(r'source_target_pairs=\{\{(\d+),(\d+)\}', line)
  if pairs:
    return sorted({int(pairs[1]), int(pairs[2])})
  listed = re.search(r'replica_groups=\{\{([\d,]*)\}', line)
  if listed:
    return [int(n) for n in listed[1].split(',')]
  iota = re.search(
    r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', line
  )
  if iota:
    numbers = [int(n) for n in iota[2].split(',')]
    ids = np.arange(math.prod(numbers)).reshape(numbers)
    if iota[3]:
      ids = ids.transpose([int(n) for n in iota[3].split(',')])
    return ids.reshape([int(n) for n in iota[1].split(',')])[0].tolist()
  named = re.search(r'replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}', line)
  if named:  # newer XLA: the mesh, and the axes along which they talk
    sizes = {k: int(n) for k, n in re.findall(r"'(\w+)'=(\d+)", named[1])}
    along = re.findall(r"'(\w+)'", named[2])
    ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
    pick = tuple(slice(None) if k in along else 0 for k in sizes)
    return ids[pick].reshape(-1).tolist()
  return list(range(devices))


def _axis(group: list[int], axes: tuple, sizes: tuple) -> str:
  """Returns the mesh axes along which the devices of a group differ."""
  places = np.unravel_index(np.array(group) % math.prod(sizes), sizes)
  differ = [a for a, p in zip(axes, places, strict=True) if len(set(p)) > 1]
  return '+'.join(differ) or 'none'


def _received(
  kind: str, shape: str, started: bool, devices: int, scattered: bool
) -> float:
  """Returns bytes that a device receives in one operation of result `shape`."""
  nested = started and re.match(r'\(\(.*?\), (.*)\)$', shape)
  if nested:  # ((operands), results)
    shape = nested[1]
  sizes = [_bytes(*match) for match in _SHAPE.findall(shape)]
  sizes = [size for size in sizes if size]
  if started and not nested and kind == 'all-gather':
    sizes = sizes[len(sizes) // 2 :]
  if started and kind == 'collective-permute':
    sizes = sizes[:1]
  size = sum(sizes)
  others = (devices - 1) / devices
  if kind == 'collective-permute':
    return size
  if kind == 'reduce-scatter':
    return size * (devices - 1)
  if kind == 'all-reduce':
    return size * others * (1 if scattered else 2)
  return size * others


def _bytes(dtype: str, shape: str) -> float:
  bits = _BITS.get(dtype)
  if bits is None:
    digits = re.search(r'^[suf](\d+)', dtype)
    if not digits:
      return 0.0
    bits = int(digits[1])
  return math.prod(int(n) for n in shape.split(',') if n) * bits / 8
