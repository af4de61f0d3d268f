"""Draws _static/architecture.svg: python docs/architecture.py.

The top row is the transformer, the lower half one MoE block. Sizes are
DeepSeek-V3's.
"""

import html
import pathlib

INK, SOFT, PAPER = '#1d2330', '#667085', '#ffffff'
BLUE, ORANGE, GREEN, PINK = '#0072B2', '#D55E00', '#009E73', '#CC79A7'
parts = []


def text(x, y, words, size=13, colour=INK, anchor='middle', weight='normal'):
  """Adds a line of text."""
  parts.append(
    f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}" '
    f'text-anchor="{anchor}" font-weight="{weight}">{html.escape(words)}</text>'
  )


def box(x, y, width, height, title, line='', colour=INK, fill=PAPER):
  """Adds a module: its name, and a line about it."""
  parts.append(
    f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="9" '
    f'fill="{fill}" stroke="{colour}" stroke-width="1.6"/>'
  )
  middle = y + height / 2
  text(
    x + width / 2, middle + (-3 if line else 5), title, 14, INK, weight='600'
  )
  if line:
    text(x + width / 2, middle + 15, line, 11.5, SOFT)


def arrow(*points, colour=INK, dashed=False):
  """Adds a line through the points that ends in an arrow."""
  path = 'M' + ' L'.join(f'{x},{y}' for x, y in points)
  dash = ' stroke-dasharray="5 4"' if dashed else ''
  parts.append(
    f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.6" '
    f'marker-end="url(#end)"{dash}/>'
  )


def panel(x, y, width, height, title, colour):
  """Adds the frame of a group of boxes."""
  parts.append(
    f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="14" '
    f'fill="{colour}" fill-opacity="0.07" stroke="{colour}" '
    'stroke-opacity="0.5"/>'
  )
  text(x + 16, y + 24, title, 14, colour, 'start', '600')


def model():
  """Adds the top row: the whole transformer."""
  box(20, 40, 120, 56, 'embedding', '129,280 × 7,168')
  box(180, 40, 150, 56, '3 dense blocks', 'width 18,432')
  box(370, 40, 170, 56, '58 MoE blocks', 'scan, remat', BLUE)
  box(580, 40, 110, 56, 'final norm')
  box(730, 40, 120, 56, 'head', 'next token')
  box(580, 132, 110, 56, 'MTP module', 'one more block', PINK)
  box(730, 132, 120, 56, 'head (shared)', 'token after it')
  for a, b in ((140, 180), (330, 370), (540, 580), (690, 730)):
    arrow((a, 68), (b - 2, 68))
  arrow((635, 96), (635, 130))
  arrow((690, 160), (728, 160))
  arrow((80, 96), (80, 172), (578, 172), dashed=True)
  text(330, 165, 'embedding of the token ahead', 11.5, SOFT)
  arrow((455, 96), (455, 226), colour=BLUE, dashed=True)


def block():
  """Adds the lower half: attention and experts of one block."""
  panel(20, 228, 400, 372, 'Multi-head Latent Attention', ORANGE)
  panel(450, 228, 400, 372, 'Mixture of Experts', GREEN)
  box(40, 266, 160, 46, 'w_q_down, norm', 'latent 1,536', ORANGE)
  box(40, 336, 160, 46, 'w_q_up', '128 heads × (128 + 64)', ORANGE)
  box(240, 266, 160, 46, 'w_kv_down, norm', 'latent 512: the cache', ORANGE)
  box(240, 336, 75, 46, 'w_k_up', '128', ORANGE)
  box(325, 336, 75, 46, 'w_v_up', '128', ORANGE)
  box(40, 410, 160, 46, 'w_k_rope, rotate', '64, shared: the cache', ORANGE)
  box(40, 484, 360, 46, 'attend', 'softmax(q·k / √192) · v, causal', ORANGE)
  box(140, 546, 160, 40, 'w_out', '', ORANGE)
  arrow((120, 312), (120, 334))
  arrow((320, 312), (278, 334))
  arrow((320, 312), (362, 334))
  arrow((200, 370), (216, 370), (216, 482))
  arrow((278, 382), (278, 482))
  arrow((362, 382), (362, 482))
  arrow((120, 456), (120, 482))
  arrow((220, 530), (220, 544))
  box(470, 266, 170, 46, 'router', 'sigmoid, + bias to choose', GREEN)
  box(470, 342, 170, 46, '4 of 8 groups', 'then 8 of 256', GREEN)
  box(660, 266, 170, 46, 'shared expert', 'width 2,048', GREEN)
  for i in range(6):
    chosen = i in (1, 4)
    parts.append(
      f'<rect x="{470 + 62 * i}" y="420" width="50" height="52" rx="7" '
      f'fill="{GREEN if chosen else PAPER}" '
      f'fill-opacity="{0.3 if chosen else 1}" stroke="{GREEN}"/>'
    )
  text(745, 360, '256 experts,', 12.5, SOFT)
  text(745, 376, 'width 2,048 each', 12.5, SOFT)
  box(560, 510, 180, 40, 'weighted sum', '', GREEN)
  arrow((555, 312), (555, 340))
  arrow((555, 388), (557, 418))
  arrow((555, 388), (743, 418))
  arrow((557, 472), (630, 508))
  arrow((743, 472), (690, 508))
  arrow((830, 289), (842, 289), (842, 530), (742, 530))
  text(650, 580, 'after the step: bias down where the load is high', 12, SOFT)


def draw() -> str:
  """Returns the picture as SVG."""
  parts.clear()
  model()
  block()
  inside = ''.join(parts)
  return (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 870 620" '
    'font-family="system-ui, sans-serif"><defs><marker id="end" '
    'viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
    f'orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="{INK}"/></marker></defs>'
    f'<rect width="870" height="620" rx="14" fill="{PAPER}"/>{inside}</svg>\n'
  )


if __name__ == '__main__':
  path = pathlib.Path(__file__).parent / '_static' / 'architecture.svg'
  path.write_text(draw(), encoding='utf-8')
