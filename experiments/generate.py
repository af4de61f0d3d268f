"""Text from a released checkpoint's folder, or from a run's.

  python -m experiments.generate --checkpoint=DIR --prompt="Once upon a time"

DIR is a Hugging Face folder or the workdir of a run (its last checkpoint).
--chat asks as a user asks a chat model, by the folder's chat template or, where
it has none, by that of DeepSeek V3 and R1. Temperature 0 is greedy.
"""

from __future__ import annotations

import pathlib
import secrets

from absl import flags

from experiments import cli, workdir
from mla_moe.config import ConfigError

FLAGS = flags.FLAGS


def define() -> None:
  """This program's flags."""
  cli.define_unsealed()
  flags.DEFINE_string('checkpoint', '', 'A Hugging Face folder, or a run.')
  flags.DEFINE_string('prompt', '', 'The text to continue, or to answer.')
  flags.DEFINE_integer('max_new_tokens', 64, 'At most so many.', 1)
  flags.DEFINE_float('temperature', 0.0, '0 is greedy.', 0.0)
  flags.DEFINE_integer('seed', -1, 'Of the draws; -1 is another every time.')
  flags.DEFINE_bool('chat', False, 'Apply the chat template.')
  flags.DEFINE_string('system', '', "The system's text, with --chat.")
  flags.DEFINE_string(
    'tokenizer', '', "'byte' or a tokenizer.json; the folder's if empty."
  )
  flags.DEFINE_enum(
    'dtype', 'float32', ['float32', 'bfloat16'], 'Of the parameters.'
  )


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

  config, variables = load_huggingface(folder, dtype)
  return config, variables, str(folder / 'tokenizer.json')


def run(folder: pathlib.Path, text: str) -> str:
  """The continuation of `text` (the answer to it, with --chat)."""
  from experiments import chat, sample
  from mla_moe import hf_config, tokenizer

  config, variables, name = load(folder, FLAGS.dtype)
  name = FLAGS.tokenizer or name
  if name == 'byte':  # whatever the model calls its bos
    words = tokenizer.ByteTokenizer()
  else:
    words = tokenizer.load(name, config.bos_id, config.eos_id)
  beside = folder / 'huggingface'
  beside = beside if beside.is_dir() else folder
  if FLAGS.chat:
    ids = chat.prompt(beside, words, text, FLAGS.system)
  else:
    ids = [config.bos_id, *words.encode(text)]
  if max(ids) >= config.vocab:
    raise ConfigError(
      f'--tokenizer: makes the token {max(ids)}, but the model has only '
      f'{config.vocab}'
    )
  new = FLAGS.max_new_tokens
  window = -(-(len(ids) + new) // 64) * 64
  if window > config.max_positions:
    window = config.max_positions
    if len(ids) + new > window:
      raise ConfigError(
        f'--max_new_tokens={new}: with a prompt of {len(ids)} tokens more than '
        f'the {window} positions of the model'
      )
  out = sample.sample(
    config,
    variables,
    ids,
    new,
    window,
    temperature=FLAGS.temperature,
    seed=secrets.randbits(31) if FLAGS.seed < 0 else FLAGS.seed,
  )
  ends = {config.eos_id}
  path = beside / 'generation_config.json'
  if path.exists():
    given = hf_config.read_json(path).get('eos_token_id')
    ends |= set(given if isinstance(given, list) else [given])
  stop = next((i for i, t in enumerate(out) if int(t) in ends), len(out))
  return words.decode(out[:stop])


def main() -> None:
  """Prints the text."""
  if not FLAGS.checkpoint:
    raise ConfigError('--checkpoint: name a Hugging Face folder or a run')
  if not FLAGS.prompt:
    raise ConfigError('--prompt: is empty')
  print(run(pathlib.Path(FLAGS.checkpoint).expanduser(), FLAGS.prompt))


if __name__ == '__main__':
  cli.run(main, define)
