"""The numbers of the loop around the training step; the step reads none."""

from __future__ import annotations

import dataclasses

from mla_moe.checked import Checked


@dataclasses.dataclass(frozen=True)
class RunConfig(Checked):
  """The loop: its length, and the steps between logs, checkpoints, evaluations.

  An interval of 0 means never. Three kinds of checkpoints are kept: the newest
  `keep`, those of steps that `keep_every` divides, and the `keep_best` with the
  lowest held-out bits per byte. Every `check_every` steps the state's
  fingerprints are recorded, and replicas compared. A step that takes
  `step_timeout` seconds ends the run. Every `health_every` steps the error of
  the FP8 products is measured, where the model has any.

  After `max_skips` skipped steps in a row the run stops. After `spike_patience`
  spikes in a row it rolls back to the checkpoint before the first and continues
  with the text `spike_jump` batches later (PaLM, section 5.1), at most
  `max_rollbacks` times. `base` is the folder of the release that the model's
  adapters (`model.lora`) are trained over.
  """

  steps: int = 243425
  seed: int = 0
  log_every: int = 10
  eval_every: int = 1000
  eval_batches: int = 16
  sample_every: int = 1000
  health_every: int = 100
  save_every: int = 1000
  keep: int = 3
  keep_every: int = 0
  keep_best: int = 0
  check_every: int = 100
  step_timeout: float = 1800.0
  max_skips: int = 5
  spike_patience: int = 3
  spike_jump: int = 200
  max_rollbacks: int = 3
  base: str = ''

  def _rules(self):
    self._positive('steps', 'log_every', 'eval_batches', 'keep')
    self._positive('max_skips', 'spike_patience')
