"""Prints the text that a model writes after a prompt, as it comes.

  python -m experiments.generate --checkpoint=DIR --prompt="Once upon a time"

DIR is a Hugging Face folder or the workdir of a run (its last checkpoint).
With --chat the prompt is a question, put into the folder's chat template or, if
it has none, that of DeepSeek V3 and R1. With --prefix and --suffix, a model
that was trained so (data.fim_rate) writes the text between them. Temperature 0
is greedy. --speculative drafts with the MTP module and changes only the speed.
The last line, on standard error, has the speed and the fraction of accepted
drafts.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator

import numpy as np
from absl import flags

from mla_moe.config import ConfigError

from . import cli, opened, runtime, text
from . import prompt as prompts
from .serving import template

FLAGS = flags.FLAGS


def define() -> None:
  """Defines this program's flags."""
  opened.define()
  flags.DEFINE_string('prompt', '', 'The text to continue, or to answer.')
  flags.DEFINE_integer('max_new_tokens', 64, 'At most so many.', 1)
  opened.define_sampling()
  template.define()
  flags.DEFINE_bool('chat', False, 'Apply the chat template.')
  flags.DEFINE_string('system', '', "The system's text, with --chat.")
  flags.DEFINE_bool('special', False, "Read the prompt's special tokens.")
  flags.DEFINE_string('prefix', '', 'The text before a middle to fill in.')
  flags.DEFINE_string('suffix', '', 'The text after it.')


def run(model: opened.TextModel, prompt: str) -> None:
  """Prints the continuation of `prompt` (the answer to it, with --chat)."""
  from mla_moe.decode import generation

  ids = _ids(model, prompt)
  opened.check_ids(ids, model.config.vocab)
  steps = generation.stream(
    model.config,
    model.variables,
    np.array([ids], np.int32),
    FLAGS.max_new_tokens,
    speculative=FLAGS.speculative,
    stop_ids=model.stop_ids,
    cache=model.cache,
    **opened.knobs(),
  )
  stream = text.TextStream(model.tokenizer, FLAGS.stop)
  start, moments, count = time.perf_counter(), [], 0
  for step in _compiled(steps):
    tokens = step.tokens[0]
    count += len(tokens)
    moments.append((time.perf_counter(), count))
    shown = [i for i in tokens if i not in model.stop_ids]
    text.show(stream.add(shown))
    if stream.ended:
      break
  text.show(stream.add([], last=True) + '\n')
  print(_speed(start, moments, step), file=sys.stderr)


def _ids(model: opened.TextModel, prompt: str) -> np.ndarray:
  """Returns the ids of the prompt, or around the middle, as the flags say."""
  words = model.tokenizer
  if FLAGS.prefix or FLAGS.suffix:
    return prompts.fill_in(words, FLAGS.prefix, FLAGS.suffix)
  if FLAGS.chat:
    return template.prompt(
      model.folder, words, prompt, FLAGS.system, model.template, FLAGS.special
    )
  return (prompts.special if FLAGS.special else prompts.plain)(words, prompt)


def _compiled(steps: Iterator) -> Iterator:
  """Yields the steps; the first two, which compile, come together."""
  first = runtime.First()
  first.begin()
  head = list(itertools.islice(steps, 2))
  first.end()
  yield from head
  yield from steps


def _speed(start, moments, last) -> str:
  """Returns a line about the steps after the second; the first two compile.

  moments: (time, tokens so far) of each step; last: the last `generation.Step`.
  """
  seconds, count = moments[-1]
  line = f'{count} tokens, the first after {moments[0][0] - start:.1f} s'
  if len(moments) > 2:
    warm = seconds - moments[1][0]
    line += f', then {(count - moments[1][1]) / warm:.1f} tokens/s'
  if FLAGS.speculative and last.passes:
    line += (
      f'; {last.accepted / last.passes:.0%} of the drafts accepted, '
      f'{(count - 1) / last.passes:.2f} tokens a forward pass'
    )
  return line


def main() -> None:
  """Prints the text."""
  if FLAGS.prefix or FLAGS.suffix:
    for name in ('prompt', 'chat', 'special'):
      if FLAGS[name].value:
        raise ConfigError(
          f'--{name}: does not go with --prefix and --suffix, which are the '
          'texts around the one to write'
        )
  elif not FLAGS.prompt:
    raise ConfigError('--prompt: is empty')
  own = template.own()
  run(opened.from_flags()._replace(template=own), FLAGS.prompt)


if __name__ == '__main__':
  cli.run(main, define)
