"""Does written thought help at this size? Two cold starts, reinforced alike.

The task is a sum of two numbers of two digits, for the model of `make r1`. One
cold start imitates answers alone, the other the same answers behind their
digits' sums with the carry, from the last digit on:

  17+85=102        17+85=7+5=12,1+1+8=10>102

Both have as many steps on the same questions, and then as many steps of
reinforcement, in which only the text behind the last > is graded. Each arm is
trained from three seeds, of weights, questions and draws. A row of
OUT/thought.jsonl is one run of both stages; a stopped benchmark goes on with
the next. Intervals are Student's, of 95 %.
"""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile
import time

from mla_moe.config import Config

from .. import cli, r1, train, workdir
from ..ablate import differences
from ..rl import policy, tasks
from ..training import example_source
from . import paired, show

TASK, SEEDS = 'add2', (0, 1, 2)
ARMS = 'answer alone', 'steps, then answer'
_HEAD = 'arm', 'cold start', 'after reinforcement', 'tokens, CPU seconds'


def flags(parser) -> None:
  """Adds this benchmark's flags."""
  parser.add_argument('--cold', type=int, default=300, help='steps')
  parser.add_argument('--steps', type=int, default=100, help='by reinforcement')


def run(out: pathlib.Path, args) -> None:
  """Trains the arms that OUT/thought.jsonl lacks, and prints the table."""
  file = out / f'thought-{args.cold}-{args.steps}.jsonl'
  measure = lambda arm, seed: trained(arm, seed, args.cold, args.steps)
  paired.add(file, ARMS, SEEDS, measure)
  title = f'{TASK}: {args.cold} steps of imitation, {args.steps} of rewards'
  show.results(
    out, 'thought', title, table(paired.rows(file)), [], lambda: None, _HEAD
  )


def steps(question: str) -> str:
  """Returns the sums of a sum's digits with the carry: '7+5=12,1+1+8=10>'."""
  a, b = question.rstrip('=').split('+')
  width = max(len(a), len(b))
  pairs = zip(a.zfill(width)[::-1], b.zfill(width)[::-1], strict=True)
  parts, carry = [], 0
  for x, y in pairs:
    total = int(x) + int(y) + carry
    terms = [str(carry)] * bool(carry) + [x, y] if parts else [x, y]
    parts.append(f'{"+".join(terms)}={total}')
    carry = total // 10
  return f'{",".join(parts)}>'


def last(question: tasks.Question, text: str) -> float:
  """Returns 1 where the text behind the last > is the right answer, else 0."""
  return float(text.rpartition('>')[2] == question.answer)


def trained(arm: str, seed: int, cold: int, reinforced: int) -> dict:
  """Returns what an arm reaches from a seed: parts of answers that are right.

  sampled_first and sampled: of the first and of the last ten rollouts. greedy:
  of held-out questions, before and after. tokens: of an answer at the end.
  """
  items = r1.examples(TASK, seed, cold)[: 64 * cold]
  if arm == ARMS[1]:
    items = [x._replace(answer=steps(x.text) + x.answer) for x in items]
  longest = max(len(x.answer) for x in items) + 2
  length = max(len(x.text) for x in items) + longest
  began = time.process_time()
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    file = folder / 'cold.jsonl'
    r1.write_examples(file, items)
    shared = f'--config.run.seed={seed}', f'--config.data.seq_len={length}'
    begin = _config(
      'cold', *shared, f'--config.data.source={file}',
      f'--config.run.steps={cold}', f'--config.run.save_every={cold}',
    )  # fmt: skip
    _train(begin, folder / 'cold', open_source=example_source.opened())
    rewarded = _config(
      'zero', *shared, f'--config.rl.task={TASK}',
      f'--config.run.steps={reinforced}', f'--config.rl.max_new={longest}',
      f'--config.run.eval_every={reinforced}',
    )  # fmt: skip
    rl = dataclasses.replace(rewarded.rl, rewards=(('last', 1.0),))
    rewarded = dataclasses.replace(rewarded, rl=rl)
    options = train.Options(init=str(folder / 'cold'))
    opened = policy.opened(rewards={'last': last})
    _train(rewarded, folder / 'rl', options, opened)
    numbers = r1.compared(folder / 'rl')
    rows = workdir.rows(folder / 'rl' / 'metrics.jsonl')
    lengths = [r['completion_length'] for r in rows if 'reward' in r][-10:]
  return {
    'sampled_first': numbers['first'],
    'sampled': numbers['last'],
    'greedy_first': numbers['greedy_first'],
    'greedy': numbers['greedy'],
    'tokens': sum(lengths) / len(lengths),
    'cpu_seconds': time.process_time() - began,
  }


def _train(config: Config, *args, **kwargs) -> None:
  """Trains to the last step; a run that a signal ended gives no number."""
  end = train.run(config, *args, **kwargs)
  if end['step'] < config.run.steps:
    raise cli.Stopped(f'stopped at step {end["step"]}: this arm has no number')


def table(rows: list[dict]) -> list[tuple[str, ...]]:
  """Returns a row for each arm: means over its seeds, with intervals."""
  lines = []
  for arm in ARMS:
    of_arm = [row for row in rows if row['name'] == arm]
    if not of_arm:
      continue

    def share(name, of_arm=of_arm):
      values = [row[name] for row in of_arm]
      mean, half, _ = differences.interval(values)
      each = ', '.join(f'{value:.1%}' for value in values)
      return f'{mean:.1%} ± {half:.1%} ({each})'

    mean = lambda name, of_arm=of_arm: differences.mean(
      [r[name] for r in of_arm]
    )[0]
    lines.append(
      (
        arm,
        f'sampled {share("sampled_first")}; greedy {share("greedy_first")}',
        f'sampled {share("sampled")}; greedy {share("greedy")}',
        f'{mean("tokens"):.1f}; {mean("cpu_seconds"):.0f}',
      )
    )
  return lines


def _config(variant: str, *words: str):
  """Returns a variant of `configs/r1_tiny.py` with some fields changed."""
  return cli.config_of([f'--config=r1_tiny:{variant}', *words], cli.define)
