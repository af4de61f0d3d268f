"""Text from a released checkpoint's folder, or from a run's, as it comes.

  python -m experiments.generate --checkpoint=DIR --prompt="Once upon a time"

DIR is a Hugging Face folder or the workdir of a run (its last checkpoint).
--chat asks as a user asks a chat model, by the folder's chat template or, where
it has none, by that of DeepSeek V3 and R1. Temperature 0 is greedy;
--speculative drafts with the MTP module and changes only the speed, which the
last line says (on standard error, like the share of accepted drafts).
"""

from __future__ import annotations

import os
import pathlib
import secrets
import sys
import time
from typing import NamedTuple

import numpy as np
from absl import flags

from experiments import cli, workdir
from mla_moe.config import ConfigError

FLAGS = flags.FLAGS


def define() -> None:
  """This program's flags."""
  define_model()
  flags.DEFINE_string('prompt', '', 'The text to continue, or to answer.')
  flags.DEFINE_integer('max_new_tokens', 64, 'At most so many.', 1)
  flags.DEFINE_float('temperature', 0.0, '0 is greedy.', 0.0)
  flags.DEFINE_integer('top_k', 0, 'Of so many likely tokens; 0 is off.', 0)
  flags.DEFINE_float('top_p', 1.0, 'Of the likeliest with this mass.', 0.0, 1.0)
  flags.DEFINE_float('min_p', 0.0, 'A share of the likeliest.', 0.0, 1.0)
  flags.DEFINE_float('repetition_penalty', 1.0, 'Above 1 repeats less.', 0.0)
  flags.DEFINE_multi_string('stop', [], 'A text that ends it; repeatable.')
  flags.DEFINE_integer('seed', -1, 'Of the draws; -1 is another every time.')
  flags.DEFINE_bool('speculative', False, 'Draft with the MTP module.')
  flags.DEFINE_bool('chat', False, 'Apply the chat template.')
  flags.DEFINE_string('system', '', "The system's text, with --chat.")


def define_model() -> None:
  """The flags that say which model, and how it is kept."""
  cli.define_unsealed()
  flags.DEFINE_string('checkpoint', '', 'A Hugging Face folder, or a run.')
  flags.DEFINE_string(
    'tokenizer', '', "'byte' or a tokenizer.json; the folder's if empty."
  )
  flags.DEFINE_enum(
    'dtype', 'float32', ['float32', 'bfloat16'], 'Of the parameters.'
  )
  flags.DEFINE_enum(
    'cache',
    'auto',
    ['auto', 'float32', 'bfloat16', 'int8', 'float8'],
    'Type of the cached latents.',
  )


class Loaded(NamedTuple):
  """A model with its words: `folder` has the chat template, `ends` end it."""

  config: object
  variables: object
  words: object
  folder: pathlib.Path
  ends: tuple


def load(folder: pathlib.Path, dtype: str):
  """(ModelConfig, variables, name of the tokenizer) of either kind of folder.

  Raises:
    ConfigError: neither, or one that cannot be loaded.
  """
  if not folder.is_dir():
    raise ConfigError(f'--checkpoint={str(folder)!r}: is no folder')
  if (folder / 'checkpoints').is_dir():
    from experiments import convert

    config = workdir.read_config(folder)
    variables = convert.last_variables(folder, config, FLAGS.allow_unsealed)
    return config.model, variables, config.data.tokenizer
  from mla_moe import load_huggingface

  if not list(folder.glob('*.safetensors*')):
    raise ConfigError(
      f'--checkpoint={str(folder)!r}: holds neither a run with a checkpoint '
      'nor a model in .safetensors'
    )
  config, variables = load_huggingface(folder, dtype)
  return config, variables, str(folder / 'tokenizer.json')


def open_checkpoint() -> Loaded:
  """What --checkpoint and its companions name.

  Raises:
    ConfigError: no model, or one that cannot be loaded.
  """
  from mla_moe.data import tokenizer
  from mla_moe.hf import config_json

  if not FLAGS.checkpoint:
    raise ConfigError('--checkpoint: name a Hugging Face folder or a run')
  folder = pathlib.Path(FLAGS.checkpoint).expanduser()
  config, variables, name = load(folder, FLAGS.dtype)
  name = FLAGS.tokenizer or name
  if not FLAGS.tokenizer and name != 'byte' and not os.path.exists(name):
    raise ConfigError(
      f"{name!r}: is not there; name the model's by --tokenizer=FILE, or "
      '--tokenizer=byte where it was trained on bytes'
    )
  if name == 'byte':  # whatever the model calls its bos
    words = tokenizer.ByteTokenizer()
  else:
    words = tokenizer.load(name, config.bos_id, config.eos_id)
  beside = folder / 'huggingface'
  beside = beside if beside.is_dir() else folder
  ends = {config.eos_id}
  path = beside / 'generation_config.json'
  if path.exists():
    given = config_json.read_json(path).get('eos_token_id')
    given = given if isinstance(given, list) else [given]
    ends |= {i for i in given if isinstance(i, int) and 0 <= i < config.vocab}
  return Loaded(config, variables, words, beside, tuple(sorted(ends)))


def check_ids(ids, vocab: int) -> None:
  """Refuses tokens that the model does not have (ConfigError)."""
  if max(ids) >= vocab:
    raise ConfigError(
      f'--tokenizer: makes the token {max(ids)}, but the model has only {vocab}'
    )


def run(loaded: Loaded, text: str) -> None:
  """Prints the continuation of `text` (the answer to it, with --chat)."""
  from experiments import chat
  from experiments import text as texts
  from mla_moe import CacheConfig
  from mla_moe.decode import generation

  if FLAGS.chat:
    ids = chat.prompt(loaded.folder, loaded.words, text, FLAGS.system)
  else:
    ids = [loaded.config.bos_id, *loaded.words.encode(text)]
  check_ids(ids, loaded.config.vocab)
  rounds = generation.stream(
    loaded.config,
    loaded.variables,
    np.array([ids], np.int32),
    FLAGS.max_new_tokens,
    speculative=FLAGS.speculative,
    stop_ids=loaded.ends,
    cache=CacheConfig(dtype=FLAGS.cache),
    temperature=FLAGS.temperature,
    top_k=FLAGS.top_k,
    top_p=FLAGS.top_p,
    min_p=FLAGS.min_p,
    repetition_penalty=FLAGS.repetition_penalty,
    seed=secrets.randbits(31) if FLAGS.seed < 0 else FLAGS.seed,
  )
  growing = texts.Growing(loaded.words, FLAGS.stop)
  began, moments, count = time.perf_counter(), [], 0
  for now in rounds:
    new = now.tokens[0]
    count += len(new)
    moments.append((time.perf_counter(), count))
    shown = [i for i in new if i not in loaded.ends]
    print(growing.add(shown), end='', flush=True)
    if growing.ended:
      break
  print(growing.add([], last=True))
  print(_speed(began, moments, now), file=sys.stderr)


def _speed(began, moments, last) -> str:
  """One line about the rounds after the second, which both compile."""
  seconds, count = moments[-1]
  line = f'{count} tokens, the first after {moments[0][0] - began:.1f} s'
  if len(moments) > 2:
    warm = moments[-1][0] - moments[1][0]
    line += f', then {(count - moments[1][1]) / warm:.1f} tokens/s'
  if FLAGS.speculative and last.passes:
    line += (
      f'; {last.accepted / last.passes:.0%} of the drafts accepted, '
      f'{(count - 1) / last.passes:.2f} tokens a forward pass'
    )
  return line


def main() -> None:
  """Prints the text."""
  if not FLAGS.prompt:
    raise ConfigError('--prompt: is empty')
  run(open_checkpoint(), FLAGS.prompt)


if __name__ == '__main__':
  cli.run(main, define)
