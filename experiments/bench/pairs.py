"""What FP8 costs in loss: many short runs in pairs with bf16's own products.

  python -m experiments.bench.pairs OUT.jsonl [--steps=200] [--seeds=96]
  python -m experiments.bench.pairs OUT.jsonl --table

`experiments.bench precision` compares single runs as DeepSeek-V3's report does
(appendix B.1). Runs as short as a CPU can do part by chance by about as much as
the report's bound, 0.25 %, whatever the precision. So here the same gap is the
mean of many pairs. The control is bf16's products once more with activations of
bfloat16, not float32: what another rounding does by itself. What it found
stands in precision.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import pathlib

import numpy as np

from experiments.bench import paired
from experiments.bench.precision import BOUND, smooth
from mla_moe import config as c

# Two tiles of 128 in every product's inner dimension but the heads' and the
# latents' (one), as few weights as that allows.
MODEL = c.ModelConfig(
  vocab=264,
  dim=256,
  layers=2,
  dense_layers=1,
  dense_width=256,
  max_positions=256,
  init_std=0.03,
  bos_id=256,
  eos_id=257,
  dtype='float32',
  compute=c.ComputeConfig(remat='none'),
  mla=c.MLAConfig(
    heads=4, query_rank=0, kv_rank=128, nope_dim=32, rope_dim=16, value_dim=32
  ),
  moe=c.MoEConfig(
    experts=16, top_k=2, width=128, groups=1, top_groups=1, scale=1.0
  ),
  mtp=c.MTPConfig(0),
)
DATA = dataclasses.replace(paired.DATA, batch_size=4)
VARIANTS = {
  'bf16': {},
  'control': {'dtype': 'bfloat16'},
  'fp8_block': {'precision': 'fp8_block'},
}


def config(name: str, steps: int) -> c.Config:
  """AdamW, its rate falling to a tenth: late losses are of settled models."""
  tokens = steps * DATA.batch_size * DATA.seq_len
  recipe = c.OptimConfig(
    learning_rate=2e-3,
    warmup_steps=20,
    phases=(('cosine', tokens, 0.1),),
    bias_rate=3e-3,
    bias_tokens=1e12,
  )
  return c.Config(
    model=dataclasses.replace(MODEL, **VARIANTS[name]),
    optim=recipe,
    data=DATA,
    run=c.RunConfig(steps=steps),
  )


def measure(name: str, seed: int, steps: int) -> dict:
  """One model: its held-out loss and its loss at each step, nats a byte."""
  nll, told = paired.trained(config(name, steps), seed)
  return {'nll': nll, 'loss': [round(float(t['main_loss']), 6) for t in told]}


def table(rows: list[dict]) -> str:
  """Markdown: each variant's gaps to bf16, of means over the seeds."""
  found = {(row['name'], row['seed']): row for row in rows}
  seeds = sorted({row['seed'] for row in rows})
  lines = [
    f'| | pairs | held-out loss | gap to bf16 | largest gap while training | '
    f'steps over {BOUND:.2%} | of one pair |',
    '| --- | --- | --- | --- | --- | --- | --- |',
  ]
  for name in VARIANTS:
    both = [s for s in seeds if (name, s) in found and ('bf16', s) in found]
    ours, base = [[found[n, s] for s in both] for n in (name, 'bf16')]
    if not both:
      continue
    loss = f'{np.mean([row["nll"] for row in ours]):.4f}'
    if name == 'bf16':
      lines.append(f'| {name} | {len(both)} | {loss} | | | | |')
      continue
    last = [a['nll'] / b['nll'] - 1 for a, b in zip(ours, base, strict=True)]
    way = np.stack(
      [
        smooth(a['loss']) / smooth(b['loss']) - 1
        for a, b in zip(ours, base, strict=True)
      ]
    )
    way = way[:, way.shape[1] // 10 :]
    worst = np.abs(way.mean(0)).argmax()
    shown = [
      f'{100 * m:+.2f} ± {100 * e:.2f} %'
      for m, e in map(paired.mean, (last, way[:, worst]))
    ]
    over = (np.abs(way.mean(0)) > BOUND).sum()
    lines.append(
      f'| {name} | {len(both)} | {loss} | {shown[0]} | {shown[1]} | '
      f'{over} of {way.shape[1]} | {np.abs(way).max():.2%} |'
    )
  return '\n'.join(lines)


def main() -> None:
  """Trains what OUT.jsonl has not yet, row by row; then prints the table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('out', type=pathlib.Path)
  parser.add_argument('--steps', type=int, default=200)
  parser.add_argument('--seeds', type=int, default=96)
  parser.add_argument('--table', action='store_true', help='train nothing')
  flags = parser.parse_args()
  if not flags.table:
    done = functools.partial(measure, steps=flags.steps)
    paired.add(flags.out, VARIANTS, range(flags.seeds), done)
  print(table(paired.rows(flags.out)))


if __name__ == '__main__':
  main()
