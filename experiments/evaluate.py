"""Benchmarks by lm-evaluation-harness (extra [eval]).

  python -m experiments.evaluate --checkpoint=DIR --tasks=hellaswag,arc_easy

DIR is a Hugging Face folder or a run. Likelihoods come from one forward pass of
a batch of sequences, continuations from the decode engine (`rollout`).
Tasks by name are downloaded; --include=FOLDER adds task files of your own,
which may read local data and then need no network.
"""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Sequence

import numpy as np
from absl import flags

from experiments import cli, generate, text
from mla_moe.config import ConfigError

FLAGS = flags.FLAGS
_ROUND = 64


def define() -> None:
  """This program's flags."""
  generate.define_model()
  flags.DEFINE_list('tasks', [], 'Names of tasks, joined by commas.')
  flags.DEFINE_string('include', '', 'A folder of task files (.yaml).')
  flags.DEFINE_integer('limit', 0, 'Examples of each task; 0: all.', 0)
  flags.DEFINE_integer('batch', 8, 'Sequences at a time.', 1)
  flags.DEFINE_integer('fewshot', -1, "Examples shown; -1: the task's.")
  flags.DEFINE_string('out', '', 'A .json file of the results.')


@functools.lru_cache(maxsize=2)
def _scorer(config):
  import jax
  import jax.numpy as jnp

  from mla_moe import Transformer

  @jax.jit
  def score(variables, tokens, targets):
    logits = Transformer(config).apply(variables, tokens).logits
    picked = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    log_probs = picked - jax.nn.logsumexp(logits, -1)
    return log_probs, logits.argmax(-1) == targets

  return score


def likelihoods(
  loaded: generate.Loaded,
  pairs: Sequence[tuple[list[int], list[int]]],
  batch: int,
) -> list[tuple[float, bool]]:
  """(log-probability, whether greedy) of each continuation after its context.

  A pair too long for the model loses the beginning of its context.

  Raises:
    ConfigError: tokens that the model does not have.
  """
  found = [None] * len(pairs)
  order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))
  longest = loaded.config.max_positions + 1
  for start in range(0, len(order), batch):
    some = order[start : start + batch]
    rows = [[*pairs[i][0], *pairs[i][1]][-longest:] for i in some]
    generate.check_ids([max(row) for row in rows], loaded.config.vocab)
    width = max(map(len, rows)) - 1
    width = min(-(-width // _ROUND) * _ROUND, longest - 1)
    tokens = np.zeros((batch, width), np.int32)
    targets = np.zeros((batch, width), np.int32)
    for j, row in enumerate(rows):
      tokens[j, : len(row) - 1] = row[:-1]
      targets[j, : len(row) - 1] = row[1:]
    scored = _scorer(loaded.config)(loaded.variables, tokens, targets)
    log_probs, greedy = map(np.asarray, scored)
    for j, (i, row) in enumerate(zip(some, rows, strict=True)):
      part = slice(max(len(row) - 1 - len(pairs[i][1]), 0), len(row) - 1)
      total = float(log_probs[j, part].sum(dtype=np.float64))
      found[i] = (total, bool(greedy[j, part].all()))
  return found


def continuations(
  loaded: generate.Loaded,
  asked: Sequence[tuple[list[int], dict]],
  batch: int,
) -> list[str]:
  """The text after each prompt, up to its first stop string ('until')."""
  from mla_moe import rollout

  found = [''] * len(asked)
  order = sorted(range(len(asked)), key=lambda i: len(asked[i][0]))
  for start in range(0, len(order), batch):
    some = order[start : start + batch]
    new = max(int(asked[i][1].get('max_gen_toks', 256)) for i in some)
    room = loaded.config.max_positions - new
    rows = [asked[i][0][-room:] for i in some]
    rows += [rows[0]] * (batch - len(rows))  # one shape: one compilation
    prompts = np.zeros((batch, max(map(len, rows))), np.int32)
    for j, row in enumerate(rows):
      prompts[j, : len(row)] = row
    out = rollout(
      loaded.config,
      loaded.variables,
      prompts,
      new,
      lengths=np.array([len(row) for row in rows], np.int32),
      stop_ids=loaded.ends,
      temperature=max(float(asked[some[0]][1].get('temperature', 0)), 0.0),
    )
    for j, i in enumerate(some):
      until = asked[i][1].get('until') or []
      until = [until] if isinstance(until, str) else until
      limit = int(asked[i][1].get('max_gen_toks', 256))
      ids = [t for t in out.tokens[j, : out.counts[j]] if t not in loaded.ends]
      found[i] = text.Growing(loaded.words, until).add(ids[:limit], last=True)
  return found


def adapter(loaded: generate.Loaded, batch: int):
  """The model as lm-eval's LM.

  Raises:
    ConfigError: lm-eval is not installed.
  """
  try:
    from lm_eval.api.model import LM
  except ImportError:
    raise ConfigError(
      'lm-eval is not installed: pip install "mla_moe[eval]"'
    ) from None
  encode = lambda words: list(map(int, loaded.words.encode(words)))
  bos = [loaded.config.bos_id]

  class Adapter(LM):
    """Likelihoods and continuations of one model."""

    def loglikelihood(self, requests):
      pairs = []
      for context, continuation in (r.args for r in requests):
        # Spaces belong to what follows them, as tokenizers have it.
        bare = context.rstrip()
        continuation = context[len(bare) :] + continuation
        whole, before = encode(bare + continuation), encode(bare)
        pairs.append((bos + before, whole[len(before) :]))
      return likelihoods(loaded, pairs, batch)

    def loglikelihood_rolling(self, requests):
      window = loaded.config.max_positions
      sums = []
      for (words,) in (r.args for r in requests):
        ids = encode(words)
        cut = [ids[at : at + window] for at in range(0, len(ids), window)]
        pairs = [(bos, part) for part in cut if part]
        sums.append(sum(x for x, _ in likelihoods(loaded, pairs, batch)))
      return sums

    def generate_until(self, requests):
      asked = [(bos + encode(r.args[0]), r.args[1]) for r in requests]
      return continuations(loaded, asked, batch)

  return Adapter()


def run(loaded: generate.Loaded) -> dict:
  """Evaluates the flags' tasks: {task: {metric: value}}.

  Raises:
    ConfigError: no tasks, or some that are not there.
  """
  model = adapter(loaded, FLAGS.batch)
  if not FLAGS.tasks:
    raise ConfigError('--tasks: name at least one')
  import lm_eval
  from lm_eval.tasks import TaskManager

  manager = TaskManager(
    include_path=FLAGS.include or None, include_defaults=not FLAGS.include
  )
  missing = [name for name in FLAGS.tasks if name not in manager.all_tasks]
  if missing:
    raise ConfigError(f'--tasks={missing[0]!r}: there is no such task')
  out = lm_eval.simple_evaluate(
    model=model,
    tasks=FLAGS.tasks,
    limit=FLAGS.limit or None,
    num_fewshot=None if FLAGS.fewshot < 0 else FLAGS.fewshot,
    task_manager=manager,
    bootstrap_iters=0,
  )
  number = lambda value: isinstance(value, (int, float))
  return {
    task: {key: value for key, value in row.items() if number(value)}
    for task, row in out['results'].items()
  }


def main() -> None:
  """Prints, and writes where asked, what a checkpoint reaches."""
  results = run(generate.open_checkpoint())
  for task, row in results.items():
    for metric, value in row.items():
      print(f'{task:24} {metric:28} {value:.4f}')
  if FLAGS.out:
    pathlib.Path(FLAGS.out).write_text(json.dumps(results, indent=1))


if __name__ == '__main__':
  cli.run(main, define)
