"""The plan of an ablation: its sizes, its arms, and the steps of each arm.

The first arm is the one that the others are compared with. Its config sets the
budget: `run.steps` steps, or the tokens, the training FLOPs or the seconds that
these take. Each other arm gets as many steps as that budget pays for, and its
schedule is stretched to them. A choice of what is equal is a choice of the
question: a dearer step wins at equal steps and may lose on the clock.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any, NamedTuple

from mla_moe.config import Config, ConfigError, freeze, thaw

from . import reading
from .recipe import Recipe, price, stretched, toy

EQUAL = ('steps', 'tokens', 'flops', 'seconds')
# Fields that two arms must share, or their losses are not of the same text.
_OF_TEXT = (
  *('data.source', 'data.field', 'data.tokenizer', 'data.dtype'),
  *('data.heldout', 'data.packing', 'data.fim_rate', 'model.vocab'),
)


class Plan(NamedTuple):
  """A checked ablation. `recipes` are {size: {arm: Recipe}}, all in order.

  In each size the first arm is the reference, of whose config the budget is,
  unless there are `seconds`. `points` are the evaluations of a run: it is
  trained in as many chunks. `seed` is the first pair's. `code` is a hash of the
  source of the ablation, to which functions of its own belong.
  """

  name: str
  title: str
  paper: str
  equal: str
  seconds: float
  points: int
  recipes: dict[str, dict[str, Recipe]]
  seed: int = 0
  code: str = ''

  @property
  def arms(self) -> list[str]:
    return list(next(iter(self.recipes.values())))


def make(
  name: str,
  *,
  sizes: str = '',
  arms: str = '',
  equal: str = '',
  steps: int = 0,
  seconds: float = 0.0,
  points: int = 10,
  seed: int = 0,
  smoke: bool = False,
) -> Plan:
  """Returns the checked plan of an ablation; '' and 0 leave its own values.

  With `smoke` its sizes are toys: the first one, or those in `sizes`.

  Raises:
    ConfigError: there is none of that name, size or arm, fewer than two arms,
      or arms that cannot be compared.
  """
  word, (values, name, text, code) = name, reading.read(name)
  configs = _some('--sizes', sizes, values['sizes'])
  if smoke and not sizes:
    configs = dict(list(configs.items())[:1])
  chosen = _some('--arms', arms, values['arms'])
  equal = equal or values['equal']
  if equal not in EQUAL:
    raise ConfigError(f'--equal={equal}: there is only {", ".join(EQUAL)}')
  if seconds and equal != 'seconds':
    raise ConfigError(
      f'--seconds={seconds:g}: is a budget of --equal=seconds; equal are '
      f'{equal}'
    )
  if len(chosen) < 2:
    raise ConfigError(f'--arms={arms}: one arm has nothing to be compared with')
  recipes = {}
  for i, (size, config) in enumerate(configs.items()):
    config = freeze(thaw(config))  # fills in the tokenizer's numbers
    config = toy(config, i) if smoke else config
    if steps:
      config = stretched(config, config, steps)
    recipes[size] = {
      arm: _recipe(word, size, arm, function, config)
      for arm, function in chosen.items()
    }
    _compare(size, recipes[size], equal)
    if points > config.run.steps:
      raise ConfigError(
        f'--points={points}: size {size} has {config.run.steps} steps, and an '
        'evaluation follows a step'
      )
  return Plan(
    *(name, text, values['paper'], equal, seconds, points, recipes, seed, code)
  )


def _recipe(name: str, size: str, arm: str, function, config) -> Recipe:
  """Returns the recipe of an arm.

  Raises:
    ConfigError: its function fails, or returns no config and no recipe.
  """
  place = reading.place(function)
  with reading.own_code(f'{name}, arm {arm} at {size}', place):
    value = function(config)
  recipe = value if isinstance(value, Recipe) else Recipe(value)
  if not isinstance(recipe.config, Config):
    raise ConfigError(
      f'--name={name}: arm {arm} gives {recipe.config!r:.60} at {size}; it '
      'must return a Config or a Recipe'
    )
  return recipe


def _some(flag: str, words: str, values: dict) -> dict:
  """Returns the entries that `words` name, in that order; '': all."""
  chosen = words.split(',') if words else list(values)
  for word in chosen:
    if word not in values:
      raise ConfigError(f'{flag}={word}: there is only {", ".join(values)}')
  return {word: values[word] for word in chosen}


def _compare(size: str, recipes: dict[str, Recipe], equal: str) -> None:
  """Refuses arms whose losses cannot be compared, or that cannot be trained.

  Raises:
    ConfigError: names the arm, the field and both values.
  """
  (first, reference), *others = recipes.items()
  fields = _OF_TEXT
  if equal == 'steps':  # other batches of as many steps are other tokens
    fields += 'data.seq_len', 'data.batch_size'
  for arm, recipe in others:
    for field in fields:
      ours, theirs = (_get(r.config, field) for r in (recipe, reference))
      if ours != theirs:
        way = '--equal=tokens' if field in fields[len(_OF_TEXT) :] else ''
        way = way or 'judge both by one text'
        raise ConfigError(
          f'{field}={ours!r} of arm {arm} at {size}, {theirs!r} of {first}: '
          f'their losses cannot be compared; {way}'
        )
  for arm, recipe in recipes.items():
    config = recipe.config
    for field, wanted, rule in (
      ('mesh.devices', 1, 'an ablation trains on one device'),
      ('rl.task', '', 'an ablation trains on text'),
      ('model.lora.rank', 0, 'an ablation trains all parameters'),
      ('data.sources', (), 'an ablation reads one data.source'),
      ('data.batch_start', 0, 'the batch of an ablation is constant'),
    ):
      if _get(config, field) != wanted:
        value = _get(config, field)
        raise ConfigError(f'{field}={value!r} of arm {arm} at {size}: {rule}')


def of_text(config: Config) -> str:
  """Returns the fields of a config that choose its text, as JSON."""
  return json.dumps({field: _get(config, field) for field in _OF_TEXT})


def _get(config: Config, field: str) -> Any:
  return functools.reduce(getattr, field.split('.'), config)


def paid(plan: Plan, size: str, seconds: dict[str, float]) -> dict[str, Recipe]:
  """Returns the size's recipes, each with the steps that the budget pays for.

  `seconds` are those of a step by arm, of a budget in seconds. The budget is
  the price of the reference's own run, unless the plan has `seconds`. Schedules
  follow the steps.
  """
  recipes = plan.recipes[size]
  (first, reference), *_ = recipes.items()
  cost_of = lambda arm: price(recipes[arm], plan.equal, seconds.get(arm, 1.0))
  budget = plan.seconds or reference.config.run.steps * cost_of(first)
  steps = {arm: round(budget / cost_of(arm)) for arm in recipes}
  for arm, count in steps.items():
    if count < plan.points:
      raise ConfigError(
        f'{plan.equal}={budget:.3g}: pays for {count} steps of arm {arm} at '
        f'{size}, but --points={plan.points}; raise --steps or --seconds'
      )
  return {
    arm: recipe._replace(
      config=stretched(recipe.config, reference.config, steps[arm])
    )
    for arm, recipe in recipes.items()
  }


def described(plan: Plan) -> dict:
  """Returns the plan as JSON values, by which its folder knows it.

  The pairs are none of it: a folder may get more. An arm that is a config is
  known by it, and one with functions of its own by their source, too.
  """
  first, configs, steps, code = plan.arms[0], {}, {}, {}
  for size, recipes in plan.recipes.items():
    steps[size] = recipes[first].config.run.steps
    for arm, recipe in recipes.items():
      configs[f'{size}-{arm}'] = dataclasses.asdict(recipe.config)
      if recipe != Recipe(recipe.config):
        code[arm] = plan.code
  return {
    'name': plan.name,
    'reference': first,
    'equal': plan.equal,
    'seconds': plan.seconds,
    'points': plan.points,
    'seed': plan.seed,
    'steps': steps,
    'code': code,
    'configs': configs,
  }
