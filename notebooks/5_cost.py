# %% [markdown]
# # What does it cost?
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/mla-moe/mla_moe/blob/main/notebooks/5_cost.ipynb)
#
# DeepSeek-V3's training bill from first principles, beside the published one;
# the price of serving a million tokens; and the total when the price falls and
# use grows.

# %%
"""Cost: the training bill, serving, and the total under falling prices."""

import sys

import numpy as np
from matplotlib import pyplot

from experiments import chips
from experiments.page import COLOURS, draw_plainly
from mla_moe import Config, cost

draw_plainly()
V3 = Config().model
H800 = chips.CHIPS['h800']

# %% [markdown]
# ## Training
#
# A parameter that works on a token costs 6 FLOPs to train on it: 2 forward, 4
# backward. Attention adds a part that grows with the length. So:

# %%
counts = cost.parameters(V3)
flops = cost.train_flops_per_token(V3, 4096)
print(
  f'{counts.total / 1e9:.1f}B parameters, {counts.active / 1e9:.1f}B active'
)
print(f'{flops / 1e9:.1f} GFLOP for each training token (published: 250)')

TOKENS = 14.8e12
REACHED = 0.3894  # of the bf16 peak: "Insights into DeepSeek-V3", Table 4
hours, dollars = chips.hours_and_money(
  V3,
  TOKENS,
  4096,
  devices=2048,
  peak_flops=H800.bf16,
  utilisation=REACHED,
  dollars_per_hour=2.0,
)
# The context extensions and post-training are taken as published.
parts = {
  'pre-training': (hours / 1e6, 2.664),
  'context': (0.119, 0.119),
  'post-training': (0.005, 0.005),
}
ours, published = (sum(p[i] for p in parts.values()) for i in (0, 1))
print(f'{"":14} {"here":>7} {"report":>7}  million H800 hours')
for name, (mine, theirs) in parts.items():
  print(f'{name:14} {mine:7.3f} {theirs:7.3f}')
print(f'{"all":14} {ours:7.3f} {published:7.3f}')
print(f'at $2 an hour: ${2 * ours:.3f}M, published $5.576M')
assert abs(2 * ours / 5.576 - 1) < 0.01

# %% [markdown]
# The published total, from one line of arithmetic and one measured number, to
# within 1 %. It pays for one run. It does not pay for the runs before it that
# found the recipe, nor for people, data or the machines that stood idle.
#
# Where do the FLOPs go, and what would a dense model of the same size cost?

# %%
a = V3.mla
width = a.nope_dim + a.rope_dim + a.value_dim
expert = 3 * V3.dim * V3.moe.width
by_part = {
  'attention, weights': 6 * counts.attention,
  'attention, length': 3 * 2 * a.heads * width * 2048 * V3.layers,
  'routed experts': 6 * V3.moe_layers * V3.moe.top_k * expert,
  'shared expert': 6 * counts.shared,
  'dense layers': 6 * counts.dense,
  'head, router': 6 * (counts.head + counts.router),
}
figure, (left, right) = pyplot.subplots(
  1, 2, figsize=(12, 3.4), width_ratios=(3, 2)
)
bars = left.barh(
  list(by_part), [v / 1e9 for v in by_part.values()], color=COLOURS
)
left.bar_label(bars, [f'{v / 1e9:.0f}' for v in by_part.values()], padding=4)
left.invert_yaxis()
left.set(
  title=f'Training a token of V3: {sum(by_part.values()) / 1e9:.0f} GFLOP',
  xlabel='GFLOP',
  xlim=(0, 150),
)
dense = 6 * counts.total / 1e9
bars = right.barh(['V3', 'dense 671B'], [flops / 1e9, dense], color=COLOURS[:2])
right.bar_label(bars, [f'{flops / 1e9:.0f}', f'{dense:,.0f}'], padding=4)
right.invert_yaxis()
right.set(title='The same size without experts', xlabel='GFLOP', xlim=(0, 4900))
pyplot.show()

# %% [markdown]
# ## On other hardware
#
# The same share of the peak, list prices with their sources in
# `experiments/chips.py`. Whether a slice can hold it at all is
# `experiments.plan`'s question.

# %%
names = ['h800', 'v5p', 'v6e', 'tpu7x', 'h100', 'b200']
bill = {}
for name in names:
  chip = chips.CHIPS[name]
  bill[name] = chips.hours_and_money(
    V3,
    TOKENS,
    4096,
    devices=2048,
    peak_flops=chip.bf16 * chip.cores,
    utilisation=REACHED,
    dollars_per_hour=chip.dollars,
  )
figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 3.2))
for plot, i, title in (
  (left, 0, 'million chip hours'),
  (right, 1, 'million dollars'),
):
  sizes = [bill[name][i] / 1e6 for name in names]
  bars = plot.barh(names, sizes, color=COLOURS[i])
  plot.bar_label(bars, [f'{s:.2f}' for s in sizes], padding=4)
  plot.invert_yaxis()
  plot.margins(x=0.15)
  plot.set(title=f'Pre-training, {title}', xlabel=title)
pyplot.show()

# %% [markdown]
# ## Serving
#
# A decoding step must read every weight that its tokens touch, and the cache of
# every sequence. A batch of $B$ sequences on $n$ chips shares the reading of
# weights; each sequence has a cache of its own:
#
# $$ t = \max\Big(\frac{W(B) + B\, S\, c}{n \cdot bandwidth},\
#    \frac{2 B (P_{active} + attention(S))}{n \cdot peak}\Big) $$
#
# $W(B)$ are the weights that a batch touches: soon all of them.


# %%
def step_seconds(batch, context, devices, chip=H800):
  """Returns seconds of a decoding step: (reading, computing), FP8 weights."""
  spread = 1 - (1 - V3.moe.top_k / V3.moe.experts) ** batch
  weights = counts.total - counts.routed * (1 - spread)
  cache = context * cost.cache_bytes_per_token(V3)
  reading = (weights + batch * cache) / (devices * chip.bandwidth)
  attention = 2 * a.heads * (2 * a.kv_rank + a.rope_dim) * context * V3.layers
  computing = batch * (2 * counts.active / chip.fp8 + attention / chip.bf16)
  return reading, computing / devices


def price(batch, context, devices=128, chip=H800, reached=0.5):
  """Returns dollars for a million tokens at a fraction of the bound's speed."""
  seconds = max(step_seconds(batch, context, devices, chip)) / reached
  return devices * chip.dollars / 3600 * seconds / batch * 1e6


batches = np.unique(np.round(np.logspace(0, 4.3, 50)).astype(int))
figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4))
for context, colour in zip((1024, 5000, 32768, 131072), COLOURS, strict=False):
  fits = [
    b
    for b in batches
    if counts.total + b * context * cost.cache_bytes_per_token(V3)
    < 128 * H800.usable
  ]
  prices = [price(b, context) for b in fits]
  left.loglog(fits, prices, color=colour, label=f'{context:,} tokens')
  speed = [0.5 / max(step_seconds(b, context, 128)) for b in fits]
  right.loglog(fits, speed, color=colour)
left.axhline(2.19, color='grey', ls=':')
left.text(2e4, 2.35, "R1's price, February 2025: $2.19", ha='right', fontsize=9)
left.set(
  title='128 H800: a million output tokens',
  ylabel='dollars',
  xlabel='sequences at a time (lines end where memory does)',
)
left.legend(frameon=False, title='context')
right.set(
  title='The speed for one user',
  ylabel='tokens a second',
  xlabel='sequences at a time',
)
pyplot.show()

# %% [markdown]
# Published for a day of February 2025: 226.75 nodes of 8 H800, 168B output and
# 608B input tokens. The bound above, beside it:

# %%
gpu_hours = 226.75 * 8 * 24
print(f'cost of the day: ${gpu_hours * 2:,.0f} (published $87,072)')
per_node = 168e9 / (226.75 * 24 * 3600)
print(
  f'output over all nodes: {per_node:,.0f} tokens/s a node, prefill included'
)
batch, nodes = 9000, 18  # the published decoding unit has 18 nodes
bound = batch / max(step_seconds(batch, 4989, 8 * nodes)) / nodes
print(
  f'decoding, {batch // nodes} sequences a node: bound {bound:,.0f} tokens/s'
)
print('published for decoding nodes: 14,800')

# %% [markdown]
# The bound counts memory and arithmetic alone. It leaves out the network, which
# the authors name as the limit: with an all-to-all at 50 GB/s a token takes at
# least 14.8 ms.
#
# ## When the price falls and use grows
#
# If use grows by more than the price falls, the total rises: with a price
# elasticity $e$, tokens $\propto price^{-e}$ and spending $\propto
# price^{1-e}$. Above 1, cheaper tokens cost more in all (Jevons' coal). Nobody
# knows the elasticity; the sliders are for an argument about it.


# %%
def draw(elasticity=1.3, fall=10.0, years=4):
  """Draws price, use and spending over the years; `fall`: times a year."""
  t = np.linspace(0, years, 80)
  price_ = fall**-t
  use = price_**-elasticity
  figure, plot = pyplot.subplots(figsize=(9, 3.6))
  plot.semilogy(t, price_, label='price of a token')
  plot.semilogy(t, use, label='tokens used')
  plot.semilogy(t, price_ * use, '--', label='spending', lw=2.5)
  plot.set(
    title=f'{fall:g} times cheaper each year, elasticity {elasticity:g}',
    xlabel='years',
    ylabel='relative to today',
  )
  plot.legend(frameon=False)
  pyplot.show()


# Sliders where the notebook runs live; a picture where it is only read.
try:
  import ipywidgets
except ImportError:
  ipywidgets = None
if ipywidgets and 'google.colab' in sys.modules:
  ipywidgets.interact(
    draw, elasticity=(0.5, 2.0, 0.1), fall=(2.0, 20.0, 1.0), years=(1, 6)
  )
else:
  draw()
