"""A model opened for text: a released checkpoint, or the last one of a run.

Text needs more than weights: a tokenizer, the ids that end a text, and the
folder of the chat template. A release has them beside its weights. A run names
its tokenizer in its config; one that began from a release has the release's
files in its folder `huggingface`.
"""

from __future__ import annotations

import os
import pathlib
import secrets
from collections.abc import Sequence
from typing import NamedTuple

from absl import flags

from mla_moe import vocabulary
from mla_moe.config import CacheConfig, ConfigError, ModelConfig
from mla_moe.types import PyTree

from . import cli, ends, run_tokenizer, workdir
from .checkpointing import bucket
from .data.tokenizer import ByteTokenizer, Tokenizer, load

FLAGS = flags.FLAGS


class TextModel(NamedTuple):
  """A model with its tokenizer.

  variables: {'params', 'router'}; folder: of the chat template; stop_ids: a
  text ends with any of them; template: a chat template of one's own, in the
  place of the folder's; cache: of the latents of its texts.
  """

  config: ModelConfig
  variables: PyTree
  tokenizer: Tokenizer
  folder: pathlib.Path
  stop_ids: tuple[int, ...]
  template: str = ''
  cache: CacheConfig = CacheConfig()


def define() -> None:
  """Defines the flags of every program that opens a model."""
  cli.define_unsealed()
  text = 'A Hugging Face folder, or a run.'
  cli.define_path('checkpoint', '', text, read=cli.run_folder)
  text = "'byte' or a tokenizer's file; the folder's if empty."
  cli.define_path('tokenizer', '', text)
  flags.DEFINE_enum(
    'dtype', 'float32', ['float32', 'bfloat16'], 'Of the parameters.'
  )
  text = "Of a release's matrices: floats, or codes that are read in place."
  kinds = ['trained', 'fp8', 'int8', 'int4']
  flags.DEFINE_enum('base', 'trained', kinds, text)
  flags.DEFINE_enum(
    'cache',
    'auto',
    ['auto', 'float32', 'bfloat16', 'int8', 'float8'],
    'Type of the cached latents.',
  )


def define_sampling() -> None:
  """Defines the flags of every program that draws an answer."""
  flags.DEFINE_float('temperature', 0.0, '0 is greedy.', 0.0)
  flags.DEFINE_integer('top_k', 0, 'Of so many likely tokens; 0 is off.', 0)
  flags.DEFINE_float('top_p', 1.0, 'Of the likeliest with this mass.', 0.0, 1.0)
  flags.DEFINE_float('min_p', 0.0, 'A fraction of the likeliest one.', 0.0, 1.0)
  flags.DEFINE_float('repetition_penalty', 1.0, 'Above 1 repeats less.', 0.0)
  flags.DEFINE_multi_string('stop', [], 'A text that ends it')
  flags.DEFINE_integer('seed', -1, 'Of the draws; -1 is another every time.')
  flags.DEFINE_bool('speculative', False, 'Draft with the MTP module.')


def knobs() -> dict[str, float]:
  """Returns the sampling parameters of the flags."""
  names = 'temperature', 'top_k', 'top_p', 'min_p', 'repetition_penalty'
  seed = secrets.randbits(31) if FLAGS.seed < 0 else FLAGS.seed
  return {name: FLAGS[name].value for name in names} | {'seed': seed}


def from_flags() -> TextModel:
  """Returns the model of the flags of `define`.

  Raises:
    ConfigError: no model, or one that cannot be loaded.
  """
  if not FLAGS.checkpoint:
    raise ConfigError('--checkpoint: name a Hugging Face folder or a run')
  model = open_model(
    bucket.here('--checkpoint', FLAGS.checkpoint),
    tokenizer=FLAGS.tokenizer,
    dtype=FLAGS.dtype,
    allow_unsealed=FLAGS.allow_unsealed,
    base=FLAGS.base,
  )
  return model._replace(cache=CacheConfig(dtype=FLAGS.cache))


def open_model(
  folder: pathlib.Path,
  *,
  tokenizer: str = '',
  dtype: str = 'float32',
  allow_unsealed: bool = False,
  base: str = 'trained',
) -> TextModel:
  """Returns the model of a folder with its tokenizer.

  Args:
    folder: a Hugging Face folder, or a run.
    tokenizer: 'byte' or a tokenizer's file; '' is the folder's own.
    dtype: of a release's parameters; a run's are float32.
    allow_unsealed: trust a checkpoint that was never sealed.
    base: 'trained', or the codes that a release's matrices stay in.

  Raises:
    ConfigError: no model, or one that cannot be loaded.
  """
  config, variables, own = load_variables(folder, dtype, allow_unsealed, base)
  release = folder / 'huggingface'
  release = release if release.is_dir() else folder
  return TextModel(
    config=config,
    variables=variables,
    tokenizer=_tokenizer(tokenizer, own, config),
    folder=release,
    stop_ids=ends.of(release, config),
  )


def load_variables(
  folder: pathlib.Path,
  dtype: str = 'float32',
  allow_unsealed: bool = False,
  base: str = 'trained',
) -> tuple[ModelConfig, PyTree, str]:
  """Returns config, variables and the tokenizer's name of either folder.

  Raises:
    ConfigError: neither a release nor a run, or one that cannot be loaded.
  """
  if not folder.is_dir():
    raise ConfigError(f'--checkpoint={str(folder)!r}: is no folder')
  from .adapters.load import load_base
  from .checkpointing.load import load_run

  if workdir.is_run(folder):
    if base != 'trained':
      raise ConfigError(
        f'--base={base}: is for a Hugging Face folder; the config of the run '
        f'--checkpoint={folder} names its base'
      )
    run, variables = load_run(folder, allow_unsealed=allow_unsealed)
    return (
      run.model,
      variables,
      run_tokenizer.path_of(folder, run.data.tokenizer),
    )
  if not list(folder.glob('*.safetensors*')) + list(folder.glob('*.bin')):
    raise ConfigError(
      f'--checkpoint={str(folder)!r}: holds neither a run with a checkpoint '
      'nor a model in .safetensors'
    )
  config, variables = load_base(folder, base, dtype)
  return config, variables, str(vocabulary.file_of(str(folder)))


def check_ids(ids: Sequence[int], vocab: int) -> None:
  """Refuses ids that the model does not have.

  Raises:
    ConfigError: names the largest of them.
  """
  if max(ids) >= vocab:
    raise ConfigError(
      f'--tokenizer: makes the token {max(ids)}, but the model has only {vocab}'
    )


def _tokenizer(name: str, own: str, config: ModelConfig) -> Tokenizer:
  """Returns the tokenizer `name`, or the model's own if that is ''."""
  if not name and own != 'byte' and not os.path.exists(own):
    vocabulary.refuse_tekken(pathlib.Path(own))
    raise ConfigError(
      f"{own!r}: is not there; name the model's by --tokenizer=FILE, or "
      '--tokenizer=byte where it was trained on bytes'
    )
  name = name or own
  if name == 'byte':  # the model's bos_id may be another
    return ByteTokenizer()
  return load(name, config.bos_id, config.eos_id)
