"""Benchmarks of a checkpoint, by lm-evaluation-harness (extra [eval]).

  python -m experiments.evaluate --checkpoint=DIR --tasks=hellaswag,arc_easy

DIR is a Hugging Face folder or a run. Likelihoods come from one forward pass of
a batch of sequences, continuations from `rollout`. Named tasks are downloaded.
--include=FOLDER adds task files of your own, which may read local data and need
no network then.

A model has max_positions. An answer that would exceed them gets shorter, and a
line says so. A question is never cut in silence: one that leaves no room is an
error of its task before anything is computed, or loses its beginning by
--truncate. The other tasks go on. --out has each task's results when it ends,
and the same command again runs the tasks without results.
"""

from __future__ import annotations

import functools
import itertools
import pathlib
import traceback
from collections.abc import Sequence

import numpy as np
from absl import flags

from mla_moe.checked import few
from mla_moe.config import ConfigError

from . import cli, fitted, opened, scores, text

FLAGS = flags.FLAGS
_MULTIPLE = 64  # of the lengths that are compiled


def define() -> None:
  """Defines this program's flags."""
  opened.define()
  flags.DEFINE_list('tasks', [], 'Names of tasks, joined by commas.')
  cli.define_path('include', '', 'A folder of task files (.yaml).')
  flags.DEFINE_integer('limit', 0, 'Examples of each task; 0: all.', 0)
  flags.DEFINE_integer('batch', 8, 'Sequences at a time.', 1)
  flags.DEFINE_integer('fewshot', -1, "Examples shown; -1: the task's.")
  flags.DEFINE_bool('truncate', False, 'Cut questions that are too long.')
  cli.define_path('out', '', 'A .json file of the results, completed.')


@functools.lru_cache(maxsize=2)
def _scorer(config):
  """Returns a compiled function from tokens and targets [B, T] to the targets'
  log-probabilities, and whether each is the most likely token."""
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
  model: opened.TextModel,
  pairs: Sequence[tuple[list[int], list[int]]],
  batch: int,
  truncate: bool = False,
) -> list[tuple[float, bool]]:
  """Returns (log-probability, whether greedy) of each pair's continuation.

  A pair is (context, continuation), token ids both. With `truncate`, one that
  is too long for the model loses the beginning of its context.

  Raises:
    ConfigError: tokens that the model does not have, a context without tokens,
      or a pair that is too long.
  """
  pairs = fitted.pairs(model, pairs, truncate)
  results = [None] * len(pairs)
  order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))
  for start in range(0, len(order), batch):
    chosen = order[start : start + batch]
    rows = [[*pairs[i][0], *pairs[i][1]] for i in chosen]
    width = max(*map(len, rows), 2) - 1
    width = -(-width // _MULTIPLE) * _MULTIPLE
    width = min(width, model.config.max_positions)
    tokens = np.zeros((batch, width), np.int32)
    targets = np.zeros((batch, width), np.int32)
    for j, row in enumerate(rows):
      tokens[j, : len(row) - 1] = row[:-1]
      targets[j, : len(row) - 1] = row[1:]
    out = _scorer(model.config)(model.variables, tokens, targets)
    log_probs, greedy = map(np.asarray, out)
    for j, (i, row) in enumerate(zip(chosen, rows, strict=True)):
      part = slice(len(row) - 1 - len(pairs[i][1]), len(row) - 1)
      total = float(log_probs[j, part].sum(dtype=np.float64))
      results[i] = (total, bool(greedy[j, part].all()))
  return results


def continuations(
  model: opened.TextModel,
  requests: Sequence[tuple[list[int], dict]],
  batch: int,
  truncate: bool = False,
) -> list[str]:
  """Returns the text after each prompt, up to its first stop string.

  A request is (prompt's ids, options of lm-eval: 'until', 'max_gen_toks',
  'do_sample' and the sampler's knobs). Its text depends on the request and on
  its number in `requests`, which is its seed. So equal requests draw different
  samples, and neither the batch nor the requests beside it matter.

  An answer has at most `max_gen_toks` tokens, and fewer where the prompt leaves
  fewer of max_positions. A prompt that leaves none is refused; with `truncate`
  it loses its beginning, so that a quarter of max_positions is left.

  Raises:
    ConfigError: a prompt that is too long, or an option that is not valid or
      would have to be ignored; before anything is computed.
  """
  questions = fitted.questions(model, requests, truncate)
  texts = [''] * len(requests)
  # One limit a batch: another would change the answers of the rows beside it.
  key = lambda i: (questions[i].limit, len(questions[i].ids))
  order = sorted(range(len(requests)), key=key)
  for limit, group in itertools.groupby(order, lambda i: questions[i].limit):
    group = list(group) if limit else []
    for start in range(0, len(group), batch):
      chosen = group[start : start + batch]
      out = _continue(model, [questions[i] for i in chosen], limit, batch)
      for i, words in zip(chosen, out, strict=True):
        texts[i] = words
  return texts


def _continue(
  model, rows: list[fitted.Question], limit: int, batch: int
) -> list[str]:
  """Returns the texts of up to `batch` rows."""
  from mla_moe import rollout

  # Few shapes, few compilations; rows that fill up a batch are computed, too.
  size = min(1 << (len(rows) - 1).bit_length(), batch)
  filled = [*rows, *(rows[:1] * (size - len(rows)))]
  prompts = np.zeros((size, max(len(row.ids) for row in rows)), np.int32)
  for row, prompt in zip(filled, prompts, strict=True):
    prompt[: len(row.ids)] = row.ids
  out = rollout(
    model.config,
    model.variables,
    prompts,
    limit,
    lengths=np.array([len(row.ids) for row in filled], np.int32),
    stop_ids=model.stop_ids,
    cache=model.cache,
    **{name: [row.knobs[name] for row in filled] for name in rows[0].knobs},
  )
  texts = []
  for row, tokens, count in zip(rows, out.tokens, out.counts, strict=False):
    stream = text.TextStream(model.tokenizer, row.stops)
    tokens = [t for t in tokens[:count] if t not in model.stop_ids]
    texts.append(stream.add(tokens, last=True))
  return texts


def adapter(model: opened.TextModel, batch: int, truncate: bool = False):
  """Returns the model as lm-eval's LM.

  Raises:
    ConfigError: lm-eval is not installed.
  """
  try:
    from lm_eval.api.model import LM
  except ImportError:
    raise ConfigError(
      'lm-eval is not installed: pip install "mla_moe[eval]"'
    ) from None
  encode = lambda words: list(map(int, model.tokenizer.encode(words)))
  config = model.config
  bos = [config.bos_id] if config.bos_id >= 0 else []

  def begun(ids: list[int]) -> list[int]:
    """Returns a context; an empty one has at least the end of another text."""
    return [*bos, *ids] or [config.eos_id]

  class Adapter(LM):
    """Likelihoods and continuations of one model."""

    def loglikelihood(self, requests):
      pairs = []
      for context, continuation in (r.args for r in requests):
        # Tokenizers join a space to the word after it.
        bare = context.rstrip()
        continuation = context[len(bare) :] + continuation
        whole, before = encode(bare + continuation), encode(bare)
        pairs.append((begun(before), whole[len(before) :]))
      return likelihoods(model, pairs, batch, truncate)

    def loglikelihood_rolling(self, requests):
      sums = []
      for (words,) in (r.args for r in requests):
        pairs = fitted.windows(begun([]), encode(words), config.max_positions)
        sums.append(sum(x for x, _ in likelihoods(model, pairs, batch)))
      return sums

    def generate_until(self, requests):
      prompts = [(begun(encode(r.args[0])), r.args[1]) for r in requests]
      return continuations(model, prompts, batch, truncate)

  return Adapter()


def run(model: opened.TextModel) -> dict[str, dict]:
  """Returns {task: {metric: value}} of the flags' tasks; prints each.

  A task that failed has the row {'error': line}.

  Raises:
    ConfigError: no tasks, some that are not there, or results of other settings
      in --out.
  """
  adapted = adapter(model, FLAGS.batch, FLAGS.truncate)
  if not FLAGS.tasks:
    raise ConfigError('--tasks: name at least one')
  from lm_eval.tasks import TaskManager

  manager = TaskManager(
    include_path=FLAGS.include or None, include_defaults=not FLAGS.include
  )
  missing = [name for name in FLAGS.tasks if name not in manager.all_tasks]
  if missing:
    raise ConfigError(f'--tasks={missing[0]!r}: there is no such task')
  path, tasks, settings = None, {}, {}
  if FLAGS.out:
    path = pathlib.Path(FLAGS.out)
    settings = scores.settings(
      model,
      FLAGS.include,
      limit=FLAGS.limit,
      fewshot=FLAGS.fewshot,
      truncate=FLAGS.truncate,
    )
    tasks = scores.read(path, settings)
    scores.write(path, settings, tasks)  # now, not after hours
  for name in FLAGS.tasks:
    if not scores.has_results(tasks.get(name, {})):
      tasks[name] = _task(name, adapted, manager)
      if path:
        scores.write(path, settings, tasks)
    _show(tasks[name])
  return {k: v for name in FLAGS.tasks for k, v in tasks[name].items()}


def _task(name: str, adapted, manager) -> dict[str, dict]:
  """Returns {task: {metric: value}}: of a group, a row for each part."""
  import lm_eval

  try:
    out = lm_eval.simple_evaluate(
      model=adapted,
      tasks=[name],
      limit=FLAGS.limit or None,
      num_fewshot=None if FLAGS.fewshot < 0 else FLAGS.fewshot,
      task_manager=manager,
      bootstrap_iters=0,
    )
  except ConnectionError as error:  # of the library `datasets`
    line = (
      f'{error}; a task of your own with local data needs no network: '
      '--include=FOLDER (docs/evaluation.md)'
    )
  except ConfigError as error:
    line = str(error)
  except Exception as error:  # a task may raise anything: the others go on
    traceback.print_exc()
    line = f'{type(error).__name__}: {error}'
  else:
    number = lambda value: isinstance(value, (int, float))
    return {
      task: {key: value for key, value in row.items() if number(value)}
      for task, row in out['results'].items()
    }
  return {name: {'error': str(ConfigError(line))}}


def _show(rows: dict[str, dict]) -> None:
  """Prints the results of a task when it has ended."""
  for task, row in rows.items():
    for metric, value in row.items():
      shown = value if isinstance(value, str) else f'{value:.4f}'
      print(f'{task:24} {metric:28} {shown}', flush=True)


def main() -> None:
  """Prints the results, and writes them to --out.

  Raises:
    cli.Stopped: a task failed.
  """
  results = run(opened.from_flags())
  failed = [task for task, row in results.items() if 'error' in row]
  if failed:
    raise cli.Stopped(
      f'{len(failed)} of {len(results)} tasks failed: {few(failed)}'
    )


if __name__ == '__main__':
  cli.run(main, define)
