"""The shape letters and array types that every signature of the package uses.

One letter means one thing everywhere: in einsum strings (lower case), in
signatures (`Float[Array, 'B T D']`) and in the comments.

  B batch        T query tokens    S key tokens     M tokens flattened (B*T)
  D model width  V vocabulary      L layers         F expert hidden
  E experts      G expert groups   K experts/token  A assignments (M*K)
  N heads        Q query rank      C latent kv rank
  H nope head dim                  R rope head dim  U value head dim

Annotations are strings (every module has `from __future__ import annotations`).
Production never evaluates them; pytest does, through jaxtyping's import hook.
So jaxtyping is a dependency of the tests alone.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING or 'jaxtyping' in sys.modules:
  import jax
  import numpy as np
  from jaxtyping import Bool, Float, Int, PyTree

  Array = jax.Array | np.ndarray
else:
  Array = Bool = Float = Int = PyTree = object

__all__ = ['Array', 'Bool', 'Float', 'Int', 'PyTree']
