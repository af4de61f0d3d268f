"""Draws _static/run.png from a run's folder: python docs/run_picture.py DIR.

The picture has the colours, the size and the rounded white card of
architecture.svg, so that the two stand side by side on any background.
"""

import json
import pathlib
import sys

import matplotlib
import numpy as np

matplotlib.use('Agg')

from matplotlib import patches, pyplot

INK, SOFT, LINE = '#1d2330', '#667085', '#d9dce3'
BLUE, ORANGE, GREEN, PINK = '#0072B2', '#D55E00', '#009E73', '#CC79A7'
# Inches, and pixels an inch: architecture.svg's 870 x 620, 1.8 times as fine.
SIZE, DOTS = (8.7, 6.2), 180
STYLE = {
  'font.size': 10.5,
  'text.color': INK,
  'axes.edgecolor': SOFT,
  'axes.labelcolor': SOFT,
  'axes.linewidth': 0.8,
  'axes.spines.right': False,
  'axes.spines.top': False,
  'axes.titlecolor': INK,
  'axes.titlelocation': 'left',
  'axes.titlesize': 11.5,
  'axes.titleweight': 'bold',
  'xtick.color': SOFT,
  'ytick.color': SOFT,
  'legend.frameon': False,
  'legend.fontsize': 10,
}


def rows(path: pathlib.Path) -> list[dict]:
  """The rows of a .jsonl file."""
  return [
    json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()
  ]


def learning(plot, steps, evals):
  """Training loss, MTP loss and held-out text, in bits per byte."""
  step = [row['step'] for row in steps]
  curves = (
    ('main_loss', BLUE, 'next byte', 2),
    ('mtp_loss', PINK, 'byte after (MTP)', 1),
  )
  for name, colour, label, above in curves:
    bits = [row[name] / np.log(2) for row in steps]
    plot.plot(step, bits, color=colour, lw=1.6, label=label, zorder=above)
  step = [row['step'] for row in evals]
  bits = [row['bits_per_byte'] for row in evals]
  plot.plot(step, bits, 'o', color=INK, ms=5, zorder=3, label='held-out text')
  level = evals[-1]['gzip_bits_per_byte']
  plot.axhline(level, color=SOFT, ls=(0, (4, 3)), lw=1.2, label='gzip -9')
  plot.set(title='Bits per byte', ylim=(0, 6))
  plot.legend(ncols=2, columnspacing=1.2, handlelength=1.6)


def balance(plot, steps, names):
  """MaxVio by layer, of single batches (thin) and of their running mean."""
  step = [row['step'] for row in steps]
  batch = np.array([row['max_vio_layers'] for row in steps])
  running = np.array([row['max_vio_running_layers'] for row in steps])
  for layer, name in enumerate(names):
    colour = (BLUE, ORANGE, GREEN, PINK)[layer % 4]
    plot.plot(step, batch[:, layer], color=colour, alpha=0.28, lw=0.8)
    plot.plot(step, running[:, layer], color=colour, lw=1.7, label=name)
  plot.set(title='MaxVio: busiest expert above the mean')
  plot.set_ylim(0, 3)
  plot.legend(handlelength=1.6)


def maps(axes, loads, names):
  """Each expert's load over the run, one map a layer; returns an image."""
  load = np.array([row['load'] for row in loads], float)  # [steps, L, E]
  load /= load.mean(-1, keepdims=True)
  extent = (0, loads[-1]['step'], load.shape[2] - 0.5, -0.5)
  for layer, (plot, name) in enumerate(zip(axes, names, strict=True)):
    image = plot.imshow(
      load[:, layer].T,
      aspect='auto',
      cmap='RdBu_r',
      vmin=0,
      vmax=2,
      extent=extent,
      interpolation='nearest',
    )
    last = loads[-1]['step']
    plot.set_xticks([0, last // 3, 2 * last // 3])
    plot.set_title(name, loc='center', weight='normal', size=10.5, color=SOFT)
    plot.set_xlabel('step')
    plot.set_yticks([0, load.shape[2] - 1])
    if layer:
      plot.set_yticklabels([])
  axes[0].set_ylabel('expert', labelpad=-8)
  return image


def draw(folder: pathlib.Path):
  """Matplotlib's figure of the run in `folder`."""
  metrics = rows(folder / 'metrics.jsonl')
  steps = [row for row in metrics if 'loss' in row]
  evals = [row for row in metrics if 'bits_per_byte' in row]
  loads = rows(folder / 'load.jsonl')
  config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))[
    'model'
  ]
  main = config['layers'] - config['dense_layers']
  layers = len(loads[0]['load'])
  names = [f'MoE layer {i + 1}' for i in range(main)]
  names += ['MTP module' for _ in range(layers - main)]

  figure = pyplot.figure(figsize=SIZE)
  figure.patch.set_alpha(0)
  card = patches.FancyBboxPatch(
    (0.018, 0.025),
    0.964,
    0.95,
    boxstyle='round,pad=0.014,rounding_size=0.02',
    mutation_aspect=SIZE[0] / SIZE[1],
    transform=figure.transFigure,
    color='white',
    zorder=-1,
  )
  figure.add_artist(card)
  count, millions = steps[-1]['step'], steps[-1]['tokens'] / 1e6
  bits = evals[-1]['bits_per_byte']
  headline = f'{count} steps, {millions:.2f} million bytes: '
  headline += f'{bits:.2f} bits per held-out byte'
  figure.text(0.035, 0.925, headline, size=15, weight='bold')
  top = figure.add_gridspec(
    1, 2, left=0.065, right=0.965, top=0.84, bottom=0.54, wspace=0.16
  )
  learning(figure.add_subplot(top[0]), steps, evals)
  balance(figure.add_subplot(top[1]), steps, names)
  title = 'Load of each expert, over the steps'
  figure.text(0.065, 0.445, title, size=11.5, weight='bold')
  low = figure.add_gridspec(
    1, layers, left=0.065, right=0.885, top=0.385, bottom=0.115, wspace=0.08
  )
  axes = [figure.add_subplot(low[i]) for i in range(layers)]
  image = maps(axes, loads, names)
  place = figure.add_axes((0.9, 0.115, 0.012, 0.27))
  bar = figure.colorbar(image, cax=place)
  bar.set_ticks([0, 1, 2], labels=['none', 'mean', 'twice'])
  bar.outline.set_visible(False)
  return figure


if __name__ == '__main__':
  target = pathlib.Path(__file__).parent / '_static' / 'run.png'
  with pyplot.rc_context(STYLE):  # ticks are made when they are drawn
    draw(pathlib.Path(sys.argv[1])).savefig(
      target,
      dpi=DOTS,
      pil_kwargs={'optimize': True},
      metadata={'Software': None},
    )
