"""Benchmarks of a checkpoint, by lm-evaluation-harness (extra [eval]).

  python -m experiments.evaluate --checkpoint=DIR --tasks=hellaswag,arc_easy

DIR is a Hugging Face folder or a run. Likelihoods come from one forward pass of
a batch of sequences, continuations from `rollout`. Named tasks are downloaded.
--include=FOLDER adds task files of your own, which may read local data and need
no network then.
"""

from __future__ import annotations

import functools
import itertools
import json
import pathlib
from collections.abc import Sequence

import numpy as np
from absl import flags

from mla_moe.config import ConfigError

from . import cli, opened, text

FLAGS = flags.FLAGS
_MULTIPLE = 64  # of the lengths that are compiled
_KNOBS = {
  'temperature': 0.0,
  'top_k': 0,
  'top_p': 1.0,
  'min_p': 0.0,
  'repetition_penalty': 1.0,
}
_OPTIONS = {*_KNOBS, 'until', 'max_gen_toks', 'do_sample'}


def define() -> None:
  """Defines this program's flags."""
  opened.define()
  flags.DEFINE_list('tasks', [], 'Names of tasks, joined by commas.')
  flags.DEFINE_string('include', '', 'A folder of task files (.yaml).')
  flags.DEFINE_integer('limit', 0, 'Examples of each task; 0: all.', 0)
  flags.DEFINE_integer('batch', 8, 'Sequences at a time.', 1)
  flags.DEFINE_integer('fewshot', -1, "Examples shown; -1: the task's.")
  flags.DEFINE_string('out', '', 'A .json file of the results.')


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
) -> list[tuple[float, bool]]:
  """Returns (log-probability, whether greedy) of each pair's continuation.

  A pair is (context, continuation), token ids both. One that is too long for
  the model loses the beginning of its context.

  Raises:
    ConfigError: tokens that the model does not have.
  """
  scores = [None] * len(pairs)
  order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))
  longest = model.config.max_positions + 1
  for start in range(0, len(order), batch):
    chosen = order[start : start + batch]
    rows = [[*pairs[i][0], *pairs[i][1]][-longest:] for i in chosen]
    opened.check_ids([max(row) for row in rows], model.config.vocab)
    width = max(map(len, rows)) - 1
    width = min(-(-width // _MULTIPLE) * _MULTIPLE, longest - 1)
    tokens = np.zeros((batch, width), np.int32)
    targets = np.zeros((batch, width), np.int32)
    for j, row in enumerate(rows):
      tokens[j, : len(row) - 1] = row[:-1]
      targets[j, : len(row) - 1] = row[1:]
    out = _scorer(model.config)(model.variables, tokens, targets)
    log_probs, greedy = map(np.asarray, out)
    for j, (i, row) in enumerate(zip(chosen, rows, strict=True)):
      part = slice(max(len(row) - 1 - len(pairs[i][1]), 0), len(row) - 1)
      total = float(log_probs[j, part].sum(dtype=np.float64))
      scores[i] = (total, bool(greedy[j, part].all()))
  return scores


def continuations(
  model: opened.TextModel,
  requests: Sequence[tuple[list[int], dict]],
  batch: int,
) -> list[str]:
  """Returns the text after each prompt, up to its first stop string.

  A request is (prompt's ids, options of lm-eval: 'until', 'max_gen_toks',
  'do_sample' and the sampler's knobs). Its text depends on the request and on
  its number in `requests`, which is its seed. So equal requests draw different
  samples, and neither the batch nor the requests beside it matter.

  Raises:
    ConfigError: an option that this program would have to ignore.
  """
  texts = [''] * len(requests)
  limits = [int(o.get('max_gen_toks', 256)) for _, o in requests]
  # One limit a batch: a longer one would cut prompts that have room.
  key = lambda i: (limits[i], len(requests[i][0]))
  order = sorted(range(len(requests)), key=key)
  for limit, group in itertools.groupby(order, lambda i: limits[i]):
    group = list(group)
    for start in range(0, len(group), batch):
      chosen = group[start : start + batch]
      rows = [(*requests[i], i) for i in chosen]
      out = _continue(model, rows, limit, batch)
      for i, words in zip(chosen, out, strict=True):
        texts[i] = words
  return texts


def _continue(model, rows: list[tuple], limit: int, batch: int) -> list[str]:
  """Returns the texts of up to `batch` rows, each (ids, options, seed)."""
  from mla_moe import rollout

  room = max(model.config.max_positions - limit, 1)
  knobs = [_knobs(options) | {'seed': seed} for _, options, seed in rows]
  missing = batch - len(rows)  # one shape: one compilation
  ids = [row[-room:] for row, _, _ in rows] + [rows[0][0][-1:]] * missing
  knobs += [_knobs({}) | {'seed': 0}] * missing
  prompts = np.zeros((batch, max(map(len, ids))), np.int32)
  for row, prompt in zip(ids, prompts, strict=True):
    prompt[: len(row)] = row
  out = rollout(
    model.config,
    model.variables,
    prompts,
    limit,
    lengths=np.array([len(row) for row in ids], np.int32),
    stop_ids=model.stop_ids,
    cache=model.cache,
    **{name: [row[name] for row in knobs] for name in knobs[0]},
  )
  texts = []
  for (_, options, _), tokens, count in zip(
    rows, out.tokens[: len(rows)], out.counts[: len(rows)], strict=True
  ):
    until = options.get('until') or []
    stream = text.TextStream(
      model.tokenizer, [until] if isinstance(until, str) else until
    )
    tokens = [t for t in tokens[:count] if t not in model.stop_ids]
    texts.append(stream.add(tokens, last=True))
  return texts


def _knobs(options: dict) -> dict:
  """Returns the sampler's knobs that the options of lm-eval ask for."""
  for name, value in options.items():
    if name not in _OPTIONS and value is not None:
      raise ConfigError(
        f'generation_kwargs: {name}={value!r} is not supported; a task may set '
        + ', '.join(sorted(_OPTIONS))
      )
  knobs = {}
  for name, default in _KNOBS.items():
    value = options.get(name)
    knobs[name] = default if value is None else type(default)(value)
  if options.get('do_sample') and options.get('temperature') is None:
    knobs['temperature'] = 1.0
  if options.get('do_sample') is False:
    knobs['temperature'] = 0.0
  return knobs


def adapter(model: opened.TextModel, batch: int):
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
  bos = [model.config.bos_id]

  class Adapter(LM):
    """Likelihoods and continuations of one model."""

    def loglikelihood(self, requests):
      pairs = []
      for context, continuation in (r.args for r in requests):
        # Tokenizers join a space to the word after it.
        bare = context.rstrip()
        continuation = context[len(bare) :] + continuation
        whole, before = encode(bare + continuation), encode(bare)
        pairs.append((bos + before, whole[len(before) :]))
      return likelihoods(model, pairs, batch)

    def loglikelihood_rolling(self, requests):
      window = model.config.max_positions
      sums = []
      for (words,) in (r.args for r in requests):
        ids = encode(words)
        parts = [ids[i : i + window] for i in range(0, len(ids), window)]
        pairs = [(bos, part) for part in parts if part]
        sums.append(sum(x for x, _ in likelihoods(model, pairs, batch)))
      return sums

    def generate_until(self, requests):
      prompts = [(bos + encode(r.args[0]), r.args[1]) for r in requests]
      return continuations(model, prompts, batch)

  return Adapter()


def run(model: opened.TextModel) -> dict:
  """Returns {task: {metric: value}} of the flags' tasks.

  Raises:
    ConfigError: no tasks, some that are not there, or data that only a network
      brings.
  """
  adapted = adapter(model, FLAGS.batch)
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
  try:
    out = lm_eval.simple_evaluate(
      model=adapted,
      tasks=FLAGS.tasks,
      limit=FLAGS.limit or None,
      num_fewshot=None if FLAGS.fewshot < 0 else FLAGS.fewshot,
      task_manager=manager,
      bootstrap_iters=0,
    )
  except ConnectionError as error:  # of the library `datasets`
    raise ConfigError(
      f'--tasks={",".join(FLAGS.tasks)}: {error}; a task of your own with '
      'local data needs no network: --include=FOLDER (docs/evaluation.md)'
    ) from None
  number = lambda value: isinstance(value, (int, float))
  return {
    task: {key: value for key, value in row.items() if number(value)}
    for task, row in out['results'].items()
  }


def main() -> None:
  """Prints the results, and writes them to --out."""
  results = run(opened.from_flags())
  for task, row in results.items():
    for metric, value in row.items():
      print(f'{task:24} {metric:28} {value:.4f}')
  if FLAGS.out:
    pathlib.Path(FLAGS.out).write_text(
      json.dumps(results, indent=1), encoding='utf-8'
    )


if __name__ == '__main__':
  cli.run(main, define)
