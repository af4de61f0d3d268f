"""Reinforcement learning beside TRL, and fine-tuning beside pre-training.

Both programs teach the model of `make r1` from the same weights, 32 questions
with 16 answers each and one update a step, in float32. A figure is the
processor's seconds of one step, of a process with one thread that is pinned to
one core; the programs take turns. So other programs on the machine disturb the
ratio little.

  short      prompts of 10 tokens, answers of 10
  long       64 and 64: no answer ends early
  ragged     64 and at most 64: answers end by chance, after 22 on average
  scheduler  as `ragged`, our answers by the scheduler
  kl         as `short`, with R1's divergence from a reference policy
  tuning     our steps on examples beside those on a text, at one shape

Our answers share their prompt in a row. TRL's updates compute 16 answers at a
time in `long` and `ragged`, ours a few rows: on a CPU that is faster. The
weights are random, but all embeddings share a direction that the end token's
row of the head reads: so its probability is the same after each token.
--peer_python names a Python with torch, transformers and trl.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import random
import sys

import numpy as np

from .. import cli, soak
from . import contender, show

_CHORES = 'eval', 'sample', 'save', 'check'
_QUESTIONS = 2048  # of a file; each rollout takes the next 32
_COMMON = 1.0  # the length of the embeddings' common direction
_PARTS = 'rollout', 'grade', 'pack', 'score', 'update', 'rest'
_NEVER, _SOMETIMES = -8.0, 3.75  # logits of the end token, beside some 0.4


@dataclasses.dataclass(frozen=True)
class Job:
  """A race: folders and numbers, which travel to the programs as JSON.

  model: the weights, in the layout of a release. questions: a .jsonl file.
  prompt and new: most tokens of a prompt, and of its answer. micro: answers
  that TRL's update computes at a time, 0: all. ours: the columns of our rows,
  and the rows that our update computes at a time. engine: of our rollouts.
  """

  model: str
  questions: str
  prompt: int = 0
  new: int = 0
  prompts: int = 32
  samples: int = 16
  beta: float = 0.0
  micro: int = 0
  ours: tuple = (49, 32)  # four answers of 10 tokens
  engine: str = 'rollout'


def flags(parser) -> None:
  """Adds this benchmark's flags."""
  parser.add_argument('--only', default='', help='parts, joined by commas')
  parser.add_argument('--rounds', type=int, default=5, help='turns of each')
  parser.add_argument(
    '--peer_python',
    default=sys.executable,
    help='a Python with torch, transformers and trl',
  )


def run(out: pathlib.Path, args) -> None:
  """Measures the parts of `args.only`, prints them, writes OUT/rl.html."""
  race = functools.partial(_race, out, args)
  ragged = functools.partial(race, 64, _SOMETIMES, micro=16, ours=(512, 4))
  parts = {
    'short': lambda: race(10, _NEVER),
    'kl': lambda: race(10, _NEVER, beta=0.001),
    'long': lambda: race(64, _NEVER, micro=16, ours=(575, 4)),
    'ragged': ragged,
    'scheduler': lambda: ragged(engine='scheduler'),
    'tuning': lambda: _tuning(out, args.rounds),
  }
  results = show.measure(out / 'rl.json', parts, args.only)
  show.results(
    out,
    'rl',
    'Reinforcement learning: CPU seconds a step, one thread',
    rows(results),
    show.machines(results),
    lambda: None,
  )


# ------------------------------------------------------------------- measuring


def _race(out, args, tokens: int, end: float, **more) -> dict:
  """Returns, by program, the medians of the seconds of a step and its parts."""
  name = 'never' if end == _NEVER else 'sometimes'
  model, file = out / f'rl-{name}', out / f'rl-{tokens}.jsonl'
  weights(model, end)
  questions(file, tokens)
  job = Job(str(model), str(file), tokens, tokens, **more)
  racers = {
    'mla_moe': contender.ours('ours_rl', job, ''),
    'TRL': contender.peer(args.peer_python, 'peer_rl', job, ''),
  }
  return _medians(contender.started(racers), args.rounds)


def _tuning(out, rounds: int) -> dict:
  """Returns the seconds of a step that fine-tunes, and of one that trains."""
  file = out / 'rl-tuning.jsonl'
  questions(file, 64, answer='completion')
  sources = {
    'pre-training': str(soak.texts(out / 'rl-texts')),
    'fine-tuning': str(file),
  }
  racers = {
    mode: contender.ours('ours_sft', Job('', source), mode)
    for mode, source in sources.items()
  }
  return _medians(racers, rounds)


def _medians(racers: dict, rounds: int) -> dict:
  contender.take_turns(racers, rounds)
  figures = {}
  for name, racer in racers.items():
    steps = racer.seconds
    middle = {k: float(np.median([s[k] for s in steps])) for k in steps[0]}
    totals = [step['step'] for step in steps]
    figures[name] = middle | {
      'fastest': min(totals),
      'slowest': max(totals),
      'versions': racer.versions,
    }
  return figures


def config(job: dict):
  """Returns the config of our side of a job."""
  values = {
    'rl.task': job['questions'],
    'rl.prompts': job['prompts'],
    'rl.samples': job['samples'],
    'rl.max_new': job['new'],
    'rl.beta': job['beta'],
    'rl.prompt': 'shared',
    'rl.engine': job['engine'],
    'data.seq_len': job['ours'][0],
    'data.batch_size': job['prompts'] * job['samples'],
    'data.micro_batch': job['ours'][1],
    'optim.learning_rate': 1e-6,  # TRL's default: the text stays random
  }
  words = [f'--config.{name}={value}' for name, value in values.items()]
  whole = _config('zero', *words)
  rl = dataclasses.replace(whole.rl, rewards=(('paid', 1.0),))
  return dataclasses.replace(whole, rl=rl)


def tuned(source: str):
  """Returns the config of `tuning`: examples or a text, rows of 126 tokens."""
  return _config(
    'cold',
    f'--config.data.source={source}',
    '--config.data.seq_len=126',
  )


def _config(variant: str, *words: str):
  """Returns a variant of `configs/r1_tiny.py` that never ends or saves."""
  chores = [f'--config.run.{name}_every=0' for name in _CHORES]
  words = (f'--config=r1_tiny:{variant}', '--config.run.steps=1000000', *words)
  return cli.config_of([*words, *chores], cli.define)


def weights(folder: pathlib.Path, end: float) -> None:
  """Writes random weights whose end token has about the logit `end`."""
  import jax

  from mla_moe import save_huggingface
  from mla_moe.train.state import init_state

  whole = _config('zero')
  model, state = whole.model, init_state(jax.random.key(0), whole)
  random_part = np.asarray(state.params['embedding'])
  common = np.zeros(model.dim, np.float32)
  common[0] = _COMMON
  head = np.array(state.params['w_head'])
  # The final norm makes the direction's length about sqrt(dim).
  head[:, model.eos_id] = end / model.dim**0.5 * common / _COMMON
  params = state.params | {'embedding': random_part + common, 'w_head': head}
  variables = {'params': params, 'router': state.router}
  save_huggingface(folder, model, variables, force=True)


def questions(file: pathlib.Path, prompt: int, answer: str = 'answer') -> None:
  """Writes questions of `prompt` tokens: digits, to be sorted.

  `answer` names the right ones.
  """
  rng = random.Random(0)
  with file.open('w', encoding='utf-8') as lines:
    for _ in range(_QUESTIONS):
      digits = ''.join(rng.choices('0123456789', k=prompt - 2))
      row = {'prompt': f'{digits}>', answer: ''.join(sorted(digits))}
      lines.write(json.dumps(row) + '\n')


# --------------------------------------------------------------------- showing


def rows(results: dict) -> list[tuple[str, str, str]]:
  """Returns (figure, its value, a figure to compare it with), in order."""
  lines = []
  for part, result in results.items():
    figures = result['figures']
    first = next(iter(figures.values()))['step']
    for name, one in figures.items():
      note = f'{one["fastest"]:.3f} to {one["slowest"]:.3f}; '
      note += f'{one["step"] / first:.2f} x; '
      note += ', '.join(
        f'{key} {value:.3f}' for key, value in one.items() if key in _PARTS
      )
      lines.append((f'{part}: {name}', f'{one["step"]:.3f} s', note))
  return lines
