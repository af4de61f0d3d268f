# %% [markdown]
# # Train, sample, speculate
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/mla-moe/mla_moe/blob/main/notebooks/4_train_and_speculate.ipynb)
#
# The first run, in a notebook: a V3 in miniature learns some Python, continues
# a prompt, and drafts its own tokens with the module that V3 was trained with.

# %%
"""A first run: training, sampling, drafts by the MTP module."""

import dataclasses
import json
import pathlib

import numpy as np
from matplotlib import pyplot

from configs import tiny
from experiments import train
from experiments.checkpointing.load import load_run
from experiments.data import tokenizer
from experiments.page import COLOURS, draw_plainly
from mla_moe import config as c
from mla_moe import rollout
from mla_moe.decode import generation

draw_plainly()

# %% [markdown]
# ## Train
#
# `configs/tiny.py:smoke` is DeepSeek-V3's architecture at toy size: latent
# attention, 16 experts in 4 groups with a balancing bias, one shared expert,
# one MTP module. Its text is the source of Python's own standard library, so
# nothing is downloaded. In a terminal this is
#
# ```text
# python -m experiments.train --config=configs/tiny.py:smoke \
#   --config.run.steps=160 --workdir=runs/notebook
# ```

# %%
config = c.freeze(tiny.get_config('smoke'))
config = dataclasses.replace(
  config,
  run=dataclasses.replace(
    config.run,
    steps=160,
    log_every=8,
    eval_every=80,
    sample_every=0,
    save_every=160,
  ),
)
FOLDER = pathlib.Path('runs/notebook')
final = train.run(config, FOLDER)

# %% [markdown]
# The folder holds the files of every run: checkpoints, `metrics.jsonl`, a page
# with all pictures (`report.html`). Running the cell again changes nothing: the
# run is finished. Here are two curves of it: the loss of the next token, and
# that of the token after it, which the MTP module predicts.

# %%
rows = [
  json.loads(row) for row in open(FOLDER / 'metrics.jsonl', encoding='utf-8')
]
steps = [row for row in rows if 'main_loss' in row]
x = [row['step'] for row in steps]
figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 3.6))
left.plot(x, [row['main_loss'] for row in steps], label='next token')
left.plot(x, [row['mtp_loss'] for row in steps], label='the one after')
left.set(title='Loss', xlabel='step', ylabel='nats a byte')
left.legend(frameon=False)
right.plot(x, [row['max_vio_running'] for row in steps], color=COLOURS[2])
right.set(title='MaxVio of the experts', xlabel='step', ylim=(0, None))
pyplot.show()
print(f'held out: {final["bits_per_byte"]:.2f} bits a byte')

# %% [markdown]
# ## Sample

# %%
words = tokenizer.ByteTokenizer()
_, variables = load_run(FOLDER)
PROMPT = 'def __init__(self, '
prompt = np.array([[config.model.bos_id, *words.encode(PROMPT)]], np.int32)
greedy = rollout(config.model, variables, prompt, 48)
print(PROMPT + words.decode(greedy.tokens[0]))

# %% [markdown]
# After 160 steps it knows what Python looks like, not what it means. `make
# train` takes four minutes and gets further.
#
# ## Speculate
#
# While the model verifies a token, its MTP module has already drafted the next.
# If the model agrees, two tokens come out of one pass. Drafts never change the
# text, only the number of passes.

# %%
drafted = rollout(config.model, variables, prompt, 48, speculative=True)
assert (drafted.tokens == greedy.tokens).all()
print(f'alone:       {greedy.passes} passes for 48 tokens')
print(
  f'with drafts: {drafted.passes} passes, {drafted.accepted} drafts accepted'
)

# %% [markdown]
# Passes over tokens, for the greedy text and for sampled ones; each step up is
# one pass.

# %%
figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 3.8))
accepted = {}
for temperature, colour in zip((0.0, 0.7, 1.0), COLOURS, strict=False):
  tokens, passes = [0], [0]
  rounds = generation.stream(
    config.model,
    variables,
    prompt,
    48,
    speculative=True,
    temperature=temperature,
    seed=1,
  )
  for some in rounds:
    tokens.append(tokens[-1] + len(some.tokens[0]))
    passes.append(some.passes)
  name = f'temperature {temperature:g}'
  left.step(tokens, passes, where='post', color=colour, label=name)
  accepted[name] = some.accepted / max(some.passes, 1)
left.plot([0, 48], [0, 48], ':', color='grey', label='without drafts')
left.set(title='Passes of the model', xlabel='tokens', ylabel='passes')
left.legend(frameon=False)
bars = right.barh(list(accepted), list(accepted.values()), color=COLOURS[:3])
right.bar_label(bars, [f'{s:.0%}' for s in accepted.values()], padding=4)
v3 = right.barh(["V3's report"], [0.875], color='lightgrey')
right.bar_label(v3, ['85 to 90 %'], label_type='center')
right.invert_yaxis()
right.set(title='Accepted drafts', xlim=(0, 1))
pyplot.show()

# %% [markdown]
# V3's second token is accepted 85 to 90 % of the time (report, section 5.4.3),
# which is 1.8 times the tokens a second. The miniature's module is as young as
# the model, and repetitive text is easy to draft: its number shows only that
# the machinery works.
