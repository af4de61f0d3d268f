"""Sparse attention's cost in loss: V3.2's two stages beside dense training.

A small dense V3 is trained on texts of --length bytes. Then it goes two ways,
for the same tokens of the same text: dense as before, or through the warm-up
(a fresh indexer learns from the attention over all keys, all else is frozen)
and the sparse stage, where a query reads --topk keys. Both are judged on the
same held-out text. The dense way trains its model in the warm-up's tokens,
too, so it has the advantage.

Both begin with fresh moments of the optimizer. Results of each seed stand in
sparse_quality.jsonl, a run that is stopped goes on with the next seed.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from mla_moe import config as c
from mla_moe.train import optim, stage

from .. import page
from ..ablate import differences
from ..data import batches
from . import models, paired, show

BOUND = 0.01
_HEAD = (
  'seed', 'dense before', 'dense', 'sets, after the warm-up', 'sparse', 'gap',
)  # fmt: skip

MODEL = models.build(
  **models.BYTES | dict(max_positions=4096, query_rank=48),
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


def flags(parser) -> None:
  """Adds this benchmark's flags."""
  add = parser.add_argument
  add('--seeds', type=int, default=2)
  add('--dense', type=int, default=150, help='steps before the ways part')
  add('--warmup', type=int, default=20, help='steps of the indexer alone')
  add('--sparse', type=int, default=40, help='steps over sets')
  add('--length', type=int, default=2048, help='bytes of the row of a step')
  add('--topk', type=int, default=256, help='keys that a query reads')
  add('--heldout', type=int, default=12, help='rows that are judged')


def run(out: pathlib.Path, args) -> None:
  """Trains a pair for each seed that the file lacks; prints and draws them."""
  file = out / 'sparse_quality.jsonl'
  paired.add(file, ('pair',), range(args.seeds), lambda _, s: measure(s, args))
  rows = paired.rows(file)
  tokens = args.length * (args.warmup + args.sparse)
  show.results(
    out,
    'sparse_quality',
    f'Held-out bits a byte: {args.topk} keys of {args.length}, after '
    f'{tokens:,} bytes more',
    table(rows),
    [verdict(rows), show.in_words(show.machine())],
    lambda: _draw(rows),
    _HEAD,
  )


def configs(args) -> dict[str, c.Config]:
  """Returns the configs of the stages, each of which begins at its step 0."""
  data = c.DataConfig(seq_len=args.length, batch_size=1)

  def config(dsa, steps, phases, **recipe):
    recipe = dict(optimizer='muon', learning_rate=8e-3) | recipe
    phases = [(kind, n * args.length, end) for kind, n, end in phases]
    recipe |= dict(phases=tuple(phases), bias_rate=3e-3, bias_tokens=1e12)
    warm = min(20, 1 + steps // 5)
    return c.Config(
      model=dataclasses.replace(MODEL, dsa=dsa),
      optim=c.OptimConfig(warmup_steps=warm, **recipe),
      data=data,
      run=c.RunConfig(steps=steps),
    )

  both, none = args.warmup + args.sparse, c.DSAConfig()
  dsa = c.DSAConfig(heads=4, dim=16, topk=args.topk)
  of_all = dataclasses.replace(dsa, attention='dense')
  falling = lambda steps: (('cosine', steps, 0.05),)
  frozen = dict(optimizer='adamw', learning_rate=5e-3, trains='indexer')
  constant = (('constant', 1.0, 1.0),)
  return {
    'before': config(none, args.dense, constant),
    'dense': config(none, both, falling(both)),
    'warmup': config(of_all, args.warmup, constant, **frozen),
    'sparse': config(dsa, args.sparse, falling(args.sparse)),
  }


def measure(seed: int, args) -> dict:
  """Trains a pair; returns held-out nats a byte, and each step's measurements.

  `nll` is the sparse model's; `before`, `dense` and `sets` are those of the
  table.
  """
  stages, rows = configs(args), {}
  ends: dict[str, dict] = {}

  def train(name: str, params, router, first: int):
    config = stages[name]
    init, step, _ = _programs(config)
    state = init(jax.random.key(seed))
    if params is not None:
      copies = jax.tree.map(jnp.copy, (params, router))
      params = stage.merged(copies[0], state.params)
      state = state.replace(params=params, router=copies[1])
    data = dataclasses.replace(config.data, seed=seed)
    rows[name] = []
    for number in range(config.run.steps):
      text = paired.text()
      batch = batches.batch_at(text.train, data, first + number, text.bos_id)
      rates = optim.rates(config.optim, number, number * data.seq_len)
      state, values = step(state, batch, rates)
      keys = ('main_loss', 'index_kl', 'index_mass')
      mean = lambda name, v=values: round(float(np.mean(v[name])), 5)
      rows[name].append({k: mean(k) for k in keys if k in values})
    ends[name] = {'params': state.params, 'router': state.router}
    return ends[name]

  judge = functools.partial(_judged, args=args, seed=seed)
  before = train('before', None, None, 0)
  train('dense', **before, first=args.dense)
  train('warmup', **before, first=args.dense)
  train('sparse', **ends['warmup'], first=args.dense + args.warmup)
  return {
    'nll': judge(stages['sparse'], ends['sparse']),
    'before': judge(stages['dense'], before),
    'dense': judge(stages['dense'], ends['dense']),
    'sets': judge(stages['sparse'], ends['warmup']),
    'steps': rows,
  }


def _programs(config: c.Config):
  """Returns `paired.programs` of a config; schedules are arguments of them."""
  optim = dataclasses.replace(
    config.optim, phases=c.OptimConfig().phases, warmup_steps=0
  )
  return paired.programs(
    dataclasses.replace(config, optim=optim, run=c.RunConfig())
  )


def _judged(config: c.Config, variables: dict, *, args, seed: int) -> float:
  """Returns the held-out loss of a model's variables in nats a byte."""
  init, _, evaluate = _programs(config)
  text = paired.text()
  state = init(jax.random.key(seed)).replace(**variables)
  heldout = batches.eval_batches(
    text.heldout, config.data, text.bos_id, args.heldout
  )
  sums = [evaluate(state, batch) for batch in heldout]
  return sum(float(s['nll']) for s in sums) / sum(
    int(s['tokens']) for s in sums
  )


def table(rows: list[dict]) -> list[tuple[str, ...]]:
  """Returns a row, under _HEAD, for each seed."""
  bits = lambda nats: f'{nats / math.log(2):.4f}'
  return [
    (
      str(row['seed']),
      *(bits(row[name]) for name in ('before', 'dense', 'sets', 'nll')),
      f'{row["nll"] / row["dense"] - 1:+.2%}',
    )
    for row in rows
  ]


def verdict(rows: list[dict]) -> str:
  """Returns the mean gap with its interval, and the bound."""
  gaps = [row['nll'] / row['dense'] - 1 for row in rows]
  mean, half, _ = differences.interval(gaps)
  text = f'Sparse beside dense: {mean:+.2%}'
  if len(rows) > 1:
    text += f', 95 % from {mean - half:+.2%} to {mean + half:+.2%}'
  return f'{text}; {len(rows)} pairs, the bound is {BOUND:.0%}.'


def _draw(rows: list[dict]):
  figure, axes = page.figure(2, height=3.4)
  losses, masses = axes[0]
  for i, row in enumerate(rows):
    steps = row['steps']
    first = len(steps['before'])
    ways = {
      'dense': (0, steps['before'] + steps['dense']),
      'sparse': (first + len(steps['warmup']), steps['sparse']),
    }
    for (name, (start, values)), colour in zip(
      ways.items(), page.COLOURS, strict=False
    ):
      smooth = np.convolve(
        [v['main_loss'] for v in values], np.ones(20) / 20, 'valid'
      )
      at = start + 19 + np.arange(len(smooth))
      style = {'color': colour, 'label': '' if i else name}
      losses.plot(at, smooth / math.log(2), **style)
    values = steps['warmup'] + steps['sparse']
    masses.plot(
      first + np.arange(len(values)),
      [v['index_mass'] for v in values],
      color=page.COLOURS[i],
      label=f'seed {row["seed"]}',
    )
    masses.axvline(first + len(steps['warmup']), color='grey', ls=':')
  losses.set(title='Training loss, 20 steps', xlabel='step', ylabel='bits')
  masses.set(title='Attention in the sets, of the most possible', xlabel='step')
  losses.legend(frameon=False)
  masses.legend(frameon=False)
  return figure
