"""comparison.html: several runs' curves over each other, and their configs.

The abscissa is the tokens that a run has read, because runs with other batches
have other steps; where a run learns by reinforcement, it is the step. Names and
colours of the runs are in the table on top.
"""

from __future__ import annotations

import html
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from mla_moe.config import ConfigError

from . import history, page, workdir

# Title, ordinate, and its value in a row, which may lack it.
_Curves = tuple[tuple[str, str, Callable[[dict], Any]], ...]
_RL_CURVES: _Curves = (
  ('Reward', 'mean', lambda row: row['reward']),
  ('Held-out questions', 'pass@1', lambda row: row['pass_at_1']),
  ('Length of an answer', 'tokens', lambda row: row['completion_length']),
  ('Entropy', 'nats', lambda row: row['entropy']),
  ('KL to the reference', 'nats', lambda row: row['kl']),
  ('Gradient norm', 'gradient norm', lambda row: row['grad_norm']),
)
_CURVES: _Curves = (
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
  logged = lambda path: any(
    'loss' in row or 'reward' in row for row in workdir.rows(path)
  )
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
  """Returns matplotlib's figure of the runs' curves, its legend below them.

  Runs of reinforcement learning beside others have their curves above those.
  """
  from matplotlib import ticker

  of_rl = [run.is_rl for run in runs]
  curves = (_RL_CURVES if any(of_rl) else ()) + (() if all(of_rl) else _CURVES)
  abscissa = 'step' if any(of_rl) else 'tokens'
  figure, axes = page.figure(2, lines=len(curves) // 2)
  for plot, (title, unit, value) in zip(axes.flat, curves, strict=True):
    for run, colour in zip(runs, colours, strict=True):
      x, y = [], []
      if run.is_rl == ((title, unit, value) in _RL_CURVES):
        x, y = _curve(run, _rows(run, title), value, abscissa)
      style = 'o-' if len(x) < 40 else '-'
      plot.plot(x, y, style, color=colour, lw=1.2, ms=3)
    plot.set(title=title, xlabel=abscissa, ylabel=unit)
    plot.xaxis.set_major_formatter(ticker.EngFormatter())  # 40 k, 5 T
    drawn = (line.get_ydata(orig=False) for line in plot.lines)
    if title == 'Gradient norm' and any((y > 0).any() for y in drawn):
      plot.set_yscale('log')
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


def _rows(run: history.History, title: str) -> list[dict]:
  """Returns the rows of a run that a chart draws."""
  of_title = {
    'Held-out text': run.evaluations,
    'Held-out questions': run.passes,
  }
  return of_title.get(title, run.steps)


def _curve(
  run, rows: list[dict], value, abscissa: str
) -> tuple[list[float], list[float]]:
  """Returns the abscissas and the values of the rows that have one.

  Rows of evaluations have no tokens: their steps are looked up.
  """
  steps = [row['step'] for row in run.steps]
  places = [row[abscissa] for row in run.steps]
  x, y = [], []
  for row in rows:
    try:
      y.append(value(row))
    except KeyError:
      continue
    x.append(row.get(abscissa, float(np.interp(row['step'], steps, places))))
  return x, y


def _runs_table(runs, names: list[str], colours: list[str]) -> str:
  """Returns the table of the runs: where they ran, and their last numbers.

  A column that no run has a number for is left out.
  """
  columns: dict[str, list[str]] = {
    'run': [
      f'<b style="color:{colour}">&#9679;</b> {html.escape(name)}'
      for name, colour in zip(names, colours, strict=True)
    ]
  }
  facts = [history.facts(run) for run in runs]
  for name in facts[0]:
    columns[name] = [html.escape(row[name]) for row in facts]
  for name, form, kind, field in (
    ('steps', ',', 'steps', 'step'),
    ('tokens', ',', 'steps', 'tokens'),
    ('loss, nats', '.3f', 'steps', 'main_loss'),
    ('bits per byte', '.3f', 'evaluations', 'bits_per_byte'),
    ('reward', '.3f', 'steps', 'reward'),
    ('pass@1', '.1%', 'passes', 'pass_at_1'),
  ):
    last = [_last(run, kind, field) for run in runs]
    columns[name] = ['-' if x is None else format(x, form) for x in last]
  rates = [
    [row['tokens_per_s'] for row in run.steps if 'tokens_per_s' in row]
    for run in runs
  ]
  columns['tokens/s'] = [f'{np.median(x):,.0f}' if x else '-' for x in rates]
  columns = {n: x for n, x in columns.items() if set(x) != {'-'}}
  rows = list(map(list, zip(*columns.values(), strict=True)))
  return page.table(list(columns), rows)


def _last(run: history.History, kind: str, field: str) -> float | None:
  """Returns the last number of a field, or None without one."""
  if field == 'main_loss' and run.is_rl:  # an objective, and no likelihood
    return None
  values = [row[field] for row in getattr(run, kind) if field in row]
  return values[-1] if values else None


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
