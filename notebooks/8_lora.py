# %% [markdown]
# # Adapters over four bits
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/mla-moe/mla_moe/blob/main/notebooks/8_lora.ipynb)
#
# Training V2-Lite whole takes 188 GB: weights, gradients and two moments, four
# bytes each. People have a card of 24 GB. So its weights stay in four bits, as
# they are, and two small matrices beside each of them learn
# ([docs/lora.md](../docs/lora.md)). How few numbers are enough to teach a model
# something new? Here is a small one, that learns the spelling alphabet.

# %%
"""Adapters: a release in four bits, a lesson at three ranks, and a merge."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import pyplot

from experiments.adapters import lora
from experiments.adapters.frozen import Frozen
from experiments.adapters.load import load_base
from experiments.adapters.state import init_state
from experiments.bench import models, paired
from experiments.data import batches
from experiments.page import draw_plainly
from mla_moe import config as c
from mla_moe import rollout, save_huggingface
from mla_moe.train import optim, step

draw_plainly()
FOLDER = pathlib.Path('runs/notebook_lora')
BASE_STEPS, STEPS = 120, 150
RANKS = 1, 2, 8

# %% [markdown]
# ## A release
#
# Two layers, 96 wide, with eight experts, learn bytes of Python's standard
# library for half a minute. Then the model is written as released models are,
# in Hugging Face's layout.

# %%
MODEL = models.build(
  **models.BYTES | dict(max_positions=128, query_rank=48),
  dim=96,
  layers=2,
  dense_width=192,
  init_std=0.05,
  heads=4,
  kv_rank=32,
  nope_dim=16,
  rope_dim=16,
  value_dim=16,
  experts=8,
  top_k=2,
  width=64,
)
recipe = c.OptimConfig(optimizer='muon', learning_rate=8e-3, warmup_steps=10)
base_run = c.Config(model=MODEL, optim=recipe, data=paired.DATA)
init, train, _ = paired.programs(base_run)
state = init(jax.random.key(0))
for i in range(BASE_STEPS):
  text = paired.text()
  batch = batches.batch_at(text.train, base_run.data, i, text.bos_id)
  state, values = train(state, batch, optim.rates(recipe, i, 0))
bits = float(values['main_loss']) / np.log(2)
print(f'the base: {bits:.2f} bits a byte after {BASE_STEPS} steps')
variables = {'params': state.params, 'router': state.router}
save_huggingface(FOLDER / 'release', MODEL, variables, force=True)

# %% [markdown]
# ## What it weighs
#
# `load_base` reads the folder and keeps the matrices of attention and MLPs in
# codes: FP8, eight bits or four, with a scale for each group. Embedding, head,
# norms and routers stay floats. Training the whole model takes sixteen bytes a
# parameter; over a frozen base only an adapter's numbers take them.

# %%
KINDS = 'int8', 'int4'
bases = {kind: load_base(FOLDER / 'release', kind) for kind in KINDS}


def with_rank(model, rank):
  """Returns the model with adapters of this rank on all its matrices."""
  adapters = c.LoRAConfig(
    rank=rank, alpha=2.0 * rank, targets=('attention', 'mlp', 'experts')
  )
  return dataclasses.replace(model, lora=adapters)


def adapter_numbers(rank):
  """Returns how many numbers the adapters of this rank have."""
  boxed = functools.partial(lora.boxed, model=with_rank(MODEL, rank))
  shapes = jax.eval_shape(boxed, jax.random.key(0))
  return sum(x.size for x in jax.tree.leaves(shapes))


mb_of = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree)) / 1e6
weighs = {kind: mb_of(frozen['params']) for kind, (_, frozen) in bases.items()}
whole = mb_of(state.params)
bars = {'whole': (whole, 3 * whole)}
for kind in KINDS:
  bars[f'{kind}, rank 8'] = weighs[kind], 16 * adapter_numbers(8) / 1e6
figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 3.4))
weights, trained = np.array(list(bars.values())).T
left.barh(list(bars), weights, label='weights')
left.barh(list(bars), trained, left=weights, label='gradients and moments')
left.set(title='State in training', xlabel='MB')
left.legend(frameon=False)
right.bar([str(r) for r in RANKS], [adapter_numbers(r) / 1e3 for r in RANKS])
right.set(title='Numbers that learn, thousands', xlabel='rank')
pyplot.show()

# %% [markdown]
# ## A lesson
#
# The answer to a letter is its word in the spelling alphabet. A row is
# `alpha` after `a=`, and its end. The loss is that of the answer alone: the
# targets before and behind it are -1.

# %%
WORDS = """alpha bravo charlie delta echo foxtrot golf hotel india juliett kilo
lima mike november oscar papa quebec romeo sierra tango uniform victor whiskey
xray yankee zulu""".split()
LENGTH = 16
BOS, EOS = 256, 257


def row(word):
  """Returns the tokens of a word's row, and the targets of its answer."""
  prompt = [BOS, *f'{word[0]}='.encode()]
  tokens = [*prompt, *word.encode(), EOS]
  targets = [-1] * (len(prompt) - 1) + tokens[len(prompt) :]
  fill = lambda ids, n: ids + [n] * (LENGTH - len(ids))
  return fill(tokens, EOS), fill(targets, -1)


tokens, targets = np.array([row(word) for word in WORDS], np.int32).swapaxes(
  0, 1
)
places = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
lesson = batches.Batch(
  tokens=tokens[None],
  targets=targets[None],
  segments=np.zeros_like(tokens)[None],
  positions=places[None],
  count=np.int32(1),
)
questions = np.array([[BOS, *f'{w[0]}='.encode()] for w in WORDS], np.int32)


def answers(model, variables):
  """Returns the greedy answer to each letter."""
  out = rollout(model, variables, questions, 12, stop_ids=(EOS,))
  pairs = zip(out.tokens, out.counts, strict=True)
  text = lambda ids: bytes(int(i) for i in ids if i < 256)
  return [text(ids[:n]).decode(errors='replace') for ids, n in pairs]


def taught(rank):
  """Returns the model, its joined variables and the loss of each step."""
  model, frozen = bases['int4']
  model = with_rank(model, rank)
  adam = c.OptimConfig(
    optimizer='adamw', learning_rate=1e-2, warmup_steps=10, bias_rate=0.0
  )
  data = dataclasses.replace(
    paired.DATA, seq_len=LENGTH, batch_size=len(WORDS), packing='separate'
  )
  run = c.Config(model=model, optim=adam, data=data)
  join = functools.partial(lora.join, model=model)
  train = jax.jit(functools.partial(step.train_step, config=run, assemble=join))
  state = init_state(jax.random.key(rank), run)
  state = state.replace(router=frozen['router'])
  losses = []
  for i in range(STEPS):
    rates = optim.rates(adam, i, 0)
    state, values = train(state, lesson, rates, frozen['params'])
    losses.append(float(values['main_loss']))
  params = join(frozen['params'], state.params)
  return model, {'params': params, 'router': state.router}, losses


results = {rank: taught(rank) for rank in RANKS}
figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 3.4))
for rank, (_, _, losses) in results.items():
  left.plot(losses, label=f'rank {rank}')
left.set(title='Nats a byte of the answers', xlabel='step', ylim=(0, None))
left.legend(frameon=False)
right_answers = {
  rank: sum(a == b for a, b in zip(answers(*result[:2]), WORDS, strict=True))
  for rank, result in results.items()
}
right.bar([str(r) for r in RANKS], list(right_answers.values()))
right.set(title='Words right, of 26', xlabel='rank', ylim=(0, 26))
pyplot.show()

# %% [markdown]
# The base did not change by a bit, and it never learned a word: what it says
# without the adapters is Python. With them it says the alphabet.

# %%
model, joined, _ = results[RANKS[-1]]
plain = answers(*bases['int4'])
for word, before, after in list(
  zip(WORDS, plain, answers(model, joined), strict=True)
)[:6]:
  print(f'{word[0]}=  before: {ascii(before):20} after: {ascii(after)}')
assert right_answers[RANKS[-1]] >= 24

# %% [markdown]
# ## A merge
#
# $W + s\,AB$ is a matrix like $W$. Merged, the model is a plain release again:
# it decodes at the price of the base, and anything that reads the layout reads
# it. Merged into float32 it says the same.


# %%
def whole_matrix(w, like):
  """Returns a frozen matrix with its adapters in it, as floats."""
  if not isinstance(w, Frozen):
    return w
  return w.astype(jnp.float32).reshape(like.shape)


is_frozen = lambda w: isinstance(w, Frozen)
floats = jax.tree.map(
  whole_matrix, joined['params'], state.params, is_leaf=is_frozen
)
merged = {'params': floats, 'router': joined['router']}
save_huggingface(FOLDER / 'merged', MODEL, merged, force=True)
same = answers(MODEL, merged) == answers(model, joined)
print('the merged release says the same:', same)
assert same

# %% [markdown]
# ## The same on an L4
#
# V2-Lite's 15.7 billion parameters are 8.8 GiB in four bits; with adapters of
# rank 16 a step takes 14.8 of the 22 GiB of Colab's L4, by the arithmetic of
# `experiments.plan` and, at 14.6, by XLA for CUDA. **These commands have not
# run on a card**; each has run here over a small release.
#
# ```text
# hf download deepseek-ai/DeepSeek-V2-Lite --local-dir=DeepSeek-V2-Lite
# python -m experiments.sft --config=configs/lora.py:lite_l4 \
#   --data=my/answers.jsonl --config.run.base=DeepSeek-V2-Lite \
#   --config.data.tokenizer=DeepSeek-V2-Lite --workdir=runs/lora
# python -m experiments.generate --checkpoint=runs/lora --prompt="..." --chat
# python -m experiments.convert --source=runs/lora --target=runs/merged \
#   --merge --dtype=bfloat16
# ```
