# %% [markdown]
# # What the indexer looks at
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/mla-moe/mla_moe/blob/main/notebooks/7_sparse.ipynb)
#
# In V3.2 a query attends to a few keys alone, and a small indexer chooses them
# ([docs/dsa.md](../docs/dsa.md)). How does it know which? It learns from the
# attention of a dense model. Here is a small one, and the choices of its
# indexers before and after that warm-up.

# %%
"""Sparse attention: the sets of keys, before and after the warm-up."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import pyplot

from experiments.bench import models, paired
from experiments.data import batches
from experiments.page import COLOURS, draw_plainly
from mla_moe import config as c
from mla_moe.model import attention, block, transformer
from mla_moe.train import optim, stage

draw_plainly()
LENGTH, TOPK = 512, 48
DENSE, WARMUP = 120, 60

# %% [markdown]
# ## A dense model
#
# Two layers, 96 wide, four heads, learn bytes of Python's standard library.
# After a minute they know some spelling, and attend to more than the last few
# bytes.

# %%
MODEL = models.build(
  **models.BYTES | dict(max_positions=LENGTH, query_rank=48),
  dim=96,
  layers=2,
  dense_width=192,
  init_std=0.05,
  heads=4,
  kv_rank=32,
  nope_dim=16,
  rope_dim=8,
  value_dim=16,
  experts=8,
  top_k=2,
  width=48,
)


def config(dsa, **recipe):
  """Returns a run of the model with this indexer."""
  return c.Config(
    model=dataclasses.replace(MODEL, dsa=dsa),
    optim=c.OptimConfig(warmup_steps=10, **recipe),
    data=c.DataConfig(seq_len=LENGTH, batch_size=4),
  )


def train(run, steps, state, first=0):
  """Returns the state after these steps, and the metrics of each."""
  _, step, _ = paired.programs(run)
  rows = []
  for i in range(steps):
    text = paired.text()
    batch = batches.batch_at(text.train, run.data, first + i, text.bos_id)
    state, values = step(state, batch, optim.rates(run.optim, i, 0))
    rows.append(jax.device_get(values))
  return state, rows


dense = config(c.DSAConfig(), optimizer='muon', learning_rate=8e-3)
init, *_ = paired.programs(dense)
state, rows = train(dense, DENSE, init(jax.random.key(0)))
bits = [float(row['main_loss']) / np.log(2) for row in rows]
print(f'{bits[0]:.2f} bits a byte at first, {np.mean(bits[-10:]):.2f} at last')

# %% [markdown]
# ## The warm-up
#
# A layer's indexer gives each pair of a query and a key a score, by two heads
# that share one key of 16 numbers. Its loss is the divergence of its softmax
# from the heads' mean attention $p$, over all keys. All other parameters stay
# as they are: their gradient is 0, and they have no moments.
#
# `index_mass` is measured beside the loss: the attention that the 48 best keys
# of the index have, of the most that any 48 keys could have.

# %%
DSA = c.DSAConfig(heads=2, dim=16, topk=TOPK, attention='dense')
warm = config(DSA, optimizer='adamw', learning_rate=5e-3, trains='indexer')
init, *_ = paired.programs(warm)
fresh = init(jax.random.key(1))
trunk, router = jax.tree.map(jnp.copy, (state.params, state.router))
fresh = fresh.replace(params=stage.merged(trunk, fresh.params), router=router)
before = jax.tree.map(jnp.copy, fresh.params)
ready, rows = train(warm, WARMUP, fresh, DENSE)

figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 3.4))
for layer in range(2):
  name = f'layer {layer}'
  left.plot([row['index_kl'][layer] for row in rows], label=name)
  right.plot([row['index_mass'][layer] for row in rows], label=name)
left.set(title='KL(p || softmax(I)), nats', xlabel='step', ylim=(0, None))
right.set(
  title=f'Attention in the {TOPK} keys, of the most possible',
  xlabel='step',
  ylim=(None, 1),
)
left.legend(frameon=False)
right.legend(frameon=False)
pyplot.show()

# %% [markdown]
# ## The sets
#
# The model reads a text that it has not seen, with each of the two indexers.
# Its report has the sets of 16 queries. For the attention $p$ itself, the dense
# model runs once more, with a function in place of its core that notes the
# probabilities.

# %%
text = paired.text()
heldout = batches.eval_batches(text.heldout, warm.data, text.bos_id, 1)
tokens = next(iter(heldout)).tokens[0][:1]


@jax.jit
def sets(params):
  """Returns the sets of 16 queries in both layers, [layers, 16, TOPK]."""
  network = transformer.Transformer(warm.model)
  variables = {'params': params, 'router': state.router}
  return network.apply(variables, tokens, method='features').index.sets[:, 0]


def probabilities():
  """Returns the mean of the heads' attention, [layers, queries, keys]."""
  noted = []

  def attend(q, k, v, *, scale, **rest):
    dots = jnp.einsum('tnh,snh->nts', q[0], k[0]) * scale
    seen = jnp.tril(jnp.ones((1, LENGTH, LENGTH), bool))
    p = jax.nn.softmax(jnp.where(seen, dots, -jnp.inf)).mean(0)
    jax.debug.callback(lambda p: noted.append(np.asarray(p)), p, ordered=True)
    return attention.attend(q, k, v, scale=scale, **rest)

  functions = block.Functions(attend)
  network = transformer.Transformer(dense.model, functions)
  variables = {'params': state.params, 'router': state.router}
  run = jax.jit(lambda v: network.apply(v, tokens, method='features').hidden)
  run(variables).block_until_ready()
  jax.effects_barrier()
  return np.stack(noted)


def kept(chosen, p):
  """Returns the attention in each layer's sets, the mean of the queries."""
  inside = np.take_along_axis(p[:, QUERIES], np.maximum(chosen, 0), -1)
  return np.where(chosen >= 0, inside, 0).sum(-1).mean(-1)


QUERIES = np.linspace(0, LENGTH, 17)[1:].astype(int) - 1
p = probabilities()
chosen = {
  'before': np.asarray(sets(before)),
  'after': np.asarray(sets(ready.params)),
  'the best': np.argsort(-p[:, QUERIES], axis=-1)[..., :TOPK],
}
figure, axes = pyplot.subplots(2, 2, figsize=(12, 6), sharex=True, sharey=True)
for (name, of_layers), line in zip(list(chosen.items())[:2], axes, strict=True):
  for layer, plot in enumerate(line):
    shade = np.log10(np.maximum(p[layer, QUERIES], 1e-5))
    plot.imshow(shade, cmap='Greys', aspect='auto', interpolation='nearest')
    for row, keys in enumerate(of_layers[layer]):
      keys = keys[keys >= 0]
      plot.plot(keys, np.full(len(keys), row), '|', color=COLOURS[1], ms=6)
    plot.set(title=f'layer {layer}, {name} the warm-up')
    plot.set(xlabel='key', ylabel='query')
    plot.set_yticks(range(0, 16, 3), QUERIES[::3])
pyplot.show()

# %% [markdown]
# Grey is the attention of the dense model, on a scale of logarithms, a mark is
# a key in the set. A fresh indexer's queries and keys are random projections:
# its keys lie anywhere. A trained one has the near keys, which the heads like
# most, and in layer 1 some of the beginning of the text.
#
# ## One query
#
# The last query of the text, and the 192 bytes before it: the darker a byte,
# the more attention the heads give it; framed ones are in the set.

# %%
SHOWN, WIDTH = 192, 48


def draw(plot, weights, keys, title):
  """Draws the last bytes of the text, those of the set in frames."""
  first = LENGTH - SHOWN
  dark = np.log10(np.maximum(weights[first:], 1e-4)) / 4 + 1
  plot.imshow(dark.reshape(-1, WIDTH), cmap='Greys', vmin=0, vmax=1.6)
  for i in range(SHOWN):
    row, column = divmod(i, WIDTH)
    letter = chr(tokens[0, first + i]) if tokens[0, first + i] < 128 else '?'
    letter = letter if letter.isprintable() else '.'
    style = dict(ha='center', va='center', family='monospace', fontsize=9)
    plot.text(column, row, letter.replace('$', r'\$'), **style)
    if first + i in keys:
      box = (column - 0.46, row - 0.46), 0.92, 0.92
      edge = dict(fill=False, color=COLOURS[1], lw=1.6)
      plot.add_patch(pyplot.Rectangle(*box, **edge))
  plot.set(title=title, xticks=[], yticks=[])


figure, axes = pyplot.subplots(3, 1, figsize=(12, 5))
titles = ('before the warm-up', 'after it', 'the best keys')
for plot, of_layers, title in zip(axes, chosen.values(), titles, strict=True):
  draw(plot, p[1, -1], set(of_layers[1][-1].tolist()), f'layer 1, {title}')
pyplot.show()

# %% [markdown]
# How much of the attention is in the sets? The best keys are those that the
# dense attention itself likes most. No indexer can do better, and to find them
# would cost the attention that it is there to save.

# %%
for name, of_layers in chosen.items():
  parts = kept(of_layers, p)
  print(f'{name:>9}: {parts[0]:.1%} and {parts[1]:.1%} of the attention')
assert (kept(chosen['after'], p) > kept(chosen['before'], p)).all()

# %% [markdown]
# In the sparse stage the model then learns to do without the rest, and its
# indexers go on learning, from the attention inside the sets:
#
# ```text
# python -m experiments.bench sparse_quality
# ```
#
# trains both stages beside a model that stays dense.
