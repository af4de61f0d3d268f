# %% [markdown]
# # Adapters over a frozen model
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/mla-moe/mla_moe/blob/main/notebooks/8_lora.ipynb)
#
# How is a model trained that fits a device only as four-bit codes? Its weights
# stay as they are, and two thin matrices beside each of them learn (LoRA, Hu et
# al. 2021): $y = xW + s\,(xA)B$. Here a small model with latent attention and
# experts learns Python, becomes codes, and learns to write it in capitals.

# %%
"""LoRA: codes, adapters of several ranks, and a merged model."""

import dataclasses
import functools
import math
import pathlib
import sysconfig
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from matplotlib import pyplot

from configs import tiny
from experiments.adapters import lora
from experiments.adapters.frozen import Frozen
from experiments.adapters.load import load_base
from experiments.page import COLOURS, draw_plainly
from mla_moe import Transformer, load_huggingface, save_huggingface
from mla_moe import config as c

draw_plainly()

# %% [markdown]
# ## A base
#
# The model has 3 layers of width 64, one of them dense, and 16 experts. Its
# text is a part of Python's standard library, byte by byte.

# %%
STEPS, RANKS = 300, (1, 4, 16)
FOLDER = pathlib.Path('runs/notebook_lora')
small = c.freeze(tiny.get_config('smoke')).model
small = dataclasses.replace(
  small, layers=3, precision='bf16', mtp=c.MTPConfig(0)
)
model = Transformer(small)
library = pathlib.Path(sysconfig.get_paths()['stdlib'])
text = b''.join(path.read_bytes() for path in sorted(library.glob('*.py'))[:60])
plain = np.frombuffer(text, np.uint8).astype(np.int32)
capitals = np.frombuffer(text.upper(), np.uint8).astype(np.int32)


def rows(stream, seed, length=64):
  """Returns 16 pieces of a text, one byte longer than the model reads."""
  starts = np.random.default_rng(seed).integers(0, len(stream) - length, 16)
  return np.stack([stream[i : i + length + 1] for i in starts])


def loss(variables, batch):
  """Returns the mean nats of the next byte."""
  logits = model.apply(variables, batch[:, :-1]).logits
  each = optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:])
  return each.mean()


def learn(trained, assemble, stream, rate, rest=None):
  """Returns the trained part after STEPS of Adam, and the losses.

  `assemble(rest, trained)` are the variables: `rest` has no gradient, and is an
  argument of the compiled step, so that it is no constant of the program.
  """
  tx = optax.adam(rate)

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(trained, opt, rest, batch):
    of = lambda trained: loss(assemble(rest, trained), batch)
    value, gradient = jax.value_and_grad(of)(trained)
    updates, opt = tx.update(gradient, opt)
    return optax.apply_updates(trained, updates), opt, value

  opt, losses = tx.init(trained), []
  for i in range(STEPS):
    trained, opt, value = step(trained, opt, rest, rows(stream, i))
    losses.append(value)
  return trained, np.array(losses)


tokens = jnp.zeros((1, 8), jnp.int32)
variables = nn.unbox(jax.jit(model.init)(jax.random.key(0), tokens))
router = variables['router']
whole = lambda router, params: {'params': params, 'router': router}
began = time.perf_counter()
params, learned = learn(variables['params'], whole, plain, 3e-3, router)
save_huggingface(FOLDER / 'base', small, whole(router, params), force=True)
print(f'{STEPS} steps in {time.perf_counter() - began:.0f} s')

# %% [markdown]
# ## As codes
#
# `load_base` reads a release and leaves its matrices in codes: a scale for each
# group of 128 numbers of a row, or of 32 in four bits. A released FP8 or int4
# file keeps its own bytes. Bytes and errors of the experts' second matrix:

# %%
exact = np.asarray(params['moe']['ffn']['w_down'])
figure, axes = pyplot.subplots(1, 3, figsize=(12, 3), sharey=True)
for axis, kind, colour in zip(axes, ('fp8', 'int8', 'int4'), COLOURS):
  _, frozen = load_base(FOLDER / 'base', kind)
  w = frozen['params']['moe']['ffn']['w_down']
  size = w.codes.nbytes + w.scales.nbytes
  error = np.asarray(w.astype(jnp.float32)) - exact
  spread = error.std() / exact.std()
  axis.hist(error.ravel() / exact.std(), 60, color=colour)
  axis.set(
    title=f'{kind}: {size / exact.size:.2f} bytes a number, {spread:.1%} off',
    xlabel='error over standard deviation',
  )
pyplot.show()

# %% [markdown]
# ## Adapters
#
# `lora.join(base, adapters, model)` is a pure function: parameters in which each
# product is a `Frozen`, codes with its A and B. Training differentiates it by
# the adapters alone. B begins at zero, so the first loss is the base's.

# %%
own, frozen = load_base(FOLDER / 'base', 'int4')
base = frozen['params']
curves, results = {}, {}
for rank in RANKS:
  adapted = dataclasses.replace(own, lora=c.LoRAConfig(rank=rank))
  joined = lambda rest, adapters, adapted=adapted: {
    'params': lora.join(rest['params'], adapters, adapted),
    'router': rest['router'],
  }
  fresh = nn.unbox(lora.boxed(jax.random.key(rank), adapted))
  results[rank], curves[rank] = learn(fresh, joined, capitals, 3e-3, frozen)
trained = {
  rank: sum(x.size for x in jax.tree.leaves(result))
  for rank, result in results.items()
}
total = sum(x.size for x in jax.tree.leaves(params))
figure, axis = pyplot.subplots(figsize=(7, 3.4))
smooth = lambda y: np.convolve(y, np.ones(10) / 10, 'valid')
if STEPS >= 10:
  axis.plot(smooth(learned), color='lightgrey', label='the base learns Python')
  for rank, colour in zip(RANKS, COLOURS):
    words = f'rank {rank}: {trained[rank] / total:.0%} of the parameters'
    axis.plot(smooth(curves[rank]), color=colour, label=words)
axis.set(xlabel='step', ylabel='nats a byte', title='Python in capitals')
axis.legend(frameon=False)
pyplot.show()

# %% [markdown]
# The adapters' memory is 16 bytes a number (weight, gradient, two moments), the
# base's that of its codes. Trained whole, all parameters would have the 16.

# %%
size = sum(x.nbytes for x in jax.tree.leaves(base))
for rank in RANKS:
  print(
    f'rank {rank:2}: {size / 2**20:.2f} MiB of base and '
    f'{16 * trained[rank] / 2**20:.2f} of adapters; '
    f'whole: {16 * total / 2**20:.2f} MiB'
  )

# %% [markdown]
# ## Taken off, and merged
#
# Without its adapters the base is what it was. Merged, $W + s\,AB$ is a release
# as any other: `convert --merge` writes it, here `save_huggingface` does. The
# last rank's losses, in nats a byte, over the base and merged:

# %%
rank = RANKS[-1]
adapted = dataclasses.replace(own, lora=c.LoRAConfig(rank=rank))
joined = whole(router, lora.join(base, results[rank], adapted))
merged = whole(router, lora.merged(joined['params'], adapted))
save_huggingface(FOLDER / 'merged', adapted, merged, force=True)
_, again = load_huggingface(FOLDER / 'merged')
measure = jax.jit(loss)
batches = {'Python': rows(plain, 10**6), 'capitals': rows(capitals, 10**6)}
for name, batch in batches.items():
  each = [measure(x, batch) for x in (frozen, joined, again)]
  print(f'{name:8}  ' + '  '.join(f'{x:.4f}' for x in each))
assert math.isclose(*(measure(x, batch) for x in (joined, again)), abs_tol=1e-3)
assert all(isinstance(w, Frozen) for w in (base['moe']['ffn']['w_down'],))

# %% [markdown]
# ## V2-Lite on Colab's L4
#
# These cells were **not run here**: this notebook was made on two CPU cores. An
# L4 has 24 GB; the plan's arithmetic for it is 15.6 GiB, 8.8 of them the base
# in four bits.
#
# ```text
# !huggingface-cli download deepseek-ai/DeepSeek-V2-Lite --local-dir lite
# !python -m experiments.plan --config=configs/lora.py:lite_l4 --topology=l4:1
# !python -m experiments.sft --config=configs/lora.py:lite_l4 \
#   --data=answers.jsonl --config.run.base=lite \
#   --config.data.tokenizer=lite --workdir=runs/lora
# !python -m experiments.generate --checkpoint=runs/lora --prompt="..." --chat
# !python -m experiments.convert --source=runs/lora --target=adapter
# ```
#
# Each line of `answers.jsonl` is a conversation: `{"messages": [{"role":
# "user", "content": "..."}, {"role": "assistant", "content": "..."}]}`. The
# folder `adapter` is PEFT's, and `convert --source=adapter
# --target=runs/again --config=configs/lora.py:lite_l4` makes a run of one.
