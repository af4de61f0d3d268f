"""Batches of a policy's own answers: reinforcement learning in the loop.

Step n belongs to rollout (n - 1) // minibatches. In a rollout's first step the
policy answers `rl.prompts` questions, the answers are graded, and their rewards
become advantages; the rollout's steps then learn from them, each from as many
whole questions. Everything random follows from the run's seed and the number of
the rollout, so a run is saved between rollouts alone and goes on bit for bit.
Only graders have clocks: the rewards of a rollout are written before they are
used, and a run that draws the same answers again reads them.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import heapq
import pathlib
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mla_moe import sharding, vocabulary
from mla_moe.checked import is_number
from mla_moe.config import Config, ConfigError
from mla_moe.model import replay

from .. import ends, workdir
from ..data import batches, packing
from ..data.tokenizer import Tokenizer
from ..training import program, source
from . import (
  advantages,
  alarms,
  engine,
  episodes,
  grading,
  objective,
  prompts,
  questions,
  record,
  rollouts,
  teachers,
)

_LOOKED_AT = 256  # questions of an endless source that are read before the run
_COUNTED = 4096  # the longest texts of those, whose tokens are counted
_TRIES = 100  # questions in the place of one that is too long


class Group(NamedTuple):
  """A question, and its G answers with all that an update needs."""

  question: questions.Question
  prompt: np.ndarray
  answers: list[episodes.Answer]
  texts: list[str]
  rewards: np.ndarray
  parts: list[dict]
  ended: np.ndarray


class Policy(source.Source):
  """The batches of a run by reinforcement; close it after the run."""

  def __init__(
    self,
    config: Config,
    words: Tokenizer,
    path: pathlib.Path,
    own: str = '',
    allow_code: bool = False,
    rewards: Mapping[str, grading.Own] | None = None,
  ):
    """Opens the questions, the prompts and the grader of a run.

    Args:
      config: of the run.
      words: its tokenizer.
      path: its folder.
      own: a chat template in the place of the one beside the tokenizer.
      allow_code: whether answers may be run as programs.
      rewards: of one's own, by the names that `rl.rewards` has.

    Raises:
      ConfigError: a config that cannot be used.
    """
    check(config)
    rl, tokenizer = config.rl, config.data.tokenizer
    self._config, self._words, self._path = config, words, path
    self._questions = questions.source(rl.task, config.run.seed)
    folder = None
    if tokenizer != 'byte':
      folder = vocabulary.file_of(tokenizer).parent
    self._prompts = prompts.Prompts(rl.template, words, folder, own)
    self._check_lengths()
    self._drawing = engine.drawing(config)
    self._ends = ends.of_run(config)
    if rl.teachers:
      teachers.check_kinds(config, self._kinds())
    self._teachers = teachers.load(config, words)
    self._grader = grading.Grader(
      self._questions,
      dict(rl.rewards),
      longest=rl.max_new,
      allow_code=allow_code,
      template=self._prompts.template,
      own=rewards,
    )
    self._grader.__enter__()
    if self._grader.about:
      print(f'Rewards: {self._grader.about}.')
    key = f'{self._questions.fingerprint} {rl.template} {own}'
    for teacher in self._teachers:
      key += f' {teachers.digest(teacher)}'
    self.fingerprint = hashlib.sha256(key.encode()).hexdigest()[:24]
    self.heldout = []
    self._record = self._alarms = None
    self._updates: list[episodes.Episodes] = []
    self._shares: list[list[np.ndarray]] = []  # of teachers, in each update
    self._groups: list[Group] = []
    # The loop reads the row of a step when it has the batch of the next one.
    self._row, self._row_before, self._rollout = {}, {}, 0

  def close(self) -> None:
    self._grader.__exit__(None, None, None)
    if self._record:
      self._record.close()

  def may_stop(self, number: int) -> bool:
    return number % self._config.rl.minibatches == 0

  def tokens(self, config: Config, number: int) -> int:
    update = self._updates[(number - 1) % config.rl.minibatches]
    return int((update.segments >= 0).sum())

  def row(self, number: int) -> dict:
    rollout = (number - 1) // self._config.rl.minibatches
    return self._row if rollout == self._rollout else self._row_before

  def notices(self, row: dict) -> list[str]:
    return self._alarms.see(row)

  def headline(self, row: dict) -> str:
    text = f'reward {row["reward"]:.3f}  length {row["completion_length"]:.1f}'
    text += f'  entropy {row["entropy"]:.2f}'
    if self._config.rl.beta:
      text += f'  KL {row["kl"]:.1e}'
    if 'teacher_kl' in row:
      text += f'  KL to teacher {row["teacher_kl"]:.3f}'
    return text

  def batch(self, setup, number: int, state: Any, left_out: int):
    rl = self._config.rl
    rollout, index = divmod(number - 1, rl.minibatches)
    if self._alarms is None:
      self._begin(number)
    if not index:
      self._rollout, self._row_before = rollout, self._row
      variables = setup.variables(state.params, state.router)
      groups, seconds = self._draw(number, rollout, variables)
      self._groups = groups
      self._updates = self._packed(rollout, groups)
      score = time.perf_counter()
      reference = state.reference and setup.variables(**state.reference)
      self._score(setup, variables, reference)
      now = time.perf_counter()
      seconds['score'] = now - score
      self._row['seconds'] = {k: round(v, 4) for k, v in seconds.items()}
    return self._updates[index]

  def _begin(self, number: int) -> None:
    """Reads the run's own files up to the step before `number`."""
    rows = workdir.rows(self._path / 'metrics.jsonl')
    rows = [r for r in rows if 'reward' in r and is_number(r.get('step'))]
    rows = [r for r in rows if r['step'] < number]
    self._alarms = alarms.Alarms.after(rows)
    if self.writes:
      workdir.rewind(self._path / 'groups.jsonl', number - 1)
    file = self._path / 'rewards.jsonl'
    self._record = record.Record(file, number, self.writes)

  def _draw(self, number, rollout, variables) -> tuple[list[Group], dict]:
    """Returns the groups of a rollout, and the seconds of its parts.

    With `rl.dynamic` it draws again until `rl.prompts` groups have a spread;
    groups without one fill the places that stay empty.
    """
    rl = self._config.rl
    rounds = max(rl.dynamic, 1)
    seconds = {'rollout': 0.0, 'grade': 0.0}
    useful, flat, drawn = [], [], []
    for turn in range(rounds):
      draw = rollout * rounds + turn
      groups = self._round(number, draw, variables, seconds)
      drawn += groups
      for group in groups:
        spread = group.rewards.max() > group.rewards.min()
        (useful if spread else flat).append(group)
      if not rl.dynamic or len(useful) >= rl.prompts:
        break
    else:
      if rl.dynamic:
        print(
          f'Rollout {rollout}: only {len(useful)} of {rl.prompts} questions '
          f'have both right and wrong answers after rl.dynamic={rl.dynamic} '
          'rounds.'
        )
    self._row = _summary(drawn)
    if rl.speculative:
      self._row['draft_acceptance'] = self._accepted / max(self._passes, 1)
    if not rl.dynamic:
      return drawn, seconds
    return (useful + flat)[: rl.prompts], seconds

  def _round(self, number, draw, variables, seconds) -> list[Group]:
    """Returns the graded groups of one draw of `rl.prompts` questions."""
    rl, began = self._config.rl, time.perf_counter()
    first = draw * rl.prompts
    items, ids = self._fitting(
      self._questions.train, range(first, first + rl.prompts)
    )
    seeds = rollouts.seeds(self._config.run.seed, draw, rl.prompts * rl.samples)
    drawn = self._drawing(variables, ids, seeds)
    self._passes, self._accepted = drawn.drafts
    middle = time.perf_counter()
    texts = [self._words.decode(ids) for ids in drawn.bodies]
    each = [item for item in items for _ in range(rl.samples)]
    graded = self._graded(number, draw, each, texts, drawn)
    end = time.perf_counter()
    seconds['rollout'] += middle - began
    seconds['grade'] += end - middle
    return self._grouped(items, ids, drawn, texts, graded)

  def _graded(self, number, draw, items, texts, drawn) -> list:
    """Returns the grades, which are in rewards.jsonl before they are used."""
    grades = self._record.find(number, draw, drawn.tokens)
    if grades is None:
      grades = self._grader.grade(items, texts, drawn.lengths)
      self._record.add(number, draw, drawn.tokens, grades)
    return grades

  def _grouped(self, items, ids, drawn, texts, graded) -> list[Group]:
    """Returns the groups with their advantages; the weights come later."""
    rl = self._config.rl
    shape = len(items), rl.samples
    counts = np.array([len(tokens) for tokens in drawn.tokens])
    rewards = np.array([grade.reward for grade in graded], np.float64)
    penalty = advantages.overlong_penalty(counts, rl.max_new, rl.overlong)
    rewards = advantages.without_errors((rewards + penalty).reshape(shape))
    advantage, _ = advantages.advantages(rewards, rl.scale)
    routes = drawn.routes or [None] * len(counts)
    groups = []
    for q, item in enumerate(items):
      rows = range(q * rl.samples, (q + 1) * rl.samples)
      answers = [
        episodes.Answer(
          ids[q], drawn.tokens[r], drawn.log_probs[r], a, 0.0, routes[r]
        )
        for r, a in zip(rows, advantage[q], strict=True)
      ]
      groups.append(
        Group(
          item,
          ids[q],
          answers,
          [texts[r] for r in rows],
          rewards[q],
          [graded[r].parts | {'error': graded[r].error} for r in rows],
          drawn.ended[q],
        )
      )
    return groups

  def _packed(self, rollout, groups) -> list[episodes.Episodes]:
    """Returns the updates of a rollout, each of as many random groups."""
    rl = self._config.rl
    key = (self._config.run.seed << 20) + rollout
    order = batches.permute(np.arange(len(groups)), len(groups), key)
    updates, self._shares = [], []
    for part in order.reshape(rl.minibatches, -1):
      chosen = [groups[i] for i in part]
      answers = [answer for group in chosen for answer in group.answers]
      used = np.ones(len(answers), bool)
      if rl.truncated == 'drop':
        used = np.concatenate([group.ended for group in chosen])
      counts = np.array([len(answer.tokens) for answer in answers])
      weights = advantages.token_weights(counts, used, rl.aggregate, rl.max_new)
      answers = [
        answer._replace(weight=weight)
        for answer, weight in zip(answers, weights, strict=True)
      ]
      updates.append(self._pack(answers, not updates))
      kinds = [group.question.kind for group in chosen for _ in group.answers]
      self._shares.append(self._shared(answers, kinds))
    return updates

  def _shared(self, answers, kinds) -> list[np.ndarray]:
    """Returns each teacher's part of the advantage of an update's tokens."""
    parts = []
    for teacher in self._teachers:
      # In the places of the advantages, and of full precision where it counts.
      of = [float(teacher.share(kind) > 0) for kind in kinds]
      marked = [
        answer._replace(advantage=mark)
        for answer, mark in zip(answers, of, strict=True)
      ]
      packed = self._pack(marked)
      parts.append(teacher.weight * packed.advantage.astype(np.float64))
    return parts

  def _pack(self, answers, fresh: bool = True) -> episodes.Episodes:
    data = self._config.data
    micro = data.micro_batch or data.batch_size
    sizes = data.seq_len, micro
    return episodes.pack(answers, *sizes, fresh, self._config.rl.prompt)

  def _score(self, setup, variables, reference) -> None:
    """Gives the updates the log-probabilities that they are compared with.

    And, with `rl.replay='train'`, the trainer's routes in the place of the
    rollout's. The reference is another model, whose routers choose themselves.
    """
    scorer = _scorer(program.of_devices(setup.config), setup.mesh)
    score = lambda weights, batch: scorer(weights, setup.place(batch))
    read = lambda *scored: np.asarray(score(*scored)[0])
    flips, divergence = [], []
    for i, update in enumerate(self._updates):
      free = update
      if update.routes is not None:
        free = update._replace(routes=np.full_like(update.routes, -1))
      if self._config.rl.replay == 'train':
        old, routes = map(np.asarray, score(variables, free))
        differ = replay.flips(*map(jnp.asarray, (routes, update.routes)))
        flips.append(np.asarray(differ)[update.targets >= 0])
        update = update._replace(old=old, routes=routes)
      elif self._teachers or not update.fresh:
        # Else the old policy is the update's own.
        update = update._replace(old=read(variables, update))
      if reference:
        update = update._replace(reference=read(reference, free))
      if self._teachers:
        shares = self._shares[i]
        update, gap = self._taught(setup, update, free, shares)
        divergence.append(gap)
      self._updates[i] = update
    if flips:
      self._row['route_flips'] = float(np.concatenate(flips).mean())
    if divergence and np.concatenate(divergence).size:
      self._row['teacher_kl'] = float(np.concatenate(divergence).mean())

  def _taught(
    self, setup, update, free, shares
  ) -> tuple[episodes.Episodes, np.ndarray]:
    """Returns the update with its teachers' advantages, and divergences.

    `free` is the update without replay: with its routes, a teacher of the
    policy's shapes is computed by the very program of the policy. A teacher
    without a question in the update does not read it.
    """
    read, config = [], setup.config
    for teacher, share in zip(self._teachers, shares, strict=True):
      if not share.any():
        continue
      same = teacher.model == config.model
      batch = free if same else free._replace(routes=None)
      theirs = dataclasses.replace(config, model=teacher.model)
      scorer = _scorer(program.of_devices(theirs), setup.mesh)
      log_probs, _ = scorer(teacher.variables, setup.place(batch))
      read.append((share, np.asarray(log_probs)))
    if not read:
      return update, np.zeros(0)
    advantage, gap = advantages.taught(update.advantage, update.old, read)
    inside = update.targets >= 0
    advantage = np.where(inside, advantage, 0.0).astype(np.float32)
    read_by_one = inside & (sum(shares) > 0)
    return update._replace(advantage=advantage), gap[read_by_one]

  def evaluate(self, setup, number: int, state: Any) -> tuple[dict, str]:
    """Returns the part of held-out questions answered right, greedily."""
    rl = self._config.rl
    count = min(rl.heldout, self._questions.held_out_size or rl.heldout)
    items, ids = self._fitting(self._questions.held_out, range(count))
    variables = setup.variables(state.params, state.router)
    drawn = rollouts.draw(
      self._config.model, rl, variables, ids, None, stop_ids=self._ends
    )
    texts = [self._words.decode(ids) for ids in drawn.bodies]
    graded = self._grader.grade(items, texts, drawn.lengths)
    right = [_rightness(grade.parts, grade.reward) for grade in graded]
    share = float(np.nanmean(right)) if right else 0.0
    return {'pass_at_1': share}, f'held out, greedy: {share:.1%} right'

  def sample(self, setup, number: int, state: Any) -> list[str]:
    """Returns two groups of the last rollout: its first, and its widest.

    Their rows go to groups.jsonl.
    """
    if not self._groups:
      return []
    widest = max(self._groups, key=lambda group: group.rewards.std())
    chosen = [self._groups[0], widest]
    rows, texts = workdir.Rows(self._path / 'groups.jsonl'), []
    for group in chosen[: 1 + (widest is not self._groups[0])]:
      rows.append({'step': number, **_shown(group)})
      lines = [f'{group.question.text}<<<']
      for text, reward in zip(group.texts, group.rewards, strict=True):
        lines.append(f'{reward:+.3f}  {text}')
      texts.append('\n'.join(lines))
    rows.close()
    return texts

  def _kinds(self) -> set[str]:
    """Returns the kinds of the questions to learn from, as far as looked at."""
    count = self._questions.size or _LOOKED_AT
    return {self._questions.train(i).kind for i in range(count)}

  def _check_lengths(self) -> None:
    """Refuses a config whose rows are too short for a question.

    All questions of a file are looked at, and the first ones of an endless
    source.
    """
    rl, length = self._config.rl, self._config.data.seq_len
    sides = (
      (self._questions.train, self._questions.size or _LOOKED_AT),
      (self._questions.held_out, self._questions.held_out_size or rl.heldout),
    )
    items = (draw(i) for draw, count in sides for i in range(count))
    items = heapq.nlargest(_COUNTED, items, key=lambda item: len(item.text))
    longest, text = max(
      (len(self._prompts.ids(item)), item.text) for item in items
    )
    need = packing.columns(longest, rl.max_new)
    if longest + rl.max_new > self._config.model.max_positions:
      raise ConfigError(
        f'model.max_positions={self._config.model.max_positions}: a prompt of '
        f'{longest} tokens (of the question {text[:40]!r}) and an answer of '
        f'rl.max_new={rl.max_new} need more; shorten one of the two'
      )
    if need > length:
      raise ConfigError(
        f'data.seq_len={length}: a prompt of {longest} tokens (of the question '
        f'{text[:40]!r}) and an answer of rl.max_new={rl.max_new} need {need} '
        f'columns; set --config.data.seq_len={need}'
      )

  def _fitting(self, draw, indices) -> tuple[list, list[np.ndarray]]:
    """Returns questions of a side and their prompts, for which rows have room.

    An endless source may make a longer question than those before the run. Far
    later ones, which no rollout has, take its place.
    """
    rl, items = self._config.rl, []
    longest = self._config.data.seq_len - packing.columns(0, rl.max_new)
    longest = min(longest, self._config.model.max_positions - rl.max_new)
    for index in indices:
      for turn in range(_TRIES):
        item = draw(index + (turn << 48))
        ids = self._prompts.ids(item)
        if len(ids) <= longest:
          break
      else:
        raise ConfigError(
          f'rl.task={rl.task!r}: {_TRIES} questions one after the other have '
          f'more than {longest} tokens; begin anew with a larger '
          f'--config.data.seq_len than {self._config.data.seq_len}'
        )
      items.append((item, ids))
    return [item for item, _ in items], [ids for _, ids in items]


@functools.lru_cache(maxsize=16)
def _scorer(config: Config, mesh):
  """Returns the jitted `objective.log_probs` of the config."""
  places = {}
  if mesh:
    replicated = jax.sharding.PartitionSpec()
    places['out_shardings'] = jax.sharding.NamedSharding(mesh, replicated)
  return jax.jit(
    functools.partial(objective.log_probs, config=config), **places
  )


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


def opened(
  own: str = '',
  allow_code: bool = False,
  rewards: Mapping[str, grading.Own] | None = None,
) -> source.Open:
  """Returns the function that opens the source of a run, for the loop.

  The arguments are those of `Policy`.
  """
  return lambda config, words, path: Policy(
    config, words, path, own, allow_code, rewards
  )


def _rightness(parts: dict, reward: float) -> float:
  """Returns the reward that says whether an answer is right."""
  for name in ('accuracy', 'code'):
    if name in parts:
      return parts[name]
  return reward


def _summary(groups: list[Group]) -> dict:
  """Returns the numbers of a rollout for metrics.jsonl."""
  answers = [answer for group in groups for answer in group.answers]
  parts = [part for group in groups for part in group.parts]
  lengths = np.array([len(answer.tokens) for answer in answers])
  rewards = np.stack([group.rewards for group in groups])
  flat = rewards.max(1) == rewards.min(1)
  right = np.array(
    [
      np.nanmean(
        [
          _rightness(part, reward)
          for part, reward in zip(group.parts, group.rewards, strict=True)
        ]
      )
      > 0.5
      for group in groups
    ]
  )
  names = dict.fromkeys(n for part in parts for n in part if n != 'error')
  drawn = np.concatenate([answer.rollout for answer in answers])
  mean = lambda name: float(np.mean([p[name] for p in parts if name in p]))
  return {
    'reward': float(rewards.mean()),
    'reward_std': float(rewards.std(axis=1).mean()),
    'rewards': {name: mean(name) for name in names},
    'completion_length': float(lengths.mean()),
    'length_max': int(lengths.max()),
    'ended': float(np.mean([group.ended for group in groups])),
    'entropy': float(-drawn.astype(np.float64).mean()),
    'zero_right': float((flat & right).mean()),
    'zero_wrong': float((flat & ~right).mean()),
    'grader_errors': float(np.mean([bool(part['error']) for part in parts])),
  }


def _shown(group: Group) -> dict:
  """Returns a group as a row of groups.jsonl."""
  answers = [
    {
      'text': group.texts[i],
      'reward': float(group.rewards[i]),
      'parts': {k: v for k, v in group.parts[i].items() if k != 'error'},
      'advantage': float(answer.advantage),
      'length': len(answer.tokens),
      'ended': bool(group.ended[i]),
    }
    for i, answer in enumerate(group.answers)
  ]
  question = group.question
  return {
    'question': question.text, 'gold': question.answer, 'answers': answers
  }  # fmt: skip
