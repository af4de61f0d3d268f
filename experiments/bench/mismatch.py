"""Rollout and trainer beside each other, with and without routing replay.

The policy of --checkpoint, a run of `experiments.r1` or any other with a task,
draws answers to --prompts questions in several precisions. The trainer's
program reads them with the routes that it chooses (none), with its own replayed
(train) and with the rollout's (rollout). Printed are, over the answers' tokens,
k3 in nats, the largest difference of log-probabilities in nats, the share of
ratios outside 1/2 to 2, and flips: the share of (token, layer) whose set of
experts the trainer would choose otherwise.

  python -m experiments.r1 --workdir=runs/r1
  python -m experiments.bench mismatch --checkpoint=runs/r1/cold
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from configs import r1_tiny
from mla_moe.config import CacheConfig, Config, freeze

from .. import cli, run_tokenizer
from ..checkpointing.load import load_run
from ..data import tokenizer
from ..rl import episodes, objective, prompts, questions, rollouts


class Setting(NamedTuple):
  """The dtype of both programs, the cache's, and the trainer's precision."""

  dtype: str
  cache: str
  precision: str = 'bf16'


SETTINGS = {
  'float32': Setting('float32', 'float32'),
  'bfloat16': Setting('bfloat16', 'bfloat16'),
  'bfloat16, int8 cache': Setting('bfloat16', 'int8'),
  'bfloat16, update in fp8_block': Setting('bfloat16', 'bfloat16', 'fp8_block'),
}
MODES = ('none', 'train', 'rollout')


def flags(parser) -> None:
  """Adds the benchmark's flags."""
  parser.add_argument('--checkpoint', default='runs/r1/cold')
  parser.add_argument('--task', default='sort8')
  parser.add_argument('--prompts', type=int, default=128)
  parser.add_argument('--samples', type=int, default=16)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--only', default='', help='A part of a setting.')


def run(out: pathlib.Path, args) -> None:
  """Prints the table, and writes it to OUT/mismatch.json."""
  folder = cli.path('--checkpoint', args.checkpoint)
  config, variables = load_run(folder)
  config = run_tokenizer.resolved(folder, config)
  ids, rl = questions_of(config, args)
  table = {}
  print('| | replay | k3 | largest | outside 1/2 to 2 | flips |')
  print('| --- | --- | --- | --- | --- | --- |')
  for name, setting in SETTINGS.items():
    if args.only not in name:
      continue
    table[name] = measure(config, rl, variables, ids, setting, args.seed)
    for mode, row in table[name].items():
      cells = f'{row["k3"]:.1e} | {row["max"]:.2g} | {row["extreme"]:.1e}'
      print(f'| {name} | {mode} | {cells} | {row["flips"]:.2%} |', flush=True)
  text = json.dumps(table, indent=1)
  (out / 'mismatch.json').write_text(text, encoding='utf-8')


def questions_of(config: Config, args) -> tuple[list[np.ndarray], object]:
  """Returns the prompts of the questions, and the fields of the rollout."""
  source = questions.source(args.task, args.seed)
  items = [source.train(i) for i in range(args.prompts)]
  words = tokenizer.load(config.data.tokenizer)
  ids = prompts.Prompts('plain', words, None).ids
  longest = max(len(item.answer) for item in items) + 2
  rl = dataclasses.replace(
    freeze(r1_tiny.get_config('zero')).rl,
    prompts=args.prompts,
    samples=args.samples,
    max_new=longest,
  )
  return [ids(item) for item in items], rl


def measure(
  config: Config,
  rl,
  variables,
  ids: list[np.ndarray],
  setting: Setting,
  seed: int,
) -> dict[str, dict[str, float]]:
  """Returns the numbers of each mode of replay, in one setting."""
  model = dataclasses.replace(config.model, dtype=setting.dtype)
  cache = CacheConfig(dtype=setting.cache, routes=True)
  seeds = rollouts.seeds(seed, 0, rl.prompts * rl.samples)
  drawn = rollouts.draw(model, rl, variables, ids, seeds, cache=cache)
  answers = [
    episodes.Answer(
      ids[i // rl.samples], tokens, log_probs, 0.0, 1.0, drawn.routes[i]
    )
    for i, (tokens, log_probs) in enumerate(
      zip(drawn.tokens, drawn.log_probs, strict=True)
    )
  ]
  length = max(len(x.prompt) + len(x.tokens) - 1 for x in answers)
  batch = episodes.pack(answers, length, 256)
  model = dataclasses.replace(model, precision=setting.precision)
  rl = dataclasses.replace(rl, replay='rollout')
  config = dataclasses.replace(config, model=model, rl=rl)
  read = jax.jit(functools.partial(objective.log_probs, config=config))
  free = batch._replace(routes=np.full_like(batch.routes, -1))
  log_probs, own = read(variables, free)
  inside = batch.targets >= 0
  rows = {'none': (log_probs, own)}
  rows['train'] = read(variables, batch._replace(routes=np.asarray(own)))
  rows['rollout'] = read(variables, batch)
  return {
    mode: numbers(rows[mode], batch.rollout, batch.routes, inside)
    for mode in MODES
  }


def numbers(result, rollout, routes, inside) -> dict[str, float]:
  """Returns the mismatch of (log-probabilities, routes) with a rollout's."""
  log_probs, own = result
  gap = (np.asarray(log_probs, np.float64) - rollout)[inside]
  flips = objective.flips(*map(jnp.asarray, (own, routes)))
  return {
    'k3': float(np.mean(np.expm1(gap) - gap)),
    'max': float(np.abs(gap).max()),
    'extreme': float(np.mean(np.abs(gap) > np.log(2))),
    'flips': float(np.asarray(flips)[inside].mean()),
    'tokens': int(inside.sum()),
  }
