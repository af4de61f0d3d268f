"""FP8's cost in loss: beside bf16, in whole runs or in many short pairs.

As DeepSeek-V3's report compares them (appendix B.1): each training loss is
smoothed by an exponential average of 0.9, and the figure is its relative gap to
bf16's. The report's bound is 0.25 %, here after the first tenth.

Two runs part by chance once any rounding differs, the sooner the higher the
learning rate. So a control stands beside the recipes: bf16's products once
more, with activations of the other width (bfloat16 for float32, or the
reverse). A gap no larger than the control's says nothing against FP8.

  python -m experiments.bench precision --config=FILE --steps=N --seeds=2

trains a config whole. Each model is a run of its own in
OUT/precision/NAME-SEED, as experiments.train makes it, with its report and
FP8's health. A seed sets the weights and not the text. A benchmark that was
stopped goes on where its runs stopped.

  python -m experiments.bench precision --pairs=96

trains a small model many times. Runs as short as a CPU can do part by about as
much as the bound, whatever the precision: only the mean of many pairs (see
paired) says something. Its results stand in precision.md.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import pathlib

import numpy as np

from mla_moe import config as c
from mla_moe.config import Config, ConfigError, freeze

from .. import cli, page, workdir
from . import models, paired, show

BOUND = 0.0025
_REFERENCE, CONTROL = 'bf16', 'control'
_RECIPES = ('fp8_block', 'fp8_channel', 'fp8_tensor')
_HEAD = (
  'precision', 'last loss', 'worst gap', 'of one seed',
  'last half by seed', f'over {BOUND:.2%}',
)  # fmt: skip


def flags(parser) -> None:
  """Adds this benchmark's flags."""
  add = parser.add_argument
  add('--only', default='', help='recipes, joined by commas')
  add('--config', default='tiny', help='NAME or FILE, or with :variant')
  add('--steps', type=int, default=0, help="0: the config's, or 200 of a pair")
  add('--seeds', type=int, default=1, help='seeds of each whole run')
  add('--pairs', type=int, default=0, help='seeds of short runs instead')
  add('--table', action='store_true', help='with --pairs: train nothing')


def run(out: pathlib.Path, args) -> None:
  """Trains --config in bf16 and in each recipe, or --pairs of short runs."""
  recipes = show.chosen(args.only, _RECIPES)
  if args.pairs or args.table:
    _pairs(out / 'pairs.jsonl', args.pairs, args.steps or 200, args.table)
  else:
    _whole_runs(out, args, recipes)


def smooth(values: list[float], keep: float = 0.9) -> np.ndarray:
  """Returns the exponential average of `values`, which begins at the first."""
  out = np.array(values, np.float64)
  for i in range(1, len(out)):
    out[i] = keep * out[i - 1] + (1 - keep) * out[i]
  return out


def of(config: Config, name: str) -> Config:
  """Returns `config` in precision `name`, which may be the control."""
  changes = {'precision': name}
  if name == CONTROL:
    wide = config.model.dtype == 'float32'
    changes = {'precision': 'bf16', 'dtype': 'bfloat16' if wide else 'float32'}
  model = dataclasses.replace(config.model, **changes)
  return dataclasses.replace(config, model=model)


# ------------------------------------------------------------------ whole runs


def _whole_runs(out: pathlib.Path, args, recipes: list[str]) -> None:
  from .. import train

  config = shortened(_config(args.config), args.steps)
  names = (_REFERENCE, CONTROL, *recipes)
  first = config.run.seed
  seeds = list(range(first, first + args.seeds))
  folder = lambda name, seed: out / 'precision' / f'{name}-{seed}'
  for seed in seeds:
    for name in names:
      print(f'--- {name}, seed {seed}', flush=True)
      seeded = dataclasses.replace(config.run, seed=seed)
      one = dataclasses.replace(of(config, name), run=seeded)
      last = train.run(one, folder(name, seed))
      if last['step'] < config.run.steps:  # a signal came, and it has saved
        print('The same command goes on from here.')
        return
  losses = {
    name: [_losses(folder(name, seed)) for seed in seeds] for name in names
  }
  pairs = lambda name: zip(losses[_REFERENCE], losses[name], strict=True)
  results = {
    'machine': show.machine(),
    'config': args.config,
    'steps': config.run.steps,
    'seeds': seeds,
    'control': of(config, CONTROL).model.dtype,
    'loss': losses,
    'gap': {name: [gap(*pair) for pair in pairs(name)] for name in names[1:]},
  }
  (out / 'precision.json').write_text(
    json.dumps(results, indent=1), encoding='utf-8'
  )
  show.results(
    out,
    'precision',
    f'Loss beside bf16: {args.config}, {config.run.steps} steps, '
    f'{len(seeds)} seeds',
    rows(results),
    [show.in_words(results['machine'])],
    lambda: _draw(results),
    _HEAD,
  )


def _config(name: str) -> Config:
  """Returns the config of a file or a name, with or without :variant."""
  path, _, arg = name.partition(':')
  path = cli.file_of(path)
  spec = importlib.util.spec_from_file_location('config_of_bench', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return freeze(module.get_config(arg))


def shortened(config: Config, steps: int) -> Config:
  """Returns `steps` of it (0: all), logged about 300 times, not evaluated."""
  steps = steps or config.run.steps
  run = dataclasses.replace(
    config.run,
    steps=steps,
    log_every=max(steps // 300, 1),
    eval_every=0,
    sample_every=0,
    save_every=max(steps // 5, 1),
    health_every=max(steps // 10, 1),
  )
  return dataclasses.replace(config, run=run)


def _losses(folder: pathlib.Path) -> dict[str, list]:
  rows = [r for r in workdir.rows(folder / 'metrics.jsonl') if 'main_loss' in r]
  return {
    'step': [row['step'] for row in rows],
    'loss': [row['main_loss'] for row in rows],
  }


def gap(reference: dict, other: dict) -> list[float]:
  """Returns (other - reference) / reference of the smoothed losses by point.

  Raises:
    ConfigError: they were not logged at the same steps.
  """
  if reference['step'] != other['step']:
    raise ConfigError('the runs were logged at different steps; remove them')
  base = smooth(reference['loss'])
  return ((smooth(other['loss']) - base) / base).tolist()


def summary(steps: list[int], gaps: list[list[float]]) -> dict:
  """Returns, of the mean of all seeds' gaps, the worst and how many are over.

  Both are of the points after the first tenth. `late` are the seeds' own means
  over the last half, `worst_seed` is the worst point of any seed.
  """
  steps, gaps = np.array(steps), np.array(gaps)
  after = gaps[:, steps > steps[-1] / 10]
  mean = np.abs(after.mean(0))
  return {
    'worst': float(mean.max()),
    'worst_seed': float(np.abs(after).max()),
    'late': gaps[:, steps > steps[-1] / 2].mean(1).tolist(),
    'points': len(mean),
    'over': int((mean > BOUND).sum()),
  }


def rows(results: dict) -> list[tuple[str, ...]]:
  """Returns a row, under _HEAD, for the control and each recipe."""
  rows = []
  for name, gaps in results['gap'].items():
    runs = results['loss'][name]
    s = summary(runs[0]['step'], gaps)
    rows.append(
      (
        f'{name} ({results["control"]})' if name == CONTROL else name,
        f'{np.mean([run["loss"][-1] for run in runs]):.4f}',
        f'{s["worst"]:.3%}',
        f'{s["worst_seed"]:.3%}',
        ', '.join(f'{late:+.3%}' for late in s['late']),
        f'{s["over"]} of {s["points"]}',
      )
    )
  return rows


def _draw(results: dict):
  figure, axes = page.figure(2, height=3.4)
  losses, gaps = axes[0]
  named = zip(results['loss'].items(), page.COLOURS, strict=False)
  for (name, runs), colour in named:
    for i, one in enumerate(runs):
      style = {'color': colour, 'label': '' if i else name}
      losses.plot(one['step'], smooth(one['loss']), **style)
      if name in results['gap']:
        percent = 100 * np.array(results['gap'][name][i])
        gaps.plot(one['step'], percent, **style)
  for sign in (-1, 1):
    gaps.axhline(sign * 100 * BOUND, color='grey', ls=':')
  losses.set(title='Loss, smoothed', xlabel='step', ylabel='nats per token')
  gaps.set(title='Gap to bf16', xlabel='step', ylabel='%')
  losses.legend(frameon=False)
  gaps.legend(frameon=False)
  return figure


# ----------------------------------------------------------------------- pairs

PAIRED = (_REFERENCE, CONTROL, 'fp8_block')
_DATA = dataclasses.replace(paired.DATA, batch_size=4)


def paired_config(name: str, steps: int) -> Config:
  """Returns a short run's config: AdamW, its rate falling to a tenth.

  So that the late losses are of models that have settled.
  """
  tokens = steps * _DATA.batch_size * _DATA.seq_len
  recipe = c.OptimConfig(
    learning_rate=2e-3,
    warmup_steps=20,
    phases=(('cosine', tokens, 0.1),),
    bias_rate=3e-3,
    bias_tokens=1e12,
  )
  run = c.RunConfig(steps=steps)
  config = c.Config(model=models.TWO_TILES, optim=recipe, data=_DATA, run=run)
  return of(config, name)


def measure(name: str, seed: int, steps: int) -> dict:
  """Trains one model; returns held-out loss and losses, nats a byte."""
  nll, values = paired.trained(paired_config(name, steps), seed)
  losses = [round(float(v['main_loss']), 6) for v in values]
  return {'nll': nll, 'loss': losses}


def _pairs(file: pathlib.Path, seeds: int, steps: int, table_only: bool):
  """Trains the models that `file` lacks; prints the table."""
  if not table_only:
    train = functools.partial(measure, steps=steps)
    paired.add(file, PAIRED, range(seeds), train)
  print(table(paired.rows(file)))


def table(rows: list[dict]) -> str:
  """Returns Markdown: each precision's gaps to bf16, means over the seeds."""
  by_run = {(row['name'], row['seed']): row for row in rows}
  seeds = sorted({row['seed'] for row in rows})
  lines = [
    f'| | pairs | held-out loss | gap to bf16 | largest gap while training | '
    f'steps over {BOUND:.2%} | of one pair |',
    '| --- | --- | --- | --- | --- | --- | --- |',
  ]
  for name in PAIRED:
    runs = [(name, s) for s in seeds], [(_REFERENCE, s) for s in seeds]
    pairs = [
      (by_run[ours], by_run[base])
      for ours, base in zip(*runs, strict=True)
      if ours in by_run and base in by_run
    ]
    if pairs:
      lines.append(_row(name, pairs))
  return '\n'.join(lines)


def _row(name: str, pairs: list[tuple[dict, dict]]) -> str:
  loss = f'{np.mean([ours["nll"] for ours, _ in pairs]):.4f}'
  if name == _REFERENCE:
    return f'| {name} | {len(pairs)} | {loss} | | | | |'
  at_end = [ours['nll'] / base['nll'] - 1 for ours, base in pairs]
  gaps = np.stack(
    [smooth(ours['loss']) / smooth(base['loss']) - 1 for ours, base in pairs]
  )
  gaps = gaps[:, gaps.shape[1] // 10 :]  # [pairs, steps]
  worst = np.abs(gaps.mean(0)).argmax()
  end, largest = [
    f'{100 * mean:+.2f} ± {100 * error:.2f} %'
    for mean, error in map(paired.mean, (at_end, gaps[:, worst]))
  ]
  over = (np.abs(gaps.mean(0)) > BOUND).sum()
  return (
    f'| {name} | {len(pairs)} | {loss} | {end} | {largest} | '
    f'{over} of {gaps.shape[1]} | {np.abs(gaps).max():.2%} |'
  )
