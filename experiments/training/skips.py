"""What the loop does about skipped steps: go on, go back, or give up.

A single bad step was skipped inside the compiled step and costs nothing. Some
in a row say that something is wrong: with the state, if losses are not finite,
and then a person should look; with the text, if they are spikes, and then what
PaLM did helps (Chowdhery et al. 2022, section 5.1): start again from before
the spike and leave that text out. It wasn't the text alone, they found, nor the
state alone, but the two together.
"""

from __future__ import annotations

import dataclasses

from mla_moe.config import RunConfig

REASONS = {1: 'its loss or gradient is not finite', 2: 'its loss is a spike'}


@dataclasses.dataclass
class Guard:
  """Counts of one run; saved with every checkpoint, as JSON."""

  streak: int = 0  # steps skipped in a row
  spikes: int = 0  # of which spikes
  rollbacks: int = 0
  passed: int = 0  # sequences of text left out

  def saw(self, skipped: int, run: RunConfig) -> str:
    """What to do after a step: '' go on, 'back', or why to 'stop'."""
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

  def went_back(self, passed: int) -> Guard:
    """The guard after a return that leaves `passed` sequences out."""
    return Guard(rollbacks=self.rollbacks + 1, passed=passed)
