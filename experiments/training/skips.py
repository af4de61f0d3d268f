"""Skipped steps: whether the run goes on, goes back or stops.

A single bad step costs nothing: the compiled step rejects its update. Several
in a row mean that something is wrong. If their losses are not finite, it is
the state, and a person should look. If their losses are spikes, this text and
this state do not go together, though each may be sound (Chowdhery et al. 2022,
section 5.1). Then the run does what PaLM's did: it restarts from a checkpoint
before the spikes and leaves their text out.
"""

from __future__ import annotations

import dataclasses

from mla_moe.config import RunConfig

REASONS = {1: 'its loss or gradient is not finite', 2: 'its loss is a spike'}


@dataclasses.dataclass
class Counts:
  """The skipped steps of one run; each checkpoint holds them, as JSON."""

  streak: int = 0  # steps skipped in a row
  spikes: int = 0  # spikes among them
  rollbacks: int = 0
  left_out: int = 0  # sequences of text that are skipped after rollbacks

  def add(self, skipped: int, run: RunConfig) -> str:
    """Counts a step, by its metric `skipped`.

    Returns '' if the run goes on, 'back' if it must go back, or the reason why
    it must stop.
    """
    if not skipped:
      self.streak = self.spikes = 0
      return ''
    self.streak += 1
    self.spikes += skipped == 2
    if self.spikes >= run.spike_patience:
      if self.rollbacks < run.max_rollbacks:
        return 'back'
      return (
        f'{self.spikes} spikes in a row, after {self.rollbacks} returns '
        '(config.run.max_rollbacks)'
      )
    if self.streak >= run.max_skips:
      return f'{self.streak} steps in a row were skipped (config.run.max_skips)'
    return ''

  def after_rollback(self, left_out: int) -> Counts:
    """Returns the counts of a run that has gone back once more."""
    return Counts(rollbacks=self.rollbacks + 1, left_out=left_out)


def read(facts: dict) -> Counts:
  """Returns the counts among a checkpoint's facts, also by older names."""
  counts = dict(facts.get('counts', facts.get('guard', {})))
  if 'passed' in counts:
    counts['left_out'] = counts.pop('passed')
  return Counts(**counts)
