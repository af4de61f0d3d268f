"""Numbers of the experts' health in the row of a logged step.

MaxVio of a layer is (busiest expert's load - mean load) / mean load (Wang et
al. 2024, equation 4): 0 is perfect balance. A single batch is noisy, so MaxVio
of a running mean of loads stands beside it.
"""

from __future__ import annotations

import numpy as np

_MEMORY = 0.95


def max_violation(load: np.ndarray) -> np.ndarray:
  """Returns MaxVio [L] of loads [L, E]; 0 where a layer had no tokens."""
  load = np.asarray(load, np.float64)
  mean = load.mean(-1)
  return np.where(mean > 0, load.max(-1) / np.maximum(mean, 1e-9) - 1, 0.0)


def running_load(before: np.ndarray | None, load: np.ndarray) -> np.ndarray:
  """Returns the exponential mean of loads [L, E]; the first load as it is."""
  load = np.asarray(load, np.float64)
  if before is None:
    return load
  return _MEMORY * before + (1 - _MEMORY) * load


def health(load: np.ndarray, running: np.ndarray) -> dict:
  """Returns lists by layer, and their means, of one step's loads [L, E]."""
  load = np.asarray(load)
  if not load.size:
    return {}
  batch, smooth = max_violation(load), max_violation(running)
  return {
    'max_vio': float(batch.mean()),
    'max_vio_running': float(smooth.mean()),
    'max_vio_layers': np.round(batch, 4).tolist(),
    'max_vio_running_layers': np.round(smooth, 4).tolist(),
    'dead_experts': int((load == 0).sum()),
  }
