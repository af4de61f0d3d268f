"""The numbers of a model's use: cache, adapters, layout of its release."""

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


LORA_GROUPS = ('attention', 'mlp', 'experts')


@dataclasses.dataclass(frozen=True)
class LoRAConfig(Checked):
  """Adapters of rank `rank` over a frozen base (docs/lora.md); 0: none.

  B is multiplied by alpha / rank, or by alpha / sqrt(rank) under `scale='root'`
  (rsLoRA). B moves at `plus` times the rate of A (LoRA+). `targets` are groups
  of matrices (LORA_GROUPS: dense and shared MLPs are 'mlp'), or names of a
  release, such as 'q_b_proj' or 'o_proj'. `experts` have adapters of their own
  ('each') or one for all ('shared').
  """

  rank: int = 0
  alpha: float = 32.0
  scale: Literal['rank', 'root'] = 'rank'
  plus: float = 1.0
  targets: tuple = LORA_GROUPS
  experts: Literal['each', 'shared'] = 'each'

  def _rules(self):
    for name in ('alpha', 'plus'):
      self._require(name, getattr(self, name) > 0, 'must be above 0')
    self._require('targets', len(self.targets) > 0, 'names no matrix')


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
