"""Multi-token prediction: module k (from 1) predicts token i + k + 1 at i.

Each module joins the hidden state of the module before with the embedding of
the token i + k, which that one predicts, and runs a block of its own (V3
section 2.2). Two things differ from the paper's equations, because the released
weights need it: the embedding comes first in the concatenation, and the first
module takes the main model's hidden state after the final norm. From module to
module the block's output goes without a norm.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import linen as nn

from mla_moe.config import ModelConfig
from mla_moe.model import block, layers, rope, weights
from mla_moe.types import Array, Float, Int


class MTP(nn.Module):
  """One prediction module; embedding and head are the main model's."""

  config: ModelConfig
  functions: block.Functions = block.Functions()

  @nn.compact
  def __call__(
    self,
    hidden: Float[Array, 'B T D'],
    embedded: Float[Array, 'B T D'],
    angles: rope.Angles,
    segments: Int[Array, 'B T'] | None,
    mask: Float[Array, 'B T'] | None,
  ) -> tuple[Float[Array, 'B T D'], Float[Array, 'B T D'], block.Reports]:
    """Returns the next module's input, its norm for the head, and reports."""
    c = self.config
    norm = lambda name: layers.RMSNorm(c.norm_eps, name=name)
    pair = [norm('embed_norm')(embedded), norm('hidden_norm')(hidden)]
    axes = ('embed', None)
    w_join = weights.param(self, 'w_join', (2 * c.dim, c.dim), axes, c.init_std)
    x = jnp.concatenate(pair, axis=-1)
    x = jnp.einsum('btd,de->bte', x, w_join.astype(x.dtype))
    args = c, c.moe_layers > 0, self.functions
    (x, _), reports = block.remat_block(c)(*args, name='block')(
      (x, None), angles, segments, mask
    )
    return x, norm('final_norm')(x), reports
