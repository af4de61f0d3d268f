# %% [markdown]
# # R1-Zero at toy size
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/mla-moe/mla_moe/blob/main/notebooks/6_r1_zero.ipynb)
#
# How does a model learn from a number that only says right or wrong? A model of
# 0.35 M parameters learns to sort eight digits, as DeepSeek-R1-Zero learned
# mathematics: it answers, a program grades, and answers better than the others
# to the same question become likelier.

# %%
"""Reinforcement: a run, its groups of answers, and what the variants change."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import pyplot

from configs import r1_tiny
from experiments import r1
from experiments.page import COLOURS, draw_plainly
from experiments.rl import advantages, objective
from mla_moe import config as c

draw_plainly()

# %% [markdown]
# ## The run
#
# A policy that is never right learns nothing: all rewards of a group are equal,
# and no answer is better than another. So a cold start comes first, 100 steps
# of imitation, after which one answer in ten is right. Then 80 steps of
# reinforcement follow; `make r1` takes 150. In a terminal this is
#
# ```text
# python -m experiments.r1 --workdir=runs/notebook_r1 --steps=80
# ```

# %%
FOLDER = pathlib.Path('runs/notebook_r1')
final = r1.run(FOLDER, 'sort8', seed=0, cold=100, steps=80)

# %% [markdown]
# Each step draws 16 answers to each of 32 questions at temperature 1: the
# reward is the part of them that is right. Now and then 256 questions that
# training never sees are answered greedily (pass@1). As the policy becomes
# sure, its entropy falls, and it moves away from the policy that it began as.


# %%
def rows(name):
  """Returns the rows of a file of the run."""
  with open(FOLDER / 'rl' / f'{name}.jsonl', encoding='utf-8') as file:
    return [json.loads(line) for line in file]


steps = [row for row in rows('metrics') if 'reward' in row]
tests = [row for row in rows('metrics') if 'pass_at_1' in row]
x = [row['step'] for row in steps]
reward = np.array([row['reward'] for row in steps])
figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(13, 3.4))
left.plot(x, reward, '.', color='lightgrey', label='reward of a step')
mean = np.convolve(reward, np.ones(10) / 10, 'valid')
left.plot(x[9:], mean, label='of ten steps')
left.plot(
  [row['step'] for row in tests],
  [row['pass_at_1'] for row in tests],
  'o-',
  label='pass@1, held out',
)
left.set(title='Answers right', xlabel='step', ylim=(0, 1))
left.legend(frameon=False)
middle.plot(x, [row['entropy'] for row in steps], label='entropy')
middle.plot(x, [row['kl'] for row in steps], label='KL from the start')
middle.set(title='Nats a token', xlabel='step', ylim=(0, None))
middle.legend(frameon=False)
right.stackplot(
  x,
  [row['zero_wrong'] for row in steps],
  [row['zero_right'] for row in steps],
  labels=('all wrong', 'all right'),
  colors=(COLOURS[1], COLOURS[2]),
  alpha=0.6,
)
right.set(title='Groups without a lesson', xlabel='step', ylim=(0, 1))
right.legend(frameon=False)
pyplot.show()

# %% [markdown]
# A group whose answers are all wrong, or all right, has no gradient: its
# advantages are exactly 0. DAPO draws other questions in its place
# (`rl.dynamic`).
#
# ## A group of answers
#
# The advantage of an answer is its reward less the group's mean, divided by the
# group's spread. The rarer a right answer, the larger its advantage: here is a
# group of an early and of a late step.

# %%
groups = [row for row in rows('groups')]
spread = [g for g in groups if len({a['reward'] for a in g['answers']}) > 1]
figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.6))
for plot, group in zip(axes, (spread[0], spread[-1]), strict=True):
  answers = sorted(group['answers'], key=lambda a: (-a['reward'], a['text']))
  values = [a['advantage'] for a in answers]
  colours = [COLOURS[2] if a['reward'] else COLOURS[1] for a in answers]
  names = [ascii(a['text'])[1:-1][:14] for a in answers]
  plot.barh(range(len(answers)), values, color=colours)
  plot.set_yticks(range(len(answers)), names, family='monospace', fontsize=8)
  plot.invert_yaxis()
  plot.axvline(0, color='grey', lw=0.8)
  plot.set(
    title=f'step {group["step"]}: {group["question"]}', xlabel='advantage'
  )
pyplot.show()

# %% [markdown]
# ## What the variants change
#
# A variant of GRPO is a value of one field of the config. Three questions tell
# them apart.
#
# **How much does a right answer count?** GRPO divides by the spread
# (`rl.scale='std'`), so a question that is nearly always or nearly never
# answered right weighs more. Dr. GRPO and V3.2 do not divide.
#
# **How much does a long answer count?** `rl.aggregate`: each answer alike
# (DeepSeekMath), each token alike (DAPO), or each token divided by one constant
# (Dr. GRPO).

# %%
G, LONGEST = 16, 64
right_of = np.arange(1, G)
rewards = (np.arange(G)[None] < right_of[:, None]).astype(float)
lengths = np.array([4, 8, 16, 32, 64])
figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 3.4))
for scale in ('std', 'none'):
  advantage, _ = advantages.advantages(rewards, scale)
  left.plot(right_of, advantage[:, 0], 'o-', label=f'scale={scale!r}')
left.set(
  title='Advantage of a right answer', xlabel=f'right answers of {G}', ylim=0
)
left.legend(frameon=False)
for aggregate in ('sequence', 'token', 'constant'):
  used = np.ones(len(lengths), bool)
  token = advantages.token_weights(lengths, used, aggregate, LONGEST)
  right.plot(lengths, token * lengths, 'o-', label=f'aggregate={aggregate!r}')
right.set(title='Weight of an answer', xlabel='its tokens', ylim=0)
right.legend(frameon=False)
pyplot.show()

# %% [markdown]
# **How far may the policy go before new answers are drawn?** The ratio of a
# token is its likelihood now over that when it was drawn. Beyond the clip a
# token loses its gradient; CISPO caps its weight instead, and R1's own clip of
# 10 hardly ever acts. The curves are gradients of the code that trains.

# %%
log_ratio = jnp.linspace(-1.2, 1.2, 481)[None]
zeros = jnp.zeros_like(log_ratio)
base = dataclasses.replace(c.freeze(r1_tiny.get_config()).rl, beta=0.0)
VARIANTS = {
  'PPO, GRPO: 0.2, 0.2': dict(clip_low=0.2, clip_high=0.2),
  'DAPO: 0.2, 0.28': dict(clip_low=0.2, clip_high=0.28),
  'CISPO: at most 2': dict(surrogate='cispo', clip_high=2.0),
  'R1: 10, 10': {},
}


def push(rl, advantage):
  """Returns the loss's push on each token's log-probability."""

  def loss(log_probs):
    ids = jnp.zeros(log_probs.shape, jnp.int32)
    many = zeros, zeros, zeros, zeros + advantage, ids
    return objective.token_loss(log_probs, *many, rl)[0].sum()

  return -jax.grad(loss)(log_ratio)[0]


figure, axes = pyplot.subplots(1, 2, figsize=(12, 3.6), sharex=True)
for plot, advantage in zip(axes, (1.0, -1.0), strict=True):
  for i, (name, fields) in enumerate(VARIANTS.items()):
    pushes = push(dataclasses.replace(base, **fields), advantage)
    plot.plot(jnp.exp(log_ratio[0]), pushes, label=name, lw=3.5 - 0.8 * i)
  plot.axvline(1, color='grey', lw=0.8, ls=':')
  plot.set(title=f'Advantage {advantage:+.0f}', xlabel='ratio', ylabel='push')
axes[0].legend(frameon=False)
pyplot.show()

# %% [markdown]
# In this run each rollout has one update, so every ratio is 1, to the bit:
# there the variants of the clip agree. They differ with several updates a
# rollout (`rl.minibatches`); `configs/r1_tiny.py` has each paper as a variant.
#
# `runs/notebook_r1/rl/report.html` has these curves and more, and a viewer of
# answers with a slider over the steps.

# %%
assert all(row['ratio_max'] == 1.0 for row in steps)
print(f'right at first: {final["first"]:.0%}, at the end: {final["last"]:.0%}')
print(
  f'held out, greedily: {final["greedy_first"]:.0%}, then {final["greedy"]:.0%}'
)
