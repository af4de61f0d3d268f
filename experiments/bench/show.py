"""The figures of a benchmark: measured part by part, printed, and drawn.

OUT/NAME.json has a part's figures beside the machine and the day they are from.
So one part can be measured again while the others stay.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import pathlib
import platform
import time
from collections.abc import Callable, Iterable

from mla_moe.config import ConfigError

from .. import page

HEAD = ('figure', 'measured', 'beside')


def machine() -> dict:
  """Returns the date, the device, the processor and the versions."""
  import jax
  import jaxlib

  cpu = platform.processor() or platform.machine()
  with contextlib.suppress(OSError):
    lines = (
      pathlib.Path('/proc/cpuinfo').read_text(encoding='utf-8').splitlines()
    )
    names = [x.split(':')[1].strip() for x in lines if x.startswith('model n')]
    cpu = names[0] if names else cpu
  return {
    'date': datetime.date.today().isoformat(),
    'device': jax.devices()[0].device_kind,
    'cpu': cpu,
    'cores': os.cpu_count(),
    'python': platform.python_version(),
    'jax': jax.__version__,
    'jaxlib': jaxlib.__version__,
  }


def chosen(only: str, names: Iterable[str]) -> list[str]:
  """Returns the names in `only`, joined there by commas; all if it is ''.

  Raises:
    ConfigError: one of them is not among `names`.
  """
  names = list(names)
  some = only.split(',') if only else names
  for name in some:
    if name not in names:
      raise ConfigError(f'--only={name}: there is only {", ".join(names)}')
  return some


def measure(
  file: pathlib.Path, parts: dict[str, Callable[[], object]], only: str
) -> dict:
  """Runs the parts that `only` names and writes their figures into `file`.

  Returns:
    {part: {'machine': ..., 'figures': ...}}, with those that the file has.
  """
  some = chosen(only, parts)
  results = {}
  if file.exists():
    results = json.loads(file.read_text(encoding='utf-8'))
    # An older version's figures have another key.
    results = {k: v for k, v in results.items() if 'figures' in v}
  for name in some:
    began = time.perf_counter()
    print(f'measuring {name} ...', end=' ', flush=True)
    # Through JSON, so that new figures are as those that are read: keys are
    # strings, tuples lists.
    figures = json.loads(json.dumps(parts[name]()))
    results[name] = {'machine': machine(), 'figures': figures}
    print(f'{time.perf_counter() - began:.0f} s')
    file.write_text(json.dumps(results, indent=1), encoding='utf-8')
  return results


def machines(results: dict) -> list[str]:
  """Returns a line for each machine that the figures come from, mostly one."""
  lines = [in_words(part['machine']) for part in results.values()]
  return list(dict.fromkeys(lines))


def in_words(machine: dict) -> str:
  """Returns `machine`'s entries in one line."""
  return ', '.join(f'{name} {value}' for name, value in machine.items())


def results(
  out: pathlib.Path,
  name: str,
  title: str,
  rows: list[tuple[str, ...]],
  notes: list[str],
  draw: Callable[[], object | None],
  head: tuple[str, ...] = HEAD,
) -> None:
  """Prints the rows as a table, and writes OUT/NAME.html with the picture.

  Without matplotlib there is no page. `draw` returns its figure, or None where
  there is nothing to draw; `notes` stand below the table.
  """
  from rich import console, table

  printed = table.Table(*head, title=title)
  for row in rows:
    printed.add_row(*row)
  console.Console(width=120).print(printed)
  for note in notes:
    print(note)
  with contextlib.suppress(ImportError):
    import matplotlib

    matplotlib.use('Agg')
    text = html(title, rows, notes, draw(), head)
    (out / f'{name}.html').write_text(text, encoding='utf-8')
    print(f'Results: {out / f"{name}.html"} and {name}.json.')


def html(
  title: str,
  rows: list[tuple[str, ...]],
  notes: list[str],
  figure,
  head: tuple[str, ...] = HEAD,
) -> str:
  """Returns the page: the figure if there is one, the table, the notes."""
  cells = lambda row: ''.join(f'<td>{cell}</td>' for cell in row)
  body = ''.join(f'<tr>{cells(row)}</tr>' for row in (head, *rows))
  parts = [page.svg(figure)] if figure is not None else []
  parts += [f'<table>{body}</table>', *(f'<p>{note}</p>' for note in notes)]
  return page.page(title, parts)
