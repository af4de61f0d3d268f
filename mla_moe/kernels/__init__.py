"""Pallas kernels, each beside the same product in plain JAX."""

import numpy as np

# The logit of a key that a query must not see, in every attention. It is
# finite, so that a query that sees no key is not NaN in either direction.
MASKED = -0.7 * float(np.finfo(np.float32).max)
