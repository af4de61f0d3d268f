"""The shape letters and types that every signature of the package uses.

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
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING or 'jaxtyping' in sys.modules:
  import jax
  from jaxtyping import Bool, Float, Int, PyTree

  Array = jax.Array | np.ndarray
else:
  Array = Bool = Float = Int = PyTree = object

__all__ = ['Array', 'Batch', 'Bool', 'Float', 'Int', 'PyTree']


class Batch(NamedTuple):
  """The rows of one step as numpy arrays, in n micro-batches.

  tokens: [n, B, T] int32. targets: [n, B, T] int32, the next tokens; -1 where
  none is predicted. segments: [n, B, T] int32, the number of a token's document
  in its row. positions: [n, B, T] int32, within the segment. With packing
  'joined' a row is one segment. count: int32, the number of real micro-batches;
  they come first, the others are padding.
  """

  tokens: np.ndarray
  targets: np.ndarray
  segments: np.ndarray
  positions: np.ndarray
  count: np.ndarray
