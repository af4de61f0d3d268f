"""FP8 beside bf16: the same run from the same seed, and how the losses differ.

As DeepSeek-V3's report compares them (appendix B.1): each loss is smoothed by
an exponential average of 0.9, and what counts is the relative gap to bf16's.
The bound is the report's: 0.25 % after the first tenth.

Two runs part by themselves once any rounding differs, the sooner the higher the
learning rate. So a control runs beside the recipes: bf16 once more, with the
activations in float32 where the config has bfloat16 and the reverse. A gap no
larger than the control's says nothing against FP8. Each seed (of the weights;
the data stay) is a pair for every recipe; gaps are also averaged over seeds,
which keeps what the recipe does and wears off what chance does.

Each is a run of its own in OUT/precision/NAME-SEED, as experiments.train makes
it, with its report and FP8's health; a benchmark that was stopped goes on where
its runs stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import pathlib

import numpy as np

from experiments import page, workdir
from experiments.bench import train as speed
from mla_moe.config import Config, ConfigError, freeze

BOUND = 0.0025
_REFERENCE, CONTROL = 'bf16', 'control'
_RECIPES = ('fp8_block', 'fp8_channel', 'fp8_tensor')


def run(out: pathlib.Path, args) -> None:
  """Trains --config in bf16 and in each recipe; prints, writes a page."""
  from experiments import train

  chosen = args.only.split(',') if args.only else list(_RECIPES)
  for name in chosen:
    if name not in _RECIPES:
      raise ConfigError(f'--only={name}: there is only {", ".join(_RECIPES)}')
  config = shortened(_config(args.config), args.steps)
  names = (_REFERENCE, CONTROL, *chosen)
  first = config.run.seed
  seeds = list(range(first, first + args.seeds))
  where = lambda name, seed: out / 'precision' / f'{name}-{seed}'
  for seed in seeds:
    for name in names:
      print(f'--- {name}, seed {seed}', flush=True)
      done = train.run(_of(config, name, seed), where(name, seed))
      if done['step'] < config.run.steps:  # by a signal, and saved
        print('The same command goes on from here.')
        return
  losses = {
    name: [_losses(where(name, seed)) for seed in seeds] for name in names
  }
  pairs = lambda name: zip(losses[_REFERENCE], losses[name], strict=True)
  found = {
    'machine': speed.machine(),
    'config': args.config,
    'steps': config.run.steps,
    'seeds': seeds,
    'control': _of(config, CONTROL, first).model.dtype,
    'loss': losses,
    'gap': {name: [gap(*pair) for pair in pairs(name)] for name in names[1:]},
  }
  (out / 'precision.json').write_text(json.dumps(found, indent=1))
  _print(found)
  with contextlib.suppress(ImportError):
    (out / 'precision.html').write_text(_page(found))
    print(f'Results: {out / "precision.html"} and precision.json.')


def _of(config: Config, name: str, seed: int) -> Config:
  """`config` as the run `name` computes it."""
  changes = {'precision': name}
  if name == CONTROL:
    wide = config.model.dtype == 'float32'
    changes = {'precision': 'bf16', 'dtype': 'bfloat16' if wide else 'float32'}
  model = dataclasses.replace(config.model, **changes)
  run = dataclasses.replace(config.run, seed=seed)
  return dataclasses.replace(config, model=model, run=run)


def _config(name: str) -> Config:
  """The config of FILE or FILE:variant."""
  path, _, arg = name.partition(':')
  if not pathlib.Path(path).is_file():
    raise ConfigError(f'--config={name!r}: there is no such file')
  spec = importlib.util.spec_from_file_location('config_of_bench', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return freeze(module.get_config(arg))


def shortened(config: Config, steps: int) -> Config:
  """`steps` of it (0: all), logged about 300 times; nothing else is shown."""
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


def smooth(values: list[float], keep: float = 0.9) -> np.ndarray:
  """The exponential average of `values`, which begins at the first."""
  out = np.array(values, np.float64)
  for i in range(1, len(out)):
    out[i] = keep * out[i - 1] + (1 - keep) * out[i]
  return out


def gap(reference: dict, other: dict) -> list[float]:
  """(other - reference) / reference of the smoothed losses, by logged point.

  Raises:
    ConfigError: they were not logged at the same steps.
  """
  if reference['step'] != other['step']:
    raise ConfigError('the runs were logged at different steps; remove them')
  base = smooth(reference['loss'])
  return ((smooth(other['loss']) - base) / base).tolist()


def summary(steps: list[int], gaps: list[list[float]]) -> dict:
  """Of each seed's gaps: their mean's worst and points over the bound.

  Both are after the first tenth. `late` are the seeds' own means over the last
  half, `worst_seed` the worst point of any.
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


_HEAD = (
  'precision', 'last loss', 'worst gap', 'of one seed',
  'last half by seed', f'over {BOUND:.2%}',
)  # fmt: skip


def _rows(found: dict) -> list[tuple[str, ...]]:
  rows = []
  for name, gaps in found['gap'].items():
    runs = found['loss'][name]
    s = summary(runs[0]['step'], gaps)
    rows.append(
      (
        f'{name} ({found["control"]})' if name == CONTROL else name,
        f'{np.mean([run["loss"][-1] for run in runs]):.4f}',
        f'{s["worst"]:.3%}',
        f'{s["worst_seed"]:.3%}',
        ', '.join(f'{late:+.3%}' for late in s['late']),
        f'{s["over"]} of {s["points"]}',
      )
    )
  return rows


def _title(found: dict) -> str:
  seeds = len(found['seeds'])
  return f'{found["config"]}, {found["steps"]} steps, {seeds} seeds'


def _print(found: dict) -> None:
  from rich import console, table

  title = f'Loss beside bf16: {_title(found)}'
  shown = table.Table(*_HEAD, title=title)
  for row in _rows(found):
    shown.add_row(*row)
  console.Console(width=110).print(shown)


def _page(found: dict) -> str:
  import matplotlib

  matplotlib.use('Agg')
  figure, axes = page.figure(2, height=3.4)
  losses, gaps = axes[0]
  for (name, runs), colour in zip(
    found['loss'].items(), page.COLOURS, strict=False
  ):
    for i, one in enumerate(runs):
      style = {'color': colour, 'label': '' if i else name}
      losses.plot(one['step'], smooth(one['loss']), **style)
      if name in found['gap']:
        percent = 100 * np.array(found['gap'][name][i])
        gaps.plot(one['step'], percent, **style)
  for sign in (-1, 1):
    gaps.axhline(sign * 100 * BOUND, color='grey', ls=':')
  losses.set(title='Loss, smoothed', xlabel='step', ylabel='nats per token')
  gaps.set(title='Gap to bf16', xlabel='step', ylabel='%')
  losses.legend(frameon=False)
  gaps.legend(frameon=False)
  cells = lambda row: ''.join(f'<td>{cell}</td>' for cell in row)
  rows = (_HEAD, *_rows(found))
  body = ''.join(f'<tr>{cells(row)}</tr>' for row in rows)
  machine = ', '.join(f'{k} {v}' for k, v in found['machine'].items())
  title = f'FP8 beside bf16: {_title(found)}'
  parts = [page.svg(figure), f'<table>{body}</table>', f'<p>{machine}</p>']
  return page.page(title, parts)
