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

import hashlib
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from mla_moe import vocabulary
from mla_moe.checked import is_number
from mla_moe.config import Config

from .. import ends, workdir
from ..data import batches
from ..data.tokenizer import Tokenizer
from ..training import source
from . import (
  advantages,
  alarms,
  checks,
  engine,
  episodes,
  grading,
  grouping,
  prompts,
  questions,
  record,
  rollouts,
  room,
  scoring,
  teachers,
)


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
    checks.check(config)
    rl, tokenizer = config.rl, config.data.tokenizer
    self._config, self._words, self._path = config, words, path
    self._questions = questions.source(rl.task, config.run.seed)
    folder = None
    if tokenizer != 'byte':
      folder = vocabulary.file_of(tokenizer).parent
    self._prompts = prompts.Prompts(rl.template, words, folder, own)
    room.check(config, self._questions, self._prompts)
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
    self._groups: list[grouping.Group] = []
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
      self._updates, scores = scoring.score(
        setup,
        self._updates,
        variables,
        reference,
        self._teachers,
        self._shares,
      )
      self._row |= scores
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

  def _draw(
    self, number, rollout, variables
  ) -> tuple[list[grouping.Group], dict]:
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
    self._row = grouping.summary(drawn)
    if rl.speculative:
      self._row['draft_acceptance'] = self._accepted / max(self._passes, 1)
    if not rl.dynamic:
      return drawn, seconds
    return (useful + flat)[: rl.prompts], seconds

  def _round(self, number, draw, variables, seconds) -> list[grouping.Group]:
    """Returns the graded groups of one draw of `rl.prompts` questions."""
    rl, began = self._config.rl, time.perf_counter()
    first = draw * rl.prompts
    indices = range(first, first + rl.prompts)
    draw_one = self._questions.train
    items, ids = room.fitting(self._config, self._prompts, draw_one, indices)
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
    return grouping.grouped(rl, items, ids, drawn, texts, graded)

  def _graded(self, number, draw, items, texts, drawn) -> list:
    """Returns the grades, which are in rewards.jsonl before they are used."""
    grades = self._record.find(number, draw, drawn.tokens)
    if grades is None:
      grades = self._grader.grade(items, texts, drawn.lengths)
      self._record.add(number, draw, drawn.tokens, grades)
    return grades

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

  def evaluate(self, setup, number: int, state: Any) -> tuple[dict, str]:
    """Returns the part of held-out questions answered right, greedily."""
    rl = self._config.rl
    count = min(rl.heldout, self._questions.held_out_size or rl.heldout)
    items, ids = room.fitting(
      self._config, self._prompts, self._questions.held_out, range(count)
    )
    variables = setup.variables(state.params, state.router)
    drawn = rollouts.draw(
      self._config.model, rl, variables, ids, None, stop_ids=self._ends
    )
    texts = [self._words.decode(ids) for ids in drawn.bodies]
    graded = self._grader.grade(items, texts, drawn.lengths)
    right = [grouping.rightness(grade.parts, grade.reward) for grade in graded]
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
      rows.append({'step': number, **grouping.shown(group)})
      lines = [f'{group.question.text}<<<']
      for text, reward in zip(group.texts, group.rewards, strict=True):
        lines.append(f'{reward:+.3f}  {text}')
      texts.append('\n'.join(lines))
    rows.close()
    return texts

  def _kinds(self) -> set[str]:
    """Returns the kinds of the questions to learn from, as far as looked at."""
    count = self._questions.size or room.LOOKED_AT
    return {self._questions.train(i).kind for i in range(count)}


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
