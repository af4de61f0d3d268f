"""How a policy draws its answers: all rows at once, or by the scheduler.

`rollout` is one compiled loop: each row takes as long as the longest answer.
The scheduler of `experiments.serving` gives the row of an answer that has ended
to the next one, and the samples of a prompt share its pages. So few rows
suffice where lengths differ. Both draw the same tokens, since draws depend on
an answer's seed and the position alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mla_moe.config import CacheConfig, Config, ConfigError

from .. import ends
from ..serving import scheduler
from . import rollouts

_ROWS = 64  # of the scheduler, where the config has none
_PAGE = 16  # tokens, of rows that are shorter than two pages of 128
_ROUND = 32  # tokens, to which rows are rounded up: few lengths compile

# (variables, prompts, a seed for each answer) -> the answers.
Draw = Callable[[Any, Sequence[np.ndarray], np.ndarray], rollouts.Drawn]


def check(config: Config) -> None:
  """Refuses a config whose answers cannot be drawn as it says.

  Raises:
    ConfigError: names the field and the fix.
  """
  rl = config.rl
  if rl.replay in ('train', 'rollout') and not config.model.moe_layers:
    raise ConfigError(
      f'rl.replay={rl.replay!r}: a model without experts has no routes; set '
      '--config.rl.replay=none'
    )
  if rl.speculative and not config.model.mtp.depth:
    raise ConfigError(
      'rl.speculative=True: the model has no MTP module that drafts '
      '(model.mtp.depth=0); leave it off'
    )
  if rl.engine == 'scheduler' and config.mesh.devices > 1:
    raise ConfigError(
      f"rl.engine='scheduler': serves one device, and config.mesh has "
      f'{config.mesh.devices}; set --config.rl.engine=rollout'
    )


def drawing(config: Config) -> Draw:
  """Returns the function that draws answers as `rl.engine` says."""
  rl, model = config.rl, config.model
  routes = rl.replay != 'none' and model.moe_layers > 0
  if rl.engine == 'scheduler':
    return _Engine(config, routes).draw
  stop_ids = ends.of_run(config)

  def draw(variables, prompts, seeds):
    options = dict(cache=CacheConfig(routes=routes), speculative=rl.speculative)
    options['stop_ids'] = stop_ids
    return rollouts.draw(model, rl, variables, prompts, seeds, **options)

  return draw


class _Engine:
  """A scheduler for the rollouts of a run, while their sizes are the same."""

  def __init__(self, config: Config, routes: bool):
    self._config, self._routes = config, routes
    self._scheduler: scheduler.Scheduler | None = None
    self._sizes = ()
    self._ends = ends.of_run(config)

  def draw(self, variables, prompts, seeds) -> rollouts.Drawn:
    """Returns the answers to the prompts, `rl.samples` each.

    Raises:
      FloatingPointError: logits that are not finite.
    """
    rl, work = self._config.rl, self._with(variables, prompts)
    before = work.passes, work.accepted
    tickets = []
    for ids, own in zip(prompts, seeds.reshape(len(prompts), -1), strict=True):
      tickets += work.submit(
        ids,
        rl.max_new,
        samples=rl.samples,
        stop_ids=self._ends,
        seed=own,
        temperature=rl.temperature,
      )
    events = {ticket: [] for ticket in tickets}
    while work.busy:
      for event in work.step():
        if event.reason == 'broken':
          raise FloatingPointError(
            'the logits of a rollout are not finite: are the parameters?'
          )
        if event.reason == 'failed':
          raise RuntimeError('a rollout: the scheduler has failed, see above')
        events[event.ticket].append(event)
    rows = list(events.values())
    routes = None
    if self._routes:
      lengths = [len(ids) - 1 for ids in prompts for _ in range(rl.samples)]
      pairs = zip(rows, lengths, strict=True)
      routes = [row[-1].routes[: n + len(row)] for row, n in pairs]
    ended = np.array([row[-1].reason == 'stop' for row in rows])
    return rollouts.Drawn(
      [np.array([e.token for e in row], np.int32) for row in rows],
      [np.array([e.drawn for e in row], np.float32) for row in rows],
      ended.reshape(-1, rl.samples),
      routes,
      (work.passes - before[0], work.accepted - before[1]),
    )

  def _with(self, variables, prompts) -> scheduler.Scheduler:
    """Returns a scheduler for these prompts, with the weights of this policy.

    Its sizes follow from the prompts alone, as a run that resumes has no other.
    """
    rl, longest = self._config.rl, max(map(len, prompts))
    length = -(-(longest + rl.max_new) // _ROUND) * _ROUND
    chunk = min(256, -(-longest // _PAGE) * _PAGE)
    if self._sizes == (length, chunk):
      self._scheduler.reload(variables)
      return self._scheduler
    self._sizes = length, chunk
    self._scheduler = scheduler.Scheduler(
      self._config.model,
      variables,
      rows=rl.rows or min(_ROWS, len(prompts) * rl.samples),
      length=length,
      cache=CacheConfig(
        page=128 if length >= 256 else _PAGE, routes=self._routes
      ),
      chunk=chunk,
      waiting=len(prompts),
      speculative=rl.speculative,
    )
    return self._scheduler
