"""Groups: a question, the G answers to it, and their rewards and advantages.

R1 compares the answers to one question with each other alone: an advantage is a
reward less the mean of its group (`advantages`). So a group is the least that
an update may be given, and a group whose rewards are all equal teaches nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mla_moe.config import RLConfig

from . import advantages, episodes, grading, questions, rollouts


class Group(NamedTuple):
  """A question, and its G answers with all that an update needs."""

  question: questions.Question
  prompt: np.ndarray
  answers: list[episodes.Answer]
  texts: list[str]
  rewards: np.ndarray
  parts: list[dict]
  ended: np.ndarray


def grouped(
  rl: RLConfig,
  items: Sequence[questions.Question],
  ids: Sequence[np.ndarray],
  drawn: rollouts.Drawn,
  texts: Sequence[str],
  graded: Sequence[grading.Graded],
) -> list[Group]:
  """Returns the groups with their advantages; token weights come later.

  Args:
    rl: the config's.
    items: Q questions.
    ids: the tokens of their prompts.
    drawn: Q G answers, the G of a question side by side.
    texts: of the answers.
    graded: of the answers.
  """
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


def rightness(parts: dict, reward: float) -> float:
  """Returns the reward that says whether an answer is right."""
  for name in ('accuracy', 'code'):
    if name in parts:
      return parts[name]
  return reward


def summary(groups: list[Group]) -> dict:
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
          rightness(part, reward)
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


def shown(group: Group) -> dict:
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
