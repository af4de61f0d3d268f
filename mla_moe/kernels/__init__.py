"""Pallas kernels; their oracles are beside the tests, or in `bench card`."""

from typing import Any

import numpy as np

# The logit of a key that a query must not see, in every attention. It is
# finite, so that a query that sees no key is not NaN in either direction.
MASKED = -0.7 * float(np.finfo(np.float32).max)


def cuda_capability(device: Any) -> float:
  """Returns an NVIDIA GPU's compute capability, such as 9.0, else 0.

  An AMD GPU's is a name, such as gfx942.
  """
  text = str(getattr(device, 'compute_capability', ''))
  return float(text) if text.replace('.', '', 1).isdigit() else 0.0
