"""Parts of a self-contained HTML page: cards of numbers, figures as SVG.

A page loads nothing from anywhere, so it can be sent and read as one file. Its
Content-Security-Policy says so to the browser: no address is opened, and no
script runs but the page's own, known by its hash.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import os

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
table{border-collapse:collapse;width:100%}
td,th{padding:4px 12px;border-bottom:1px solid var(--line);vertical-align:top;
text-align:left;font-size:14px}
.wide{overflow-x:auto}
pre{background:var(--card);border:1px solid var(--line);border-radius:10px;
padding:14px;white-space:pre-wrap;overflow-wrap:anywhere;font-size:13px}
"""

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')


def colours(count: int) -> list[str]:
  """Returns a colour for each of `count` curves; many are shades of a map."""
  if count <= len(COLOURS):
    return list(COLOURS[:count])
  from matplotlib import colors, pyplot

  shades = pyplot.get_cmap('turbo')
  return [colors.to_hex(shades(i / (count - 1))) for i in range(count)]


def draw_plainly() -> None:
  """Sets matplotlib's style of all pictures from here on, for notebooks."""
  from matplotlib import pyplot

  pyplot.rcParams.update(
    {
      'figure.dpi': 110,
      'font.size': 11,
      'axes.spines.top': False,
      'axes.spines.right': False,
      'axes.prop_cycle': pyplot.cycler(color=COLOURS),
      'figure.constrained_layout.use': True,
    }
  )


def page(title: str, parts: list[str], script: str = '') -> str:
  """Returns the HTML of a whole page; `parts` are HTML, `script` JavaScript."""
  title = html.escape(title)
  digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
  source = f'sha256-{digest}' if script else 'none'
  policy = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
    f"script-src '{source}'; "
    "base-uri 'none'; form-action 'none'"
  )
  end = f'<script>{script}</script>' if script else ''
  return (
    '<!doctype html><html lang="en"><meta charset="utf-8">'
    f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    '<meta name="viewport" content="width=device-width">'
    f'<title>{title}</title><style>{_STYLE}</style>'
    f'<main><h1>{title}</h1>{"".join(parts)}</main>{end}</html>'
  )


def numbers(cards: list[tuple[str, str]]) -> str:
  """Returns a row of cards, (name, value) each."""
  cells = (
    f'<div><b>{value}</b><span>{name}</span></div>' for name, value in cards
  )
  return f'<div class="numbers">{"".join(cells)}</div>'


def table(head: list[str], rows: list[list[str]]) -> str:
  """Returns a table; the cells are HTML, and the first of a row is its name."""
  line = lambda tag, cells: ''.join(f'<{tag}>{cell}</{tag}>' for cell in cells)
  body = ''.join(f'<tr>{line("td", row)}</tr>' for row in rows)
  return (
    f'<div class="wide"><table><tr>{line("th", head)}</tr>{body}</table></div>'
  )


def can_draw() -> bool:
  """Whether matplotlib is here; it then draws into files, unless told else."""
  try:
    import matplotlib
  except ImportError:
    print('No page: pip install "mla_moe[viz]", then the program report.')
    return False
  if 'MPLBACKEND' not in os.environ:  # a notebook has a screen of its own
    matplotlib.use('Agg')
  return True


def figure(columns: int, height: float = 3.0, lines: int = 1):
  """Returns matplotlib's (figure, axes [lines, columns]) in the page's style.

  `height` is that of a line, in inches.
  """
  from matplotlib import pyplot

  pyplot.rcParams.update(
    {
      'svg.fonttype': 'none',
      'font.size': 10,
      'axes.spines.top': False,
      'axes.spines.right': False,
      'axes.prop_cycle': pyplot.cycler(color=COLOURS),
    }
  )
  return pyplot.subplots(
    lines,
    columns,
    figsize=(10.4, height * lines),
    layout='constrained',
    squeeze=False,
  )


def legend(plot) -> None:
  """Puts the legend of an axes below it, off the curves, if they have names."""
  handles, labels = plot.get_legend_handles_labels()
  if not handles:
    return
  names = plot.legend(
    handles,
    labels,
    frameon=False,
    loc='upper center',
    bbox_to_anchor=(0.5, -0.24),
    ncols=3,
    fontsize=9,
  )
  for text in names.texts:
    text.set_parse_math(False)  # a name may have a $


def svg(figure) -> str:
  """Returns a figure of matplotlib as HTML, and closes it."""
  from matplotlib import pyplot

  text = io.StringIO()
  figure.savefig(text, format='svg', metadata={'Date': None, 'Creator': None})
  pyplot.close(figure)
  return f'<figure>{text.getvalue()[text.getvalue().index("<svg") :]}</figure>'
