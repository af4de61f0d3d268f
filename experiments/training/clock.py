"""The clock of the loop: tokens per second without compilation and chores."""

from __future__ import annotations

import contextlib
import time


class Clock:
  """Tokens and seconds between logged steps.

  It runs from the end of the first step, which compiles.
  """

  def __init__(self):
    self._began, self._tokens, self.running = 0.0, 0, False

  def add(self, tokens: int, metrics: dict) -> None:
    """Counts a step's tokens; the first step is waited for instead."""
    import jax

    if self.running:
      self._tokens += tokens
    else:
      jax.block_until_ready(metrics)
      self._began, self.running = time.perf_counter(), True

  def lap(self) -> tuple[float, int]:
    """Returns (seconds, tokens) since the last lap; (0, 0) without a step."""
    now = time.perf_counter()
    seconds, tokens = now - self._began, self._tokens
    self._began, self._tokens = now, 0
    return (seconds if tokens else 0.0), tokens

  def pause(self, seconds: float) -> None:
    """Leaves this time out of the lap."""
    self._began += seconds

  @contextlib.contextmanager
  def paused(self):
    """Leaves the time of a `with` block out of the lap."""
    began = time.perf_counter()
    yield
    self.pause(time.perf_counter() - began)
