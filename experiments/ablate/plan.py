"""The plan of an ablation: its sizes, its arms, and the steps of each arm.

A file of `configs/ablate` has one function:

  get_ablation() -> {'sizes': {name: Config}, 'arms': {name: function},
                     'equal': budget, 'paper': text}

An arm is a function from a size's config to the arm's own: a changed config, or
a `Recipe` where an idea replaces functions, too. The first arm is the one that
the others are compared with. Its config sets the budget: `run.steps` steps, or
the tokens, the training FLOPs or the seconds that these take. Each other arm
gets as many steps as that budget pays for, and its schedule is stretched to
them. A choice of what is equal is a choice of the question: a dearer step wins
at equal steps and may lose on the clock.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import importlib.util
import inspect
import pathlib
from typing import Any, NamedTuple

from mla_moe.config import Config, ConfigError, freeze, thaw

from .. import cli
from .recipe import Recipe, price, stretched, toy

EQUAL = ('steps', 'tokens', 'flops', 'seconds')
OURS = cli.CONFIGS / 'ablate'
IDEAS = pathlib.Path(__file__).parent.parent / 'ideas'
# Fields that two arms must share, or their losses are not of the same text.
_OF_TEXT = (
  *('data.source', 'data.field', 'data.tokenizer', 'data.dtype'),
  *('data.heldout', 'data.packing', 'data.fim_rate', 'model.vocab'),
)


class Plan(NamedTuple):
  """A checked ablation. `recipes` are {size: {arm: Recipe}}, all in order.

  In each size the first arm is the reference, of whose config the budget is,
  unless there are `seconds`. `points` are the evaluations of a run: it is
  trained in as many chunks.
  """

  name: str
  title: str
  paper: str
  equal: str
  seconds: float
  points: int
  recipes: dict[str, dict[str, Recipe]]

  @property
  def arms(self) -> list[str]:
    return list(next(iter(self.recipes.values())))


def names() -> list[str]:
  """Returns the names of the ablations that are here."""
  files = [path.stem for path in sorted(OURS.glob('[a-z]*.py'))]
  ideas = [path.parent.name for path in sorted(IDEAS.glob('*/ablation.py'))]
  return files + ideas


def read(name: str) -> tuple[dict, str, str]:
  """Returns the ablation of a name or file: values, name, its docstring.

  A name is that of a file in configs/ablate, or of a folder in
  experiments/ideas, which has an `ablation.py`.

  Raises:
    ConfigError: there is none, or it is no ablation.
  """
  cli.share_configs()
  if (IDEAS / name / 'ablation.py').is_file() and name.isidentifier():
    package = __package__.rpartition('.')[0]
    module = importlib.import_module(f'{package}.ideas.{name}.ablation')
  else:
    path = _file(name)
    spec = importlib.util.spec_from_file_location('ablation', path)
    module = importlib.util.module_from_spec(spec)
    try:
      spec.loader.exec_module(module)
    except ConfigError:
      raise
    except Exception as error:  # a file of one's own may raise anything
      raise ConfigError(
        f'--name={name}: {type(error).__name__}: {error}'
      ) from None
    name = path.stem
  make = getattr(module, 'get_ablation', None)
  if make is None:
    raise ConfigError(f'--name={name}: has no function get_ablation')
  values = make()
  wrong = {'sizes', 'arms', 'equal', 'paper'} ^ set(values)
  if wrong:
    raise ConfigError(
      f'--name={name}: {sorted(wrong)[0]!r} is missing or unknown; an ablation '
      "has 'sizes', 'arms', 'equal' and 'paper'"
    )
  return values, name, inspect.cleandoc(module.__doc__ or name)


def _file(name: str) -> pathlib.Path:
  """Returns the file of an ablation: of ours by its name, or a path.

  Raises:
    ConfigError: there is none; names those of ours, or one like it.
  """
  if name in names():
    return OURS / f'{name}.py'
  path = cli.path('--name', name)
  if path.is_file():
    return path
  near = difflib.get_close_matches(pathlib.Path(name).stem, names(), 1)
  hint = f'did you mean {near[0]}?' if near else f'ours: {", ".join(names())}'
  raise ConfigError(f'--name={name}: is no ablation; {hint}')


def make(
  name: str,
  *,
  sizes: str = '',
  arms: str = '',
  equal: str = '',
  steps: int = 0,
  seconds: float = 0.0,
  points: int = 10,
  smoke: bool = False,
) -> Plan:
  """Returns the checked plan of an ablation; '' and 0 leave its own values.

  With `smoke` its sizes are toys: the first one, or those in `sizes`.

  Raises:
    ConfigError: there is none of that name, size or arm, fewer than two arms,
      or arms that cannot be compared.
  """
  values, name, text = read(name)
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
    recipes[size] = {arm: _recipe(f(config)) for arm, f in chosen.items()}
    _compare(size, recipes[size], equal)
    if points > config.run.steps:
      raise ConfigError(
        f'--points={points}: size {size} has {config.run.steps} steps, and an '
        'evaluation follows a step'
      )
  return Plan(name, text, values['paper'], equal, seconds, points, recipes)


def _recipe(value: Config | Recipe) -> Recipe:
  return value if isinstance(value, Recipe) else Recipe(value)


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

  The pairs are none of it: a folder may get more.
  """
  first, configs, steps = plan.arms[0], {}, {}
  for size, recipes in plan.recipes.items():
    steps[size] = recipes[first].config.run.steps
    for arm, recipe in recipes.items():
      configs[f'{size}.{arm}'] = dataclasses.asdict(recipe.config)
  return {
    'name': plan.name,
    'reference': first,
    'equal': plan.equal,
    'seconds': plan.seconds,
    'points': plan.points,
    'steps': steps,
    'configs': configs,
  }
