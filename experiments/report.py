"""report.html of a run: one page, self-contained, for people who would look.

  python -m experiments.report DIR

Curves and heat maps are drawn by matplotlib (extra [viz]) into the page as
SVG; nothing is loaded from anywhere.
"""

from __future__ import annotations

import html
import io
import json
import pathlib
import sys

import numpy as np

from experiments import workdir
from mla_moe.config import ConfigError

_STYLE = """
:root{color-scheme:light dark;--ink:#1d2330;--soft:#667085;--paper:#fbfaf7;
--card:#fff;--line:#e4e2dc}
@media(prefers-color-scheme:dark){:root{--ink:#e8e6e1;--soft:#9aa3b2;
--paper:#14161b;--card:#1c1f26;--line:#2d313b}}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,sans-serif}
main{max-width:1060px;margin:auto;padding:40px 24px}
h1{font-size:30px;margin:0}h2{font-size:20px;margin:40px 0 12px}
p{color:var(--soft);margin:4px 0 12px;max-width:75ch}
.numbers{display:flex;flex-wrap:wrap;gap:12px;margin:24px 0}
.numbers div{background:var(--card);border:1px solid var(--line);
border-radius:10px;padding:12px 18px}
.numbers b{display:block;font-size:24px;font-variant-numeric:tabular-nums}
.numbers span{color:var(--soft);font-size:13px}
figure{margin:0 0 18px;background:#fff;border:1px solid var(--line);
border-radius:10px;padding:8px;overflow:hidden}
figure svg{width:100%;height:auto;display:block}
pre{background:var(--card);border:1px solid var(--line);border-radius:10px;
padding:14px;white-space:pre-wrap;overflow-wrap:anywhere;font-size:13px}
"""

# Okabe and Ito's colours, which colour-blind readers can tell apart.
_COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')


def write(folder: pathlib.Path) -> pathlib.Path | None:
  """Writes `folder`/report.html and returns it; None without matplotlib.

  Raises:
    ConfigError: the folder holds no run.
  """
  rows = workdir.rows(folder / 'metrics.jsonl')
  if not rows:
    raise ConfigError(f'{str(folder)!r}: holds no metrics.jsonl of a run')
  try:
    import matplotlib
  except ImportError:
    print(
      'No report.html: pip install "mla_moe[viz]", then experiments.report.'
    )
    return None
  matplotlib.use('Agg')
  steps = [row for row in rows if 'loss' in row]
  evals = [row for row in rows if 'bits_per_byte' in row]
  loads = workdir.rows(folder / 'load.jsonl')
  samples = folder / 'samples.txt'
  config = (folder / 'config.json').read_text()
  parts = [
    f'<h1>{html.escape(folder.resolve().name)}</h1>',
    _numbers(steps, evals),
    '<h2>Learning</h2>',
    _learning(steps, evals),
  ]
  if loads and 'max_vio_layers' in steps[-1]:
    parts += [
      '<h2>Balance of the experts</h2>',
      '<p>MaxVio is how far the busiest expert is above the mean load: 0 is '
      'perfect balance. The maps show each expert&#39;s share of the mean over '
      'the run, one map a layer (MTP modules last).</p>',
      _balance(steps),
      _heat(loads),
    ]
  if samples.exists():
    last = samples.read_text(errors='replace').split('--- step ')[-1]
    parts += [
      '<h2>A sample</h2>',
      '<p>The model continues after &laquo;&lt;&lt;&lt;&raquo;.</p>',
      f'<pre>step {html.escape(last)}</pre>',
    ]
  config = json.dumps(json.loads(config), indent=1)
  parts += ['<h2>Config</h2>', f'<pre>{html.escape(config)}</pre>']
  page = (
    '<!doctype html><html lang="en"><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width">'
    f'<title>{html.escape(folder.resolve().name)}</title>'
    f'<style>{_STYLE}</style><main>{"".join(parts)}</main></html>'
  )
  target = folder / 'report.html'
  target.write_text(page)
  return target


def _numbers(steps, evals) -> str:
  last = steps[-1]
  timed = [row for row in steps if 'mfu' in row]
  rates = [row['tokens_per_s'] for row in timed] or [0]
  shown = [
    ('steps', f'{last["step"]:,}'),
    ('tokens', f'{last["tokens"]:,}'),
    ('training loss, nats', f'{last["main_loss"]:.3f}'),
    ('tokens/s, median', f'{np.median(rates):,.0f}'),
    (
      'of the matmul peak',
      f'{np.median([r["mfu"] for r in timed] or [0]):.0%}',
    ),
    ('peak memory, MiB', f'{last["memory_mib"]:,.0f}'),
  ]
  if evals:
    shown[2:2] = [
      ('held-out bits per byte', f'{evals[-1]["bits_per_byte"]:.3f}'),
      ('the same, gzip -9', f'{evals[-1]["gzip_bits_per_byte"]:.3f}'),
    ]
  if 'max_vio' in last:
    shown.append(('MaxVio, running', f'{last["max_vio_running"]:.2f}'))
  cells = (
    f'<div><b>{value}</b><span>{name}</span></div>' for name, value in shown
  )
  return f'<div class="numbers">{"".join(cells)}</div>'


def _figure(columns: int, height: float = 3.0, lines: int = 1):
  from matplotlib import pyplot

  pyplot.rcParams.update(
    {
      'svg.fonttype': 'none',
      'font.size': 10,
      'axes.spines.top': False,
      'axes.spines.right': False,
      'axes.prop_cycle': pyplot.cycler(color=_COLOURS),
    }
  )
  return pyplot.subplots(
    lines,
    columns,
    figsize=(10.4, height * lines),
    layout='constrained',
    squeeze=False,
  )


def _svg(figure) -> str:
  from matplotlib import pyplot

  text = io.StringIO()
  figure.savefig(text, format='svg', metadata={'Date': None, 'Creator': None})
  pyplot.close(figure)
  return f'<figure>{text.getvalue()[text.getvalue().index("<svg") :]}</figure>'


def _learning(steps, evals) -> str:
  figure, axes = _figure(2, lines=2)
  at = [row['step'] for row in steps]
  bits = np.log(2)
  plot = axes[0, 0]
  plot.plot(at, [row['main_loss'] / bits for row in steps], label='training')
  if steps[-1]['mtp_loss']:
    mtp = [row['mtp_loss'] / bits for row in steps]
    plot.plot(at, mtp, label='MTP (the token after)', alpha=0.7)
  plot.set(title='Loss', xlabel='step', ylabel='bits per token')
  plot.legend(frameon=False)
  plot = axes[0, 1]
  if evals:
    x = [row['step'] for row in evals]
    y = [row['bits_per_byte'] for row in evals]
    plot.plot(x, y, 'o-', label='this model')
    level = evals[-1]['gzip_bits_per_byte']
    plot.axhline(level, color=_COLOURS[1], ls='--', label='gzip -9')
    plot.set_ylim(0, None)
    plot.legend(frameon=False)
  plot.set(title='Held-out text', xlabel='step', ylabel='bits per byte')
  for plot, name, unit in (
    (axes[1, 0], 'lr', 'learning rate'),
    (axes[1, 1], 'grad_norm', 'gradient norm'),
  ):
    plot.plot(at, [row[name] for row in steps])
    plot.set(title=unit.capitalize(), xlabel='step', ylabel=unit)
  axes[1, 1].set_yscale('log')
  return _svg(figure)


def _balance(steps) -> str:
  figure, axes = _figure(3)
  at = [row['step'] for row in steps]
  plot = axes[0, 0]
  batch = np.array([row['max_vio_layers'] for row in steps])
  smooth = np.array([row['max_vio_running_layers'] for row in steps])
  for layer in range(batch.shape[1]):
    colour = _COLOURS[layer % len(_COLOURS)]
    plot.plot(at, batch[:, layer], color=colour, alpha=0.25, lw=0.8)
    plot.plot(at, smooth[:, layer], color=colour)
  plot.set(title='MaxVio by layer (thin: one batch)', xlabel='step')
  plot.set_ylim(0, None)
  names = (('entropy', 'Router entropy, nats'), ('bias_norm', 'Bias norm'))
  for plot, (name, title) in zip(axes[0, 1:], names, strict=True):
    if name in steps[-1]:
      plot.plot(at, [row[name] for row in steps])
    plot.set(title=f'{title}, by layer', xlabel='step')
  return _svg(figure)


def _heat(loads) -> str:
  load = np.array([row['load'] for row in loads], float)  # [steps, L, E]
  load = load / np.maximum(load.mean(-1, keepdims=True), 1e-9)
  count = min(load.shape[1], 12)
  picked = np.unique(np.linspace(0, load.shape[1] - 1, count).astype(int))
  columns = min(4, len(picked))
  figure, axes = _figure(columns, 2.4, -(-len(picked) // columns))
  ends = (loads[0]['step'], loads[-1]['step'])
  for plot in axes.flat[len(picked) :]:
    plot.set_axis_off()
  for layer, plot in zip(picked, axes.flat, strict=False):
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
    plot.set(title=f'MoE layer {layer + 1}', xlabel='step', ylabel='expert')
  bar = figure.colorbar(image, ax=list(axes.flat), shrink=0.8)
  bar.set_label('load / mean')
  return _svg(figure)


def main() -> None:
  """The report of the folder named on the command line."""
  if len(sys.argv) != 2 or sys.argv[1].startswith('-'):
    print('usage: python -m experiments.report DIR', file=sys.stderr)
    sys.exit(2)
  try:
    path = write(pathlib.Path(sys.argv[1]))
  except ConfigError as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)
  if path:
    print(path)


if __name__ == '__main__':
  main()
