"""Released checkpoints into runs, and runs into the releases' layout.

  python -m experiments.convert --source=HF_DIR --target=runs/mine
  python -m experiments.convert --source=runs/mine --target=HF_DIR --fp8

The first makes a run at step 0 with the weights, a fresh optimizer and the
recipe of --config (with its overrides): data, optimizer, mesh and length, and
what a release does not say of the model: the activations' dtype, remat and
kernels. Tokenizer, chat template and generation settings lie in the run's
folder `huggingface`. To train it further:

  python -m experiments.train --config=runs/mine/config.py --workdir=runs/mine

The second writes the run's last checkpoint. --check loads the Hugging Face
side with transformers, too, and prints how far each layer's output is from
ours; with --source alone it does nothing else.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import shutil
import tempfile

from absl import flags

from experiments import cli, opened, workdir
from mla_moe.config import Config, ConfigError, ModelConfig

FLAGS = flags.FLAGS
TOLERANCE = 2e-4
_CONFIG = '''\
"""The config of this run, which began from a released checkpoint.

  python -m experiments.train --config={0}/config.py --workdir={0}
"""

import json
import pathlib

from mla_moe import config as c


def get_config(arg=''):
  """config.json, beside this file."""
  path = pathlib.Path(__file__).with_name('config.json')
  return c.thaw(c.variant(c.freeze(json.loads(path.read_text())), arg))
'''


def define() -> None:
  """This program's flags, beside those of a config."""
  cli.define()
  cli.define_unsealed()
  flags.DEFINE_string('source', '', 'A Hugging Face folder, or a run.')
  flags.DEFINE_string('target', '', 'The other, to be made.')
  flags.DEFINE_bool('fp8', False, 'Write FP8 blocks.')
  flags.DEFINE_bool('power_of_two', False, 'New FP8 scales are powers of two.')
  flags.DEFINE_enum(
    'dtype',
    'float32',
    ['float32', 'bfloat16'],
    'Of what is written for transformers (a run is float32).',
  )
  flags.DEFINE_bool('force', False, 'Replace a checkpoint that is there.')
  flags.DEFINE_bool('check', False, 'Compare with transformers.')


def is_run(folder: pathlib.Path) -> bool:
  """Whether the folder is a run's."""
  return (folder / 'checkpoints').is_dir()


def combined(released: ModelConfig, recipe: ModelConfig) -> ModelConfig:
  """The released model, computed and rounded as the recipe says."""
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
  """A run at step 0 from a Hugging Face folder, whole or not at all.

  Raises:
    ConfigError: bad input, or a target that exists.
  """
  import jax
  import jax.numpy as jnp

  from mla_moe import load_huggingface, sharding
  from mla_moe.checkpoint import store
  from mla_moe.hf import save
  from mla_moe.train import optim, step

  if target.exists() and (not target.is_dir() or any(target.iterdir())):
    if not force:
      raise ConfigError(
        f'--target={str(target)!r}: exists; --force replaces it'
      )
    if not is_run(target):
      raise ConfigError(
        f'--target={str(target)!r}: is no run, so it is not replaced'
      )
  mesh = sharding.make_mesh(recipe.mesh) if recipe.mesh.devices > 1 else None
  model, variables = load_huggingface(source, jnp.float32, mesh)
  model = combined(model, recipe.model)
  data = recipe.data
  if (source / 'tokenizer.json').exists():
    words = str(target / 'huggingface' / 'tokenizer.json')
    data = dataclasses.replace(data, tokenizer=words)
  config = dataclasses.replace(recipe, model=model, data=data)
  sharding.check(config)
  make = optim.optimizer(config.optim).init
  state = step.State(
    jnp.zeros((), jnp.int32),
    variables['params'],
    variables['router'],
    jax.jit(make)(variables['params']),
    step.fresh_guard(config.optim),
  )
  target.parent.mkdir(parents=True, exist_ok=True)
  scratch = pathlib.Path(
    tempfile.mkdtemp('.partial', f'.{target.name}.', target.parent)
  )
  try:
    with workdir.claim(scratch, config) as path:
      (path / 'huggingface').mkdir()
      save.copy_extras(source, path / 'huggingface')
      (path / 'config.py').write_text(_CONFIG.format(target))
      with store.Writer(path / 'checkpoints', config.run.keep) as saved:
        # No text has been trained on: any may be.
        facts = {'corpus': '', 'config': workdir.digest(config)}
        saved.save(0, state, facts)
    if target.exists():
      shutil.rmtree(target)
    os.replace(scratch, target)
  except BaseException:
    shutil.rmtree(scratch, ignore_errors=True)
    raise


def to_huggingface(
  source: pathlib.Path,
  target: pathlib.Path,
  *,
  fp8: bool = False,
  power_of_two: bool = False,
  dtype: str = 'float32',
  force: bool = False,
  unsealed: bool = False,
) -> None:
  """A run's last checkpoint in the releases' layout."""
  from mla_moe import save_huggingface

  config = workdir.read_config(source)
  extras = source / 'huggingface'
  if not extras.is_dir():
    extras = pathlib.Path(config.data.tokenizer).expanduser()
    extras = extras if extras.is_dir() else extras.parent
    extras = extras if config.data.tokenizer != 'byte' else None
  save_huggingface(
    target,
    config.model,
    opened.last_variables(source, config, unsealed),
    fp8,
    power_of_two=power_of_two,
    dtype=None if fp8 and dtype == 'float32' else dtype,
    extras=extras,
    force=force,
  )


def check(folder: pathlib.Path) -> float:
  """Prints each layer's largest error against transformers; returns logits'.

  What transformers cannot load by itself (FP8 without a GPU, Kimi K2's
  model_type) is given to it in float32, from a temporary folder.

  Raises:
    ConfigError: transformers is not there.
  """
  try:
    import torch
    import transformers
  except ImportError:
    raise ConfigError(
      '--check needs transformers: pip install torch transformers'
    ) from None
  import numpy as np

  from mla_moe import load_huggingface, save_huggingface
  from mla_moe.hf import config_json

  config, variables = load_huggingface(folder)
  values = config_json.read_json(folder / 'config.json')
  native = values.get('model_type') in ('deepseek_v2', 'deepseek_v3')
  tokens = np.random.default_rng(0).integers(0, config.vocab, (1, 64))
  with tempfile.TemporaryDirectory() as scratch:
    place = folder
    if values.get('quantization_config') or not native:
      place = pathlib.Path(scratch) / 'plain'
      save_huggingface(place, config, variables)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
      place,
      dtype=torch.float32,
      attn_implementation='eager',
      trust_remote_code=False,
    )
    with torch.no_grad():
      out = theirs(torch.from_numpy(tokens), output_hidden_states=True)
  ours = _outputs(config, variables, tokens)
  # transformers' last hidden state has been through the final norm.
  theirs = [x.numpy() for x in (*out.hidden_states, out.logits)]
  names = ['embedding', *(f'layer {i}' for i in range(config.layers - 1))]
  names += ['final norm', 'logits']
  error = 0.0
  for name, a, b in zip(names, ours, theirs, strict=True):
    error = float(np.abs(a - b).max())
    print(f'{name:12s} largest error {error:.2e} of {np.abs(b).max():.2e}')
  return error


def _outputs(config, variables, tokens) -> list:
  """Ours: the embedding, every layer but the last, final norm, logits."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from mla_moe import Transformer
  from mla_moe.model import block, rope

  params, router = variables['params'], variables['router']
  tokens = jnp.asarray(tokens, jnp.int32)
  positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
  cos, sin = rope.angles(positions, config.mla.rope_dim, config.mla.rope)
  x = params['embedding'][tokens]
  found = [x]
  for name, count in (
    ('dense', config.dense_layers),
    ('moe', config.moe_layers),
  ):
    layer = jax.jit(block.Block(config, name == 'moe').apply)
    for i in range(count):
      take = lambda leaf, i=i: leaf[i]
      one = {'params': jax.tree.map(take, params[name])}
      if name in router:
        one['router'] = jax.tree.map(take, router[name])
      x, _ = layer(one, x, cos, sin, None, None)
      found.append(x)
  network = Transformer(config)
  run = jax.jit(network.apply, static_argnames='method')
  found[-1] = run(variables, tokens, method=Transformer.features).hidden
  found.append(run(variables, tokens).logits)
  return [np.asarray(x) for x in found]


def main() -> None:
  """Converts, by what the source is."""
  if not FLAGS.source:
    raise ConfigError('--source: name a Hugging Face folder or a run')
  source = pathlib.Path(FLAGS.source).expanduser()
  if not source.is_dir():
    raise ConfigError(f'--source={FLAGS.source!r}: is no folder')
  target = pathlib.Path(FLAGS.target).expanduser() if FLAGS.target else None
  if target is None and not (FLAGS.check and not is_run(source)):
    raise ConfigError('--target: name the folder to make')
  side = source
  if target is not None and is_run(source):
    to_huggingface(
      source,
      target,
      fp8=FLAGS.fp8,
      power_of_two=FLAGS.power_of_two,
      dtype=FLAGS.dtype,
      force=FLAGS.force,
      unsealed=FLAGS.allow_unsealed,
    )
    side = target
  elif target is not None:
    if FLAGS.fp8:
      raise ConfigError('--fp8: a run holds float32; it is for the way back')
    to_run(source, target, cli.config(), FLAGS.force)
    print(
      f'Train it: python -m experiments.train --config={target}/config.py '
      f'--workdir={target}'
    )
  if FLAGS.check and check(side) > TOLERANCE:
    raise RuntimeError(f'the logits differ by more than {TOLERANCE}')


if __name__ == '__main__':
  cli.run(main, define)
