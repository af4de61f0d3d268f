"""comparison.html: several runs' curves over each other, and their configs.

The abscissa is the tokens that a run has read, because runs with other batches
have other steps. Names and colours of the runs are in the table on top.
"""

from __future__ import annotations

import html
import math
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from mla_moe.config import ConfigError

from . import history, page, workdir

# Title, ordinate, and its value in a row, which may lack it.
_CURVES: tuple[tuple[str, str, Callable[[dict], Any]], ...] = (
  ('Loss', 'bits per token', lambda row: row['main_loss'] / np.log(2)),
  ('Held-out text', 'bits per byte', lambda row: row['bits_per_byte']),
  ('Learning rate', 'learning rate', lambda row: row['lr']),
  ('Gradient norm', 'gradient norm', lambda row: row['grad_norm']),
  ('Speed', 'tokens/s', lambda row: row['tokens_per_s']),
  ('MaxVio', 'running mean', lambda row: row['max_vio_running']),
)


def runs_in(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns the runs with a logged step below a folder that is no run."""
  if (folder / 'metrics.jsonl').exists() or not folder.is_dir():
    return []
  files = sorted(folder.glob('*/metrics.jsonl'))
  logged = lambda path: any('loss' in row for row in workdir.rows(path))
  return [path.parent for path in files if logged(path)]


def write(folders: list[pathlib.Path]) -> pathlib.Path | None:
  """Writes comparison.html beside the first run; returns it, or None.

  Raises:
    ConfigError: a folder holds no run, or the page cannot be written.
  """
  runs = [history.read(folder) for folder in folders]
  if not page.can_draw():
    return None
  names, colours = _names(runs), page.colours(len(runs))
  fields = differences([run.config for run in runs])
  parts = [
    _runs_table(runs, names, colours),
    '<h2>Curves</h2>',
    page.svg(draw(runs, names, colours)),
    '<h2>Config fields that differ</h2>',
    page.table(
      ['', *map(html.escape, names)],
      [[html.escape(x) for x in (key, *row)] for key, row in fields.items()],
    )
    if fields
    else '<p>None.</p>',
  ]
  target = folders[0].resolve().parent / 'comparison.html'
  text = page.page(f'{len(runs)} runs', parts)
  try:
    target.write_text(text, encoding='utf-8', errors='replace')
  except OSError as error:
    raise ConfigError(
      f'{target}: cannot be written ({error.strerror})'
    ) from None
  return target


def differences(configs: list[dict]) -> dict[str, list[str]]:
  """Returns {field: value in each config} of the fields that differ.

  A field that a config lacks is '-'.
  """
  flat = [_flat(config) for config in configs]
  keys = dict.fromkeys(key for fields in flat for key in fields)
  rows = {key: [fields.get(key, '-') for fields in flat] for key in keys}
  return {key: row for key, row in rows.items() if len(set(row)) > 1}


def draw(runs: list[history.History], names: list[str], colours: list):
  """Returns matplotlib's figure of the runs' curves, its legend below them."""
  from matplotlib import ticker

  figure, axes = page.figure(2, lines=3)
  for plot, (title, unit, value) in zip(axes.flat, _CURVES, strict=True):
    for run, colour in zip(runs, colours, strict=True):
      rows = run.evaluations if title == 'Held-out text' else run.steps
      x, y = _curve(run, rows, value)
      style = 'o-' if len(x) < 40 else '-'
      plot.plot(x, y, style, color=colour, lw=1.2, ms=3)
    plot.set(title=title, xlabel='tokens', ylabel=unit)
    plot.xaxis.set_major_formatter(ticker.EngFormatter())  # 40 k, 5 T
  axes[1, 1].set_yscale('log')
  figure.legend(
    axes[0, 0].lines,
    [f' {name}' for name in names],  # one that begins with _ is left out
    loc='outside lower center',
    frameon=False,
    ncols=3,
  )
  for text in figure.legends[0].texts:
    text.set_parse_math(False)  # a name may have a $
  return figure


def _curve(run, rows: list[dict], value) -> tuple[list[float], list[float]]:
  """Returns the tokens and the values of the rows that have one.

  Rows of evaluations have no tokens: their steps are looked up.
  """
  steps = [row['step'] for row in run.steps]
  tokens = [row['tokens'] for row in run.steps]
  x, y = [], []
  for row in rows:
    try:
      y.append(value(row))
    except KeyError:
      continue
    x.append(row.get('tokens', float(np.interp(row['step'], steps, tokens))))
  return x, y


def _runs_table(runs, names: list[str], colours: list[str]) -> str:
  """Returns the table of the runs: where they ran, and their last numbers."""
  head = ['run', *history.facts(runs[0]), 'steps', 'tokens']
  head += ['loss, nats', 'bits per byte', 'tokens/s']
  rows = []
  for run, name, colour in zip(runs, names, colours, strict=True):
    last = run.steps[-1]
    rates = [r['tokens_per_s'] for r in run.steps if 'tokens_per_s' in r]
    bits = [row['bits_per_byte'] for row in run.evaluations]
    rows.append(
      [
        f'<b style="color:{colour}">&#9679;</b> {html.escape(name)}',
        *map(html.escape, history.facts(run).values()),
        f'{last["step"]:,}',
        f'{last["tokens"]:,}',
        f'{last["main_loss"]:.3f}',
        f'{bits[-1]:.3f}' if bits else '-',
        f'{np.median(rates or [math.nan]):,.0f}',
      ]
    )
  return page.table(head, rows)


def _names(runs: list[history.History]) -> list[str]:
  """Returns the folders' names, or their paths where two have one name."""
  names = [run.name for run in runs]
  if len(set(names)) < len(names):
    return [str(run.folder) for run in runs]
  return names


def _flat(value: Any, path: str = '') -> dict[str, str]:
  """Returns {field: text} of nested dicts: 'model.moe.experts': '16'."""
  if not isinstance(value, dict):
    return {path: str(value)}
  fields = {}
  for name, item in value.items():
    fields |= _flat(item, f'{path}.{name}' if path else name)
  return fields
