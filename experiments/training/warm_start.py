"""A warm start: a run that begins from the weights of another run or a release.

It begins at step 0 with a text, schedules and a length of its own; only the
shapes of the model must be the same. The optimizer's moments come along if the
other run had the same optimizer, and both learn from text or both from rewards.
A dense model may begin a run with an indexer, whose weights are random then.
The run saves step 0 before it takes a step, and depends on its origin no more;
a run that is killed before that begins again from the very checkpoint that its
folder names.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from typing import Any, NamedTuple

from mla_moe import files
from mla_moe.config import Config, ConfigError, ModelConfig

from .. import distributed, indexers, workdir
from ..adapters import base as frozen_base
from ..checkpointing import bucket, storage

_FILE = 'init.json'
# Fields that say only with which numbers a model is computed or begins.
_NUMBERS = ('compute', 'dtype', 'precision', 'init_std', 'release')


class Origin(NamedTuple):
  """Where a run's weights are from.

  source: the other run's folder, or the release's. step: of the checkpoint, or
  None for a release. moments: whether the optimizer's came along.
  """

  source: str
  step: int | None = None
  moments: bool = False

  def __str__(self) -> str:
    place = '' if self.step is None else f' at step {self.step}'
    part = 'weights and moments' if self.moments else 'weights alone'
    return f'{self.source}{place}, {part}'


def recorded(path: pathlib.Path) -> Origin | None:
  """Returns the origin of the run in this folder, or None.

  Raises:
    ConfigError: a record that cannot be read.
  """
  if not (path / _FILE).exists():
    return None
  try:
    return Origin(**json.loads(files.read_bytes(path / _FILE)))
  except (ValueError, TypeError, RecursionError) as error:
    raise ConfigError(f'{path}/{_FILE}: cannot be read ({error})') from None


def chosen(path: pathlib.Path, init: str, begun: bool) -> Origin | None:
  """Returns the origin of a run by its flag `init` ('': none) and its record.

  Raises:
    ConfigError: the run has begun, and not from there.
  """
  origin = recorded(path)
  if not init:
    return origin
  source = os.fspath(storage.path(init))
  if origin and _is_same(origin, source):
    return origin
  if begun:
    raise ConfigError(
      f'--init={init}: the run in {path} has begun, from '
      f'{origin.source if origin else "random weights"}; name another --workdir'
    )
  return Origin(source)


def _is_same(origin: Origin, source: str) -> bool:
  """Whether the origin is the folder `source`, or was before it moved."""
  if origin.source == source or not storage.path(origin.source).exists():
    return True
  if origin.step is None:
    return False
  name = f'checkpoints/{origin.step}/seal.json'
  folders = [storage.of(x) for x in (origin.source, source)]
  return (
    all((folder.path / name).is_file() for folder in folders)
    and len({folder.read(name) for folder in folders}) == 1
  )


def begin(setup, origin: Origin, *, allow_unsealed: bool = False) -> Any:
  """Returns the state at step 0, and records the origin in the run's folder.

  Raises:
    ConfigError: no checkpoint there, a model of another shape, or adapters
      over another base.
  """
  folder = bucket.here('--init', origin.source)
  if workdir.is_run(folder):
    state, copy = _of_run(setup, folder, origin.step, allow_unsealed)
    origin = copy._replace(source=origin.source)  # `folder` may be a copy
  elif list(folder.glob('*.safetensors*')):
    state, origin = _of_release(setup, folder), Origin(origin.source)
  else:
    raise ConfigError(
      f'--init={origin.source}: holds neither a run with a checkpoint nor a '
      'release in .safetensors'
    )
  if distributed.first():
    workdir.write(setup.path / _FILE, json.dumps(origin._asdict()))
    print(f'Begins from {origin}.')
  return state


def _of_run(setup, folder, step, allow_unsealed) -> tuple[Any, Origin]:
  from mla_moe.train.state import RENAMED

  from ..checkpointing import store
  from . import program

  config, theirs = setup.config, workdir.read_config(folder)
  check_tokenizer(setup, theirs, folder)
  check_adapters(config.model, theirs.model, str(folder))
  model = _like(config.model, theirs.model, str(folder))
  like = dataclasses.replace(
    config, model=model, optim=theirs.optim, rl=theirs.rl
  )
  restored = store.restore(
    workdir.checkpoints(folder),
    program.state_shapes(like, setup.mesh),
    before=None if step is None else step + 1,
    allow_unsealed=allow_unsealed,
    renamed=RENAMED,
  )
  if restored is None or step not in (None, restored.step):
    raise ConfigError(
      f'--init={folder}: has no checkpoint {"yet" if step is None else step}'
    )
  if config.model.lora.rank:
    frozen_base.compare(setup.base, restored.facts, config, restored.step)
  state = restored.state
  # The gradients of rewards are not of the size that those of a text were.
  moments = config.optim.optimizer == theirs.optim.optimizer
  moments = moments and bool(config.rl.task) == bool(theirs.rl.task)
  moments = moments and config.model.dsa == model.dsa
  moments = moments and config.optim.trains == theirs.optim.trains
  opt = state.opt if moments else None
  origin = Origin(str(folder), restored.step, moments)
  variables = _whole(setup, {'params': state.params, 'router': state.router})
  return at_step_0(setup.config, setup.mesh, *variables, opt), origin


def _of_release(setup, folder: pathlib.Path) -> Any:
  from mla_moe import load_huggingface

  if setup.config.model.lora.rank:
    raise ConfigError(
      f'--init={folder}: adapters are trained over a release that run.base '
      'names; leave --init out, or begin from the adapters of a run'
    )
  model, variables = load_huggingface(folder, mesh=setup.mesh)
  _like(setup.config.model, model, str(folder))
  return at_step_0(setup.config, setup.mesh, *_whole(setup, variables))


def _like(ours: ModelConfig, theirs: ModelConfig, source: str) -> ModelConfig:
  """Returns our model with their indexer, or none; refuses other shapes."""
  own = ours.dsa.heads and theirs.dsa.heads
  attention = theirs.dsa.attention if own else ours.dsa.attention
  dsa = dataclasses.replace(ours.dsa, attention=attention)
  like = dataclasses.replace(ours, dsa=dsa if own else theirs.dsa)
  check(ours if own or not ours.dsa.heads else like, theirs, source)
  return like


def _whole(setup, variables: Any) -> tuple[Any, Any]:
  """Returns params and router, the indexer's included."""
  config = setup.config
  args = config.model, config.run.seed, config.optim.trains, setup.mesh
  variables = indexers.completed(variables, *args)
  return variables['params'], variables['router']


def at_step_0(
  config: Config, mesh: Any, params: Any, router: Any, opt: Any = None
) -> Any:
  """Returns a run's state of these weights, in its layout on its mesh.

  `opt` is fresh where None. The reference of reinforcement is a copy.
  """
  import jax
  import jax.numpy as jnp

  from mla_moe.train import optim, stage
  from mla_moe.train.state import State, empty_window, reference_of

  from . import program

  layout = program.state_shapes(config, mesh)
  places = jax.tree.map(lambda x: x.sharding, layout)
  if opt is None:
    init = optim.optimizer(config.optim).init
    part = stage.trained(params, config.optim)
    opt = jax.jit(init, out_shardings=places.opt)(part)
  zero, window = jnp.zeros((), jnp.int32), empty_window(config.optim)
  reference = reference_of(params, router, config)
  state = State(zero, params, router, opt, window, reference)
  state = jax.device_put(state, places)
  # A step gives its state's buffers away: the reference needs its own.
  return state.replace(reference=jax.tree.map(jnp.copy, state.reference))


def check_tokenizer(setup, theirs: Config, folder: pathlib.Path) -> None:
  """Refuses a run of another tokenizer, whose ids are other texts.

  A tokenizer that is no longer where that run read it cannot be compared.

  Raises:
    ConfigError: names both.
  """
  from ..data import tokenizer

  name, model = theirs.data.tokenizer, theirs.model
  try:
    words = tokenizer.load(name, model.bos_id, model.eos_id)
  except ConfigError:
    return
  files_of = [x.fingerprint.split(':')[0] for x in (words, setup.tokenizer)]
  if len({*files_of}) > 1:
    raise ConfigError(
      f'--init={folder}: its ids are of data.tokenizer={name!r}, and not of '
      f'{setup.config.data.tokenizer!r}; set --config.data.tokenizer={name}'
    )


def check_adapters(ours: ModelConfig, theirs: ModelConfig, source: str) -> None:
  """Refuses other adapters, or adapters where there are none.

  Raises:
    ConfigError: names the differing fields.
  """
  like = dataclasses.replace(ours, lora=theirs.lora, base=theirs.base)
  lines = workdir.differences(ours, like, 'config.model')
  if lines and (ours.lora.rank or theirs.lora.rank):
    raise ConfigError(
      f'--init={source}: its adapters are others ({"; ".join(lines)}); set '
      'these fields as they are there'
    )


def check(
  ours: ModelConfig, theirs: ModelConfig, source: str, flag: str = '--init'
) -> None:
  """Refuses a model of other shapes, and prints what else differs.

  Raises:
    ConfigError: names the differing fields.
  """
  same = {name: getattr(ours, name) for name in _NUMBERS}
  lines = workdir.differences(
    ours, dataclasses.replace(theirs, **same), 'config.model'
  )
  if not lines:
    return
  text = '; '.join(lines)
  if _shapes(ours) != _shapes(theirs):
    raise ConfigError(
      f'{flag}={source}: its model has other shapes ({text}); set these fields '
      'as they are there'
    )
  if distributed.first():
    print(f'The model is computed otherwise than in {source}: {text}.')


def _shapes(model: ModelConfig) -> dict[str, tuple]:
  import jax
  import jax.numpy as jnp
  from flax import linen as nn

  from mla_moe.model import transformer

  tokens = jnp.zeros((1, model.mtp.depth + 2), jnp.int32)
  init = transformer.Transformer(model).init
  shapes = nn.unbox(jax.eval_shape(init, jax.random.key(0), tokens))
  leaves = jax.tree_util.tree_flatten_with_path(shapes)[0]
  return {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}
