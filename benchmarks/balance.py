"""What balancing costs in perplexity: a bias, a loss and nothing, paired.

  python benchmarks/balance.py OUT.jsonl [--steps=200] [--tuning=12]
    [--seeds=96]
  python benchmarks/balance.py OUT.jsonl --table

Two models of one seed begin with the same weights, read the same text in the
same order and are judged on the same held-out text: only what balances their
experts differs, and the difference of their losses is one measurement. The
loss's weight and the bias's rate, five values of each, are chosen by the
held-out loss of the first `--tuning` seeds; the comparison is made on the
`--seeds` after them, which chose nothing. Each model is one row of OUT.jsonl,
and a run that is stopped goes on with the next: 6 seconds for each on one core.
What it found stands in balance.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from mla_moe import config as c
from mla_moe import corpus, data, optim, step, tokenizer

# The model of notebooks/2_routing.py.
MODEL = c.ModelConfig(
  vocab=264,
  dim=64,
  layers=3,
  dense_layers=1,
  dense_width=128,
  max_positions=256,
  init_std=0.05,
  bos_id=256,
  eos_id=257,
  dtype='float32',
  remat='none',
  mla=c.MLAConfig(
    heads=2, query_rank=0, kv_rank=32, nope_dim=16, rope_dim=8, value_dim=16
  ),
  moe=c.MoEConfig(
    experts=16, top_k=4, width=32, groups=1, top_groups=1, scale=1.0
  ),
  mtp=c.MTPConfig(0),
)
DATA = c.DataConfig(seq_len=128, batch_size=8)
HELDOUT = 48  # batches
# Name: the loss's weight and the bias's rate.
LOSSES = {f'loss {w}': (w, 0.0) for w in (0.001, 0.003, 0.01, 0.03, 0.1)}
BIASES = {f'bias {r}': (0.0, r) for r in (0.0003, 0.001, 0.003, 0.01, 0.03)}
VARIANTS = {'nothing': (0.0, 0.0), **LOSSES, **BIASES}


@functools.cache
def text():
  """The training tokens' and the held-out ones', and the id between texts."""
  words = tokenizer.load('byte', 256, 257)
  return corpus.prepare(DATA, words, pathlib.Path('runs/.corpus'))


@functools.cache
def programs(steps: int, weight: float):
  """Config, first state, step and evaluation at this weight of the loss."""
  tokens = steps * DATA.batch_size * DATA.seq_len
  recipe = c.OptimConfig(
    learning_rate=6e-3,
    warmup_steps=20,
    phases=(('cosine', tokens, 0.1),),
    bias_tokens=1e12,
    balance_loss=weight,
  )
  config = c.Config(model=MODEL, optim=recipe, data=DATA)
  jit = lambda f, **k: jax.jit(functools.partial(f, config=config), **k)
  train = jit(step.train_step, donate_argnums=0)
  return config, jit(step.init_state), train, jit(step.eval_step)


def measure(steps: int, name: str, seed: int) -> dict:
  """Trains one model: its held-out loss in nats a byte, and its MaxVio.

  MaxVio is that of the whole load of the last third of the steps, the mean of
  the layers: with so many tokens it is the paper's MaxVio_global.
  """
  weight, rate = VARIANTS[name]
  config, init, train, evaluate = programs(steps, weight)
  state = init(jax.random.key(seed))
  load = 0.0
  order = dataclasses.replace(DATA, seed=seed)
  stream = data.batches(text().train, order, text().bos_id, 0, steps)
  for number, batch in enumerate(stream):
    tokens = number * DATA.batch_size * DATA.seq_len
    rates = optim.rates(config.optim, number, tokens)
    rates = rates._replace(bias_rate=jnp.float32(rate))
    state, values = train(state, batch, rates)
    load = load + np.asarray(values['load']) * (3 * number >= 2 * steps)
  heldout = data.eval_batches(text().heldout, DATA, text().bos_id, HELDOUT)
  sums = [evaluate(state, batch) for batch in heldout]
  nll = sum(float(s['nll']) for s in sums) / sum(int(s['tokens']) for s in sums)
  violation = float((load.max(-1) / load.mean(-1) - 1).mean())
  return {'name': name, 'seed': seed, 'nll': nll, 'maxvio': violation}


def best(rows: list[dict], names, seeds) -> str:
  """The variant of the lowest mean held-out loss over these seeds."""
  nll = {(r['name'], r['seed']): r['nll'] for r in rows}
  return min(names, key=lambda name: sum(nll[name, s] for s in seeds))


def compared(rows: list[dict], name: str, other: str, seeds) -> tuple:
  """Perplexity of `name` above that of `other` in %, its standard error, n."""
  nll = {(r['name'], r['seed']): r['nll'] for r in rows}
  both = [s for s in seeds if (name, s) in nll and (other, s) in nll]
  above = [100 * np.expm1(nll[name, s] - nll[other, s]) for s in both]
  error = np.std(above, ddof=1) / np.sqrt(len(above)) if len(above) > 1 else 0
  return float(np.mean(above)), float(error), len(above)


def table(rows: list[dict], tuning: int) -> str:
  """Markdown: each variant's perplexity and MaxVio; the chosen ones, paired."""
  lines = [
    '| | seeds | perplexity | MaxVio | beside nothing, same seeds |',
    '| --- | --- | --- | --- | --- |',
  ]
  first = range(tuning)
  later = sorted({r['seed'] for r in rows} - set(first))

  def line(name, seeds):
    mine = [r for r in rows if r['name'] == name and r['seed'] in seeds]
    mean, error, _ = compared(rows, name, 'nothing', seeds)
    beside = '' if name == 'nothing' else f'{mean:+.2f} ± {error:.2f} %'
    ppl = np.exp([r['nll'] for r in mine]).mean()
    vio = np.mean([r['maxvio'] for r in mine])
    return f'| {name} | {len(mine)} | {ppl:.3f} | {vio:.2f} | {beside} |'

  lines += [line(name, first) for name in VARIANTS]
  chosen = best(rows, LOSSES, first), best(rows, BIASES, first)
  if later:
    lines += [line(name, later) for name in ('nothing', *chosen)]
    mean, error, n = compared(rows, chosen[1], chosen[0], later)
    lines += ['', f'{chosen[1]} beside {chosen[0]}, {n} seeds that chose']
    lines[-1] += f' nothing: {mean:+.2f} ± {error:.2f} %'
  return '\n'.join(lines)


def main() -> None:
  """Trains what OUT.jsonl has not yet, row by row; then prints the table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('out', type=pathlib.Path)
  parser.add_argument('--steps', type=int, default=200)
  parser.add_argument('--tuning', type=int, default=12)
  parser.add_argument('--seeds', type=int, default=96)
  parser.add_argument('--table', action='store_true', help='train nothing')
  flags = parser.parse_args()
  rows = []
  if flags.out.exists():
    rows = [json.loads(line) for line in flags.out.read_text().splitlines()]

  def add(name, seed):
    if any(r['name'] == name and r['seed'] == seed for r in rows):
      return
    rows.append(measure(flags.steps, name, seed))
    with flags.out.open('a') as file:
      file.write(json.dumps(rows[-1]) + '\n')

  if not flags.table:
    for seed in range(flags.tuning):
      for name in VARIANTS:
        add(name, seed)
    first = range(flags.tuning)
    chosen = best(rows, LOSSES, first), best(rows, BIASES, first)
    for seed in range(flags.tuning, flags.tuning + flags.seeds):
      for name in ('nothing', *chosen):
        add(name, seed)
  print(table(rows, flags.tuning))


if __name__ == '__main__':
  main()
