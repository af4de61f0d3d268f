"""What balancing costs in perplexity: a bias, a loss and nothing, paired.

  python -m experiments.bench.balance OUT.jsonl [--steps=200] [--tuning=12]
    [--seeds=96]
  python -m experiments.bench.balance OUT.jsonl --table

Only what balances the experts differs between the models of one seed (see
paired.py). The loss's weight and the bias's rate, five values of each, are
chosen by the held-out loss of the first `--tuning` seeds; the comparison is
made on the `--seeds` after them, which chose nothing. A model takes 6 seconds
on one core. What it found stands in balance.md.
"""

from __future__ import annotations

import argparse
import functools
import pathlib

import jax.numpy as jnp
import numpy as np

from experiments.bench import paired
from mla_moe import config as c

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
  compute=c.ComputeConfig(remat='none'),
  mla=c.MLAConfig(
    heads=2, query_rank=0, kv_rank=32, nope_dim=16, rope_dim=8, value_dim=16
  ),
  moe=c.MoEConfig(
    experts=16, top_k=4, width=32, groups=1, top_groups=1, scale=1.0
  ),
  mtp=c.MTPConfig(0),
)
# Name: the loss's weight and the bias's rate.
LOSSES = {f'loss {w}': (w, 0.0) for w in (0.001, 0.003, 0.01, 0.03, 0.1)}
BIASES = {f'bias {r}': (0.0, r) for r in (0.0003, 0.001, 0.003, 0.01, 0.03)}
VARIANTS = {'nothing': (0.0, 0.0), **LOSSES, **BIASES}


@functools.cache
def config(steps: int, weight: float) -> c.Config:
  """AdamW for `steps`, at this weight of the loss; the rate is the caller's."""
  tokens = steps * paired.DATA.batch_size * paired.DATA.seq_len
  recipe = c.OptimConfig(
    learning_rate=6e-3,
    warmup_steps=20,
    phases=(('cosine', tokens, 0.1),),
    bias_tokens=1e12,
    balance_loss=weight,
  )
  run = c.RunConfig(steps=steps)
  return c.Config(model=MODEL, optim=recipe, data=paired.DATA, run=run)


def measure(name: str, seed: int, steps: int) -> dict:
  """One model: its held-out loss in nats a byte, and its MaxVio.

  MaxVio is that of the whole load of the last third of the steps, the mean of
  the layers: with so many tokens it is the paper's MaxVio_global.
  """
  weight, rate = VARIANTS[name]
  biased = lambda rates: rates._replace(bias_rate=jnp.float32(rate))
  nll, told = paired.trained(config(steps, weight), seed, biased)
  late = [t['load'] for n, t in enumerate(told) if 3 * n >= 2 * steps]
  load = np.sum(late, 0, dtype=np.float64)
  violation = float((load.max(-1) / load.mean(-1) - 1).mean())
  return {'nll': nll, 'maxvio': violation}


def best(rows: list[dict], names, seeds) -> str:
  """The variant of the lowest mean held-out loss over these seeds."""
  nll = {(r['name'], r['seed']): r['nll'] for r in rows}
  return min(names, key=lambda name: sum(nll[name, s] for s in seeds))


def compared(rows: list[dict], name: str, other: str, seeds) -> tuple:
  """Perplexity of `name` above that of `other` in %, its standard error, n."""
  nll = {(r['name'], r['seed']): r['nll'] for r in rows}
  both = [s for s in seeds if (name, s) in nll and (other, s) in nll]
  above = [100 * np.expm1(nll[name, s] - nll[other, s]) for s in both]
  return *paired.mean(above), len(above)


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
  done = functools.partial(measure, steps=flags.steps)
  first = range(flags.tuning)
  if not flags.table:
    paired.add(flags.out, VARIANTS, first, done)
    rows = paired.rows(flags.out)
    chosen = best(rows, LOSSES, first), best(rows, BIASES, first)
    later = range(flags.tuning, flags.tuning + flags.seeds)
    paired.add(flags.out, ('nothing', *chosen), later, done)
  print(table(paired.rows(flags.out), flags.tuning))


if __name__ == '__main__':
  main()
