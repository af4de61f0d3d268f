"""All measurements of one accelerator, most valuable first.

  python -m experiments.bench card --minutes=8 --out=runs/card

An H200 has run all parts but `train` and most of `products`; docs/benchmarks.md
has its figures. On a CPU, --toy runs all parts at toy sizes.

The parts, in their order: the card's own rates; FP8 products, attention and
decoding kernels beside their oracles; a training step of V2-Lite's shape in
bfloat16 and FP8; products by expert and dense ones; absorbed decoding; and the
run of `make train`. Each row is printed and written into OUT/card.json as soon
as it is measured.

Each part is a process of its own with a limit of time, since a kernel that
reads a wrong address spoils the device for its whole process. A part that fails
is a row that says so (its messages are in OUT/card-PART.log), and the next part
runs. Time that a part leaves goes to the parts after it. The longest operations
of the training steps are in OUT/card-step-PRECISION.txt.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time

from mla_moe.config import ConfigError

from .. import cli, commands
from . import show

# Seconds of each part, of eight minutes.
PARTS = {
  'card': 25,
  'fp8': 75,
  'attention': 90,
  'step': 130,
  'products': 70,
  'decode': 50,
  'train': 40,
}


def flags(parser) -> None:
  """Adds this benchmark's flags."""
  parser.add_argument('--minutes', type=int, default=8, help='of all parts')
  parser.add_argument('--only', default='', help='parts, joined by commas')
  parser.add_argument('--toy', action='store_true', help='tiny, on any device')
  # Of a part's own process:
  parser.add_argument('--part', default='', help='run this part, in here')
  parser.add_argument('--seconds', type=int, default=60, help='limit of a part')


def run(out: pathlib.Path, args) -> None:
  """Runs the parts of `args.only`, after the card's own rates.

  Raises:
    ConfigError: there is no NVIDIA GPU, and no --toy.
    Stopped: a check is wrong or a part failed; all others have run.
  """
  chosen = show.chosen(args.only, PARTS)
  file = out / 'card.json'
  if args.part:
    run_part(args.part, Rows(file, args.part), args.toy, args.seconds)
    return
  names = list(dict.fromkeys(['card', *chosen]))
  end = time.monotonic() + 60 * args.minutes
  bad = 0
  for i, name in enumerate(names):
    rows = Rows(file, name)
    rows.clear()
    limit = end - time.monotonic()
    limit *= PARTS[name] / sum(PARTS[other] for other in names[i:])
    code, line = process(name, max(limit, 1), out, args.toy)
    if name == 'card' and code == 2:
      raise ConfigError(line.removeprefix('error: '))
    if code:
      rows.fail(name, line)
    bad += sum(row['good'] is False for row in rows.read())
  print(f'Results: {file}.')
  if bad:
    raise cli.Stopped(f'card: {bad} rows are wrong or failed')


def run_part(part: str, rows: Rows, toy: bool, seconds: int) -> None:
  """Measures a part in this process.

  Raises:
    ConfigError: there is no NVIDIA GPU, and `toy` is false.
  """
  import jax

  # The device of `train` belongs to the process that it starts.
  if part != 'train' and not toy and jax.default_backend() != 'gpu':
    raise ConfigError(
      'card: needs an NVIDIA GPU, and jax sees none; --toy tries it here'
    )
  from . import card_checks, card_times

  if part == 'train':
    card_times.make_train(rows, toy, seconds)
    return
  rows.machine(show.machine())
  measure = {
    'card': card_times.card,
    'fp8': card_checks.fp8_products,
    'attention': card_checks.attention_kernels,
    'step': card_times.training_step,
    'products': card_times.products,
    'decode': card_times.decoding,
  }[part]
  measure(rows, toy)


def process(
  name: str, limit: float, out: pathlib.Path, toy: bool
) -> tuple[int, str]:
  """Runs a part for at most `limit` seconds.

  Returns:
    Its exit code, and the last line of its messages; -9 and the limit if it was
    killed at that.
  """
  command = [*commands.program('bench'), 'card', f'--out={out}']
  command += [f'--part={name}', f'--seconds={math.ceil(limit)}']
  env = {**os.environ, 'PYTHONUNBUFFERED': '1'}
  env.setdefault('XLA_PYTHON_CLIENT_MEM_FRACTION', '0.92')
  if toy:  # compiling is most of its time
    env.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
  log = out / f'card-{name}.log'
  sys.stdout.flush()
  with log.open('w', encoding='utf-8') as errors:
    part = subprocess.Popen(
      command + ['--toy'] * toy, env=env, stderr=errors, process_group=0
    )
    try:
      code, line = part.wait(limit), ''
    except subprocess.TimeoutExpired:
      code, line = -signal.SIGKILL, f'over its {limit:.0f} s'
    finally:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(part.pid, signal.SIGKILL)  # and the processes that it started
      part.wait()
  lines = log.read_text(encoding='utf-8', errors='replace').split('\n')
  last = next((text for text in lines[::-1] if text.strip()), 'no message')
  return code, line or (last if code >= 0 else f'signal {-code}: {last}')


class Rows:
  """The rows of one part in card.json, each written at once.

  A row has a figure's name, its value (None: it failed, or is not finite), the
  unit, figures to compare it with, whether a check is good (None: it is no
  check), and the seconds since the row before it, compilation included: after a
  time-out they say where the part was.
  """

  def __init__(self, file: pathlib.Path, part: str):
    self._file, self._part = file, part
    self._began = time.monotonic()

  def read(self, part: str = '') -> list[dict]:
    """Returns the rows of a part, by default this one."""
    return self._all().get(part or self._part, {}).get('figures', [])

  def value(self, part: str, figure: str) -> float | None:
    """Returns the value of a row of any part, None if there is no such row."""
    rows = [row for row in self.read(part) if row['figure'] == figure]
    return rows[-1]['value'] if rows else None

  def clear(self) -> None:
    """Drops this part's rows, which an earlier call wrote."""
    results = self._all()
    results.pop(self._part, None)
    self._write(results)

  def machine(self, machine: dict) -> None:
    """Writes the machine that the part's figures come from."""
    results = self._all()
    results[self._part] = {'machine': machine, 'figures': self.read()}
    self._write(results)

  def add(
    self,
    figure: str,
    value: float | None,
    unit: str = '',
    beside: str = '',
    good: bool | None = None,
  ) -> None:
    """Prints a row and writes it into the file."""
    if value is not None and not math.isfinite(value):
      value, good, beside = None, False, f'{value} {unit}; {beside}'
    row = {'figure': figure, 'value': value, 'unit': unit, 'beside': beside}
    results = self._all()
    part = results.setdefault(self._part, {'machine': {}, 'figures': []})
    now = time.monotonic()
    row.update(good=good, seconds=round(now - self._began, 1))
    self._began = now
    part['figures'].append(row)
    self._write(results)
    mark = {True: 'ok', False: 'BAD', None: ''}[good]
    text = 'failed' if value is None else f'{_number(value)} {unit}'
    taken = f'{row["seconds"]:.0f} s'
    print(f'{self._part:9} {figure:40} {text:>16} {mark:3} {taken:>5} {beside}')

  def fail(self, figure: str, reason: object) -> None:
    """Adds a row for a figure that could not be measured."""
    text = str(reason).strip() or 'no message'
    if isinstance(reason, Exception):
      text = f'{type(reason).__name__}: {text}'
    self.add(figure, None, beside=text.splitlines()[0][:200], good=False)

  def text(self, name: str, text: str) -> None:
    """Writes a text beside the rows, OUT/card-NAME.txt."""
    file = self._file.with_name(f'card-{name}.txt')
    file.write_text(text, encoding='utf-8')

  @contextlib.contextmanager
  def attempt(self, figure: str):
    """Turns an exception into a row of `figure`."""
    try:
      yield
    except Exception as error:
      self.fail(figure, error)

  def _all(self) -> dict:
    if not self._file.exists():
      return {}
    return json.loads(self._file.read_text(encoding='utf-8'))

  def _write(self, results: dict) -> None:
    whole = self._file.with_suffix('.json.part')
    text = json.dumps(results, indent=1, allow_nan=False)
    whole.write_text(text, encoding='utf-8')
    whole.replace(self._file)


def _number(value: float) -> str:
  return f'{value:,.0f}' if abs(value) >= 100 else f'{value:.3g}'
