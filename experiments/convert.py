"""Converts a released checkpoint into a run, or a run into a release.

  python -m experiments.convert --source=HF_DIR --target=runs/mine
  python -m experiments.convert --source=runs/mine --target=HF_DIR --fp8

The first command makes a run at step 0 with the released weights and a fresh
optimizer. The recipe of --config (with its overrides) gives data, optimizer,
mesh and length, and the parts of a model that a release does not fix: dtype,
precision and kernels. A dense release gets the indexer of the recipe's
`model.dsa`, with random weights, for sparse attention's warm-up. The release's
tokenizer, chat template and settings of generation are copied into the run's
folder `huggingface`. To train on:

  python -m experiments.train --config=runs/mine/config.py --workdir=runs/mine

The second command writes the run's last checkpoint in the layout of the
releases. A source that is PEFT's folder of an adapter becomes a run, too, whose
base is --config.run.base, or the folder that the adapter names:

  python -m experiments.convert --source=PEFT_DIR --target=runs/mine \\
    --config=configs/lora.py:lite_l4 --config.run.base=HF_DIR

--check also loads the Hugging Face side with transformers and prints how far
each layer's output is from ours; with --source alone it does nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from absl import flags

from mla_moe import vocabulary
from mla_moe.config import Config, ConfigError, LoRAConfig, ModelConfig

from . import (
  against_transformers,
  cli,
  commands,
  indexers,
  mesh_check,
  run_tokenizer,
  tokenizer,
  workdir,
)
from .checkpointing import bucket

FLAGS = flags.FLAGS
TOLERANCE = 2e-4  # of the logits, with --check
_CONFIG = '''\
"""The config of this run, which began from a released checkpoint.

In the folder DIR of this file, wherever it was moved to:

  python -m experiments.train --config=DIR/config.py --workdir=DIR
"""

import json
import pathlib

from configs import variant
from mla_moe import config as c
from mla_moe import vocabulary


def get_config(arg=''):
  """config.json, beside this file."""
  path = pathlib.Path(__file__).with_name('config.json')
  values = json.loads(path.read_text(encoding='utf-8'))
  own = vocabulary.file_of(str(path.with_name('huggingface')))
  if own.exists():
    values['data']['tokenizer'] = str(own)
  return c.thaw(variant(c.freeze(values), arg))
'''


def define() -> None:
  """Defines this program's flags, and those of a config."""
  cli.define()
  cli.define_unsealed()
  text = 'A Hugging Face folder, or a run.'
  cli.define_path('source', '', text, read=cli.run_folder)
  cli.define_path('target', '', 'The folder to make, of the other kind.')
  flags.DEFINE_bool('fp8', False, 'Write FP8 with a scale per tile.')
  flags.DEFINE_bool('power_of_two', False, 'New FP8 scales are powers of two.')
  flags.DEFINE_enum(
    'dtype',
    'float32',
    ['float32', 'bfloat16'],
    'Of the written release (a run is float32).',
  )
  flags.DEFINE_bool('merge', False, "Write a run's adapters into their base.")
  flags.DEFINE_bool('force', False, 'Replace a checkpoint that exists.')
  flags.DEFINE_bool('check', False, 'Compare with transformers.')


def combined(released: ModelConfig, recipe: ModelConfig) -> ModelConfig:
  """Returns the released model, computed and rounded as the recipe says."""
  released = indexers.added(released, recipe.dsa)
  return dataclasses.replace(
    released,
    dtype=recipe.dtype,
    precision=recipe.precision,
    compute=recipe.compute,
  )


def to_run(
  source: pathlib.Path,
  target: pathlib.Path,
  recipe: Config,
  force: bool = False,
) -> None:
  """Writes a run at step 0 from a Hugging Face folder, complete or not at all.

  Raises:
    ConfigError: bad input, a target that exists, or that a process writes to.
  """
  import jax.numpy as jnp

  from mla_moe import load_huggingface, sharding
  from mla_moe.hf import save

  from .training import warm_start

  _check_target(source, target, force)
  extras = save.extras_of(source)
  name = _tokenizer(source, target, [*extras], recipe.data.tokenizer)
  data = dataclasses.replace(recipe.data, tokenizer=name)
  mesh = sharding.make_mesh(recipe.mesh) if recipe.mesh.devices > 1 else None
  with _claimed(target):
    model, variables = load_huggingface(source, jnp.float32, mesh)
    model = combined(model, recipe.model)
    config = dataclasses.replace(recipe, model=model, data=data)
    mesh_check.check(config)
    args = model, config.run.seed, config.optim.trains, mesh
    variables = indexers.completed(variables, *args)
    weights = variables['params'], variables['router']
    state = warm_start.at_step_0(config, mesh, *weights)
    _write_run(target, config, state, extras)


def adapters_to_run(
  source: pathlib.Path,
  target: pathlib.Path,
  recipe: Config,
  force: bool = False,
) -> None:
  """Writes a run at step 0 from PEFT's folder, complete or not at all.

  Raises:
    ConfigError: as `to_run`; an adapter of another kind, or without its base.
  """
  from mla_moe import files, sharding
  from mla_moe.hf import config_json
  from mla_moe.hf import source as release

  from .adapters import base as frozen_base
  from .adapters import peft_files
  from .training import warm_start

  _check_target(source, target, force)
  base = recipe.run.base or peft_files.base_of(source)
  folder = pathlib.Path(base)
  if not base or not folder.is_dir():
    raise ConfigError(
      f'{source}: its base {base!r} is no folder here; name the release by '
      '--config.run.base'
    )
  _check_outside('run.base', folder, target)
  words = files.read_json(release.config_path(folder))
  model = config_json.read(words, recipe.model.dtype)
  own = LoRAConfig(plus=recipe.model.lora.plus)
  model = dataclasses.replace(combined(model, recipe.model), lora=own)
  model, params, _ = peft_files.load(source, model)
  model = dataclasses.replace(model, base=recipe.model.base)
  extras = _extras_of_adapter(source, folder)
  name = _tokenizer(folder, target, [*extras], recipe.data.tokenizer)
  config = dataclasses.replace(
    recipe,
    model=model,
    data=dataclasses.replace(recipe.data, tokenizer=name),
    run=dataclasses.replace(recipe.run, base=str(folder)),
  )
  frozen_base.check(config)
  mesh_check.check(config)
  mesh = sharding.make_mesh(config.mesh) if config.mesh.devices > 1 else None
  with _claimed(target):
    base = frozen_base.load(config, mesh)
    model = combined(base.model, recipe.model)  # without MTP that is not there
    config = dataclasses.replace(config, model=model)
    state = warm_start.at_step_0(config, mesh, params, base.router)
    _write_run(target, config, state, extras, {'base': base.fingerprint})


def _extras_of_adapter(
  source: pathlib.Path, base: pathlib.Path
) -> dict[str, pathlib.Path | bytes]:
  """Returns the base's tokenizer and settings, or the adapter's own.

  Trainers write the tokenizer with which they trained beside an adapter.
  """
  from mla_moe.hf import save

  extras, own = save.extras_of(base), save.extras_of(source)
  if not {*vocabulary.FILES} & own.keys():
    return extras
  print(f"The tokenizer is the adapter's, of {source}.")
  others = {k: x for k, x in extras.items() if k not in vocabulary.FILES}
  return others | own


@contextlib.contextmanager
def _claimed(target: pathlib.Path) -> Iterator[None]:
  """Keeps other programs from a run that is there."""
  free = contextlib.nullcontext()
  with workdir.lock(target) if workdir.is_run(target) else free:
    yield


def _write_run(
  target: pathlib.Path,
  config: Config,
  state: Any,
  extras: dict[str, pathlib.Path | bytes],
  facts: Mapping[str, str] = MappingProxyType({}),
) -> None:
  """Writes a run at step 0, and a release's other files (`extras`)."""
  from mla_moe.hf import save

  from .checkpointing import saving

  with (
    save.replacing(target) as scratch,
    workdir.claim(scratch, config) as path,
  ):
    own = path / run_tokenizer.FOLDER
    if {*vocabulary.FILES} & extras.keys():  # not those of before
      shutil.rmtree(own, ignore_errors=True)
    own.mkdir(exist_ok=True)
    for name, file in extras.items():
      if isinstance(file, bytes):
        (own / name).write_bytes(file)
      else:
        shutil.copyfile(file, own / name)
    (path / 'config.py').write_text(commands.typed(_CONFIG), encoding='utf-8')
    with saving.Writer(path / 'checkpoints', config.run.keep) as writer:
      # The empty corpus: the run may train on any text.
      own = {'corpus': '', 'config': workdir.digest(config)}
      writer.save(0, state, own | dict(facts))


def _tokenizer(
  source: pathlib.Path, target: pathlib.Path, extras: list[str], recipe: str
) -> str:
  """Returns the run's tokenizer: the release's, else the recipe's.

  Raises:
    ConfigError: bytes in the place of a tokenizer that is not read.
  """
  for name in vocabulary.FILES:
    if name in extras:
      return str(target / run_tokenizer.FOLDER / name)
  if recipe == 'byte':
    vocabulary.refuse_tekken(vocabulary.file_of(str(source)))
  print(
    f'WARNING: {source}: has no {" or ".join(vocabulary.FILES)}; the tokenizer '
    f"is the recipe's, --config.data.tokenizer={recipe}."
  )
  return recipe


def _is_free(target: pathlib.Path, force: bool) -> bool:
  """Whether nothing is at the target; without `force` nothing else may be."""
  if not target.exists() or (target.is_dir() and not any(target.iterdir())):
    return True
  if not force:
    raise ConfigError(f'--target={str(target)!r}: exists; --force replaces it')
  return False


def _check_target(
  source: pathlib.Path, target: pathlib.Path, force: bool
) -> None:
  """Refuses a target that exists, but a run with `force`."""
  if _is_free(target, force):
    return
  if not workdir.is_run(target):
    raise ConfigError(
      f'--target={str(target)!r}: is no run, so it is not replaced'
    )
  workdir.read_config(target)  # another program's `checkpoints` has none
  _check_outside('--source', source, target)


def _check_outside(
  name: str, folder: pathlib.Path, target: pathlib.Path
) -> None:
  """Refuses to read from a target, which would be deleted."""
  if folder.resolve().is_relative_to(target.resolve()):
    raise ConfigError(
      f'{name}={str(folder)!r}: lies in the target, which would be deleted'
    )


def to_huggingface(
  source: pathlib.Path,
  target: pathlib.Path,
  *,
  fp8: bool = False,
  power_of_two: bool = False,
  dtype: str = 'float32',
  force: bool = False,
  allow_unsealed: bool = False,
  merge: bool = False,
) -> None:
  """Writes a run's last checkpoint in the layout of the releases.

  Adapters are written in PEFT's format, or with `merge` in their base.

  Raises:
    ConfigError: no checkpoint, a target that exists, a model that no release
      computes.
  """
  from mla_moe import save_huggingface

  from .checkpointing.load import load_run

  has_adapters = workdir.read_config(source).model.lora.rank > 0
  if merge and not has_adapters:
    raise ConfigError('--merge: is for a run with adapters (model.lora.rank)')
  if has_adapters and not merge:
    options = {'fp8': fp8, 'power_of_two': power_of_two}
    options['dtype'] = dtype != 'float32'
    if any(options.values()):
      name = next(filter(options.get, options))
      raise ConfigError(
        f'--{name}: adapters are written in float32; leave it out, or write '
        'them into their base (--merge)'
      )
    _write_adapters(source, target, allow_unsealed, force)
    return
  config, variables = load_run(source, allow_unsealed=allow_unsealed)
  if merge:
    from .adapters import lora

    variables |= {'params': lora.merged(variables['params'], config.model)}
  extras = _extras(source, config)
  save_huggingface(
    target,
    config.model,
    variables,
    fp8,
    power_of_two=power_of_two,
    dtype=None if fp8 and dtype == 'float32' else dtype,
    extras=extras,
    force=force,
  )
  if config.model.dsa.heads and config.model.dsa.attention == 'dense':
    print(
      f"The release's readers will select {config.model.dsa.topk} keys "
      '(sparse); this model was trained dense '
      "(config.model.dsa.attention='dense')."
    )


def _write_adapters(
  source: pathlib.Path, target: pathlib.Path, allow_unsealed: bool, force: bool
) -> None:
  """Writes a run's adapters alone, in PEFT's format, complete or not at all."""
  from mla_moe.hf import save

  from .adapters import peft_files
  from .checkpointing.load import load_state

  peft_files.check(workdir.read_config(source).model)
  own = {peft_files.CONFIG, peft_files.WEIGHTS}
  if not _is_free(target, force) and (
    not target.is_dir() or {path.name for path in target.iterdir()} != own
  ):
    raise ConfigError(
      f'--target={str(target)!r}: is no folder of adapters alone, so it is not '
      'replaced'
    )
  config, restored = load_state(source, allow_unsealed=allow_unsealed)
  params = restored.state.params
  with save.replacing(target) as scratch:
    peft_files.export(scratch, config.model, params, config.run.base)
    scratch.chmod(0o755)


def _extras(
  run: pathlib.Path, config: Config
) -> dict[str, pathlib.Path | bytes]:
  """Returns {name: file or content} of a run's tokenizer and its settings.

  A file of another name than tokenizer.json goes alone: settings beside it may
  belong to another tokenizer.
  """
  from mla_moe.hf import save

  folder, name = run / run_tokenizer.FOLDER, config.data.tokenizer
  extras = save.extras_of(folder) if folder.is_dir() else {}
  if {*vocabulary.FILES} & extras.keys():
    return extras
  if name == 'byte':
    # The ids of a release that began as one are of another tokenizer.
    ends = config.model.bos_id, config.model.eos_id
    if ends == (vocabulary.BYTE.bos_id, vocabulary.BYTE.eos_id):
      extras['tokenizer.json'] = tokenizer.byte_tokenizer()
    return extras
  path = pathlib.Path(name).expanduser()
  if path.is_dir():
    return save.extras_of(path) | extras
  if not path.is_file():
    print(f'WARNING: data.tokenizer={name!r} is gone: none is exported.')
    return extras
  if path.name in vocabulary.FILES:
    return save.extras_of(path.parent) | extras
  return extras | {vocabulary.FILES[path.suffix == '.model']: path}


def main() -> None:
  """Converts; errors of the disk are one line."""
  try:
    _convert()
  except OSError as error:
    if error.errno not in workdir.DISK:
      raise
    place = pathlib.Path(error.filename or FLAGS.target)
    raise cli.Stopped(workdir.trouble(place.parent, error)) from error


def _is_adapter(source: pathlib.Path) -> bool:
  return (source / 'adapter_config.json').is_file()


def _check_flags(source: pathlib.Path) -> None:
  """Refuses flags that are of the other direction, or of whole models.

  Raises:
    ConfigError: names the flag and its use.
  """
  is_run, is_adapter = workdir.is_run(source), _is_adapter(source)
  if not is_run:
    names = ['fp8', 'power_of_two', 'merge']
    names = [name for name in names if FLAGS[name].value]
    names += ['dtype'] * (FLAGS.dtype != 'float32')
    if names:
      raise ConfigError(
        f'--{names[0]}: a run holds float32'
        + (', and adapters apart' if is_adapter else '')
        + '; convert to a run first, then that with this flag'
      )
  else:
    own = workdir.read_config(source).model.lora.rank > 0
    is_adapter = own and not FLAGS.merge
  if FLAGS.check and is_adapter:
    raise ConfigError(
      f'--check: compares whole models, and adapters of {source} are none; '
      'convert to a run, then that with --merge --check'
    )


def _convert() -> None:
  """Converts in the direction that the kind of the source implies."""
  if not FLAGS.source:
    raise ConfigError('--source: name a Hugging Face folder or a run')
  source = bucket.here('--source', FLAGS.source)
  if not source.is_dir():
    raise ConfigError(f'--source={FLAGS.source!r}: is no folder')
  target = pathlib.Path(FLAGS.target) if FLAGS.target else None
  if target is None and not (FLAGS.check and not workdir.is_run(source)):
    raise ConfigError('--target: name the folder to make')
  _check_flags(source)
  release = source
  if target is not None and workdir.is_run(source):
    to_huggingface(
      source,
      target,
      fp8=FLAGS.fp8,
      power_of_two=FLAGS.power_of_two,
      dtype=FLAGS.dtype,
      force=FLAGS.force,
      allow_unsealed=FLAGS.allow_unsealed,
      merge=FLAGS.merge,
    )
    release = target
  elif target is not None:
    write = adapters_to_run if _is_adapter(source) else to_run
    write(source, target, cli.config(), FLAGS.force)
    print(
      commands.typed('Train it: python -m experiments.train'),
      f'--config={target}/config.py --workdir={target}',
    )
  if FLAGS.check and against_transformers.compare(release) > TOLERANCE:
    raise RuntimeError(f'the logits differ by more than {TOLERANCE}')


if __name__ == '__main__':
  cli.run(main, define)
