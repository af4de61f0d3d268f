"""The tokenizer of a run: a copy in the run's folder, wherever it was read.

A path stands for its content. `data.tokenizer` says where a run that begins
finds its tokenizer; the run copies it, with its settings and chat template,
into its folder `huggingface`, and from then on reads the copy. So a run goes
on, and speaks, where it was moved or copied to. Another path is no other run;
another tokenizer is.
"""

from __future__ import annotations

import dataclasses
import pathlib
import shutil

from mla_moe import files, vocabulary
from mla_moe.config import Config, ConfigError

FOLDER = 'huggingface'  # also of a release that a run began from


def path_of(run: pathlib.Path, name: str) -> str:
  """Returns the tokenizer to read where a run's config says `name`."""
  own = vocabulary.file_of(str(run / FOLDER))
  return str(own) if name != 'byte' and own.is_file() else name


def resolved(run: pathlib.Path, config: Config) -> Config:
  """Returns the config with the run's copy as its tokenizer."""
  name = path_of(run, config.data.tokenizer)
  data = dataclasses.replace(config.data, tokenizer=name)
  return dataclasses.replace(config, data=data)


def adopt(run: pathlib.Path, name: str, begun: bool) -> None:
  """Copies the tokenizer `name` into the run's folder, if there is one.

  Raises:
    ConfigError: it cannot be read; or it is not the one of a run that has
      `begun`.
  """
  if name == 'byte' or not vocabulary.exists(name):
    return
  path, own = vocabulary.file_of(name), vocabulary.file_of(str(run / FOLDER))
  content = files.read_bytes(path)
  if own.is_file() and files.read_bytes(own) == content:
    return
  if own.is_file() and begun:
    raise ConfigError(
      f'data.tokenizer={name!r}: is not the one of this run, '
      f'{own}; leave it out, or name another --workdir'
    )
  from mla_moe.hf import save

  # Settings beside a file of another name may belong to another tokenizer. A
  # link is read, and nothing beside it.
  is_whole = path.name in vocabulary.FILES and not path.is_symlink()
  extras = save.extras_of(path.parent) if is_whole else {}
  extras |= {vocabulary.FILES[path.suffix == '.model']: content}
  folder = run / FOLDER
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir(mode=0o700)
  for extra, source in extras.items():
    if not isinstance(source, bytes):
      source = files.read_bytes(source)
    (folder / extra).write_bytes(source)
