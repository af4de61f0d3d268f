"""Checks of a config by reinforcement, before a program is compiled.

A rule stands here where two fields of a run exclude each other; bounds of one
field are its own class's.
"""

from __future__ import annotations

import jax

from mla_moe import sharding
from mla_moe.checked import is_number
from mla_moe.config import Config, ConfigError

from . import engine


def check(config: Config) -> None:
  """Refuses a config that reinforcement learning cannot run.

  Raises:
    ConfigError: names the field and the fix.
  """
  rl, data, run = config.rl, config.data, config.run
  if not rl.task:
    raise ConfigError(
      "rl.task='': names the questions; set --config.rl.task=sort8, or a "
      '.jsonl file of questions and answers'
    )
  for pair in rl.rewards:
    if not (isinstance(pair, tuple) and len(pair) == 2 and is_number(pair[1])):
      raise ConfigError(
        f'rl.rewards={rl.rewards!r}: must be (name, weight) pairs, such as '
        "(('accuracy', 1.0),)"
      )
  if config.model.eos_id < 0:
    raise ConfigError(
      'model.eos_id=-1: without an end token no answer ends; set one'
    )
  engine.check(config)
  names = [name for name, _ in rl.rewards]
  if len({*names}) < len(names):
    raise ConfigError(
      f'rl.rewards={rl.rewards!r}: names a reward twice; add up its weights'
    )
  rows = rl.prompts * rl.samples // rl.minibatches
  rules = [
    ('data.batch_size', data.batch_size, rows, 'the answers of an update'),
    ('data.packing', data.packing, 'separate', 'answers see no other ones'),
    ('data.batch_start', data.batch_start, 0, 'a rollout does not grow'),
    ('mesh.stage', config.mesh.stage, 1, 'a pipeline counts padding'),
    ('optim.spike_sigma', config.optim.spike_sigma, 0, 'losses are near 0'),
    ('run.keep_best', run.keep_best, 0, 'there are no bits per byte'),
    ('processes', jax.process_count(), 1, 'one process draws all answers'),
  ]
  core = config.model.compute.attention
  xla = core == 'auto' and sharding.target_platform() != 'tpu'
  if rl.prompt == 'shared' and not (xla or core in ('xla', 'reference')):
    raise ConfigError(
      "rl.prompt='shared': the attention kernel does not know shared prompts; "
      'set --config.model.compute.attention=xla'
    )
  for name, value, right, reason in rules:
    if value != right:
      raise ConfigError(
        f'{name}={value!r}: {reason}; it must be {right!r} here'
      )
  for name in ('steps', 'save_every'):
    if getattr(run, name) % rl.minibatches:
      raise ConfigError(
        f'run.{name}={getattr(run, name)}: must be a multiple of '
        f'rl.minibatches={rl.minibatches}, since a run is saved between '
        'rollouts'
      )
