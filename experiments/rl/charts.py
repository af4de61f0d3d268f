"""The charts of a reinforcement learning run, from the rows of its metrics.

The reward of the training questions may rise because the policy reads the
grader and not the question, so held-out questions stand beside it. Length,
entropy and divergence tell how the policy moves, the groups without spread how
much it still learns from, and the mismatch whether its ratios are right.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from .. import page
from . import alarms

_FLOOR = 1e-9  # a logarithm has no zero: smaller differences stand here
_BARS = 60  # at most; of more steps they are means of neighbours


def cards(steps: list[dict], passes: list[dict]) -> str:
  """Returns the run's last numbers; `passes` are the rows with pass_at_1."""
  last = steps[-1]
  values = [
    ('steps', f'{last["step"]:,}'),
    (
      'reward, first to last',
      f'{steps[0]["reward"]:.2f} → {last["reward"]:.2f}',
    ),
  ]
  if passes:
    values.append(('held-out pass@1', f'{passes[-1]["pass_at_1"]:.1%}'))
  for name, title, form in (
    ('completion_length', 'tokens an answer', ',.0f'),
    ('ended', 'answers that ended', '.0%'),
    ('entropy', 'entropy, nats a token', '.2f'),
    ('kl', 'KL to the reference, nats', '.2g'),
  ):
    if name in last:
      values.append((title, format(last[name], form)))
  names = _names(steps, 'seconds')
  if names:
    total = sum(_column(steps, name, 'seconds') for name in names)
    values.append(('seconds a step, median', f'{np.nanmedian(total):.2f}'))
  return page.numbers(values)


def draw(steps: list[dict], passes: list[dict]) -> list:
  """Returns matplotlib's figures: of learning, and of the updates."""
  x = [row['step'] for row in steps]
  learning, axes = page.figure(2, lines=3)
  _reward(axes[0, 0], x, steps, passes)
  _length(axes[0, 1], x, steps)
  _entropy(axes[1, 0], x, steps)
  _spread(axes[1, 1], x, steps)
  _mismatch(axes[2, 0], x, steps)
  _seconds(axes[2, 1], x, steps)
  updates, more = page.figure(2, lines=2)
  _curves(more[0, 0], x, steps, {'grad_norm': ''}, 'Gradient norm')
  more[0, 0].set_yscale('log')
  _curves(more[0, 1], x, steps, {'lr': ''}, 'Learning rate')
  shares = {'clipped': 'clipped tokens', 'dropped': 'dropped tokens'}
  _curves(more[1, 0], x, steps, shares, 'Share of tokens without a gradient')
  _curves(more[1, 1], x, steps, {'max_ratio': ''}, 'Largest ratio')
  for plot in [*axes.flat, *more.flat]:
    plot.set_xlabel('step')
    plot.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    page.legend(plot)
  return [learning, updates]


def _reward(plot, x, steps, passes):
  for name, colour in zip(
    _names(steps, 'rewards'), page.COLOURS[2:] * 9, strict=False
  ):
    values = _column(steps, name, 'rewards')
    style = {'lw': 0.9, 'alpha': 0.7, **_point(x)}
    plot.plot(x, values, color=colour, label=f' {name}', **style)
  mean = _column(steps, 'reward')
  plot.plot(
    x, mean, **_point(x), color=page.COLOURS[0], label='reward', zorder=3
  )
  evaluated = [row['step'] for row in passes]
  names = sorted({n for row in passes for n in row if _is_pass(n)})
  for name in names:
    style = {'lw': 1.6 if name == 'pass_at_1' else 0.7, 'zorder': 4}
    style |= _point(passes)
    label = f'held-out {name.replace("_at_", "@")}'
    values = _column(passes, name)
    plot.plot(evaluated, values, color=page.COLOURS[1], label=label, **style)
  plot.set(title='Reward and held-out questions', ylabel='mean')


def _is_pass(name: str) -> bool:
  return bool(re.fullmatch(r'pass_at_\w{1,9}', name))


def _length(plot, x, steps):
  names = {'completion_length': 'mean', 'length_max': 'longest'}
  _curves(plot, x, steps, names, 'Length of an answer', 'tokens')
  plot.set_ylim(0, None)
  ended = _column(steps, 'ended')
  if np.isfinite(ended).any():
    other = _second(plot, 'share that ended', page.COLOURS[2])
    other.plot(x, ended, color=page.COLOURS[2], lw=1, **_point(x))
    other.set_ylim(0, 1.05)


def _entropy(plot, x, steps):
  _curves(plot, x, steps, {'entropy': ''}, 'Entropy and KL', 'entropy, nats')
  plot.set_ylim(0, None)
  plot.yaxis.label.set_color(page.COLOURS[0])
  names = {'kl': 'KL to the reference', 'kl_old': 'KL of an update'}
  colours = page.COLOURS[1:3]
  other = _second(plot, 'KL, nats', page.COLOURS[1])
  for (name, label), colour in zip(names.items(), colours, strict=True):
    values = _column(steps, name)
    if np.isfinite(values).any():
      other.plot(x, values, color=colour, lw=1, **_point(x))
      plot.plot([], [], color=colour, lw=1, label=label)  # for the legend
  other.set_ylim(0, None)


def _spread(plot, x, steps):
  columns = {
    'all right': _column(steps, 'zero_right'),
    'all wrong': _column(steps, 'zero_wrong'),
  }
  _stack(plot, x, columns, page.COLOURS[2:4])
  plot.axhline(alarms.FLAT, color='#888', ls=':', lw=1)
  plot.set(title='Questions that teach nothing', ylabel='share', ylim=(0, 1))


def _mismatch(plot, x, steps):
  names = {
    'mismatch_k3': 'k3, nats a token',
    'mismatch_max': 'largest difference',
    'mismatch_extreme': 'share outside [1/2, 2]',
  }
  for name, label in names.items():
    values = _column(steps, name)
    if np.isfinite(values).any():
      plot.plot(x, np.maximum(values, _FLOOR), label=label, **_point(x))
  plot.axhline(alarms.MISMATCH, color='#888', ls=':', lw=1)
  plot.set(title='Mismatch of rollout and trainer', yscale='log')
  plot.set_ylim(_FLOOR / 2, None)


def _seconds(plot, x, steps):
  names = _names(steps, 'seconds')
  columns = {f' {name}': _column(steps, name, 'seconds') for name in names}
  _stack(plot, x, columns, page.colours(len(names)))
  plot.set(title='Time of a step', ylabel='seconds')


def _stack(plot, x, columns: dict[str, np.ndarray], colours: Sequence[str]):
  """Draws bars {label: values} on each other, a bar of a step or of a few."""
  size = -(-len(x) // _BARS)
  bins = [slice(i, i + size) for i in range(0, len(x), size)]
  places = [np.mean(x[part]) for part in bins]
  width = places[1] - places[0] if len(places) > 1 else 1.0
  bottom = np.zeros(len(bins))
  for (label, values), colour in zip(columns.items(), colours, strict=True):
    heights = [np.nan_to_num(values[part]).mean() for part in bins]
    plot.bar(places, heights, 0.9 * width, bottom, color=colour, label=label)
    bottom += heights


def _curves(plot, x, steps, names: dict[str, str], title: str, unit: str = ''):
  """Draws the columns {name: label, '' for none} that the rows have."""
  for name, label in names.items():
    values = _column(steps, name)
    if np.isfinite(values).any():
      plot.plot(x, values, label=label, **_point(x))
  plot.set(title=title, ylabel=unit)


def _point(rows: Sequence) -> dict:
  """Returns the style of a curve's points, seen where they are few."""
  return {'marker': 'o' if len(rows) < 40 else '', 'ms': 3}


def _second(plot, unit: str, colour: str):
  """Returns an ordinate of its own on the right of a chart."""
  other = plot.twinx()
  other.set_ylabel(unit, color=colour)
  other.spines['right'].set_visible(True)
  return other


def _names(steps: list[dict], group: str) -> list[str]:
  """Returns the names of a row's group of numbers, in their first order."""
  return list(dict.fromkeys(n for row in steps for n in row.get(group, {})))


def _column(rows: list[dict], name: str, group: str = '') -> np.ndarray:
  """Returns the number of each row, NaN where it lacks one."""
  rows = [row.get(group, {}) for row in rows] if group else rows
  values = [row.get(name) for row in rows]
  return np.array([x if type(x) in (int, float) else np.nan for x in values])
