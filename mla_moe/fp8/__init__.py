"""FP8 training: quantised operands for all three products of a linear layer.

from mla_moe import fp8

y = fp8.dot(x, w, precision='fp8_block')
y = fp8.ragged_dot(rows, w, group_sizes, precision='fp8_block')
nn.Dense(width, dot_general=fp8.DotGeneral('fp8_block'))

`quantize` makes FP8 arrays, `recipe` says which tiles they take, `gemm` and
`grouped` multiply them, `linear` makes layers with gradients of that.
"""

from __future__ import annotations

from mla_moe.fp8.gemm import choose, collect_fallbacks
from mla_moe.fp8.linear import (
  SAVED,
  DotGeneral,
  Weight,
  dot,
  dots,
  prepare,
  ragged_dot,
)
from mla_moe.fp8.quantize import Quantized, dequantize, retile
from mla_moe.fp8.recipe import Recipe, Rounding

__all__ = [
  'SAVED',
  'DotGeneral',
  'Quantized',
  'Recipe',
  'Rounding',
  'Weight',
  'choose',
  'collect_fallbacks',
  'dequantize',
  'dot',
  'dots',
  'prepare',
  'ragged_dot',
  'retile',
]
