"""The cost of balance in perplexity: with a bias, with a loss, without either.

The models of one seed differ only in what balances their experts (see paired).
There are five weights of the loss and five rates of the bias. The first
`--tuning` seeds choose one of each, by the held-out loss; the `--seeds` after
them compare the two, and have chosen nothing. Its results stand in balance.md.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Collection

import jax.numpy as jnp
import numpy as np

from mla_moe import config as c

from . import models, paired

# Name: the loss's weight and the bias's rate.
LOSSES = {f'loss {w}': (w, 0.0) for w in (0.001, 0.003, 0.01, 0.03, 0.1)}
BIASES = {f'bias {r}': (0.0, r) for r in (0.0003, 0.001, 0.003, 0.01, 0.03)}
VARIANTS = {'nothing': (0.0, 0.0), **LOSSES, **BIASES}


@functools.cache
def config(steps: int, weight: float) -> c.Config:
  """Returns the config at a weight of the loss; `measure` sets the bias."""
  tokens = steps * paired.DATA.batch_size * paired.DATA.seq_len
  recipe = c.OptimConfig(
    learning_rate=6e-3,
    warmup_steps=20,
    phases=(('cosine', tokens, 0.1),),
    bias_tokens=1e12,
    balance_loss=weight,
  )
  run = c.RunConfig(steps=steps)
  return c.Config(model=models.ROUTING, optim=recipe, data=paired.DATA, run=run)


def measure(name: str, seed: int, steps: int) -> dict:
  """Trains one model; returns its held-out loss in nats a byte and its MaxVio.

  MaxVio is that of the whole load of the last third of the steps, the mean of
  the layers: with so many tokens it is the paper's MaxVio_global.
  """
  weight, rate = VARIANTS[name]
  biased = lambda rates: rates._replace(bias_rate=jnp.float32(rate))
  nll, values = paired.trained(config(steps, weight), seed, biased)
  last = [v['load'] for n, v in enumerate(values) if 3 * n >= 2 * steps]
  load = np.sum(last, 0, dtype=np.float64)
  violation = float((load.max(-1) / load.mean(-1) - 1).mean())
  return {'nll': nll, 'maxvio': violation}


def best(
  rows: list[dict], names: Collection[str], seeds: Collection[int]
) -> str:
  """Returns the variant with the lowest mean held-out loss over the seeds."""
  nll = {(r['name'], r['seed']): r['nll'] for r in rows}
  return min(names, key=lambda name: sum(nll[name, s] for s in seeds))


def compared(
  rows: list[dict], name: str, other: str, seeds: Collection[int]
) -> tuple[float, float, int]:
  """Returns the perplexity of `name` above `other`'s in %, its error, pairs."""
  nll = {(r['name'], r['seed']): r['nll'] for r in rows}
  both = [s for s in seeds if (name, s) in nll and (other, s) in nll]
  above = [100 * np.expm1(nll[name, s] - nll[other, s]) for s in both]
  return *paired.mean(above), len(above)


def table(rows: list[dict], tuning: int) -> str:
  """Returns Markdown: the variants' perplexity and MaxVio; the best, paired."""
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


def flags(parser) -> None:
  """Adds this benchmark's flags."""
  parser.add_argument('--steps', type=int, default=200)
  parser.add_argument(
    '--tuning', type=int, default=12, help='seeds that choose'
  )
  parser.add_argument(
    '--seeds', type=int, default=96, help='seeds that compare'
  )
  parser.add_argument('--table', action='store_true', help='train nothing')


def run(out: pathlib.Path, args) -> None:
  """Trains the models that OUT/balance.jsonl lacks; prints the table."""
  file = out / 'balance.jsonl'
  tuning = range(args.tuning)
  if not args.table:
    train = functools.partial(measure, steps=args.steps)
    paired.add(file, VARIANTS, tuning, train)
    rows = paired.rows(file)
    chosen = best(rows, LOSSES, tuning), best(rows, BIASES, tuning)
    later = range(args.tuning, args.tuning + args.seeds)
    paired.add(file, ('nothing', *chosen), later, train)
  if not file.exists():
    raise c.ConfigError(f'--table: there is no {file}')
  print(table(paired.rows(file), args.tuning))
