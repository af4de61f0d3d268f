# %% [markdown]
# # Latent attention
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/mla-moe/mla_moe/blob/main/notebooks/1_latent_attention.ipynb)
#
# Why is DeepSeek-V3's cache so small, and why is decoding not slower for it?

# %%
"""Latent attention: cache, absorption, and where one form beats the other."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import pyplot

from experiments.page import COLOURS, draw_plainly
from mla_moe import Config, cost
from mla_moe.model import attention

draw_plainly()
V3 = Config().model

# %% [markdown]
# ## What a token leaves behind
#
# Every layer of a decoder caches numbers of every token. Ordinary attention
# caches a key and a value for each head; grouped-query attention shares them
# among some heads; MLA caches one latent, from which the keys and values of all
# heads can be made, and one rotated key. The areas below are to scale.

# %%
mla, layers = V3.mla, V3.layers
cached = {
  'MHA: 128 heads': 2 * mla.heads * mla.nope_dim,
  'GQA: 8 groups': 2 * 8 * mla.nope_dim,
  'MQA: 1 head': 2 * mla.nope_dim,
  'MLA: 512 + 64': mla.kv_rank + mla.rope_dim,
}
assert cached['MLA: 512 + 64'] * layers * 2 == cost.cache_bytes_per_token(V3)

# MHA, GQA and MLA have one colour each, here and below.
HUES = [*COLOURS[:2], COLOURS[3], COLOURS[2]]
figure, plot = pyplot.subplots(figsize=(9, 4.2))
left = 0.0
for (name, numbers), colour in zip(cached.items(), HUES, strict=True):
  side = np.sqrt(numbers)
  plot.add_patch(pyplot.Rectangle((left, 0), side, side, color=colour))
  size = numbers * layers * 2
  plot.text(left, -8, f'{name}\n{size:,} bytes', va='top', color=colour)
  left += max(side, 66) + 16
plot.set(xlim=(-2, left), ylim=(-42, 186), aspect='equal')
plot.set_axis_off()
plot.set_title('The cache of one token, all 61 layers, bfloat16 (area = bytes)')
pyplot.show()

# %% [markdown]
# At a context of 128K tokens, a single sequence takes half a terabyte or 9 GB.

# %%
for name, numbers in cached.items():
  print(
    f'{name:16} {numbers * layers * 2 * 131072 / 1e9:8.1f} GB at 128K tokens'
  )

# %% [markdown]
# ## Absorption
#
# A head's key is $k_n = [c W^{uk}_n;\, k^{rope}]$, made from the latent $c$.
# Its logit with the query $q_n = [q^{nope}_n;\, q^{rope}_n]$ is
#
# $$ q^{nope}_n \cdot (c W^{uk}_n) + q^{rope}_n \cdot k^{rope}
#    = (W^{uk}_n q^{nope}_n) \cdot c + q^{rope}_n \cdot k^{rope}. $$
#
# The right-hand side never makes a key: the up-projection has moved into the
# query, and is applied once a step and not once a cached token. The values'
# up-projection moves behind the weighted sum in the same way. Both forms, in a
# few lines:


# %%
def expanded(q_nope, q_rope, latent, k_rope, w_k_up, w_v_up):
  """Keys and values of every head, then ordinary attention."""
  k_nope = jnp.einsum('bsc,cnh->bsnh', latent, w_k_up)
  v = jnp.einsum('bsc,cnu->bsnu', latent, w_v_up)
  shared = jnp.broadcast_to(
    k_rope[:, :, None], (*k_nope.shape[:3], k_rope.shape[-1])
  )
  k = jnp.concatenate([k_nope, shared], -1)
  q = jnp.concatenate([q_nope, q_rope], -1)
  return attention.attend(q, k, v, scale=q.shape[-1] ** -0.5, impl='reference')


def absorbed(q_nope, q_rope, latent, k_rope, w_k_up, w_v_up):
  """One shared latent sequence of keys and values for all heads."""
  scale = (q_nope.shape[-1] + q_rope.shape[-1]) ** -0.5
  q = jnp.einsum('btnh,cnh->btnc', q_nope, w_k_up)
  logits = jnp.einsum('btnc,bsc->bnts', q, latent)
  logits += jnp.einsum('btnr,bsr->bnts', q_rope, k_rope)
  visible = jnp.tril(jnp.ones(logits.shape[-2:], bool))
  probs = jax.nn.softmax(jnp.where(visible[None, None], logits * scale, -1e30))
  out = jnp.einsum('bnts,bsc->btnc', probs, latent)
  return jnp.einsum('btnc,cnu->btnu', out, w_v_up)


def inputs(length, heads=8, rank=64, nope=16, rope=8, value=16):
  """Random arrays of a small MLA, float32."""
  keys = jax.random.split(jax.random.key(0), 6)
  shapes = (
    (1, length, heads, nope),
    (1, length, heads, rope),
    (1, length, rank),
    (1, length, rope),
    (rank, heads, nope),
    (rank, heads, value),
  )
  return [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]


arrays = inputs(48)
difference = jnp.abs(expanded(*arrays) - absorbed(*arrays)).max()
print(f'largest difference of the two: {difference:.1e}')
assert difference < 1e-4

# %% [markdown]
# ## Which is less work?
#
# For $T$ new tokens that attend to $S$ cached ones, per layer (a multiply and
# an add are two FLOPs):
#
# * expanded: $2 S N C (H + U)$ to make keys and values, then
#   $2 T S N (H + R + U)$;
# * absorbed: $2 T N C (H + U)$ to fold, then $2 T S N (2C + R)$.
#
# Decoding has $T = 1$, training $T = S$. For many cached tokens, both are equal
# work at this number of new ones:

# %%
n, c = mla.heads, mla.kv_rank
h, r, u = mla.nope_dim, mla.rope_dim, mla.value_dim


def work(t, s):
  """FLOPs of (expanded, absorbed) for t new tokens over s cached ones."""
  make = 2 * n * c * (h + u)
  return (
    make * s + 2 * t * s * n * (h + r + u),
    make * t + 2 * t * s * n * (2 * c + r),
  )


# s -> infinity: c (h + u) = t ((2c + r) - (h + r + u))
even = c * (h + u) / (2 * c - h - u)
print(f'break-even at {even:.1f} new tokens a step')
assert 170 < even < 171

figure, (plot, other) = pyplot.subplots(1, 2, figsize=(11, 4))
new = np.unique(np.round(np.logspace(0, 4, 60)).astype(int))
both = np.array([work(t, 32768) for t in new]) / new[:, None] / 1e9
plot.loglog(new, both[:, 0], label='expanded')
plot.loglog(new, both[:, 1], label='absorbed')
plot.axvline(even, color='grey', ls=':')
plot.text(even * 1.15, both.max() / 3, f'{np.ceil(even):.0f} tokens')
plot.set(
  title='Work for each new token, 32K cached',
  xlabel='new tokens in a step',
  ylabel='GFLOP a layer and token',
)
plot.legend(frameon=False)

# Bytes that one decoding step must read for one sequence.
lengths = np.logspace(2, 5.2, 40)
gqa = 2 * 8 * h * 2 * layers * lengths / 1e9
other.loglog(lengths, 2 * n * h * 2 * layers * lengths / 1e9, label='MHA')
other.loglog(lengths, gqa, label='GQA, 8 groups')
other.loglog(lengths, (c + r) * 2 * layers * lengths / 1e9, label='MLA')
other.set(
  title='Cache read for one new token',
  xlabel='tokens in the cache',
  ylabel='GB',
)
other.legend(frameon=False)
pyplot.show()

# %% [markdown]
# So training and long prompts expand, decoding absorbs. Each dot product of the
# absorbed form is longer, but no key is ever made again, and a step reads 57
# times fewer bytes than MHA's would. An accelerator that decodes waits for
# bytes:

# %%
intensity = {
  'MHA': 2 * n * (h + u) / (2 * n * h * 2),
  'GQA, 8 groups': 2 * n * (h + u) / (2 * 8 * h * 2),
  'MLA, absorbed': 2 * n * (2 * c + r) / ((c + r) * 2),
}
figure, plot = pyplot.subplots(figsize=(9, 2.9))
bars = plot.barh(list(intensity), list(intensity.values()), color=COLOURS[:3])
plot.bar_label(bars, [f'{x:,.0f}' for x in intensity.values()], padding=4)
plot.axvline(989e12 / 3350e9, color='grey', ls=':')
plot.text(989e12 / 3350e9 - 4, 0, 'an H100 can do this many', ha='right')
plot.invert_yaxis()
plot.set(
  title='FLOPs for each byte of cache, decoding',
  xlabel='FLOPs a byte',
  xlim=(0, 330),
)
pyplot.show()

# %% [markdown]
# MLA turns decoding from a problem of memory into one that fills the chip:
# nearly as many FLOPs a byte as an H100 has. That is also why it decodes large
# batches well, and why a model like V2-Lite, with 16 heads, gains less:

# %%
lite = dataclasses.replace(mla, heads=16)
print(
  f'V2-Lite: {2 * lite.heads * (2 * c + r) / ((c + r) * 2):.0f} FLOPs a byte'
)
