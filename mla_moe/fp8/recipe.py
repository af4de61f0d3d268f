"""Which tiles a tensor takes in each product, by precision.

fp8_block is DeepSeek's: 1x128 tiles of activations and gradients along the
axis summed over, 128x128 blocks of weights (V3 section 3.3.2). fp8_channel has
one scale for each row that is summed, fp8_tensor one for the whole array. Both
suit XLA's own FP8 dot. Their outliers cost more: one coarsens its whole row, or
the whole array.

A tensor of tokens is quantised twice in training, since two products sum over
different axes of it: over its features (`rows`: y and dx) and over its tokens
(`columns`: dw).
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from mla_moe.config import FP8_IMPLS, ConfigError
from mla_moe.fp8 import gemm
from mla_moe.fp8 import quantize as q8
from mla_moe.fp8.quantize import TILE, WHOLE, Quantized
from mla_moe.types import Array, Bool, Float


@dataclasses.dataclass(frozen=True)
class Recipe:
  """A layer's precision and implementation; a static argument of its products.

  Raises:
    ConfigError: an unknown precision, or an `impl` that does not compute it.
  """

  precision: str = 'fp8_block'
  impl: str = 'auto'

  def __post_init__(self):
    if self.precision not in FP8_IMPLS:
      raise ConfigError(
        f'precision={self.precision!r}: must be one of {", ".join(FP8_IMPLS)}'
      )
    fitting = ('auto', *FP8_IMPLS[self.precision])
    if self.impl not in fitting:
      raise ConfigError(
        f'impl={self.impl!r}: precision={self.precision!r} needs one of '
        f'{", ".join(fitting)}'
      )

  def resolved(self) -> Recipe:
    """Returns the recipe with the first device's implementation for 'auto'."""
    if self.impl != 'auto' or self.precision == 'bf16':
      return self
    impl, _ = gemm.choose(self.precision)
    return dataclasses.replace(self, impl=impl)

  def rows(self, x: Float[Array, '*axes'], features: int = 1) -> Quantized:
    """Returns `x` for a sum over its last `features` axes; blocks are 1x128."""
    tiles = {
      'fp8_block': (TILE,),
      'fp8_channel': (WHOLE,) * features,
      'fp8_tensor': (WHOLE,) * x.ndim,
    }
    return q8.quantize(x, tiles[self.precision])

  def columns(
    self, x: Float[Array, '*axes'] | Quantized, features: int = 1
  ) -> Quantized:
    """`x` for a sum over all axes but its last `features`; blocks are 128x1.

    If `x` is quantised already, it is tiled again.
    """
    tiles = {
      'fp8_block': (TILE,) + (1,) * features,
      'fp8_channel': (WHOLE,) * (x.ndim - features) + (1,) * features,
      'fp8_tensor': (WHOLE,) * x.ndim,
    }
    if not isinstance(x, Quantized):
      return q8.quantize(x, tiles[self.precision])
    # One tile for everything is the same tile whichever axis is summed.
    same = self.precision == 'fp8_tensor'
    return x if same else q8.retile(x, tiles[self.precision])

  def weights(
    self, w: Float[Array, '*axes'], lead: int = 0, shards: tuple = ()
  ) -> tuple[Quantized, ...]:
    """Returns the FP8 copies of `w` [lead axes, K, ..., N]: one, or two.

    The first is for the sum over K (y), the last for the sum over the axes
    after K (dx). One copy serves both where its tiles are square or whole.
    `lead` axes index weights (layers, experts).
    """
    between = w.ndim - lead - 2
    if self.precision == 'fp8_block':
      return (q8.quantize(w, (TILE, *(1,) * between, TILE), shards),)
    if self.precision == 'fp8_tensor':
      return (q8.quantize(w, (WHOLE,) * (w.ndim - lead)),)
    forward = (WHOLE,) + (1,) * (between + 1)
    backward = (1,) + (WHOLE,) * (between + 1)
    return q8.quantize(w, forward), q8.quantize(w, backward)


@dataclasses.dataclass(frozen=True)
class Rounding:
  """Quantises and dequantises, for a loop that multiplies in a wider dtype.

  Both methods return FP8's values in the argument's dtype, and the argument
  itself if the precision is 'bf16'. fp8_tensor takes one scale per call (a
  block of rows), not per array.
  """

  recipe: Recipe

  def rows(
    self, x: Float[Array, '*axes'], features: int = 1
  ) -> Float[Array, '*axes']:
    """`x` rounded for a sum over the last `features` axes."""
    if self.recipe.precision == 'bf16':
      return x
    return q8.dequantize(self.recipe.rows(x, features), x.dtype)

  def columns(
    self,
    x: Float[Array, '*axes'],
    features: int = 1,
    valid: Bool[Array, ' rows'] | None = None,
  ) -> Float[Array, '*axes']:
    """`x` rounded for a sum over the rows; rows not `valid` become zeros."""
    if self.recipe.precision == 'bf16':
      return x
    if valid is not None:
      x = jnp.where(valid.reshape(-1, *(1,) * (x.ndim - 1)), x, 0)
    return q8.dequantize(self.recipe.columns(x, features), x.dtype)
