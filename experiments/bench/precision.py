"""FP8's cost in loss: whole runs beside bf16, with their reports.

As DeepSeek-V3's report compares them (appendix B.1): each training loss is
smoothed by an exponential average of 0.9, and the figure is its relative gap to
bf16's. The report's bound is 0.25 %, here after the first tenth.

Two runs part by chance once any rounding differs, the sooner the higher the
learning rate. So a control stands beside the recipes: bf16's products once
more, with activations of the other width (bfloat16 for float32, or the
reverse). A gap no larger than the control's says nothing against FP8. The mean
of many short pairs says more: python -m experiments.ablate --name=fp8.

  python -m experiments.bench precision --config=FILE --steps=N --seeds=2

trains a config whole. Each model is a run of its own in
OUT/precision/NAME-SEED, as experiments.train makes it, with its report and
FP8's health. A seed sets the weights and not the text. A benchmark that was
stopped goes on where its runs stopped.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import pathlib

import numpy as np

from mla_moe.config import Config, ConfigError, freeze

from .. import cli, page, workdir
from . import show

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
  add('--steps', type=int, default=0, help="0: the config's")
  add('--seeds', type=int, default=1, help='seeds of each whole run')


def run(out: pathlib.Path, args) -> None:
  """Trains --config in bf16 and in each recipe."""
  from .. import train

  recipes = show.chosen(args.only, _RECIPES)
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
