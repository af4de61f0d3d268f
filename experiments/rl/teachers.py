"""Teachers: on-policy distillation, where a token is paid and not an answer.

The pupil answers, and teachers read its answers: the advantage of a token is
log teacher - log pupil (`advantages.taught`). So it learns from its own
mistakes, as by reinforcement, and from each of their tokens. V4 makes one model
of its specialists so: each teaches the questions of its kind.

V4 sums the divergence over the whole vocabulary. Here it is estimated by the
token drawn, as Thinking Machines do: a teacher leaves 4 bytes of a token. Its
hidden states, of which V4 makes the logits again, would be 2 D bytes, and the
logits 2 V: with V3's sizes 14 KB and 259 KB.
"""

from __future__ import annotations

import pathlib
from typing import NamedTuple

from mla_moe import files, sharding, vocabulary
from mla_moe.config import Config, ConfigError, ModelConfig
from mla_moe.hf import config_json, source
from mla_moe.types import PyTree

from .. import cli, run_tokenizer, workdir
from ..data import tokenizer


class Teacher(NamedTuple):
  """A model that reads answers; variables: {'params', 'router'}.

  Without a `kind` it teaches by all questions.
  """

  model: ModelConfig
  variables: PyTree
  weight: float
  kind: str = ''

  def share(self, kind: str) -> float:
    """Returns its part of the advantage of an answer to a question."""
    return self.weight if self.kind in ('', kind) else 0.0


def load(config: Config, words: tokenizer.Tokenizer) -> list[Teacher]:
  """Returns the teachers of `config.rl`, on its mesh.

  Args:
    config: of the pupil's run.
    words: the pupil's tokenizer.

  Raises:
    ConfigError: a teacher that is not there, or has another vocabulary.
  """
  mesh = None
  if config.mesh.devices > 1:
    mesh = sharding.make_mesh(config.mesh)
  return [
    _teacher(config, words, name, mesh)._replace(weight=weight, kind=kind)
    for name, weight, kind in map(_whole, config.rl.teachers)
  ]


def shape_of(name: str, config: Config) -> tuple[ModelConfig, str]:
  """Returns a teacher's model, and the dtype that its weights will have.

  No weights are read. Of a folder that is not here it is the config's model.
  """
  folder = pathlib.Path(name)
  if name and (folder / 'checkpoints').is_dir():
    return workdir.read_config(folder).model, 'float32'
  if name and folder.is_dir():
    values, dtype = (
      files.read_json(source.config_path(folder)),
      config.model.dtype,
    )
    return config_json.read(values, dtype), dtype
  return config.model, 'float32'


def check_kinds(config: Config, kinds: set[str]) -> None:
  """Refuses a teacher of a kind that no question is of.

  Raises:
    ConfigError: names the kind, and those of the questions.
  """
  for name, _, kind in map(_whole, config.rl.teachers):
    if kind and kind not in kinds:
      known = ', '.join(sorted(map(repr, kinds - {''}))) or 'none'
      raise ConfigError(
        f'rl.teachers: {name} teaches questions of the kind {kind!r}, and '
        f'{config.rl.task} has {known}; a line of it names its "kind"'
      )


def _whole(teacher: tuple) -> tuple[str, float, str]:
  name, weight, *kind = teacher
  return name, weight, *(kind or ('',))


def digest(teacher: Teacher) -> str:
  """Returns the teacher's sums: a run resumes with the very same weights."""
  from ..checkpointing import fingerprint

  values, _ = fingerprint.read(fingerprint.of(teacher.variables))
  return repr(sorted(values.items()))


def _teacher(config, words, name, mesh) -> Teacher:
  from mla_moe import load_huggingface

  from ..checkpointing.load import load_run

  folder = cli.path('rl.teachers', name)
  if not name or not folder.is_dir():
    raise ConfigError(
      f'rl.teachers names {name!r}: is no folder; set --teacher=RUN, or a '
      'release in .safetensors'
    )
  if (folder / 'checkpoints').is_dir():
    run, variables = load_run(folder, mesh=mesh)
    model = run.model
    own = run_tokenizer.path_of(folder, run.data.tokenizer)
  else:
    model, variables = load_huggingface(folder, config.model.dtype, mesh)
    own = str(vocabulary.file_of(str(folder)))
  theirs = tokenizer.load(own, model.bos_id, model.eos_id)
  files_of = [x.fingerprint.split(':')[0] for x in (words, theirs)]
  if len({*files_of}) > 1 or model.vocab != config.model.vocab:
    raise ConfigError(
      f'rl.teachers: {name} has {model.vocab} ids of {own!r}, and the pupil '
      f'{config.model.vocab} of {config.data.tokenizer!r}; a teacher reads '
      "the pupil's ids, so that both need one tokenizer"
    )
  if model.max_positions < config.data.seq_len:
    raise ConfigError(
      f'rl.teachers: {name} reads max_positions={model.max_positions} tokens, '
      f'fewer than data.seq_len={config.data.seq_len}; name another teacher'
    )
  return Teacher(model, variables, 0.0)
