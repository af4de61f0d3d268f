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
  values = [('steps', f'{steps[-1]["step"]:,}')]
  _, rewards = _points(steps, 'reward')
  if rewards:
    reward = f'{rewards[0]:.2f} \N{RIGHTWARDS ARROW} {rewards[-1]:.2f}'
    values.append(('reward, first to last', reward))
  for rows, name, title, form in (
    (passes, 'pass_at_1', 'held-out pass@1', '.1%'),
    (steps, 'completion_length', 'tokens an answer', ',.0f'),
    (steps, 'ended', 'answers that ended', '.0%'),
    (steps, 'entropy', 'entropy, nats a token', '.2f'),
    (steps, 'kl', 'KL to the reference, nats', '.2g'),
  ):
    _, numbers = _points(rows, name)
    if numbers:
      values.append((title, format(numbers[-1], form)))
  seconds = [sum(row['seconds'].values()) for row in steps if 'seconds' in row]
  if seconds:
    values.append(('seconds of a rollout', f'{np.nanmean(seconds):.2f}'))
  return page.numbers(values)


def draw(steps: list[dict], passes: list[dict]) -> list:
  """Returns matplotlib's figures: of learning, and of the updates."""
  learning, axes = page.figure(2, lines=3)
  _reward(axes[0, 0], steps, passes)
  _length(axes[0, 1], steps)
  _entropy(axes[1, 0], steps)
  _spread(axes[1, 1], steps)
  _mismatch(axes[2, 0], steps)
  _stack(axes[2, 1], steps, 'seconds', page.COLOURS)
  axes[2, 1].set(title='Time of a rollout, without updates', ylabel='seconds')
  updates, more = page.figure(2, lines=2)
  for plot, name, title in (
    (more[0, 0], 'grad_norm', 'Gradient norm'),
    (more[0, 1], 'lr', 'Learning rate'),
    (more[1, 0], 'clipped', 'Share of tokens without a gradient'),
    (more[1, 1], 'ratio_max', 'Largest ratio'),
  ):
    plot.set(title=title)
    _line(plot, steps, name, label='clipped' if name == 'clipped' else '')
  _line(more[1, 0], steps, 'dropped', label='dropped')
  more[1, 0].set_ylim(0, None)
  if any(row.get('grad_norm', 0) > 0 for row in steps):
    more[0, 0].set_yscale('log')
  for plot in [*axes.flat, *more.flat]:
    plot.set_xlabel('step')
    plot.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    page.legend(plot)
  return [learning, updates]


def _reward(plot, steps, passes):
  names = _names(steps, 'rewards')
  parts = [_points(steps, name, 'rewards') for name in names]
  if parts == [_points(steps, 'reward')]:
    names = []  # one part of weight 1 would hide behind the reward
  for name, colour in zip(names, page.COLOURS[2:] * 9, strict=False):
    style = {'lw': 0.9, 'alpha': 0.7, 'label': f' {name}'}
    _line(plot, steps, name, 'rewards', color=colour, **style)
  blue, red, *_ = page.COLOURS
  _line(plot, steps, 'reward', color=blue, label='reward', zorder=3)
  for name in sorted({n for row in passes for n in row if _is_pass(n)}):
    style = {'lw': 1.6 if name == 'pass_at_1' else 0.7, 'zorder': 4}
    label = f'held-out {name.replace("_at_", "@")}'
    _line(plot, passes, name, color=red, label=label, **style)
  plot.set(title='Reward and held-out questions', ylabel='mean')
  if plot.get_ylim()[0] > 0:
    plot.set_ylim(0, None)


def _is_pass(name: str) -> bool:
  return bool(re.fullmatch(r'pass_at_\w{1,9}', name))


def _length(plot, steps):
  _line(plot, steps, 'completion_length', label='mean')
  _line(plot, steps, 'length_max', label='longest')
  plot.set(title='Length of an answer', ylabel='tokens', ylim=(0, None))
  colour = page.COLOURS[2]
  other = _second(plot, 'share that ended', colour)
  _line(other, steps, 'ended', color=colour, lw=1)
  other.set_ylim(0, 1.05)


def _entropy(plot, steps):
  blue, red, green, *_ = page.COLOURS
  _line(plot, steps, 'entropy', color=blue, label='entropy')
  plot.set(title='Entropy and KL', ylim=(0, None))
  plot.set_ylabel('entropy, nats', color=blue)
  other = _second(plot, 'KL, nats', red)
  for name, label, colour in (
    ('kl', 'KL to the reference', red),
    ('kl_old', 'KL of an update', green),
  ):
    if any(_points(steps, name)[1]):  # else it is 0 in each step
      _line(other, steps, name, color=colour, lw=1)
      plot.plot([], [], color=colour, lw=1, label=label)  # for the legend
  other.set_ylim(0, None)


def _spread(plot, steps):
  """Draws the shares of questions whose answers are all right, all wrong."""
  rows = [
    {
      'step': row['step'],
      'flat': {'all right': row['zero_right'], 'all wrong': row['zero_wrong']},
    }
    for row in steps
    if {'zero_right', 'zero_wrong'} <= row.keys()
  ]
  _stack(plot, rows, 'flat', page.COLOURS[2:])
  plot.axhline(alarms.FLAT, color='#888', ls=':', lw=1)
  plot.set(title='Questions that teach nothing', ylabel='share', ylim=(0, 1))


def _mismatch(plot, steps):
  for name, label in (
    ('mismatch_k3', 'k3, nats a token'),
    ('mismatch_max', 'largest difference'),
    ('mismatch_extreme', 'share outside [1/2, 2]'),
    ('route_flips', 'share of routes that flip'),
  ):
    _, values = _points(steps, name)
    if values and max(values) <= _FLOOR:
      label, style = f'{label}: 0', {'color': 'none'}
    else:
      style = {}
    _line(plot, steps, name, label=label, least=_FLOOR, **style)
  plot.axhline(alarms.MISMATCH, color='#888', ls=':', lw=1)
  plot.set(title='Mismatch of rollout and trainer', yscale='log')
  plot.set_ylim(_FLOOR / 2, None)


def _stack(plot, rows: list[dict], group: str, colours: Sequence[str]):
  """Draws the numbers of a group on each other, a bar of a row or of a few."""
  rows = [row for row in rows if group in row]
  size = max(-(-len(rows) // _BARS), 1)
  bins = [rows[i : i + size] for i in range(0, len(rows), size)]
  places = [np.mean([row['step'] for row in part]) for part in bins]
  width = 0.9 * (places[1] - places[0] if len(places) > 1 else 1.0)
  bottom = np.zeros(len(bins))
  names = _names(rows, group)
  for name, colour in zip(names, list(colours) * len(names), strict=False):
    values = [[row[group].get(name, 0.0) for row in part] for part in bins]
    heights = [np.nan_to_num(part).mean() for part in values]
    label = f' {name}'
    plot.bar(places, heights, width, bottom, color=colour, label=label)
    bottom += heights


def _line(plot, rows, name: str, group: str = '', least=-np.inf, **style):
  """Draws a number over the steps of the rows that have it.

  Where few rows have it, its points have marks. Below `least` it stands there.
  """
  x, y = _points(rows, name, group)
  marker = 'o' if len(x) < 40 else ''
  if x:
    plot.plot(x, np.maximum(y, least), marker=marker, ms=3, **style)


def _second(plot, unit: str, colour: str):
  """Returns an ordinate of its own on the right of a chart."""
  other = plot.twinx()
  other.set_ylabel(unit, color=colour)
  other.spines['right'].set_visible(True)
  return other


def _names(steps: list[dict], group: str) -> list[str]:
  """Returns the names of a row's group of numbers, in their first order."""
  return list(dict.fromkeys(n for row in steps for n in row.get(group, {})))


def _points(
  rows: list[dict], name: str, group: str = ''
) -> tuple[list[int], list[float]]:
  """Returns the steps of the rows that have a number, and the numbers."""
  pairs = [
    (row['step'], (row.get(group, {}) if group else row).get(name))
    for row in rows
  ]
  pairs = [(x, y) for x, y in pairs if type(y) in (int, float)]
  return [x for x, _ in pairs], [y for _, y in pairs]
