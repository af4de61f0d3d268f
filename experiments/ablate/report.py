"""report.html of an ablation: verdicts, curves, pairs, costs and the paper's.

One line of curves for each size: on the left held-out bits over what was spent,
a thin line a run and a thick one an arm's mean; on the right each pair's
difference at the end, and the interval of its mean.
"""

from __future__ import annotations

import dataclasses
import html
import os
import pathlib

import numpy as np

from mla_moe import cost

from .. import comparison, page, workdir
from . import folder, outcome
from . import plan as plans
from .recipe import flops_of_step, tokens_of_step

_COSTS = (
  'size', 'arm', 'parameters', 'active', 'GFLOPs a token', 'steps', 'tokens',
  'training FLOPs', 'seconds', 'tokens/s', 'skipped', 'MaxVio',
)  # fmt: skip


def write(
  path: pathlib.Path, plan: plans.Plan, recipes: dict
) -> pathlib.Path | None:
  """Writes the page into the folder; returns it, or None without matplotlib.

  `recipes` are {size: {arm: Recipe}} with the steps that were paid for.
  """
  if not page.can_draw():
    return None
  sizes, arms = list(recipes), plan.arms
  rows = [
    row
    for row in folder.results(path)
    if row['size'] in sizes and row['arm'] in arms
  ]
  comparisons = outcome.compared(rows, sizes, arms, plan.equal)
  lines = plan.title.partition('\n\n')
  parts = [
    f'<p>{html.escape(lines[0])}</p>',
    _cards(rows, plan, sizes),
    '<h2>Verdicts</h2>',
    f'<p>Beside {html.escape(arms[0])}, at equal {plan.equal}. A difference is '
    'relative, of the held-out bits per byte of runs of one seed; below 0 is '
    'better. A speed-up is the compute that the better arm saves for the same '
    'loss, along its own curve (a lower bound); by the ladder: along the '
    'reference&#39;s last losses at all sizes, in training FLOPs.</p>',
    page.table(list(outcome.HEAD), _cells(outcome.table(comparisons))),
    *(
      f'<p>{html.escape(x)}</p>' for x in outcome.clock(comparisons, plan.equal)
    ),
    '<h2>Curves and pairs</h2>',
    page.svg(_draw(rows, plan, sizes, comparisons)),
    '<h2>Costs</h2>',
    page.table(list(_COSTS), _cells(_costs(rows, recipes))),
    *_fields(recipes),
    *_paper(plan, lines[2]),
    *_origin(path),
  ]
  # --table writes it beside a run, so each process has a file of its own.
  own, target = path / f'report-{os.getpid()}.html', path / 'report.html'
  workdir.write(own, page.page(f'Ablation: {plan.name}', parts))
  return own.replace(target)


def _cells(rows) -> list[list[str]]:
  return [list(map(html.escape, row)) for row in rows]


def _cards(rows: list[dict], plan: plans.Plan, sizes: list[str]) -> str:
  seeds = {row['seed'] for row in rows}
  hours = sum(row['curve'][-1]['seconds'] for row in rows) / 3600
  return page.numbers(
    [
      ('equal', plan.equal),
      ('sizes', str(len(sizes))),
      ('arms', str(len(plan.arms))),
      ('seeds', str(len(seeds))),
      ('finished runs', str(len(rows))),
      ('hours of training', f'{hours:.2f}'),
    ]
  )


def _draw(rows, plan, sizes, comparisons):
  figure, axes = page.figure(2, 3.4, len(sizes))
  colours = dict(zip(plan.arms, page.colours(len(plan.arms)), strict=True))
  _, unit = outcome.ABSCISSA[plan.equal]
  for (left, right), size in zip(axes, sizes, strict=True):
    for arm, colour in colours.items():
      curves = [
        np.array(outcome.points(row['curve'], plan.equal), float)
        for row in rows
        if (row['size'], row['arm']) == (size, arm)
      ]
      for curve in curves:
        left.plot(*curve.T, color=colour, alpha=0.3, lw=0.8)
      if curves:
        left.plot(*np.mean(curves, 0).T, '.-', color=colour, label=arm)
    left.set(title=f'{size}: held-out text', xlabel=unit)
    left.set(ylabel='bits per byte')
    page.legend(left)
    of_size = [c for c in comparisons if c.size == size]
    for i, c in enumerate(of_size):
      percent = 100 * np.array(c.changes)
      right.plot(percent, np.full(len(percent), i), '.', color=colours[c.arm])
      if len(percent) > 1:
        middle, half = 100 * c.change.mean, 100 * c.change.half
        style = dict(color=colours[c.arm], capsize=4, fmt='s')
        right.errorbar(middle, i + 0.15, xerr=half, **style)
    right.axvline(0, color='grey', ls=':')
    right.set_yticks(range(len(of_size)), [c.arm for c in of_size])
    right.set_ylim(-0.6, len(of_size) - 0.4)
    right.set(title=f'{size}: pairs', xlabel=f'% beside {plan.arms[0]}')
  return figure


def _costs(rows: list[dict], recipes: dict) -> list[tuple[str, ...]]:
  """Returns a row, under _COSTS, for each arm at each size."""
  lines = []
  for size, arms in recipes.items():
    for arm, recipe in arms.items():
      config = recipe.config
      counts = cost.parameters(config)
      ends = [
        row['curve'][-1]
        for row in rows
        if (row['size'], row['arm']) == (size, arm)
      ]
      mean = lambda name, e=ends: np.mean([x[name] for x in e if name in x])
      tokens = config.run.steps * tokens_of_step(config)
      seconds = speed = '-'
      if ends:
        spent = mean('seconds')
        seconds, speed = f'{spent:.1f}', f'{tokens / spent:,.0f}'
      has = lambda name, e=ends: any(name in end for end in e)
      lines.append(
        (
          size,
          arm,
          f'{counts.total + counts.mtp:,}',
          f'{counts.active + counts.mtp_active:,}',
          f'{recipe.flops(config, config.data.seq_len) / 1e9:.4f}',
          f'{config.run.steps:,}',
          f'{tokens:,}',
          f'{config.run.steps * flops_of_step(recipe):.3g}',
          seconds,
          speed,
          f'{mean("skipped"):.4g}' if has('skipped') else '-',
          f'{mean("max_vio"):.2f}' if has('max_vio') else '-',
        )
      )
  return lines


def _fields(recipes: dict) -> list[str]:
  """Returns the tables of the fields in which the arms differ, by size."""
  parts = ['<h2>Config fields that differ</h2>']
  for size, arms in recipes.items():
    configs = [dataclasses.asdict(recipe.config) for recipe in arms.values()]
    fields = comparison.differences(configs)
    rows = [(name, *values) for name, values in fields.items()]
    parts.append(f'<p>{html.escape(size)}</p>')
    head = ['', *map(html.escape, arms)]
    parts.append(page.table(head, _cells(rows)) if rows else '<p>None.</p>')
  return parts


def _paper(plan: plans.Plan, rest: str) -> list[str]:
  text = '\n\n'.join(filter(None, (rest, plan.paper)))
  return ['<h2>What is compared, and the paper&#39;s numbers</h2>'] + [
    f'<pre>{html.escape(text)}</pre>'
  ]


def _origin(path: pathlib.Path) -> list[str]:
  starts = workdir.rows(path / 'starts.jsonl')
  if not starts:
    return []
  last = {k: v for k, v in starts[-1].items() if k not in ('step', 'texts')}
  words = ', '.join(f'{name} {value}' for name, value in last.items())
  return [f'<p>{html.escape(f"{len(starts)} starts, the last: {words}")}</p>']
