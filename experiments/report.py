"""report.html of a run: one self-contained page of curves and heat maps.

  python -m experiments.report DIR
  python -m experiments.report A B C

A run of reinforcement learning has other curves, and a viewer of its answers.
Of several runs, or of a sweep's folder, it is comparison.html: the runs' curves
over each other, and the fields in which their configs differ. Matplotlib (extra
[viz]) draws the curves into the page as SVG; nothing is loaded from anywhere.
"""

from __future__ import annotations

import html
import json
import pathlib
import sys

import numpy as np

from . import cli, commands, comparison, history, page, workdir
from .checkpointing import bucket
from .rl import charts, viewer
from .training import samples, warm_start

_INCIDENTS = 50  # the last ones


def write(folder: pathlib.Path) -> pathlib.Path | None:
  """Writes `folder`/report.html and returns it; None without matplotlib.

  Raises:
    ConfigError: the folder holds no run.
  """
  run = history.read(folder)
  if not page.can_draw():
    return None
  config, began = json.dumps(run.config, indent=1), warm_start.recorded(folder)
  lines = origin(run) + [f'Began from {began}.'] * bool(began)
  answers = viewer.parts(viewer.read(folder / 'groups.jsonl'))
  parts = [
    *(f'<p>{html.escape(line)}</p>' for line in lines),
    *(_reinforced(run) if run.is_rl else _trained(run)),
    *_texts(run.starts),
    *_incidents(folder / 'incidents.jsonl'),
    *_experts(run.steps, history.loads(folder), run.config['model']),
    *_indexers(run.steps),
    *_fp8(run.fp8),
    *(answers or _sample(folder / samples.FILE)),
    '<h2>Config</h2>',
    f'<pre>{html.escape(config)}</pre>',
  ]
  target = folder / 'report.html'
  text = page.page(run.name, parts, viewer.SCRIPT if answers else '')
  target.write_text(text, encoding='utf-8', errors='replace')
  return target


def origin(run: history.History) -> list[str]:
  """Returns a line of date, versions, mesh and device for the latest start."""
  if not run.starts:
    return []
  resumed = len(run.starts) - 1
  more = f', resumed {resumed} times, last on' if resumed else ''
  dates = [str(row['date']) for row in run.starts]
  date = f'{dates[0]}{more} {dates[-1]}' if resumed else dates[0]
  facts = history.facts(run)
  return [' \N{MIDDLE DOT} '.join([f'{date} UTC', *list(facts.values())[1:]])]


def _trained(run: history.History) -> list[str]:
  return [
    _numbers(run.steps, run.evaluations),
    '<h2>Learning</h2>',
    _learning(run.steps, run.evaluations),
  ]


def _reinforced(run: history.History) -> list[str]:
  learning, updates = map(page.svg, charts.draw(run.steps, run.passes))
  return [
    charts.cards(run.steps, run.passes),
    '<h2>Learning</h2>',
    '<p>Held-out questions are answered greedily and are never trained on. A '
    'dotted line is the limit of an alarm; a mismatch of 0 is at the bottom.'
    '</p>',
    learning,
    '<h2>Updates</h2>',
    updates,
  ]


def _texts(starts: list[dict]) -> list[str]:
  """Returns a table of the texts of the last start; older runs have none."""
  rows = []
  try:
    for text in starts[-1].get('texts', []) if starts else []:
      row = {'source': text['source'] or '-'} | dict(text['table'])
      rows.append(row | {'epochs': f'{text["epochs"]:.3g}'})
  except (TypeError, ValueError, KeyError):
    return []  # edited by hand
  if not rows:
    return []
  # Ids have fewer numbers than a text.
  columns = list(max(rows, key=len))
  cells = [[str(row.get(name, '-')) for name in columns] for row in rows]
  columns = list(map(str, columns))
  cells = [list(map(html.escape, row)) for row in cells]
  columns = list(map(html.escape, columns))
  return ['<h2>Texts</h2>', page.table(columns, cells)]


def _incidents(path: pathlib.Path) -> list[str]:
  rows = workdir.rows(path)
  if not rows:
    return []
  cells = [[str(row.get('step')), str(row.get('what'))] for row in rows]
  return [
    '<h2>Incidents</h2>',
    page.table(
      ['step', 'incident'],
      [list(map(html.escape, row)) for row in cells[-_INCIDENTS:]],
    ),
  ]


def _experts(steps, loads, model: dict) -> list[str]:
  if not loads or 'max_vio_layers' not in steps[-1]:
    return []
  main_layers = model['layers'] - model['dense_layers']
  return [
    '<h2>Balance of the experts</h2>',
    '<p>MaxVio is how far the busiest expert is above the mean load: 0 is '
    'perfect balance. The maps show each expert&#39;s share of the mean over '
    'the run, one map a layer (MTP modules last).</p>',
    _balance(steps, main_layers),
    _load_maps(loads, main_layers),
  ]


def _indexers(steps) -> list[str]:
  if not steps or 'index_kl' not in steps[-1]:
    return []
  titles = {
    'index_kl': 'KL of the index, nats a token',
    'index_mass': 'Attention in the sets, of the most possible',
    'index_overlap': "A set's share in the set before",
  }
  figure, axes = page.figure(len(titles))
  for plot, (name, title) in zip(axes[0], titles.items(), strict=True):
    values = np.array([row[name] for row in steps])
    for layer in range(values.shape[1]):
      colour = page.COLOURS[layer % len(page.COLOURS)]
      plot.plot([row['step'] for row in steps], values[:, layer], color=colour)
    plot.set(title=title, xlabel='step')
  return [
    '<h2>Sparse attention</h2>',
    '<p>A line a layer, MTP modules last. Attention and overlap are of a '
    'sample of queries; the first layer overlaps with itself.</p>',
    _over_steps(figure, axes),
  ]


def _fp8(rows) -> list[str]:
  if not rows:
    return []
  return [
    '<h2>FP8</h2>',
    '<p>Of each layer&#39;s attention input (x), a weight (w) and the '
    'gradient at its output (g), on a few tokens: the relative error of two '
    'products against float32, values that became zero, values at the '
    'largest number, and the worst tile&#39;s range in powers of two. '
    'Thick: the worst layer.</p>',
    _fp8_curves(rows),
  ]


def _sample(path: pathlib.Path) -> list[str]:
  last = samples.last(path)
  if not last:
    return []
  return [
    '<h2>A sample</h2>',
    '<p>The model continues after &laquo;&lt;&lt;&lt;&raquo;.</p>',
    f'<pre>step {html.escape(last)}</pre>',
  ]


def _numbers(steps, evals) -> str:
  last = steps[-1]
  column = lambda name: [row[name] for row in steps if name in row] or [0]
  cards = [
    ('steps', f'{last["step"]:,}'),
    ('tokens', f'{last["tokens"]:,}'),
    ('training loss, nats', f'{last["main_loss"]:.3f}'),
    ('tokens/s, median', f'{np.median(column("tokens_per_s")):,.0f}'),
    (
      'of the matmul peak',
      f'{np.median(column("mfu")):.0%}',
    ),
    ('peak memory, MiB', f'{last["memory_mib"]:,.0f}'),
  ]
  if evals:
    names = {'bits_per_byte': 'held-out bits per byte'}
    names['gzip_bits_per_byte'] = 'the same, gzip -9'
    row = evals[-1]
    cards[2:2] = [(names[x], f'{row[x]:.3f}') for x in names if x in row]
  if 'max_vio' in last:
    cards.append(('MaxVio, running', f'{last["max_vio_running"]:.2f}'))
  return page.numbers(cards)


def _learning(steps, evals) -> str:
  figure, axes = page.figure(2, lines=2)
  x = [row['step'] for row in steps]
  bits = np.log(2)
  plot = axes[0, 0]
  plot.plot(x, [row['main_loss'] / bits for row in steps], label='training')
  if steps[-1]['mtp_loss']:
    mtp = [row['mtp_loss'] / bits for row in steps]
    plot.plot(x, mtp, label='MTP (the token after)', alpha=0.7)
  plot.set(title='Loss', xlabel='step', ylabel='bits per token')
  page.legend(plot)
  plot = axes[0, 1]
  if evals:
    evaluated = [row['step'] for row in evals]
    held_out = [row['bits_per_byte'] for row in evals]
    plot.plot(evaluated, held_out, 'o-', label='this model')
    level = evals[-1].get('gzip_bits_per_byte')
    if level is not None:
      plot.axhline(level, color=page.COLOURS[1], ls='--', label='gzip -9')
    for name in _sets(evals[-1]):
      points = [(row['step'], row[name]) for row in evals if name in _sets(row)]
      label = name.partition('/')[2]
      plot.plot(*zip(*points, strict=True), '.-', label=label, lw=0.8)
    plot.set_ylim(0, None)
    page.legend(plot)
  plot.set(title='Held-out text', xlabel='step', ylabel='bits per byte')
  axes[1, 0].plot(x, [row['lr'] for row in steps])
  _norms(axes[1, 1], steps)
  for plot, unit in zip(
    axes[1], ('learning rate', 'gradient norm'), strict=True
  ):
    plot.set(title=unit.capitalize(), xlabel='step', ylabel=unit)
  return _over_steps(figure, axes)


def _norms(plot, steps) -> None:
  """Draws the norms of gradients; the log scale is for positive ones alone.

  A warm-up trains the indexers alone: the norm of all else is 0.
  """
  names = {'grad_norm': 'the model', 'index_grad_norm': 'indexers'}
  norms = {
    label: [row.get(name, np.nan) for row in steps]
    for name, label in names.items()
    if any(name in row for row in steps)
  }
  for label, norm in norms.items():
    plot.plot([row['step'] for row in steps], norm, label=label)
  if any(x > 0 for norm in norms.values() for x in norm):
    plot.set_yscale('log')
  if len(norms) > 1:
    page.legend(plot)


def _sets(row: dict) -> list[str]:
  """Returns the names of single sets' numbers in the row of an evaluation."""
  is_number = lambda value: type(value) in (int, float)
  prefix = 'bits_per_byte/'
  return [n for n in row if n.startswith(prefix) and is_number(row[n])]


def _over_steps(figure, axes) -> str:
  """Returns the figure as SVG; its abscissas are steps, and have no halves."""
  for plot in axes.flat:
    plot.xaxis.get_major_locator().set_params(integer=True)
  return page.svg(figure)


def _balance(steps, main_layers: int) -> str:
  names = {'entropy': 'Router entropy, nats', 'bias_norm': 'Bias norm'}
  # A number is a policy's entropy.
  names = [n for n in names.items() if isinstance(steps[-1].get(n[0]), list)]
  figure, axes = page.figure(1 + len(names))
  x = [row['step'] for row in steps]
  plot = axes[0, 0]
  batch = np.array([row['max_vio_layers'] for row in steps])
  smooth = np.array([row['max_vio_running_layers'] for row in steps])
  for layer in range(batch.shape[1]):
    colour = page.COLOURS[layer % len(page.COLOURS)]
    label = _layer(layer, main_layers)
    plot.plot(x, batch[:, layer], color=colour, alpha=0.25, lw=0.8)
    plot.plot(x, smooth[:, layer], color=colour, label=label)
  if batch.shape[1] <= len(page.COLOURS):  # more would share a colour
    page.legend(plot)
  plot.set(title='MaxVio by layer (thin: one batch)', xlabel='step')
  plot.set_ylim(0, None)
  for plot, (name, title) in zip(axes[0, 1:], names, strict=True):
    plot.plot(x, [row[name] for row in steps])
    plot.set(title=f'{title}, by layer', xlabel='step')
  return _over_steps(figure, axes)


def _fp8_curves(rows) -> str:
  figure, axes = page.figure(2, lines=2)
  x = [row['step'] for row in rows]
  for plot, (end, title) in zip(
    axes.flat,
    (
      ('error', 'Relative error of a product'),
      ('flushed', 'Share of values that became zero'),
      ('saturated', 'Share of values at the largest number'),
      ('range', "The worst tile's range, powers of two"),
    ),
    strict=True,
  ):
    names = [name for name in rows[0]['fp8_layers'] if name.endswith(end)]
    for name, colour in zip(names, page.COLOURS, strict=False):
      layers = np.array([row['fp8_layers'][name] for row in rows])
      worst, label = layers.max(1), name[: -len(end) - 1]
      plot.plot(x, layers, color=colour, alpha=0.25, lw=0.8)
      plot.plot(x, worst, 'o-', color=colour, label=label)
    plot.set(title=title, xlabel='step')
    page.legend(plot)
  return page.svg(figure)


def _layer(layer: int, main_layers: int) -> str:
  """Returns its name; MTP modules come after the main model's MoE layers."""
  module = layer - main_layers + 1
  return f'MTP module {module}' if module > 0 else f'MoE layer {layer + 1}'


def _load_maps(loads, main_layers: int) -> str:
  load = np.array([row['load'] for row in loads], float)  # [steps, L, E]
  load = load / np.maximum(load.mean(-1, keepdims=True), 1e-9)
  count = min(load.shape[1], 12)
  layers = np.unique(np.linspace(0, load.shape[1] - 1, count).astype(int))
  columns = min(4, len(layers))
  figure, axes = page.figure(columns, 2.4, -(-len(layers) // columns))
  # The map of a single row has a width, too.
  ends = (loads[0]['step'], max(loads[-1]['step'], loads[0]['step'] + 1))
  for plot in axes.flat[len(layers) :]:
    plot.set_axis_off()
  for layer, plot in zip(layers, axes.flat, strict=False):
    extent = (*ends, load.shape[2] - 0.5, -0.5)
    image = plot.imshow(
      load[:, layer].T,
      aspect='auto',
      cmap='RdBu_r',
      vmin=0,
      vmax=2,
      extent=extent,
      interpolation='nearest',
    )
    plot.set(title=_layer(layer, main_layers), xlabel='step', ylabel='expert')
  bar = figure.colorbar(image, ax=list(axes.flat), shrink=0.8)
  bar.set_label('load / mean')
  return page.svg(figure)


def main() -> None:
  """Writes the report of the folder on the command line, or a comparison."""
  names = sys.argv[1:]
  if names in (['--help'], ['-h']):
    print(commands.typed(__doc__))
    return
  if not names or any(name.startswith('-') for name in names):
    usage = commands.typed('usage: python -m experiments.report DIR [DIR ...]')
    print(usage, file=sys.stderr)
    sys.exit(2)
  with cli.edge():
    folders = bucket.runs('DIR', names)
    inside = comparison.runs_in(folders[0]) if not folders[1:] else []
    if folders[1:] or inside:
      path = comparison.write(inside or folders)
    else:
      path = write(folders[0])
    if path:
      print(path)


if __name__ == '__main__':
  main()
