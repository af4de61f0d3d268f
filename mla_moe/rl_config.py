"""The numbers of reinforcement learning (GRPO and its kin); R1-Zero's defaults.

A variant of the literature is a value of one field, so that a run is R1, Dr.
GRPO, DAPO, GSPO, CISPO or V3.2 by its config alone; `rl.objective` has the
formulas. The KL estimator k1 is not offered: inside a loss its gradient is
zero in expectation, so it regularises nothing.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from mla_moe.checked import Checked, check_divides, is_row


@dataclasses.dataclass(frozen=True)
class RLConfig(Checked):
  """One rollout and its updates (DeepSeek-R1, section 2.2 and supplement).

  `task` is the source of the questions ('' is no reinforcement learning): a
  task of `experiments.rl.tasks` such as 'sort8', or a .jsonl file. `template`
  makes a prompt of a question: the question alone, R1-Zero's, or the chat
  template of the tokenizer. `rewards` are (name, weight) pairs, whose weighted
  sum is an answer's reward.

  A rollout draws `samples` answers to each of `prompts` questions, of at most
  `max_new` tokens, at `temperature`; `minibatches` updates follow, each of as
  many whole questions. `rows` answers are drawn at a time (0: all), all in one
  loop or, by the 'scheduler', as rows become free (`engine`); with
  `speculative` the MTP module drafts, which draws other tokens of the same
  distribution. `aggregate` says over what the loss of a token is averaged: all
  tokens ('token', DAPO), its answer and then the answers ('sequence',
  DeepSeekMath), or the constant answers x max_new ('constant', Dr. GRPO).
  `scale` divides advantages by the spread of the question's rewards ('std'), of
  the rollout's ('batch'), or not at all ('none').

  `clip_low` and `clip_high` bound the ratio to [1 - low, 1 + high]; with
  surrogate 'cispo' `clip_high` is the ceiling itself. `ratio` is each token's
  or the geometric mean of the answer's ('sequence', GSPO). `beta` weighs the KL
  divergence from the reference, which is replaced by the policy every `refresh`
  steps (0: never). `kl_form` is R1's 'k3' or V3.2's 'unbiased', which is k3
  times the ratio. `off_policy` (0: off) drops the policy's term of a worse
  answer whose log-probability has fallen by more a token (V3.2). `old` says
  whose log-probabilities the ratio divides by: the trainer's own, of the
  update's shapes, or the rollout's; `correct` weighs a token by trainer /
  rollout, cut at `correct_limit`, or drops it beyond.

  `replay` says whose experts the updates take: each token's own, which are
  compared with the rollout's ('compare') or not ('none': no record, 2 K bytes
  of a token in each layer); the rollout's ('rollout', R3); or the trainer's
  own, before the updates ('train', R2).

  In an update each answer has a copy of its `prompt`, or the answers of a
  question in one row share it: the row (`data.seq_len`) then has room for
  several, and the prompt is computed once. Routers count it once, too.

  `dynamic` (0: off) draws up to so many rollouts until `prompts` questions have
  both right and wrong answers (DAPO). `truncated` answers, those without an
  end, can be dropped. `overlong` is the length of DAPO's ramp before `max_new`.
  At an evaluation, `heldout` questions are answered greedily. `teachers` are
  (folder, weight) or (folder, weight, kind) of models that distil into the
  policy (`advantages.taught`) by all questions or by those of a kind; the rest
  of a question's weights, up to 1, is the rewards'.
  """

  task: str = ''
  template: Literal['plain', 'r1_zero', 'chat'] = 'r1_zero'
  rewards: tuple = (('accuracy', 1.0), ('format', 1.0))
  prompts: int = 512
  samples: int = 16
  minibatches: int = 16
  max_new: int = 32768
  temperature: float = 1.0
  rows: int = 0
  prompt: Literal['copied', 'shared'] = 'copied'
  engine: Literal['rollout', 'scheduler'] = 'rollout'
  speculative: bool = False
  aggregate: Literal['sequence', 'token', 'constant'] = 'sequence'
  scale: Literal['std', 'batch', 'none'] = 'std'
  clip_low: float = 10.0
  clip_high: float = 10.0
  ratio: Literal['token', 'sequence'] = 'token'
  surrogate: Literal['clip', 'cispo'] = 'clip'
  beta: float = 0.001
  kl_form: Literal['k3', 'unbiased'] = 'k3'
  refresh: int = 400
  off_policy: float = 0.0
  old: Literal['train', 'rollout'] = 'train'
  correct: Literal['none', 'truncate', 'mask'] = 'none'
  correct_limit: float = 2.0
  replay: Literal['compare', 'none', 'train', 'rollout'] = 'compare'
  dynamic: int = 0
  truncated: Literal['keep', 'drop'] = 'keep'
  overlong: int = 0
  heldout: int = 256
  teachers: tuple = ()

  def _rules(self):
    self._positive('prompts', 'samples', 'minibatches', 'max_new', 'heldout')
    self._require(
      'samples',
      self.samples > 1 or self.scale == 'none',
      f'scale={self.scale!r} needs at least 2 answers to a question',
    )
    check_divides('minibatches', self.minibatches, 'prompts', self.prompts)
    self._require(
      'rows',
      self.rows % self.samples == 0,
      f'must be a multiple of samples={self.samples}, or 0 for all',
    )
    self._require(
      'temperature',
      self.temperature > 0,
      'must be above 0: greedy answers to a question are all alike',
    )
    self._require(
      'teachers',
      all(map(_is_teacher, self.teachers)) and _most(self.teachers) < 1 + 1e-6,
      'must be (folder, weight) or (folder, weight, kind), such as '
      "(('runs/r1', 1.0),); weights are above 0 and at most 1 in all",
    )
    self._require('clip_high', self.clip_high > 0, 'must be above 0')
    self._require('correct_limit', self.correct_limit >= 1, 'must be 1 or more')
    self._require(
      'overlong',
      self.overlong < self.max_new,
      f'must be less than max_new={self.max_new}',
    )


def _is_teacher(teacher: object) -> bool:
  """Whether an object is a folder, a weight and perhaps a kind."""
  row = is_row(teacher, str, float) or is_row(teacher, str, float, str)
  return row and 0 < teacher[1] <= 1


def _most(teachers: tuple) -> float:
  """Returns the largest sum of weights that the teachers of a question have."""
  kinds = {teacher[2:] for teacher in teachers}
  of = lambda kind: (t[1] for t in teachers if t[2:] in ((), kind))
  return max((sum(of(kind)) for kind in kinds), default=0.0)
