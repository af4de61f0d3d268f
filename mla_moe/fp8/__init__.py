"""FP8 training: quantised operands for all three products of a linear layer.

from mla_moe import fp8

y = fp8.dot(x, w, precision='fp8_block')
y = fp8.ragged_dot(rows, w, group_sizes, precision='fp8_block')
nn.Dense(width, dot_general=fp8.DotGeneral('fp8_block'))

`quantize` makes FP8 arrays, `recipe` says which tiles they take, `gemm` and
`grouped` multiply them, `linear` makes layers with gradients of that.
"""

from __future__ import annotations

from mla_moe.fp8.gemm import choose as choose
from mla_moe.fp8.gemm import collect_fallbacks as collect_fallbacks
from mla_moe.fp8.linear import SAVED as SAVED
from mla_moe.fp8.linear import DotGeneral as DotGeneral
from mla_moe.fp8.linear import OwnWeight as OwnWeight
from mla_moe.fp8.linear import Weight as Weight
from mla_moe.fp8.linear import dot as dot
from mla_moe.fp8.linear import dots as dots
from mla_moe.fp8.linear import ragged_dot as ragged_dot
from mla_moe.fp8.quantize import Quantized as Quantized
from mla_moe.fp8.quantize import dequantize as dequantize
from mla_moe.fp8.quantize import retile as retile
from mla_moe.fp8.recipe import Recipe as Recipe
from mla_moe.fp8.recipe import Rounding as Rounding
