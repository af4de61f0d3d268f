"""The numbers of a model's use: its latent cache, the layout of its release."""

from __future__ import annotations

import dataclasses
from typing import Literal

from mla_moe.checked import Checked


@dataclasses.dataclass(frozen=True)
class CacheConfig(Checked):
  """The latent cache of decoding: its dtype, and the tokens in a page.

  'auto' is float32 on a CPU and bfloat16 elsewhere; 'int8' and 'float8' (E4M3)
  have a scale for each 128 numbers and keep the shared key in bfloat16. `impl`
  is the attention that reads the cache one token at a time: 'xla' anywhere, or
  the kernels 'tpu' (which 'auto' takes on a TPU) and 'gpu', which read
  unquantised latents. With `routes` the experts of each token lie beside its
  latents, 2 K bytes in each MoE layer.
  """

  dtype: Literal['auto', 'float32', 'bfloat16', 'int8', 'float8'] = 'auto'
  page: int = 128
  impl: Literal['auto', 'xla', 'tpu', 'gpu'] = 'auto'
  routes: bool = False

  def _rules(self):
    self._positive('page')
    self._require(
      'impl',
      self.impl in ('auto', 'xla') or self.dtype not in ('int8', 'float8'),
      f"the kernels read no {self.dtype} latents; use 'xla'",
    )
    self._require(
      'page',
      self.impl != 'tpu' or self.page % 128 == 0,
      "impl='tpu' reads pages of multiples of 128",
    )


@dataclasses.dataclass(frozen=True)
class ReleaseConfig(Checked):
  """The layout of a model's Hugging Face folder; it changes no number.

  `family` is that of its words (`hf.dialects`); '' is DeepSeek's, or another
  that computes the model. Rotated features are neighbours ('pairs') or the two
  halves. Experts have tensors of their own ('single') or one for all ('fused').
  """

  family: str = ''
  rotary: Literal['pairs', 'halves'] = 'pairs'
  experts: Literal['single', 'fused'] = 'single'
