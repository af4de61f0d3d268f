"""Training in turns: the arms of a pair, a chunk each, on one machine.

The arms of one seed begin together and take turns: a chunk of the first, a
chunk of the second, and the other way round in the next turn. A chunk is an
equal part of each arm's own budget. So a machine that others slow down slows
all arms alike, and their curves have points at equal parts of the budget.

A budget in seconds is measured so, too, before the first pair: short rounds in
turns give each arm's time relative to the reference's in the same round, and
the median round decides the number of steps. From then on the number of steps
is fixed, so that a run resumes bit for bit; its seconds are measured again, and
the page compares them.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

from mla_moe.config import Config, ConfigError, OptimConfig
from mla_moe.train import optim
from mla_moe.types import Batch

from .. import runtime
from ..data import batches, corpus, tokenizer
from ..training import program, steps
from . import folder
from .recipe import Recipe, flops_of_step, tokens_of_step

_ROUNDS = 9  # of the clock; the first is left out
_ROUND_SECONDS = 0.5  # of the reference
# Fields of the optimizer that the host reads alone: schedules.
_SCHEDULE = (
  *('learning_rate', 'warmup_steps', 'phases', 'bias_rate', 'bias_rate_final'),
  *('bias_tokens', 'mtp_loss', 'mtp_loss_final', 'mtp_tokens'),
)


class Text(NamedTuple):
  """The tokens of an ablation, and the bytes of each token [V].

  fingerprint: of all that the tokens depend on.
  """

  train: Any
  heldout: list[Batch]
  bos_id: int
  byte_lengths: np.ndarray
  fingerprint: str


class Programs(NamedTuple):
  """Compiled functions of an arm at a size."""

  init: Callable
  train: Callable
  evaluate: Callable


class Run(NamedTuple):
  """A run under way: its state after `step` steps, and a curve of chunks.

  A point has step, tokens, flops, seconds (of training alone), skipped (steps),
  all of them in all; loss (mean of the chunk, nats a token), bits (held out, a
  byte), and max_vio (of the chunk).
  """

  recipe: Recipe
  programs: Programs
  state: Any
  curve: list[dict]

  @property
  def step(self) -> int:
    return self.curve[-1]['step'] if self.curve else 0


def text(config: Config, cache: pathlib.Path, known: str = '') -> Text:
  """Returns the text of an ablation; tokenises it if `cache` has it not.

  Raises:
    ConfigError: as `corpus.prepare`; another text than the `known` one, by its
      fingerprint.
  """
  model, data = config.model, config.data
  words = tokenizer.load(
    data.tokenizer, model.bos_id, model.eos_id, model.vocab
  )
  tokens = corpus.prepare(data, words, cache, known=known)
  heldout = batches.eval_batches(
    tokens.heldout, data, tokens.bos_id, config.run.eval_batches
  )
  return Text(
    *(tokens.train, heldout, tokens.bos_id, words.byte_lengths()),
    fingerprint=tokens.fingerprint,
  )


# -------------------------------------------------------------------- programs


def compiled(recipe: Recipe, heldout: Batch) -> Programs:
  """Returns an arm's programs; arms that differ in schedules share them."""
  config = program.of_devices(recipe.config)
  fields = {name: getattr(OptimConfig(), name) for name in _SCHEDULE}
  config = dataclasses.replace(
    config, optim=dataclasses.replace(config.optim, **fields)
  )
  return _compiled(recipe._replace(config=config), heldout.tokens.shape)


@functools.lru_cache(maxsize=16)
def _compiled(recipe: Recipe, heldout: tuple) -> Programs:
  config, data = recipe.config, recipe.config.data
  init = functools.partial(recipe.init, config=config)
  state = jax.eval_shape(init, jax.random.key(0))
  micro = data.micro_batch or data.batch_size
  batch = _abstract((data.batch_size // micro, micro, data.seq_len))
  rate = jax.ShapeDtypeStruct((), np.float32)
  rates = optim.Rates(*(rate,) * len(optim.Rates._fields))
  train = jax.jit(
    functools.partial(recipe.train, config=config),
    donate_argnums=0,
    compiler_options=runtime.step_options(),
  )
  evaluate = jax.jit(functools.partial(recipe.evaluate, config=config))
  step = train.lower(state, batch, rates).compile()
  # A program's first call sets up threads and memory: no run's clock has it.
  zeros = lambda tree: jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), tree)
  jax.block_until_ready(step(*map(zeros, (state, batch, rates))))
  return Programs(
    init, step, evaluate.lower(state, _abstract(heldout)).compile()
  )


def _abstract(shape: tuple) -> Batch:
  array = jax.ShapeDtypeStruct(shape, np.int32)
  return Batch(*(array,) * 4, jax.ShapeDtypeStruct((), np.int32))


# ---------------------------------------------------------------------- a chunk


def advance(run: Run, words: Text, last: int) -> Run:
  """Returns the run after step `last`, with a point more in its curve.

  Its seconds are those of the steps, with their batches; not of compilation,
  of the evaluation or of saving.
  """
  config, state, rows = run.recipe.config, run.state, []
  began = time.perf_counter()
  for number in range(run.step + 1, last + 1):
    state, metrics = _step(run.programs, config, words, number, state)
    # Summed on the host, after the clock: a sum here would be a program more.
    rows.append([metrics[x] for x in ('main_loss', 'load', 'skipped')])
  jax.block_until_ready(state)
  seconds = time.perf_counter() - began
  before = run.curve[-1] if run.curve else {'seconds': 0.0, 'skipped': 0}
  losses, loads, skipped = zip(*jax.device_get(rows), strict=True)
  load = np.sum(loads, 0, dtype=np.float64)
  point = {
    'step': last,
    'tokens': last * tokens_of_step(config),
    'flops': last * flops_of_step(run.recipe),
    'seconds': before['seconds'] + seconds,
    'skipped': before['skipped'] + int(np.count_nonzero(skipped)),
    'loss': float(np.mean(losses)),
    'bits': _bits(run.programs, state, words),
  }
  if load.size:
    violation = load.max(-1) / load.mean(-1) - 1
    point['max_vio'] = float(violation.mean())
  return run._replace(state=state, curve=[*run.curve, point])


def _step(programs, config, words, number, state) -> tuple[Any, dict]:
  batch = batches.batch_at(words.train, config.data, number - 1, words.bos_id)
  rates = optim.Rates(*map(np.float32, steps.rates(config, number)))
  return programs.train(state, batch, rates)


def _bits(programs: Programs, state: Any, words: Text) -> float:
  """Returns the held-out bits per byte."""
  nll = sum(float(programs.evaluate(state, b)['nll']) for b in words.heldout)
  targets = np.concatenate([b.targets.ravel() for b in words.heldout])
  size = int(words.byte_lengths[targets[targets >= 0]].sum())
  return batches.bits_per_byte(nll, size)


# ------------------------------------------------------------------------ pairs


def pair(
  path: pathlib.Path,
  size: str,
  recipes: dict[str, Recipe],
  seed: int,
  points: int,
  words: Text,
  say: Callable[[str], None] = print,
) -> None:
  """Trains the arms of one seed in turns, each from where it stopped.

  Finished runs have a row in the folder, and are not trained again.

  Raises:
    ConfigError: one of them has another number of steps.
  """
  rows = [r for r in folder.results(path) if r['size'] == size]
  done = {r['arm']: r['curve'][-1]['step'] for r in rows if r['seed'] == seed}
  for arm in done.keys() & recipes.keys():
    folder.drop(path, size, arm, seed)
    steps = recipes[arm].config.run.steps
    if done[arm] != steps:
      raise ConfigError(
        f'{path}: the run of {arm} at {size} has {done[arm]} steps, and the '
        f'budget pays for {steps}; name another --workdir'
      )
  runs = {
    arm: _begin(path, size, arm, recipe, seed, words)
    for arm, recipe in recipes.items()
    if arm not in done
  }
  for turn in range(1, points + 1):
    for arm in ordered(runs, turn):
      run = runs[arm]
      last = turn * run.recipe.config.run.steps // points
      if last > run.step:
        run = runs[arm] = advance(run, words, last)
        folder.save(path, size, arm, seed, run)
        point = run.curve[-1]
        say(
          f'{size}, {arm}, seed {seed}: step {last:,}, '
          f'{point["bits"]:.4f} bits per byte, {point["seconds"]:.1f} s'
        )
      if turn == points:
        row = {'size': size, 'arm': arm, 'seed': seed, 'curve': run.curve}
        folder.finish(path, row)


def ordered(names: Iterable[str], turn: int) -> list[str]:
  """Returns the arms in the order of a turn: to and fro."""
  return list(names) if turn % 2 else list(names)[::-1]


def _begin(path, size, arm, recipe, seed, words) -> Run:
  """Returns a run where it stopped, or at its beginning."""
  config = recipe.config
  config = dataclasses.replace(
    config,
    data=dataclasses.replace(config.data, seed=seed),
    run=dataclasses.replace(config.run, seed=seed),
  )
  recipe = recipe._replace(config=config)
  programs = compiled(recipe, words.heldout[0])
  state = programs.init(jax.random.key(seed))
  where = path, size, arm, seed
  state, curve = folder.load(*where, state, config.run.steps) or (state, [])
  return Run(recipe, programs, state, curve)


# ------------------------------------------------------------------------ clock


def seconds_of_step(
  recipes: dict[str, Recipe], words: Text, known: dict[str, float]
) -> dict:
  """Returns the seconds of a step of each arm, measured in turns.

  Those that are `known` stay, and others are on the scale of the reference's.
  """
  first = next(iter(recipes))
  steppers = {arm: _stepper(r, words) for arm, r in recipes.items()}
  began = time.perf_counter()
  steppers[first](1)
  count = round(_ROUND_SECONDS / (time.perf_counter() - began))
  count = min(max(count, 1), 20)
  rounds = []
  for turn in range(_ROUNDS):
    times = {arm: steppers[arm](count) for arm in ordered(recipes, turn)}
    rounds.append(times)
  seconds = relative(rounds[1:], first)
  scale = known.get(first, seconds[first]) / seconds[first]
  return {arm: scale * seconds[arm] for arm in seconds} | known


def relative(rounds: list[dict[str, float]], first: str) -> dict[str, float]:
  """Returns each arm's seconds: the median ratio to `first` of its round.

  A round that others slowed down has slowed all arms, and its ratios stand.
  """
  second = float(np.median([times[first] for times in rounds]))
  return {
    arm: second * float(np.median([x[arm] / x[first] for x in rounds]))
    for arm in rounds[0]
  }


def _stepper(recipe: Recipe, words: Text) -> Callable[[int], float]:
  """Returns a function that trains n steps: the seconds of one of them."""
  programs = compiled(recipe, words.heldout[0])
  state, number = programs.init(jax.random.key(0)), 0

  def seconds(count: int) -> float:
    nonlocal state, number
    began = time.perf_counter()
    for _ in range(count):
      number += 1
      args = programs, recipe.config, words, number, state
      state, _ = _step(*args)
    jax.block_until_ready(state)
    return (time.perf_counter() - began) / count

  seconds(1)
  return seconds
