"""Which tiles a tensor takes in each product, by precision.

fp8_block is DeepSeek's: 1x128 tiles of activations and gradients along the
axis summed over, 128x128 blocks of weights (V3 section 3.3.2). fp8_channel
has one scale for each row of the sum, fp8_tensor one in all; both suit XLA's
own FP8 dot, and a row or a tensor must then share its outliers.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from mla_moe.config import ConfigError
from mla_moe.fp8 import gemm
from mla_moe.fp8 import quantize as q8
from mla_moe.fp8.quantize import TILE, WHOLE, Quantized
from mla_moe.types import Array, Float


@dataclasses.dataclass(frozen=True)
class Recipe:
  """How a layer is computed; hashable, as a static argument must be."""

  precision: str = 'fp8_block'
  impl: str = 'auto'
  scales: str = 'pow2'
  keep: str = 'fp8'

  def __post_init__(self):
    choices = {
      'precision': gemm.PRECISIONS,
      'impl': gemm.IMPLS,
      'scales': ('pow2', 'float32'),
      'keep': ('fp8', 'input'),
    }
    for name, known in choices.items():
      if getattr(self, name) not in known:
        raise ConfigError(
          f'{name}={getattr(self, name)!r}: must be one of {", ".join(known)}'
        )
    if self.impl == 'mxfp8' and self.scales != 'pow2':
      raise ConfigError(
        f"impl='mxfp8' needs scales='pow2', not {self.scales!r}"
      )
    blocks = self.precision == 'fp8_block'
    if self.impl in gemm.BLOCKED and not blocks:
      raise ConfigError(
        f"impl={self.impl!r} multiplies tiles: it needs precision='fp8_block', "
        f'not {self.precision!r}'
      )
    if self.impl == 'native' and blocks:
      raise ConfigError(
        "impl='native' has one scale along the sum: it needs precision="
        "'fp8_channel' or 'fp8_tensor', not 'fp8_block'"
      )

  def resolved(self) -> Recipe:
    """With 'auto' replaced by what the first device can do."""
    if self.impl != 'auto':
      return self
    impl, _ = gemm.choose(self.precision, 'auto', self.scales)
    return dataclasses.replace(self, impl=impl)

  def rows(self, x: Array, own: int) -> Quantized:
    """`x` for a sum over its last `own` axes; in tiles of 1x128."""
    tiles = (WHOLE,) * own
    if self.precision == 'fp8_block':
      tiles = (TILE,)
    elif self.precision == 'fp8_tensor':
      tiles = (WHOLE,) * x.ndim
    return q8.quantize(x, tiles, self.scales)

  def columns(self, x: Array | Quantized, own: int) -> Quantized:
    """`x` for a sum over all axes but its last `own`; in tiles of 128x1."""
    tiles = (WHOLE,) * (x.ndim - own) + (1,) * own
    if self.precision == 'fp8_block':
      tiles = (TILE,) + (1,) * own
    elif self.precision == 'fp8_tensor':
      tiles = (WHOLE,) * x.ndim
    if not isinstance(x, Quantized):
      return q8.quantize(x, tiles, self.scales)
    # One tile for everything is the same tile whichever axis is summed.
    return x if self.precision == 'fp8_tensor' else q8.retile(x, tiles)

  def weights(self, w: Array, lead: int = 0) -> tuple[Quantized, ...]:
    """`w` of [lead axes, K, ..., N]: for the sum over K, then over the rest.

    One of the two where it serves both.
    """
    between = w.ndim - lead - 2
    quantized = lambda tiles: q8.quantize(w, tiles, self.scales)
    if self.precision == 'fp8_block':
      return (quantized((TILE, *(1,) * between, TILE)),)
    if self.precision == 'fp8_tensor':
      return (quantized((WHOLE,) * (w.ndim - lead)),)
    over = (WHOLE,) + (1,) * (between + 1)
    rest = (1,) + (WHOLE,) * (between + 1)
    return quantized(over), quantized(rest)


@dataclasses.dataclass(frozen=True)
class Rounding:
  """FP8 operands for a loop that multiplies in a wider dtype itself.

  Each method returns its argument as quantisation leaves it, in its dtype;
  'bf16' returns the argument. Whatever has one scale in all ('fp8_tensor') has
  one for what is handed in, a block of rows.
  """

  recipe: Recipe

  def _wide(self, x: Array, quantized) -> Array:
    if self.recipe.precision == 'bf16':
      return x
    return q8.dequantize(quantized(), x.dtype)

  def rows(self, x: Float[Array, '... K'], own: int = 1) -> Array:
    """For a sum over the last `own` axes."""
    return self._wide(x, lambda: self.recipe.rows(x, own))

  def columns(
    self, x: Float[Array, 'R ...'], own: int = 1, valid: Array | None = None
  ) -> Array:
    """For a sum over the rows; those that are not `valid` become zeros."""
    if valid is not None and self.recipe.precision != 'bf16':
      x = jnp.where(valid.reshape(-1, *(1,) * (x.ndim - 1)), x, 0)
    return self._wide(x, lambda: self.recipe.columns(x, own))
